"""Chapter 5: attending with a cache, and the batch at which arithmetic becomes the limit."""

import math
from typing import Any

import torch
from torch import Tensor

from attnlab import memory
from attnlab.exercises._tools import Mistake, call, compare, parts, tensor


def take_in(answer: Any) -> str:
    """5.1: ``f(k_kept, v_kept, q, k, v)`` gives the output and the keys and values to keep; kept (B, H, S, D), new T."""
    for seed, (S, T) in enumerate([(6, 1), (5, 3), (0, 4)]):
        g = torch.Generator().manual_seed(seed)
        kept = torch.randn(2, 2, 3, S, 8, generator=g)
        q, k, v = torch.randn(3, 2, 3, T, 8, generator=g)
        what = "the output, the keys and the values"
        out, keys, values = parts(call(answer, *kept, q, k, v), 3, what)
        for name, got, old, new in (("keys", keys, kept[0], k), ("values", values, kept[1], v)):
            wrong = {}
            if S:
                wrong = {
                    f"The {name} handed back are the old ones: what is new must be kept too.": old,
                    f"The {name} handed back are only the new ones: the old ones are lost.": new,
                    f"The new {name} stand before the old ones: append at the end, in order of position.":
                        torch.cat([new, old], dim=2),
                }  # fmt: skip
            compare(got, torch.cat([old, new], dim=2), wrong, what=f"the {name}", atol=1e-6)
        compare(out, _attend(*kept, q, k, v), _mistakes(*kept, q, k, v), what="the output")
    return "right: old before new, and the last query stands on the last key."


def _attend(
    k_kept: Tensor, v_kept: Tensor, q: Tensor, k: Tensor, v: Tensor, *, diagonal: int | None = 0, scale: bool = True
) -> Tensor:
    k, v = torch.cat([k_kept, k], dim=2), torch.cat([v_kept, v], dim=2)
    T, S = q.shape[2], k.shape[2]
    scores = q @ k.mT / (math.sqrt(q.shape[-1]) if scale else 1)
    if diagonal is not None:
        scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T + diagonal), -math.inf)
    return scores.softmax(-1) @ v


def _mistakes(k_kept: Tensor, v_kept: Tensor, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    S, none = k_kept.shape[2], k_kept[:, :, :0]
    wrong = {
        "The new tokens see their own future: with several at once, mask what comes after each.":
            _attend(k_kept, v_kept, q, k, v, diagonal=None),
        "The scores are not scaled: divide by the root of the head's size.":
            _attend(k_kept, v_kept, q, k, v, scale=False),
    }  # fmt: skip
    if S:
        wrong |= {
            "The mask starts at the first key: query t of the new ones stands at position S + t, and sees all that is kept.":
                _attend(k_kept, v_kept, q, k, v, diagonal=-S),
            "A new token does not see itself: its own key and value belong to what it attends to.":
                _attend(k_kept, v_kept, q, k, v, diagonal=-1),
            "The new tokens see only each other: what is kept plays no part.": _attend(none, none, q, k, v),
        }  # fmt: skip
    return wrong


CASES = [  # model, context, operations a second, bytes a second
    ("mistral-7b-v0.2", 350, 989.4e12, 3.35e12),
    ("llama-2-7b", 64, 312e12, 2.039e12),
    ("falcon-7b", 2000, 312e12, 2.039e12),
    ("mistral-7b-v0.2", 4096, 989.4e12, 3.35e12),
]


def rows_needed(answer: Any) -> str:
    """5.2: ``f(model, context, peak_flops, bandwidth)`` is the smallest batch at the ridge, or None if none is."""
    for model, context, peak, bandwidth in CASES:
        ridge, W = peak / bandwidth, memory.bytes_per_step(model, 0)
        C, F = memory.bytes_per_step(model, context) - W, memory.flops(model, 1, context)
        where = f"{model} with {context:,} cached tokens"
        if ridge * C >= F:
            got = _or_none(answer, model, context, peak, bandwidth)
            if got is not None:
                raise Mistake(
                    f"For {where} there is no such batch: every row brings its own cache, and reading that takes longer "
                    f"than its arithmetic. Return None; got {got!r}."
                )
            continue
        got = _or_none(answer, model, context, peak, bandwidth)
        if got is None:
            raise Mistake(f"For {where} there is such a batch, and None came: is there a return?")
        exact = ridge * W / (F - ridge * C)
        right = math.ceil(exact)
        mistakes = {
            "The cache is left out: every row reads its own.": math.ceil(ridge * W / F),
            "The cache is read once for all rows there; every row has its own, and reads it alone.":
                math.ceil(ridge * (W + C) / F),
            "That is the ridge itself. A row makes about one operation a byte of weights, and reads its cache besides.":
                ridge,
            "That is the ridge itself, rounded. A row reads its cache besides the weights.": math.ceil(ridge),
            "Rounded down, the ridge is just missed: round up.": math.floor(exact),
            "Batches are whole numbers: round up.": exact,
        }  # fmt: skip
        got = tensor(got, "the batch")
        wrong = {said: n for said, n in mistakes.items() if n != right}
        compare(got, right, wrong, what=f"the batch for {where}", atol=1e-6)
    return "right: rows share the weights, each brings its own cache."


def _or_none(answer: Any, *args: Any) -> Any:
    """What ``answer`` returns, None included, which is a right answer here."""
    return call(lambda *inputs: (answer(*inputs),), *args)[0] if callable(answer) else call(answer)


CHECKS = {"5.1": take_in, "5.2": rows_needed}
