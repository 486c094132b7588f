"""Multi-head latent attention: one short vector a token from which every head makes its keys and values.

DeepSeek-V2, arXiv 2405.04434, section 2.1. The latent is what is cached::

    c = norm(W_DKV x)        k = W_UK c        v = W_UV c

It takes no rotary positions: a rotation between W_UK and the query would differ from one distance to the next. So a token has
a rotary key besides, one for all heads, and each head a part of its query for it; the two dot products are added.

Queries and outputs can take the matrices over (``absorb=True``): q · (W_UK c) = (W_UKᵀ q) · c, and Σ w (W_UV c) = W_UV (Σ w c).
What is left is multi-query attention: one key for all heads, the latent with the rotary key behind it, whose first
``d_latent`` numbers are the value.

Letters as in :mod:`attnlab.attention`; ``c`` is the size of the latent, ``R`` that of the rotary key.
"""

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.attention import scaled_dot_product_attention
from attnlab.cache import KVCache
from attnlab.errors import ConfigError, ShapeError
from attnlab.layers import RMSNorm
from attnlab.rotary import apply_rotary, rotary_angles


class LatentCache(KVCache):
    """A latent and a shared rotary key for each token: (L, B, 1, max_len, d_latent + d_rope), and nothing besides.

    A ``KVCache`` of one key/value head whose values lie in its keys: they are the first ``d_latent`` numbers.

    Raises ConfigError for sizes below 1 (or a CapacityError where memory for them is not to be had).

    >>> LatentCache(n_layers=2, batch=1, d_latent=32, d_rope=8, max_len=10).nbytes == 2 * 10 * (32 + 8) * 4
    True
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        d_latent: int,
        d_rope: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(n_layers, batch, 1, d_latent + d_rope, max_len, dtype=dtype, device=device)
        self.v = self.k[..., :d_latent]  # a view; what the base class took for values is given back

    @property
    def nbytes(self) -> int:
        """Bytes of latents and rotary keys, filled or not."""
        return self.k.nbytes


class LatentAttention(nn.Module):
    """Self-attention from a cached latent, called as ``GroupedQueryAttention`` is.

    Args:
        d_latent: size of the latent. d_rope: of the rotary key that all heads share; 0 leaves positions out.
        head_dim: of a head's keys and values; d_model / n_heads if not given. Its queries have ``d_rope`` numbers more.

    The queries' own compression, which saves memory in training and nothing in the cache, is left out.

    Raises ConfigError for sizes below 1, heads that do not divide d_model, or an odd d_rope.

    >>> layer = LatentAttention(d_model=64, n_heads=4, d_latent=32, d_rope=8)
    >>> x = torch.randn(1, 5, 64)
    >>> torch.allclose(layer(x), layer(x, absorb=True), atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_latent: int,
        d_rope: int,
        head_dim: int | None = None,
        *,
        causal: bool = True,
        rope_theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        for name, size in {"d_model": d_model, "n_heads": n_heads, "d_latent": d_latent, "head_dim": head_dim}.items():
            if size is not None and size < 1:
                raise ConfigError(f"latent attention needs {name} of 1 or more; got {size}")
        if head_dim is None:
            if d_model % n_heads:
                raise ConfigError(
                    f"d_model={d_model} does not divide into {n_heads} heads: choose another, or give head_dim"
                )
            head_dim = d_model // n_heads
        if d_rope:
            rotary_angles(torch.zeros(1, dtype=torch.long), d_rope, rope_theta)  # raises on what cannot work
        self.d_model, self.n_heads, self.head_dim = d_model, n_heads, head_dim
        self.d_latent, self.d_rope, self.causal, self.rope_theta = d_latent, d_rope, causal, rope_theta
        self.scale = 1 / math.sqrt(head_dim + d_rope)
        self.q_proj = nn.Linear(d_model, n_heads * (head_dim + d_rope), bias=False)
        self.down_proj = nn.Linear(d_model, d_latent + d_rope, bias=False)  # to the latent, and to the rotary key
        self.norm = RMSNorm(d_latent)
        self.k_up = nn.Linear(d_latent, n_heads * head_dim, bias=False)
        self.v_up = nn.Linear(d_latent, n_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, d_latent={self.d_latent}, d_rope={self.d_rope}, head_dim={self.head_dim}"

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: LatentCache | None = None,
        layer: int = 0,
        absorb: bool = False,
        return_weights: bool = False,
    ) -> Float[Tensor, "B T d"] | tuple[Float[Tensor, "B T d"], Float[Tensor, "B H T S"]]:
        """Attend within ``x``, or with ``cache`` to everything it holds for ``layer`` as well.

        Args:
            rotation: cos and sin of ``rotary_angles`` for ``d_rope`` numbers, made here if not given.
            absorb: multiply the queries with W_UK and the averages with W_UV, and the cache with nothing. The same
                numbers; which takes fewer operations depends on how many tokens come (``flops``).
            return_weights: also return the weights (B, H, T, S).

        Raises ShapeError for an ``x`` of another size.
        """
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ShapeError(f"expected x (B, T, {self.d_model}); got {tuple(x.shape)}")
        q, kept = self._queries_and_kept(x, rotation, cache)
        sees = {"causal": self.causal}
        if cache is not None:
            kept, _, sees = cache.update(layer, kept, kept[..., : self.d_latent])
        attend = self._absorbed if absorb else self._restored
        out, weights = attend(q, kept, sees, return_weights)
        out = self.o_proj(rearrange(out, "B H T D -> B T (H D)"))
        return (out, weights) if return_weights else out

    def flops(self, new_tokens: int, keys: int, absorb: bool = False) -> int:
        """Operations that depend on ``absorb``, for one row: ``new_tokens`` queries that all see ``keys`` keys.

        Those of W_UK and W_UV, of the scores and of the averages; the other projections are the same either way.
        """
        H, D, c, R = self.n_heads, self.head_dim, self.d_latent, self.d_rope
        if absorb:  # each query and each average once through a head's matrices; then every pair, c + R and c wide
            return 2 * H * new_tokens * (2 * D * c + keys * (c + R + c))
        return 2 * H * (keys * 2 * D * c + new_tokens * keys * (D + R + D))

    def _queries_and_kept(self, x, rotation, cache):
        """Queries (B, H, T, D + R), and what is cached of x, as one key/value head: (B, 1, T, c + R)."""
        q = rearrange(self.q_proj(x), "B T (H D) -> B H T D", H=self.n_heads)
        latent, shared = self.down_proj(x)[:, None].split([self.d_latent, self.d_rope], dim=-1)  # (B, 1, T, c and R)
        latent = self.norm(latent)
        if not self.d_rope:
            return q, latent
        if rotation is None:
            positions = torch.arange(x.shape[1], device=x.device) if cache is None else cache.positions(x.shape[1])
            rotation = rotary_angles(positions, self.d_rope, self.rope_theta)
        plain, turned = q.split([self.head_dim, self.d_rope], dim=-1)
        q = torch.cat((plain, apply_rotary(turned, *rotation)), dim=-1)
        return q, torch.cat((latent, apply_rotary(shared, *rotation)), dim=-1)

    def _restored(self, q, kept, sees, return_weights):
        """Keys and values of every head, made again from what is kept; then multi-head attention."""
        latent, shared = kept.split([self.d_latent, self.d_rope], dim=-1)
        k = rearrange(self.k_up(latent), "B 1 S (H D) -> B H S D", H=self.n_heads)
        v = rearrange(self.v_up(latent), "B 1 S (H D) -> B H S D", H=self.n_heads)
        k = torch.cat((k, shared.expand(-1, self.n_heads, -1, -1)), dim=-1)
        return self._attend(q, k, v, sees, return_weights)

    def _absorbed(self, q, kept, sees, return_weights):
        """Multi-query attention on what is kept, with other queries and another matrix behind it."""
        w_uk, w_uv = (
            rearrange(up.weight, "(H D) c -> H D c", H=self.n_heads).to(q.dtype) for up in (self.k_up, self.v_up)
        )
        plain, turned = q.split([self.head_dim, self.d_rope], dim=-1)
        q = torch.cat((einsum(plain, w_uk, "B H T D, H D c -> B H T c"), turned), dim=-1)
        average, weights = self._attend(q, kept, kept[..., : self.d_latent], sees, return_weights)
        # W_O follows. Merged with W_UV beforehand it would be a (d, H · c) matrix, which is more to read for each token.
        return einsum(average, w_uv, "B H T c, H D c -> B H T D"), weights

    def _attend(self, q, k, v, sees, return_weights):
        out = scaled_dot_product_attention(q, k, v, scale=self.scale, return_weights=return_weights, **sees)
        return out if return_weights else (out, None)
