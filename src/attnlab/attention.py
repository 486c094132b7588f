"""Scaled dot-product attention, for any number of key/value heads.

    Attention(Q, K, V) = softmax(Q Kᵀ / √D) V            (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1)

Shape letters, here and everywhere: ``B`` batch, ``T`` queries, ``S`` keys, ``H`` query heads, ``Hkv`` key/value heads,
``G`` = H / Hkv query heads per key/value head (the group size), ``D`` head dim.

Multi-head attention is ``Hkv = H``; multi-query attention (Shazeer 2019, arXiv 1911.02150) is ``Hkv = 1``; grouped-query
attention (Ainslie et al. 2023, arXiv 2305.13245) is everything between. Keys and values are never repeated: the query
heads of a group read the same key/value head in place.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.errors import ConfigError, ShapeError


def visible(
    query_positions: Int[Tensor, "*b T"], key_positions: Int[Tensor, "*b S"], window: int | None = None
) -> Bool[Tensor, "*b T S"]:
    """Which keys a query may attend to, from the positions of both: the one definition of causality and of the window.

    A key is seen if it is not in the future and is one of the last ``window`` positions, the query's own included: a
    query at position 10 with ``window=3`` sees keys 8, 9 and 10. A key position below 0 marks an empty slot, never seen.

    (The Mistral paper's text reads as window + 1 keys; its figure, its cache and this function keep ``window``.)
    """
    check_window(window)
    q, k = query_positions[..., :, None], key_positions[..., None, :]
    seen = (k <= q) & (k >= 0)
    return seen if window is None else seen & (k > q - window)


def causal_mask(
    T: int, S: int | None = None, window: int | None = None, device: torch.device | str | None = None
) -> Bool[Tensor, "T S"]:
    """Boolean mask, True where a query may look. The last query stands on the last key (``S`` defaults to ``T``).

    >>> causal_mask(2, 4, window=3).int()
    tensor([[1, 1, 1, 0],
            [0, 1, 1, 1]], dtype=torch.int32)
    """
    S = T if S is None else S
    if T < 0 or S < 0:
        raise ShapeError(f"a mask needs sizes of 0 or more; got T={T}, S={S}")
    keys = torch.arange(S, device=device)
    return visible(torch.arange(S - T, S, device=device), keys, window)  # (T, S)


def scaled_dot_product_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B Hkv S D"],
    v: Float[Tensor, "B Hkv S Dv"],
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    return_weights: bool = False,
) -> Float[Tensor, "B H T Dv"] | tuple[Float[Tensor, "B H T Dv"], Float[Tensor, "B H T S"]]:
    """Weighted average of the values, weighted by how well each key answers the query.

    Args:
        q, k, v: queries, keys and values; ``H`` must be a multiple of ``Hkv``.
        mask: broadcastable to (B, H, T, S). Boolean: True = may attend. Float: added to the scores.
        scale: multiplies the scores; 1 / √D if not given.
        causal: the same as ``mask=causal_mask(T, S, window)``, without making it where a kernel can do without.
        window: with ``causal``, how many keys a query sees, its own included.
        return_weights: also return the weights. This takes the readable path, where they exist; without it a fused
            kernel does the work, and gives the same numbers.

    A query whose keys are all masked gives zeros, in the output, the weights and the gradients. No queries, keys or rows give an
    empty result, or zeros. A NaN in a key or a value reaches every query that may attend to it, and may reach those that may
    not: 0 · NaN is NaN. One in a query stays in its row, where torch's kernel for CPUs makes zeros of it.

    Raises:
        ShapeError: sizes that do not fit, or dtypes that differ or are not floating-point.
        ConfigError: a window below 1, a window without ``causal``, a mask together with ``causal``.

    Worked example: 4 query heads on 2 key/value heads, so query heads 0 and 1 read K/V head 0, and 2 and 3 read head 1:

    >>> q, k = torch.zeros(1, 4, 1, 2), torch.zeros(1, 2, 1, 2)
    >>> v = torch.tensor([[[[1.0, 1.0]], [[5.0, 5.0]]]])
    >>> scaled_dot_product_attention(q, k, v)[0, :, 0, 0]
    tensor([1., 1., 5., 5.])
    """
    _check_shapes(q, k, v, mask)
    check_window(window)
    if window is not None and not causal:
        raise ConfigError("window counts keys backwards from the query: pass causal=True with it")
    if causal and mask is not None:
        raise ConfigError("pass either a mask or causal=True; combine them yourself with mask & causal_mask(T, S)")
    T, S = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if window is not None and window >= S:
        window = None  # nothing is out of reach

    plain_causal = causal and window is None and T == S and T > 1 and not return_weights  # a kernel knows this one
    if causal and not plain_causal and not (T == 1 and window is None and S > 0):
        mask = causal_mask(T, S, window, device=q.device)
    if return_weights:
        return _with_weights(q, k, v, mask, scale)
    return _fused(q, k, v, mask, scale, plain_causal)


def _with_weights(q, k, v, mask, scale):
    """The definition, line by line. Scores are in float32 at least: q·k of large vectors overflows float16."""
    Hkv = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = rearrange(q.to(wide), "B (Hkv G) T D -> B Hkv G T D", Hkv=Hkv)
    scores = einsum(grouped, k.to(wide), "B Hkv G T D, B Hkv S D -> B Hkv G T S") * scale
    scores = rearrange(scores, "B Hkv G T S -> B (Hkv G) T S")
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if mask is None:
        weights = scores.softmax(dim=-1)  # (B, H, T, S)
    else:  # softmax over nothing is 0/0, and so is its gradient; by our convention, nothing
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
    weights = weights.to(v.dtype)
    grouped = rearrange(weights, "B (Hkv G) T S -> B Hkv G T S", Hkv=Hkv)
    out = einsum(grouped, v, "B Hkv G T S, B Hkv S Dv -> B Hkv G T Dv")
    return rearrange(out, "B Hkv G T Dv -> B (Hkv G) T Dv"), weights


def _fused(q, k, v, mask, scale, is_causal):
    """The same through torch's kernels, which want as many K/V heads as query heads and would copy them to get there.

    Two ways around the copy. Without a mask that differs by query, the G query heads of a group are simply G times as
    many queries on one head. With one, the group's first heads go in one call, its second heads in the next, and so on.
    """
    B, H, T, _ = q.shape
    Hkv, S = k.shape[1:3]
    G = H // Hkv
    if 0 in (B, H, T, S, v.shape[3]):
        return q.new_zeros(B, H, T, v.shape[3])
    if mask is not None:
        mask = mask.expand(*[1] * (4 - mask.dim()), *mask.shape)  # (B or 1, H or 1, T or 1, S or 1)
        if mask.is_floating_point() and mask.dtype != q.dtype:
            # -1e9 is a number in float32, and would be -inf, "never", in float16.
            most = min(torch.finfo(q.dtype).max, torch.finfo(mask.dtype).max)
            mask = torch.where(mask.isfinite(), mask.clamp(-most, most), mask).to(q.dtype)

    def sdpa(q, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=is_causal)

    if G == 1:
        out = sdpa(q, mask)
    elif not is_causal and (mask is None or (mask.shape[1] == 1 and (T == 1 or mask.shape[2] == 1))):
        queries = rearrange(q, "B (Hkv G) T D -> B Hkv (G T) D", Hkv=Hkv)  # a group's heads stand in line
        out = rearrange(sdpa(queries, mask), "B Hkv (G T) Dv -> B (Hkv G) T Dv", G=G)
    else:
        q = rearrange(q, "B (Hkv G) T D -> G B Hkv T D", Hkv=Hkv)
        per_head = mask is not None and mask.shape[1] > 1
        masks = rearrange(mask, "B (Hkv G) T S -> G B Hkv T S", Hkv=Hkv) if per_head else [mask] * G
        out = torch.stack([sdpa(q[g], masks[g]) for g in range(G)], dim=2).flatten(1, 2)  # (B, H, T, Dv)

    if mask is not None:  # kernels differ on a row with nothing to see; ours gives zeros
        allowed = mask if mask.dtype == torch.bool else mask > -math.inf
        out = out.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return out


def online_softmax_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B Hkv S D"],
    v: Float[Tensor, "B Hkv S Dv"],
    scale: float | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    block_size: int = 256,
) -> Float[Tensor, "B H T Dv"]:
    """The same output without ever holding a row of scores: keys come block by block, with a running maximum and sum.

    When a new block raises the maximum from m to m', everything summed so far is multiplied by exp(m - m'). That is the
    whole trick (Milakov & Gimelshein 2018, arXiv 1805.02867), and the core of FlashAttention (Dao et al. 2022, arXiv
    2205.14135). Memory beyond the output is B·H·block_size², whatever T and S are. Blocks that causality or the window
    hide from every query are never computed.

    Raises:
        ShapeError: sizes that do not fit, or dtypes that differ or are not floating-point.
        ConfigError: a window or a block_size below 1, a window without ``causal``.

    Worked example, one query, scores 1, 3, 2 in blocks of one: the sum of exponentials is 1, then 1·e^(1-3) + 1 = 1.135,
    then 1.135 + e^(2-3) = 1.503, which is e^(1-3) + e^(3-3) + e^(2-3), as it should be.
    """
    _check_shapes(q, k, v, None)
    check_window(window)
    if block_size < 1:
        raise ConfigError(f"block_size must be 1 or more; got {block_size}")
    if window is not None and not causal:
        raise ConfigError("window counts keys backwards from the query: pass causal=True with it")
    (T, D), (Hkv, S) = q.shape[2:], k.shape[1:3]
    scale = 1 / math.sqrt(D) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    q = rearrange(q, "B (Hkv G) T D -> B Hkv G T D", Hkv=Hkv)
    out = q.new_zeros(*q.shape[:4], v.shape[3])

    for t in range(0, T, block_size):
        queries = q[:, :, :, t : t + block_size].to(wide) * scale
        positions = torch.arange(t, min(t + block_size, T), device=q.device) + S - T  # of these queries
        maximum = queries.new_full((*queries.shape[:4], 1), -math.inf)  # (B, Hkv, G, T', 1)
        total = torch.zeros_like(maximum)
        average = queries.new_zeros(*queries.shape[:4], v.shape[3])

        first, last = int(positions[0]), int(positions[-1])
        start = max(0, first - window + 1) // block_size * block_size if window else 0
        stop = min(S, last + 1) if causal else S
        for s in range(start, stop, block_size):
            keys, values = k[:, :, s : s + block_size].to(wide), v[:, :, s : s + block_size].to(wide)
            scores = einsum(queries, keys, "B Hkv G T D, B Hkv S D -> B Hkv G T S")
            if causal:
                here = torch.arange(s, s + keys.shape[2], device=q.device)
                scores = scores.masked_fill(~visible(positions, here, window), -math.inf)
            new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            pivot = new_maximum.masked_fill(new_maximum == -math.inf, 0.0)  # nothing seen yet: any pivot will do
            weights = (scores - pivot).exp()
            rescale = (maximum - pivot).exp()
            total = total * rescale + weights.sum(-1, keepdim=True)
            average = average * rescale + einsum(weights, values, "B Hkv G T S, B Hkv S Dv -> B Hkv G T Dv")
            maximum = new_maximum
        total = total.masked_fill(total == 0, 1.0)  # nothing seen: nothing over one
        out[:, :, :, t : t + block_size] = (average / total).to(out.dtype)
    return rearrange(out, "B Hkv G T Dv -> B (Hkv G) T Dv")


def check_window(window: int | None) -> None:
    """Refuse a window that no key fits in."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ConfigError(f"window counts keys, the query's own included: 1 or more, or None for all; got {window!r}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ShapeError(f"expected q (B, H, T, D), k and v (B, Hkv, S, D); got {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"q, k and v need one batch size, and k and v the same heads and length; got {shapes}")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ShapeError(f"a dot product needs queries and keys of one size, 1 or more; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"query heads must be a multiple of K/V heads; got {q.shape[1]} and {k.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ShapeError(
            f"q, k and v need one floating-point dtype; got {q.dtype}, {k.dtype} and {v.dtype}: convert with .to(dtype)"
        )
    if mask is not None:
        want = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        fits = mask.dim() <= 4 and all(m in (1, w) for m, w in zip(mask.shape[::-1], want[::-1], strict=False))
        if not fits:
            raise ShapeError(f"mask must broadcast to (B, H, T, S) = {want}; got {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ShapeError(f"mask must be boolean (True = may attend) or float (added); got {mask.dtype}")
