"""Decode attention as a GPU kernel in Triton, short enough to read: one new token a row against a long cache.

FlashAttention gives every row, head and block of queries a program of its own. When decoding there is one query, so a batch
of one makes as many programs as there are heads, and most of a GPU's hundred and more multiprocessors have nothing to read.
Flash-Decoding (Dao, Haziza, Massa and Sizov 2023, pytorch.org/blog/flash-decoding) splits the cache too, in three steps:

1. the cache is cut into parts, which are only views of it;
2. every part is attended to as if it were the whole, and the logarithm of its sum of exponentials is kept;
3. the parts' averages are averaged, each weighted by the exponential of that logarithm.

That is exact, not an approximation: step 3 is ``online_softmax_attention``'s rule, applied across parts instead of blocks.

A program here takes all ``G`` query heads of a group at once, as the rows of one matrix product, so that each K/V head comes
from memory once: ``2 · B · Hkv · S · D`` numbers a call, whatever ``H`` is, and little else.

Triton compiles for a GPU. With the environment variable ``TRITON_INTERPRET=1``, its interpreter runs the same source on a CPU,
very slowly: good for checking and for stepping through, not for use. The variable is looked at when triton is first imported,
which torch does by itself with the first step of an optimizer: set it at the very start.
"""

from __future__ import annotations  # tl.constexpr is looked up when there is a tl

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.attention import check_window
from attnlab.errors import ConfigError, ShapeError

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for macOS; this module can be read and documented there all the same
    triton = tl = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_PARTS = 128  # the second kernel holds a row's parts all at once
TILE_BYTES = 8192  # of keys, and as many of values, that a program takes at a time
STAGES = 3  # such pairs on their way at once, in a processor's shared memory
WARPS = 4  # of 32 threads each, in a program
SMALLEST_PRODUCT = 16  # rows and columns that a matrix product on tensor cores takes at least
PROGRAMS_PER_PROCESSOR = 4  # while one waits for memory, others have asked already


def _jit(kernel):
    """Compiled at its first call, or interpreted. Sizes that change from step to step don't make another version."""
    return triton.jit(kernel, do_not_specialize=["S", "span", "part", "n_parts"]) if triton else kernel


@_jit
def _attend_to_part(
    q, k, v, lengths, averages, logs,  # (B, H, D), (B, Hkv, S, D) twice, (B,) or None, (B, H, P, D), (B, H, P)
    q_row, q_head, k_row, k_head, k_slot, v_row, v_head, v_slot,  # strides, in numbers
    S, span, part, scale,
    G: tl.constexpr, HEADS: tl.constexpr,  # query heads of a group, and padded
    D: tl.constexpr, DIMS: tl.constexpr,  # head dim, and padded to a power of two
    TOKENS: tl.constexpr, PRODUCT: tl.constexpr,  # keys taken at a time; the type that products are made in
):  # fmt: skip
    """One part of one row's cache, for the query heads of one group: softmax over that part alone, and its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)  # a large cache has more numbers than 32 bits can count
    kv_head = tl.program_id(1).to(tl.int64)
    p = tl.program_id(2)
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIMS)

    length = S if lengths is None else tl.minimum(tl.load(lengths + row), S).to(tl.int32)  # never beyond the cache
    start = tl.maximum(length - span, 0) + p * part  # what lies before the window isn't read either
    stop = tl.minimum(start + part, length)

    at = (kv_head * G + heads)[:, None] * q_head + dims[None, :]
    mine = (heads < G)[:, None] & (dims < D)[None, :]
    queries = tl.load(q + row * q_row + at, mask=mine, other=0.0).to(PRODUCT)  # (HEADS, DIMS)
    k += row * k_row + kv_head * k_head
    v += row * v_row + kv_head * v_head

    maximum = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    average = tl.zeros((HEADS, DIMS), tl.float32)
    for first in range(start, stop, TOKENS):
        slots = (first + tl.arange(0, TOKENS)).to(tl.int64)
        inside = slots < stop
        there = inside[:, None] & (dims < D)[None, :]
        keys = tl.load(k + slots[:, None] * k_slot + dims[None, :], mask=there, other=0.0)  # (TOKENS, DIMS)
        values = tl.load(v + slots[:, None] * v_slot + dims[None, :], mask=there, other=0.0)
        scores = tl.dot(queries, tl.trans(keys.to(PRODUCT)), input_precision="ieee") * scale  # (HEADS, TOKENS)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp(scores - new_maximum[:, None])
        rescale = tl.exp(maximum - new_maximum)
        total = total * rescale + tl.sum(weights, 1)
        update = tl.dot(weights.to(PRODUCT), values.to(PRODUCT), input_precision="ieee")  # (HEADS, DIMS)
        average = average * rescale[:, None] + update
        maximum = new_maximum

    total = tl.where(total > 0, total, 1.0)  # of a part with nothing in it: average 0, logarithm -inf
    H = tl.num_programs(1) * G
    place = (row * H + kv_head * G + heads) * tl.num_programs(2) + p  # among (B, H, P)
    tl.store(logs + place, maximum + tl.log(total), mask=heads < G)
    tl.store(averages + place[:, None] * D + dims[None, :], average / total[:, None], mask=mine)


@_jit
def _merge_parts(
    averages, logs, out,  # (B·H, P, D), (B·H, P), (B·H, D)
    n_parts,
    PARTS: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """A softmax over the parts of one query head: a part's share in the whole sum is the weight of its average."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    dims = tl.arange(0, DIMS)
    sums = tl.load(logs + row * n_parts + parts, mask=parts < n_parts, other=float("-inf"))  # (PARTS,)
    maximum = tl.max(sums, 0)
    shares = tl.exp(sums - tl.where(maximum > float("-inf"), maximum, 0.0))  # all 0 in a row of length 0
    total = tl.sum(shares, 0)
    at = (row * n_parts + parts)[:, None] * D + dims[None, :]
    there = (parts < n_parts)[:, None] & (dims < D)[None, :]
    theirs = tl.load(averages + at, mask=there, other=0.0)  # (PARTS, DIMS)
    average = tl.sum(theirs * shares[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + dims, average.to(out.dtype.element_ty), mask=dims < D)


def decode_attention(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B Hkv S D"],
    v: Float[Tensor, "B Hkv S D"],
    lengths: Int[Tensor, " B"] | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    n_parts: int | None = None,
) -> Float[Tensor, "B H D"]:
    """Attention of one new token a row over the keys and values its cache holds, its own included.

    Args:
        q: a query a head; ``H`` must be a multiple of ``Hkv``.
        k, v: the cache, of the same dtype: float16, bfloat16 or float32. Any strides, as long as the ``D`` numbers of a head
            lie side by side; a slice of a longer cache is read in place.
        lengths: how many of the ``S`` slots are filled, by row (None: all). The host never looks at them, so that no step
            waits for a number: one above ``S`` counts as ``S``. A row of length 0 gives zeros.
        window: how many of the last keys are seen, the token's own included; only those are read.
        scale: multiplies the scores; 1 / √D if not given.
        n_parts: into how many parts the cache is split, at most; by default enough to keep the whole GPU reading. The
            numbers differ by rounding alone.

    Made for decoding: there is no gradient.

    Raises:
        ShapeError: sizes or strides that do not fit.
        ConfigError: another dtype, a head dim above 256, a window or n_parts that cannot be, tensors on several devices; no
            triton here, or tensors on a CPU without its interpreter.

    Source: Flash-Decoding, as the module says; the group's heads together as in Ainslie et al. 2023, arXiv 2305.13245.
    """
    _check(q, k, v, lengths, window, n_parts)
    (B, H, D), (Hkv, S) = q.shape, k.shape[1:3]
    if S == 0 or q.numel() == 0:
        return torch.zeros_like(q)
    _check_runnable(q)
    span = S if window is None else min(S, window)
    tokens = max(SMALLEST_PRODUCT, min(128, TILE_BYTES // (_padded(D) * q.element_size())))
    part, n_parts = _split(span, tokens, n_parts or _enough_parts(B * Hkv, q.device))
    # bfloat16 is the one type that the interpreter can't multiply
    product = torch.float32 if interpreted() and q.dtype == torch.bfloat16 else q.dtype
    lengths = None if lengths is None else lengths.to(q.device)

    averages = q.new_empty(B, H, n_parts, D, dtype=torch.float32)  # (B, H, P, D)
    logs = q.new_empty(B, H, n_parts, dtype=torch.float32)  # (B, H, P)
    out = q.new_empty(B, H, D)
    with torch.cuda.device_of(q):  # triton launches on the current device
        _attend_to_part[B, Hkv, n_parts](
            q, k, v, lengths, averages, logs,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
            S, span, part, 1 / math.sqrt(D) if scale is None else float(scale),
            G=H // Hkv, HEADS=_padded(H // Hkv), D=D, DIMS=_padded(D),
            TOKENS=tokens, PRODUCT=getattr(tl, str(product).removeprefix("torch.")), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        _merge_parts[(B * H,)](
            averages, logs, out, n_parts,
            PARTS=triton.next_power_of_2(n_parts), D=D, DIMS=_padded(D), num_warps=2 * WARPS,
        )  # fmt: skip
    return out


def interpreted() -> bool:
    """Whether triton was imported as its interpreter (``TRITON_INTERPRET=1``), which takes tensors on a CPU."""
    return triton is not None and not isinstance(_attend_to_part, triton.JITFunction)


def _padded(n: int) -> int:
    """The next size that a matrix product on tensor cores takes: a power of two, 16 or more."""
    return max(SMALLEST_PRODUCT, 1 << (n - 1).bit_length())


def _enough_parts(programs: int, device: torch.device) -> int:
    """How many parts give every multiprocessor its programs, where there are ``programs`` rows and K/V heads."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(MAX_PARTS, PROGRAMS_PER_PROCESSOR * processors // programs))


def _split(span: int, tokens: int, n_parts: int) -> tuple[int, int]:
    """Tokens of a part, a multiple of ``tokens``, and how many such parts hold ``span`` tokens: ``n_parts`` at most.

    >>> _split(32_768, 32, 66)
    (512, 64)
    """
    part = math.ceil(span / n_parts / tokens) * tokens
    return part, math.ceil(span / part)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window: int | None, n_parts: int | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape:
        raise ShapeError(f"expected q (B, H, D), one token a row, and k and v alike, (B, Hkv, S, D); got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[3]:
        raise ShapeError(f"q needs the batch size and the head dim of k and v; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"query heads must be a multiple of K/V heads; got {q.shape[1]} and {k.shape[1]}")
    if q.shape[2] > MAX_HEAD_DIM:
        raise ConfigError(
            f"this kernel takes head dims up to {MAX_HEAD_DIM}; got {q.shape[2]}: use scaled_dot_product_attention"
        )
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in (q, k, v)):
        raise ShapeError("the numbers of one head must lie side by side in q, k and v: call .contiguous() on them")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ConfigError(
            f"q, k and v must all be float16, all bfloat16 or all float32; got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ConfigError(f"q, k and v must be on one device; got {q.device}, {k.device} and {v.device}")
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64)):
        raise ShapeError(
            f"lengths holds a whole number for each of the {q.shape[0]} rows; got {tuple(lengths.shape)} of {lengths.dtype}"
        )
    check_window(window)
    if n_parts is not None and not 1 <= n_parts <= MAX_PARTS:
        raise ConfigError(f"the cache is split into 1 to {MAX_PARTS} parts; got n_parts={n_parts}")


def _check_runnable(q: Tensor) -> None:
    if triton is None:
        raise ConfigError(
            "this kernel is written in Triton, and Python found no package triton here: torch for NVIDIA GPUs brings it, and "
            "on any Linux machine `pip install triton` adds it, in the version that goes with your torch (3.7.1 with 2.13). "
            "Elsewhere use scaled_dot_product_attention, which gives the same numbers"
        )
    if q.device.type == "cpu" and not interpreted():
        raise ConfigError(
            "this kernel runs on a GPU and got tensors on a CPU: move them, or set the environment variable "
            "TRITON_INTERPRET=1 before triton is first imported, for its interpreter (very slow). torch imports triton with the "
            "first step of an optimizer, so that means at the very start. For speed on a CPU use "
            "scaled_dot_product_attention, which gives the same numbers"
        )
