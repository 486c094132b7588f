"""The parts of the decoder: normalisation, feed-forward, and the one attention layer.

Multi-head, grouped-query and multi-query attention are ``GroupedQueryAttention`` with one number changed, ``n_kv_heads``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.attention import check_window, scaled_dot_product_attention
from attnlab.cache import KVCache
from attnlab.errors import ConfigError, ShapeError
from attnlab.rotary import apply_rotary, rotary_angles


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale it: x / √(mean(x²) + eps) · weight (arXiv 1910.07467)."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow float16
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)): a feed-forward layer with a gate (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GroupedQueryAttention(nn.Module):
    """Self-attention with ``n_heads`` query heads on ``n_kv_heads`` key/value heads (arXiv 2305.13245).

    ``n_kv_heads = n_heads`` (the default) is multi-head attention, ``n_kv_heads = 1`` is multi-query attention. Query head
    h reads key/value head h // group_size.

    Args:
        d_model: size of a token's vector. head_dim: of a head's; d_model / n_heads if not given.
        causal: a token sees itself and what came before. window: and of that only the last so many.
        rope_theta: rotate queries and keys by position (None: positions play no part beyond the mask).

    Raises ConfigError for heads that do not divide, a window below 1, or an odd head_dim with rotary positions.

    >>> [GroupedQueryAttention(512, 8, n).k_proj.weight.shape[0] for n in (8, 2, 1)]
    [512, 128, 64]
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = True,
        window: int | None = None,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_heads(n_heads, n_kv_heads)
        check_window(window)
        if head_dim is None:
            if d_model % n_heads:
                raise ConfigError(
                    f"d_model={d_model} does not divide into {n_heads} heads: choose another, or give head_dim"
                )
            head_dim = d_model // n_heads
        if rope_theta is not None:
            rotary_angles(torch.zeros(1, dtype=torch.long), head_dim, rope_theta)  # raises on what cannot work
        self.d_model, self.n_heads, self.n_kv_heads, self.head_dim = d_model, n_heads, n_kv_heads, head_dim
        self.causal, self.window, self.rope_theta = causal, window, rope_theta
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}, window={self.window}"

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        *,
        mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        return_weights: bool = False,
    ) -> Float[Tensor, "B T d"] | tuple[Float[Tensor, "B T d"], Float[Tensor, "B H T S"]]:
        """Attend within ``x``, or with ``cache`` to everything it holds for ``layer`` as well.

        Args:
            mask: replaces the layer's own causal mask and window; not together with a cache, which knows positions.
            rotation: cos and sin of ``rotary_angles``, for a caller who makes them once for all layers.
            return_weights: also return the weights (B, H, T, S). With a rolling cache, S counts slots, not positions.
        """
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ShapeError(f"expected x (B, T, {self.d_model}); got {tuple(x.shape)}")
        if mask is not None and cache is not None:
            raise ConfigError("with a cache the mask follows from the positions; pass one or the other")
        T = x.shape[1]
        q = rearrange(self.q_proj(x), "B T (H D) -> B H T D", D=self.head_dim)
        k = rearrange(self.k_proj(x), "B T (Hkv D) -> B Hkv T D", D=self.head_dim)
        v = rearrange(self.v_proj(x), "B T (Hkv D) -> B Hkv T D", D=self.head_dim)
        if self.rope_theta is not None:
            if rotation is None:
                positions = torch.arange(T, device=x.device) if cache is None else cache.positions(T)
                rotation = rotary_angles(positions, self.head_dim, self.rope_theta)
            q, k = apply_rotary(q, *rotation), apply_rotary(k, *rotation)

        if cache is not None:
            k, v, sees = cache.update(layer, k, v)
        elif mask is not None:
            sees = {"mask": mask}
        else:
            sees = {"causal": self.causal, "window": self.window if self.causal else None}
        attended = scaled_dot_product_attention(q, k, v, return_weights=return_weights, **sees)
        out, weights = attended if return_weights else (attended, None)
        out = self.o_proj(rearrange(out, "B H T D -> B T (H D)"))
        return (out, weights) if return_weights else out


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): both layers read the residual stream and add to it."""

    def __init__(self, attention: GroupedQueryAttention, d_ff: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        d_model = attention.d_model
        self.attention_norm = RMSNorm(d_model, norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(d_model, norm_eps)
        self.feed_forward = SwiGLU(d_model, d_ff)

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        *,
        rotation: tuple[Float[Tensor, "*b T half"], Float[Tensor, "*b T half"]] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        on_weights: Callable[[int, Float[Tensor, "B H T S"]], None] | None = None,
    ) -> Float[Tensor, "B T d"]:
        """One block. ``on_weights(layer, weights)`` is called with the attention weights, if given."""
        attended = self.attention(
            self.attention_norm(x), rotation=rotation, cache=cache, layer=layer, return_weights=on_weights is not None
        )
        if on_weights is not None:
            attended, weights = attended
            on_weights(layer, weights)
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x))


def check_heads(n_heads: int, n_kv_heads: int) -> None:
    """Refuse heads that do not divide, and say which numbers would."""
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
        possible = [n for n in range(1, max(n_heads, 0) + 1) if n_heads % n == 0]
        raise ConfigError(
            f"n_heads={n_heads} must be a multiple of n_kv_heads={n_kv_heads}; n_kv_heads could be {possible or 'none'}"
        )
