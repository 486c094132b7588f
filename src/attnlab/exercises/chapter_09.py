"""Chapter 9: a rotation by position, and rows reordered from one layout into the other."""

from typing import Any

import torch
from torch import Tensor

from attnlab.exercises._tools import Mistake, call, compare
from attnlab.rotary import apply_rotary, halves_to_interleaved, interleaved_to_halves, rotary_angles


def rotate(answer: Any) -> str:
    """9.1: ``f(x, positions, theta)`` turns x (T, D) by position, pairs in halves."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=g)  # (T, D)
    positions = torch.tensor([0, 1, 2, 7, 13])  # not 0 … T - 1: positions are given
    theta = 100.0  # not the usual one, so that a fixed 10 000 shows
    compare(call(answer, x, positions, theta), _turned(x, positions, theta), {
        "Neighbours are paired (0 with 1, 2 with 3): that is the interleaved layout. In halves, i goes with i + D/2.":
            _turned(x, positions, theta, "interleaved"),
        "It turns the other way: (a·cos - b·sin, b·cos + a·sin) is asked for, and trained weights expect it.":
            _turned(x, -positions, theta),
        "The exponent is off: pair i turns by θ^(-2i/D), so that the pairs use all of 0 to 1; you use θ^(-i/D).":
            _turned(x, positions, theta**0.5),
        "The frequencies grow with i: θ^(-2i/D), with a minus.": _turned(x, positions, 1 / theta),
        "theta is fixed at 10 000; use the one that is given.": _turned(x, positions, 1e4),
        "Positions are counted 0, 1, 2, …; use the ones that are given.": _turned(x, torch.arange(5), theta),
        "Positions are counted from 1: position 0 must leave the vector as it is.": _turned(x, positions + 1, theta),
        "Every pair turns at the same speed; pair i turns by position · θ^(-2i/D).": _turned_alike(x, positions),
        "Nothing is turned.": x,
    }, what="the turned vectors")  # fmt: skip
    half = torch.randn(1, 64, generator=g)
    far = torch.tensor([3001])
    compare(call(answer, half.bfloat16(), far, 1e4), _turned(half.bfloat16().float(), far, 1e4), {
        "All is right in float32. In bfloat16 the position 3001 becomes 3008: compute angles, cos and sin in float32.":
            _turned(half.bfloat16().float(), far.bfloat16(), 1e4),
    }, what="a bfloat16 vector at position 3001 (angles belong in float32)", atol=3e-2)  # fmt: skip
    return "right: i with i + D/2, by position · θ^(-2i/D), the angles in float32."


def _turned(x: Tensor, positions: Tensor, theta: float, layout: str = "halves") -> Tensor:
    return apply_rotary(x[None, None], *rotary_angles(positions, x.shape[-1], theta), layout)[0, 0]


def _turned_alike(x: Tensor, positions: Tensor) -> Tensor:
    angles = positions[:, None].float().expand(-1, x.shape[-1] // 2)
    return apply_rotary(x[None, None], angles.cos(), angles.sin())[0, 0]


def to_halves(answer: Any) -> str:
    """9.2: ``f(weight, n_heads)`` reorders the rows of a query or key matrix from interleaved pairs to halves."""
    n_heads, head_dim, d_model = 3, 8, 5
    weight = torch.arange(n_heads * head_dim * d_model).view(-1, d_model).float()  # (H·D, d)
    right = interleaved_to_halves(weight, n_heads)
    got = call(answer, weight, n_heads)
    if isinstance(got, Tensor) and got.shape == weight.T.shape:
        raise Mistake("The matrix is transposed: nn.Linear keeps a row for each output, and rows are what moves.")
    compare(got, right, {
        "Nothing has moved.": weight,
        "That is the way back, from halves to interleaved: row 2i must come to row i, row 2i + 1 to row i + D/2.":
            halves_to_interleaved(weight, n_heads),
        "All rows are sorted at once, so that heads mix: each head's rows stay within that head.":
            interleaved_to_halves(weight, 1),
        "All rows are sorted at once, and the wrong way: each head's rows stay within that head.":
            halves_to_interleaved(weight, 1),
        "The second half comes first: even rows first, then odd ones.":
            weight.view(n_heads, head_dim // 2, 2, d_model).flip(2).transpose(1, 2).reshape(weight.shape),
        "n_heads and D/2 have changed places: a head's rows stand together, so the head is the outermost axis.":
            weight.view(head_dim // 2, n_heads, 2, d_model).transpose(1, 2).reshape(weight.shape),
    }, what="the reordered rows")  # fmt: skip
    grouped = torch.arange(2 * 4 * 3).view(-1, 3).float()  # fewer heads, as a grouped layer's keys have
    compare(call(answer, grouped, 2), interleaved_to_halves(grouped, 2), what="the rows of a smaller matrix")
    return "right: within each head the even rows first, then the odd ones; for queries and keys, never for values."


CHECKS = {"9.1": rotate, "9.2": to_halves}
