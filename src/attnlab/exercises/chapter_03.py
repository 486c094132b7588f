"""Chapter 3: many heads from one matrix, and a control that a score has to beat."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from attnlab.attention import scaled_dot_product_attention
from attnlab.exercises._tools import call, compare, parts, tensor


def multi_head(answer: Any) -> str:
    """3.1: ``f(x, w_q, w_k, w_v, w_o, n_heads)`` is multi-head self-attention without a mask; x (B, T, d)."""
    for seed, (B, T, d, n_heads) in enumerate([(2, 5, 24, 4), (1, 6, 24, 3)]):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(B, T, d, generator=g)
        matrices = torch.randn(4, d, d, generator=g) * d**-0.5
        got = call(answer, x, *matrices, n_heads)
        compare(got, _multi_head(x, *matrices, n_heads), _multi_head_mistakes(x, *matrices, n_heads), what="the output")
    return "right: cut into heads, joined in the same order, mixed by W_O."


def _cut(x: Tensor, n_heads: int) -> Tensor:
    return rearrange(x, "B T (H D) -> B H T D", H=n_heads)


def _join(heads: Tensor) -> Tensor:
    return rearrange(heads, "B H T D -> B T (H D)")


def _multi_head(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int,
    *, cut: Callable = _cut, join: Callable = _join, scale: float | None = None,
) -> Tensor:  # fmt: skip
    q, k, v = (cut(x @ w.T, n_heads) for w in (w_q, w_k, w_v))
    return join(scaled_dot_product_attention(q, k, v, scale=scale)) @ w_o.T


def _multi_head_mistakes(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n: int) -> dict[str, Tensor]:
    def wrong(**how) -> Tensor:
        return _multi_head(x, w_q, w_k, w_v, w_o, n, **how)

    def viewed(y: Tensor, n_heads: int) -> Tensor:
        return y.reshape(y.shape[0], n_heads, y.shape[1], -1)

    def apart(y: Tensor, n_heads: int) -> Tensor:
        return rearrange(y, "B T (D H) -> B H T D", H=n_heads)

    def run_together(heads: Tensor) -> Tensor:
        return heads.reshape(heads.shape[0], heads.shape[2], -1)

    D, one = x.shape[-1] // n, torch.eye(x.shape[-1])
    cure = "(B, T, H·D) was reshaped straight to (B, H, T, D). Make it (B, T, H, D), then swap T and H."
    return {
        f"Tokens and heads are mixed, twice, cutting and joining: {cure}": wrong(cut=viewed, join=run_together),
        f"Tokens and heads are mixed where you cut: {cure}": wrong(cut=viewed),
        "The heads are put together wrongly: swap H and T back before they become one vector, (B, H, T, D) to (B, T, H, D).":
            wrong(join=run_together),
        "A head's numbers are every H-th; they should be D neighbours: the vector is H blocks of D, not D blocks of H.":
            wrong(cut=apart, join=lambda y: rearrange(y, "B H T D -> B T (D H)")),
        "The heads are put together as D blocks of H; they were cut as H blocks of D.":
            wrong(join=lambda y: rearrange(y, "B H T D -> B T (D H)")),
        "The scores are divided by √d_model; the vectors in the dot product have the head's size, d_model / n_heads.":
            wrong(scale=x.shape[-1] ** -0.5),
        "The scores are not scaled: divide by the root of the head's size.": wrong(scale=1.0),
        "That is one wide head: n_heads plays no part.": _multi_head(x, w_q, w_k, w_v, w_o, 1),
        "W_O is missing: the heads stand side by side, and nothing mixes them.": _multi_head(x, w_q, w_k, w_v, one, n),
        "The matrices are the wrong way round: they are (out, in), as nn.Linear keeps them, so x meets their transpose.":
            _multi_head(x, w_q.T, w_k.T, w_v.T, w_o.T, n),
        "The heads are averaged; they belong side by side, each in its own D places.":
            _multi_head(x, w_q, w_k, w_v, w_o, n, join=lambda y: y.mean(1).repeat(1, 1, n)),
        "The head's size is divided by in full; the root is missing.": wrong(scale=1 / D),
    }  # fmt: skip


PAIRS = [(2, 4), (6, 9), (1, 12), (14, 16), (19, 22), (18, 25), (17, 29), (33, 35), (31, 37)]  # (opener, closer)


def nested_control(answer: Any) -> str:
    """3.2: ``f(weights, pairs)`` of one head: mean weight on the own opener and on the last opener, where they differ."""
    what = "the score and the control"
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        weights = torch.rand(40, 40, generator=g)  # (T, S); sums don't matter here
        got = parts(call(answer, weights, list(PAIRS)), 2, what)
        got = torch.stack([tensor(one, name).squeeze() for one, name in zip(got, what.split(" and "), strict=True)])
        compare(got, _nested(weights), _nested_mistakes(weights), what=what, atol=1e-6)
    return "right: it counts only where a lazier head would look elsewhere."


def _nested(
    weights: Tensor, back: int = 1, nearest: Callable = max, only_nested: tuple[bool, bool] = (True, True)
) -> Tensor:
    """Score and control, (2,). ``nearest`` picks from the pairs inside; a pair with none has the last opener before it."""
    own, last = [], []
    for opener, closer in PAIRS:
        inside = [pair for pair in PAIRS if opener < pair[0] and pair[1] < closer]
        before = [pair for pair in PAIRS if pair[0] < opener]
        if inside or not only_nested[0]:
            own.append(weights[closer - back, opener])
        if inside or (not only_nested[1] and before):
            last.append(weights[closer - back, nearest(inside or before)[0]])
    return torch.stack([torch.stack(own).mean(), torch.stack(last).mean()])


def _nested_mistakes(weights: Tensor) -> dict[str, Tensor]:
    right = _nested(weights)
    n = sum(any(a < c and d < b for c, d in PAIRS) for a, b in PAIRS)
    where = "only those count that have a closed pair inside, where the two openers differ."
    return {
        f"Every pair is counted, twice; {where}": _nested(weights, only_nested=(False, False)),
        f"Every pair is counted for the score; {where}": _nested(weights, only_nested=(False, True)),
        "The query is the closer; it should be the token before it, which has to predict the closer.":
            _nested(weights, back=0),
        "Of several openers inside, the first is taken; the control is the last one seen before the query.":
            _nested(weights, nearest=min),
        "The control is the opener of the pair that closed last; it should be the opener that was seen last.":
            _nested(weights, nearest=lambda inside: max(inside, key=lambda pair: pair[1])),
        "The two are the wrong way round: first the own opener, then the control.": right.flip(0),
        "Query and key are swapped: weights[query, key].": _nested(weights.T),
        "That is a sum; a mean is asked for.": right * n,
    }  # fmt: skip


CHECKS = {"3.1": multi_head, "3.2": nested_control}
