"""Chapter 1: attention with a mask, and two blocks merged."""

import math
from typing import Any

import torch
from torch import Tensor

from attnlab.attention import scaled_dot_product_attention
from attnlab.exercises._tools import Mistake, call, compare, parts, tensor


def masked_attention(answer: Any) -> str:
    """1.1: ``f(q, k, v, mask)`` gives output and weights; True = may attend; a row that sees nothing gives zeros."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 4, 16, generator=g)  # (B, H, T, D)
    k, v = torch.randn(2, 2, 2, 5, 16, generator=g)  # (B, H, S, D), twice
    mask = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    _try_masked(answer, q, k, v, mask)
    nothing = mask.clone()
    nothing[1] = False
    output, weights = parts(call(answer, q, k, v, nothing), 2, "the output and the weights")
    if not (tensor(weights).isfinite().all() and tensor(output).isfinite().all()):
        raise Mistake(
            "With a mask, all is right until a row may see nothing: softmax of nothing is 0/0, NaN. Give such a row zeros."
        )
    expected, expected_weights = scaled_dot_product_attention(q, k, v, nothing, return_weights=True)
    message = (
        "A row that may see nothing attends to everything alike: a large negative number is not minus infinity. "
        "Give such a row zeros."
    )
    alike = expected_weights.masked_fill(~nothing.any(-1)[:, None], 1 / 5)  # (B, H, T, S)
    compare(weights, expected_weights, {message: alike}, what="the weights of a row that sees nothing")
    compare(output, expected, what="the output of a row that sees nothing")
    return "right: masked before the softmax, scaled by √d_k, and a row that sees nothing gives zeros."


def _try_masked(answer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    expected, expected_weights = scaled_dot_product_attention(q, k, v, mask, return_weights=True)
    output, weights = parts(call(answer, q, k, v, mask), 2, "the output and the weights")
    dots = q @ k.mT  # (B, H, T, S)
    scores, hidden = dots / math.sqrt(q.shape[-1]), ~mask
    without = scores.softmax(-1)
    mistakes = {
        "The scores are not scaled: divide by √d_k before the softmax.": dots.masked_fill(hidden, -math.inf).softmax(
            -1
        ),
        "The scores are divided by d_k; the root is missing.": (dots / q.shape[-1])
        .masked_fill(hidden, -math.inf)
        .softmax(-1),
        "The mask is not used: the weights are those of attention without one.": without,
        "Your mask is applied after the softmax: rows no longer sum to 1.": without * mask,
        "The mask is the wrong way round: True means that a query may look.": scores.masked_fill(
            mask, -math.inf
        ).softmax(-1),
        "The mask is added as numbers: True became +1. Where it is False, the score must become minus infinity.": (
            scores + mask
        ).softmax(-1),
        "The scores are multiplied by the mask: a forbidden key has score 0, and exp(0) is 1. Minus infinity is needed.": (
            scores * mask
        ).softmax(-1),
        "The softmax runs over the queries (dim=-2); each query's weights must sum to 1 over the keys.": scores.masked_fill(
            hidden, -math.inf
        ).softmax(-2),
    }
    compare(weights, expected_weights, mistakes, what="the weights")
    compare(output, expected, what="the output, though the weights are right,")


def merge_blocks(answer: Any) -> str:
    """1.2: ``merge(a, b)`` joins two blocks' (maximum, sum, weighted sum) into that of both."""
    g = torch.Generator().manual_seed(1)
    values = torch.randn(6, 3, generator=g)  # (S, D)
    easy = torch.tensor([0.5, -1.0, 0.0, 1.0, 2.0, -0.5])
    for scores in (easy, easy.flip(0)):
        first, second = _block(scores[:2], values[:2]), _block(scores[2:], values[2:])
        whole, factor = _block(scores, values), math.exp(-abs(float(first[0] - second[0])))
        m, total, weighted = parts(call(answer, first, second), 3, "the maximum, the sum and the weighted sum")
        compare(m, whole[0], {"The maxima are added; keep the larger.": first[0] + second[0]}, what="the maximum")
        compare(total, whole[1], _total_mistakes(first, second, factor), what="the sum")
        compare(weighted, whole[2], {
            "The weighted sums are added as they are; they need the same factors as the sums.": first[2] + second[2],
            "The third thing is the finished answer; keep the weighted sum, and divide by the sum at the end.":
                whole[2] / whole[1],
        }, what="the weighted sum")  # fmt: skip
    _try_extremes(answer, easy, values)
    return "right: whatever the order and the size of the scores, two blocks make the whole."


def _total_mistakes(first: tuple, second: tuple, factor: float) -> dict[str, Tensor]:
    low, high = sorted((first, second), key=lambda block: float(block[0]))
    return {
        "The sums are added as they are: each is counted from its own maximum. Multiply by exp(old maximum - new one).":
            first[1] + second[1],
        "The factor is upside down: it is exp(old maximum - new one), never above 1.": high[1] + low[1] / factor,
        "The block with the larger maximum is rescaled; the other one must be.": low[1] + high[1] * factor,
        "Always the first block is rescaled, by the difference to the second; but the second can have the smaller maximum.":
            first[1] * torch.exp(first[0] - second[0]) + second[1],
        "Always the second block is rescaled, by the difference to the first; but the first can have the smaller maximum.":
            first[1] + second[1] * torch.exp(second[0] - first[0]),
    }  # fmt: skip


def _try_extremes(answer: Any, scores: Tensor, values: Tensor) -> None:
    what = "the maximum, the sum and the weighted sum"
    large = scores * 1000
    blocks = _block(large[:2], values[:2]), _block(large[2:], values[2:])
    _, total, weighted = parts(call(answer, *blocks), 3, what)
    if not (tensor(total).isfinite().all() and tensor(weighted).isfinite().all()):
        raise Mistake("Scores of a thousand overflow: take exp only of differences that are zero or less.")
    compare(tensor(weighted) / tensor(total), large.softmax(0) @ values, what="the answer for large scores")
    empty = (torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(3))  # a block whose keys are all masked
    full = _block(scores, values)
    for pair in ((empty, full), (full, empty)):
        merged = parts(call(answer, *pair), 3, what)
        for name, got, right in zip(("maximum", "sum", "weighted sum"), merged, full, strict=True):
            compare(got, right, what=f"the {name}, where one block is empty,")
    nothing = parts(call(answer, empty, empty), 3, what)
    if not tensor(nothing[1]).isfinite().all() or not tensor(nothing[2]).isfinite().all():
        raise Mistake("Two blocks that see nothing give NaN: minus infinity minus minus infinity. They should give 0.")


def _block(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = scores.max()
    e = (scores - m).exp()
    return m, e.sum(), e @ values


CHECKS = {"1.1": masked_attention, "1.2": merge_blocks}
