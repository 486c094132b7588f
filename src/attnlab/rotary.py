"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

Each head's D numbers are D/2 points in the plane. A token at position m turns point i by the angle m · θ^(-2i/D). The dot
product of a query at m and a key at n then depends on m - n alone.

Which two numbers make a point is a convention, and there are two. ``"halves"`` pairs i with i + D/2 (Hugging Face
checkpoints, and this package). ``"interleaved"`` pairs 2i with 2i + 1 (Mistral's own checkpoints). Weights made for one
give wrong numbers, silently, under the other; ``interleaved_to_halves`` and ``halves_to_interleaved`` convert them.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.errors import ConfigError, ShapeError

Layout = Literal["halves", "interleaved"]


def rotary_angles(
    positions: Int[Tensor, "*b T"], head_dim: int, theta: float = 10_000.0
) -> tuple[Float[Tensor, "*b T half"], Float[Tensor, "*b T half"]]:
    """cos and sin of position · θ^(-2i/D), float32, i = 0 … D/2 - 1.

    Raises ConfigError for an odd head_dim or a theta that is not positive.
    """
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"rotary positions pair up the numbers of a head: head_dim must be even; got {head_dim}")
    if not theta > 0:
        raise ConfigError(f"rope_theta must be positive; got {theta}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents  # (D/2,)
    angles = positions[..., None].float() * frequencies  # (*b, T, D/2)
    return angles.cos(), angles.sin()


def wavelengths(head_dim: int, theta: float = 10_000.0) -> Float[Tensor, " half"]:
    """Tokens that each pair takes for one full turn: 2π · θ^(2i/D), float64, i = 0 … D/2 - 1, the fastest first.

    The first is 2π whatever θ is; the last comes close to 2π · θ.

    Raises ConfigError for what ``rotary_angles`` refuses.
    """
    rotary_angles(torch.zeros(1, dtype=torch.long), head_dim, theta)  # raises on what cannot work
    return 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # (D/2,)


def apply_rotary(
    x: Float[Tensor, "B H T D"],
    cos: Float[Tensor, "*b T half"],
    sin: Float[Tensor, "*b T half"],
    layout: Layout = "halves",
) -> Float[Tensor, "B H T D"]:
    """Turn every pair of ``x`` by its angle. ``cos`` and ``sin`` are (T, D/2), or (B, T, D/2) for a position per row.

    Raises ShapeError for sizes that do not fit, ConfigError for another layout.

    Worked example, D = 4, both pairs turned by 90°: (a, b, c, d) becomes (-c, -d, a, b) in halves, where (a, c) and
    (b, d) are the points, and (-b, a, -d, c) interleaved, where (a, b) and (c, d) are.
    """
    half = x.shape[-1] // 2
    rows = cos.shape[:-2] in ((), (1,), x.shape[:1])  # another number of rows would make x as many
    if x.shape[-1] % 2 or cos.shape != sin.shape or cos.shape[-2:] != (x.shape[-2], half) or not rows:
        raise ShapeError(
            f"expected cos and sin (…, {x.shape[-2]}, {half}) for x {tuple(x.shape)}; got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    cos, sin = (t.to(x.dtype).unsqueeze(-3) for t in (cos, sin))  # (…, 1, T, D/2): one for all heads
    if layout == "halves":
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    if layout == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    raise ConfigError(f'layout must be "halves" or "interleaved"; got {layout!r}')


def interleaved_to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection from Mistral's layout to Hugging Face's; values stay as they are.

    Worked example, one head of 4: rows (0, 1, 2, 3) are the points (0, 1), (2, 3); they become rows (0, 2, 1, 3), so
    that row i and row i + 2 are a point.
    """
    _check_rows(weight, n_heads)
    return rearrange(weight, "(h half two) ... -> (h two half) ...", h=n_heads, two=2)


def halves_to_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """The way back: rows (0, 1, 2, 3) of one head become (0, 2, 1, 3) again, which for longer heads is another order."""
    _check_rows(weight, n_heads)
    return rearrange(weight, "(h two half) ... -> (h half two) ...", h=n_heads, two=2)


def _check_rows(weight: Tensor, n_heads: int) -> None:
    if n_heads < 1 or weight.shape[0] % (2 * n_heads):
        raise ShapeError(f"{weight.shape[0]} rows do not make {n_heads} heads of an even size")
