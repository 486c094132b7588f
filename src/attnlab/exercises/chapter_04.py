"""Chapter 4: RMSNorm, and one head taken away."""

from typing import Any

import torch
from torch import Tensor

from attnlab.exercises._tools import Mistake, call, compare
from attnlab.heads import ablated
from attnlab.layers import GroupedQueryAttention, RMSNorm


def rms_norm(answer: Any) -> str:
    """4.1: ``f(x, weight, eps)`` normalises the last axis of ``x`` by its root mean square."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=g) * 3 + 1  # (B, T, d); a mean, for those who subtract it
    weight = torch.rand(8, generator=g) + 0.5  # (d)
    eps = 0.1  # large enough to see where it stands
    mean_square, variance = x.square().mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    compare(call(answer, x, weight, eps), _rms(x, weight, eps), {
        "The mean is subtracted: that is LayerNorm. RMSNorm leaves it in.":
            (x - x.mean(-1, keepdim=True)) / (variance + eps).sqrt() * weight,
        "The vector is divided by its standard deviation, which leaves the mean out; take the mean of the squares.":
            x / (variance + eps).sqrt() * weight,
        "The squares are summed; their mean is needed (the vector's length is √d times too much).":
            x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * weight,
        "The root is missing: the vector is divided by its mean square.": x / (mean_square + eps) * weight,
        "The vector is multiplied by its root mean square; divide.": x * (mean_square + eps).sqrt() * weight,
        "eps stands outside the root; add it to the mean square.": x / (mean_square.sqrt() + eps) * weight,
        "eps is left out: a vector of zeros would give 0/0.": x / mean_square.sqrt() * weight,
        "The weight is left out.": _rms(x, torch.ones(8), eps),
        "One root mean square is taken over everything; each position has its own.":
            x / (x.square().mean() + eps).sqrt() * weight,
        "The mean runs over the positions (dim 1); it must run over each vector's own numbers, the last axis.":
            x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight,
    }, what="the normalised vectors")  # fmt: skip
    zeros = torch.zeros(1, 2, 8)
    compare(call(answer, zeros, weight, eps), zeros, what="what a vector of zeros gives")
    half = torch.full((1, 1, 8), 300.0, dtype=torch.float16)
    compare(call(answer, half, torch.ones(8), eps), torch.ones(1, 1, 8), {
        "All is right in float32, but in float16 the square of 300 is infinite: square in float32.":
            torch.zeros(1, 1, 8),
    }, what="the vectors in float16", atol=1e-2)  # fmt: skip
    return "right: each vector divided by its own root mean square, eps inside the root, the mean left alone."


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = RMSNorm(x.shape[-1], eps)
    norm.weight.data = weight
    return norm(x).detach()


@torch.no_grad()
def without_head(answer: Any) -> str:
    """4.2: ``f(layer, x, head)`` is a grouped-query layer's output without one query head; the layer stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = GroupedQueryAttention(20, n_heads=6, n_kv_heads=2, head_dim=4, rope_theta=1e4)  # 6 · 4 is not d_model
        x = torch.randn(2, 5, 20)
    before = {name: weights.clone() for name, weights in layer.state_dict().items()}
    whole = layer(x)
    for head in (4, 0):
        with ablated(layer, (0, head)):
            right = layer(x)
        got = call(answer, layer, x, head)
        if any(not torch.equal(weights, before[name]) for name, weights in layer.state_dict().items()):
            layer.load_state_dict(before)
            raise Mistake(
                "Your function changes the layer's weights, and leaves them so: the next call has one head less."
            )
        if any(module._forward_pre_hooks or module._forward_hooks for module in layer.modules()):
            for module in layer.modules():
                module._forward_pre_hooks.clear()
                module._forward_hooks.clear()
            raise Mistake("A hook is left on the layer: remove it, or every later call lacks the head as well.")
        compare(got, right, _head_mistakes(layer, x, head, whole, right), what="the output")
    return "right: the head's columns of o_proj, and nothing of the key/value head that it shares."


def _head_mistakes(
    layer: GroupedQueryAttention, x: Tensor, head: int, whole: Tensor, right: Tensor
) -> dict[str, Tensor]:
    D, G, narrow = layer.head_dim, layer.group_size, layer.d_model // layer.n_heads
    kv = head // G
    with ablated(layer, *((0, h) for h in range(kv * G, (kv + 1) * G))):
        group = layer(x)
    with ablated(layer, *((0, h) for h in range(layer.n_heads) if h != head)):
        alone = layer(x)
    with ablated(layer, (0, head + 1)):
        next_one = layer(x)
    mistakes = {
        "Nothing is taken away: that is the whole layer's output.": whole,
        f"The whole group of {G} query heads is gone: they share one key/value head. Take away the query head's own output.":
            group,
        "This is what the head adds, without the others; the others without the head are asked for.": alone,
        "A query of zeros doesn't silence a head: its scores are all 0, and it averages the values.":
            _with(layer, x, "q_proj", slice(head * D, (head + 1) * D), 0),
        "The rows of o_proj are set to 0: rows are numbers of the stream. A head's numbers are columns, which o_proj reads.":
            _with(layer, x, "o_proj", slice(head * D, (head + 1) * D), 0),
        "Columns head, head + H, … are taken: a head's numbers stand side by side, head · head_dim onwards.":
            _with(layer, x, "o_proj", slice(head, None, layer.n_heads), 1),
        "Only one column of o_proj is taken; a head has head_dim of them.":
            _with(layer, x, "o_proj", slice(head, head + 1), 1),
        "The slices are d_model / n_heads wide; this layer's head_dim is another number.":
            _with(layer, x, "o_proj", slice(head * narrow, (head + 1) * narrow), 1),
        "The head beside it is taken away: heads count from 0.": next_one,
    }  # fmt: skip
    return {message: wrong for message, wrong in mistakes.items() if not torch.allclose(wrong, right, atol=1e-4)}


def _with(layer: GroupedQueryAttention, x: Tensor, name: str, zeroed: slice, axis: int) -> Tensor:
    """The layer's output with some rows (axis 0) or columns (1) of one of its matrices set to 0; then put back."""
    weight = getattr(layer, name).weight
    before = weight.clone()
    weight[(zeroed,) if axis == 0 else (slice(None), zeroed)] = 0
    out = layer(x)
    weight.copy_(before)
    return out


CHECKS = {"4.1": rms_norm, "4.2": without_head}
