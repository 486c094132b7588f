"""Chapter 6: multi-query attention from its matrices, and multi-head as multi-query with one wide head."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from attnlab.attention import causal_mask, scaled_dot_product_attention
from attnlab.exercises._tools import Mistake, call, compare, parts, tensor


def multi_query(answer: Any) -> str:
    """6.1: ``f(x, w_q, w_k, w_v, w_o, n_heads)`` is causal multi-query self-attention; x (B, T, d)."""
    for seed, (B, T, d, n_heads, D) in enumerate([(2, 5, 24, 4, 6), (1, 6, 24, 3, 8)]):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(B, T, d, generator=g)
        w_q, w_k, w_v, w_o = (
            torch.randn(rows, columns, generator=g) * columns**-0.5
            for rows, columns in ((n_heads * D, d), (D, d), (D, d), (d, n_heads * D))
        )
        given = x, w_q, w_k, w_v, w_o, n_heads
        compare(call(answer, *given), _multi_query(*given), _multi_query_mistakes(*given), what="the output")
    return "right: every head asks its own question, and all read the same key and the same value of a token."


def _multi_query(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int,
    *, cut: str = "B T (H D) -> B H T D", join: str = "B H T D -> B T (H D)", causal: bool = True,
    scale: float | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q = rearrange(x @ w_q.T, cut, H=n_heads)
    k, v = ((x @ w.T)[:, None] for w in (w_k, w_v))
    return rearrange(scaled_dot_product_attention(q, k, v, mask, scale, causal=causal), join) @ w_o.T


def _multi_query_mistakes(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int
) -> dict[str, Tensor]:
    def wrong(**how) -> Tensor:
        return _multi_query(x, w_q, w_k, w_v, w_o, n_heads, **how)

    B, T, d = x.shape
    D = w_k.shape[0]
    first = w_q[:D].repeat(n_heads, 1)
    viewed = (x @ w_q.T).reshape(B, n_heads, T, D)
    mixed = scaled_dot_product_attention(viewed, (x @ w_k.T)[:, None], (x @ w_v.T)[:, None], causal=True)
    one = torch.eye(n_heads * D)
    return {
        "The mask is missing: a token must not see those after it.": wrong(causal=False),
        "The mask hides the token itself as well: only what comes after it is hidden.":
            wrong(causal=False, mask=causal_mask(T) & ~torch.eye(T, dtype=torch.bool)),
        "The mask is the wrong way round: it hides the past and shows the future.": wrong(causal=False, mask=causal_mask(T).T),
        "All heads ask the same question: keys and values are shared, the queries are not.":
            _multi_query(x, first, w_k, w_v, w_o, n_heads),
        "The queries are averaged over the heads: every head keeps its own.":
            _multi_query(x, w_q.view(n_heads, D, d).mean(0).repeat(n_heads, 1), w_k, w_v, w_o, n_heads),
        "Tokens and heads are mixed where you cut the queries: make (B, T, H, D) of them first, then swap T and H.":
            rearrange(mixed, "B H T D -> B T (H D)") @ w_o.T,
        "A query head's numbers are every H-th; they should be D neighbours: the rows of w_q are H blocks of D.":
            wrong(cut="B T (D H) -> B H T D"),
        "The heads are put together wrongly: swap H and T back before they become one vector.":
            scaled_dot_product_attention(
                rearrange(x @ w_q.T, "B T (H D) -> B H T D", H=n_heads), (x @ w_k.T)[:, None], (x @ w_v.T)[:, None],
                causal=True,
            ).reshape(B, T, -1) @ w_o.T,
        "The heads are put together as D blocks of H; w_o wants H blocks of D.": wrong(join="B H T D -> B T (D H)"),
        "The scores are divided by √d_model; the vectors in the dot product have the head's size.": wrong(scale=d**-0.5),
        "The scores are not scaled: divide by the root of the head's size.": wrong(scale=1.0),
        "The head's size is divided by in full; the root is missing.": wrong(scale=1 / D),
        "Keys and values are swapped.": _multi_query(x, w_q, w_v, w_k, w_o, n_heads),
        "W_O is missing: the heads stand side by side, and nothing mixes them.":
            _multi_query(x, w_q, w_k, w_v, one, n_heads),
    }  # fmt: skip


def one_wide_head(answer: Any) -> str:
    """6.2: ``f(w_q, w_k, w_v, w_o, n_heads)`` gives a multi-query layer of head_dim d that does what multi-head does."""
    what = "W_Q, W_K, W_V and W_O"
    for seed, (d, n_heads) in enumerate([(12, 3), (16, 4)]):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 5, d, generator=g)
        narrow = [torch.randn(d, d, generator=g) * d**-0.5 for _ in range(4)]
        got = parts(call(answer, *narrow, n_heads), 4, what)
        wide = [tensor(w, name).float() for w, name in zip(got, ("W_Q", "W_K", "W_V", "W_O"), strict=True)]
        sizes = [(n_heads * d, d), (d, d), (d, d), (d, n_heads * d)]
        for w, size, name in zip(wide, sizes, ("W_Q", "W_K", "W_V", "W_O"), strict=True):
            if tuple(w.shape) != size:
                raise Mistake(f"The shape of {name} should be {size}; got {tuple(w.shape)}.")
        output = _multi_query(x, *wide, n_heads)
        compare(
            output, _multi_head(x, *narrow, n_heads), _wide_mistakes(x, *narrow, n_heads), what="the layer's output"
        )
    return "right: one head of H·D numbers holds all keys side by side, and each query reads its own part."


def _multi_head(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int, scale: float | None = None
) -> Tensor:
    q, k, v = (rearrange(x @ w.T, "B T (H D) -> B H T D", H=n_heads) for w in (w_q, w_k, w_v))
    out = scaled_dot_product_attention(q, k, v, scale=scale, causal=True)
    return rearrange(out, "B H T D -> B T (H D)") @ w_o.T


def _wide_mistakes(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> dict[str, Tensor]:
    d = x.shape[-1]
    D = d // n_heads
    whole_o = w_o.repeat(1, n_heads)  # every head's whole value goes through W_O

    def wide(
        right_part: bool = True, own_o: bool = True, factor: float = n_heads**0.5, keys_apart: bool = True
    ) -> Tensor:
        wide_q, wide_o = torch.zeros(n_heads * d, d), torch.zeros(d, n_heads * d)
        for h in range(n_heads):
            own = slice(h * D, (h + 1) * D)
            start = h * d + (h * D if right_part else 0)
            wide_q[start : start + D] = w_q[own] * factor
            if not keys_apart:
                wide_q[h * d : (h + 1) * d] = w_q * factor
            wide_o[:, start : start + D] = w_o[:, own]
        return _multi_query(x, wide_q, w_k, w_v, wide_o if own_o else whole_o, n_heads)

    root = "The layer divides the scores by √(H·D), not by √D: make up for it in W_Q."
    return {
        root: wide(factor=1.0),
        "The queries are multiplied by H; the roots differ by √H.": wide(factor=float(n_heads)),
        "W_Q makes up for the root the wrong way round: multiply by √H, don't divide.": wide(factor=n_heads**-0.5),
        "Every head reads the first D numbers of the wide key and value: head h's own part starts at h·D.":
            wide(right_part=False),
        f"Every head reads the first D numbers of the wide key and value, and the scale is not right either. {root}":
            wide(right_part=False, factor=1.0),
        "W_O takes all of every head's value: of head h only the part that was head h's value counts, the rest gets zeros.":
            wide(own_o=False),
        "All of W_Q is in every head, so that each compares all keys at once: outside head h's part there must be zeros.":
            wide(keys_apart=False),
    }  # fmt: skip


CHECKS = {"6.1": multi_query, "6.2": one_wide_head}
