"""Key/value caches: what a decoder keeps of the past so that it need not compute it again.

Keys are stored already rotated: a key's rotation depends on its own position, which never changes, so a slot can be read
in any order. Every row of the batch has a position of its own.

A forward pass of T tokens is: ``positions = cache.positions(T)``; for every layer ``k, v, sees = cache.update(layer, k, v)``
and attention with ``**sees``; then ``cache.advance(T)``.
"""

from numbers import Integral
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.attention import check_window, visible
from attnlab.errors import CapacityError, ConfigError, ShapeError, first_line, ran_out_of_memory

SCALE_BYTES = 2  # of a bfloat16


class KVCache:
    """Room for ``max_len`` tokens a row, taken once; slot = position.

    Args:
        n_layers, batch, n_kv_heads, head_dim: its shape, with ``max_len``: two tensors of (L, B, Hkv, max_len, D).
        window: how many keys a query sees, its own included (None: all). Here it only masks: nothing is dropped.
        static: keep positions on the device and attend over every slot under a mask, so that no step depends on a
            number the host must read (what a CUDA graph needs). The caller then sees to it that nothing overflows.

    Raises ConfigError for sizes below 1 (or a CapacityError where memory for them is not to be had).
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        max_len: int,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        static: bool = False,
    ) -> None:
        check_window(window)
        sizes = {
            "n_layers": n_layers,
            "batch": batch,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "max_len": max_len,
        }
        for name, size in sizes.items():
            if not isinstance(size, Integral) or size < 1:
                raise ConfigError(f"a cache needs {name} of 1 or more; got {size!r}")
        shape = (n_layers, batch, n_kv_heads, max_len, head_dim)
        try:
            self.k = torch.zeros(shape, dtype=dtype, device=device)  # (L, B, Hkv, slots, D)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            self.k = None  # keys that found room where values did not
            if not ran_out_of_memory(error):
                raise
            raise CapacityError(f"no room for a cache of shape {shape} twice: {first_line(error)}") from error
        self.window = window
        self.static = static
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device if static else "cpu")  # tokens seen, by row

    @property
    def slots(self) -> int:
        """How many tokens are kept a row at most."""
        return self.k.shape[3]

    @property
    def max_len(self) -> int | None:
        """How many tokens a row can take in before it must be reset; None: any number."""
        return self.slots

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not."""
        return self.k.nbytes + self.v.nbytes

    def __repr__(self) -> str:
        lengths = self.lengths.tolist()
        shapes = f"keys {tuple(self.k.shape)}, values {tuple(self.v.shape)}"
        return f"{type(self).__name__}({shapes}, {self.k.dtype}, {self.nbytes:,} bytes, seen {lengths})"

    def reset(self) -> None:
        """Forget every row. What is left in the slots has no weight: it lies beyond the rows' lengths."""
        self.lengths.zero_()

    def clear(self) -> None:
        """Forget every row and what is in its slots: a weight of 0 hides every number, but 0 · NaN is NaN.

        For a row that goes to another conversation while others stand further on, and for a static cache.
        """
        self.reset()
        self.k.zero_()
        self.v.zero_()

    def row(self, i: int) -> Self:
        """Row ``i`` as a cache of batch 1 over the same memory: fill rows one by one, then decode them together."""
        if not 0 <= i < self.batch:
            raise ShapeError(f"rows are 0 to {self.batch - 1}; got {i}")
        return self._view(slice(i, i + 1))

    def front(self, n: int) -> Self:
        """The first ``n`` rows as a cache over the same memory: a step for those that are at work, while others rest."""
        if not 1 <= n <= self.batch:
            raise ShapeError(f"there are {self.batch} rows, and 1 or more can be at the front; got {n}")
        return self._view(slice(n))

    def move_row(self, source: int, target: int) -> None:
        """Put row ``source`` in the place of row ``target``, whose own content is lost."""
        self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]
        self.lengths[target] = self.lengths[source]

    def _view(self, rows: slice) -> Self:
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.k, view.v, view.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]
        return view

    def positions(self, T: int) -> Int[Tensor, "B T"]:
        """Positions of the next ``T`` tokens of each row. Raises CapacityError if they would not fit."""
        self._check_room(T)
        ahead = torch.arange(T, device=self.lengths.device)
        return (self.lengths[:, None] + ahead).to(self.k.device)

    def _check_room(self, T: int) -> None:
        if not self.static and self.max_len is not None and int(self.lengths.max()) + T > self.max_len:
            raise CapacityError(
                f"the cache holds {self.max_len} tokens a row, {int(self.lengths.max())} are in it and {T} more came; "
                f"make it longer (max_len) or the text shorter"
            )

    def advance(self, T: int) -> None:
        """Count ``T`` tokens as seen, once every layer has them."""
        self.lengths += T

    def update(
        self, layer: int, k: Float[Tensor, "B Hkv T D"], v: Float[Tensor, "B Hkv T D"]
    ) -> tuple[Float[Tensor, "B Hkv S D"], Float[Tensor, "B Hkv S D"], dict]:
        """Take in a layer's new keys and values; return all that the new queries may read, and what they see of it.

        Both come back in the dtype they came in, also where the cache keeps another. The third value goes to
        ``scaled_dot_product_attention`` as keywords: ``causal`` where all rows stand at the same position, else a ``mask`` of
        (B, 1, T, S).

        Raises ShapeError for keys and values of other sizes than the cache's, CapacityError if they do not fit.
        """
        self._check(k, v)
        T = k.shape[2]
        if not self.static and (start := self._common_length()) is not None:
            self._check_room(T)
            stop = start + T
            self.k[layer, :, :, start:stop] = k
            self.v[layer, :, :, start:stop] = v
            held = self._read(layer, stop, k.dtype)
            return *held, {"causal": True, "window": self.window}
        positions = self.positions(T)
        self._write(layer, k, v, positions)
        stop = self.slots if self.static else int(self.lengths.max()) + T
        held = torch.arange(stop, device=k.device).expand(self.batch, stop)
        mask = visible(positions, held, self.window)[
            :, None
        ]  # (B, 1, T, S): what lies beyond a row's length is its future
        return *self._read(layer, stop, k.dtype), {"mask": mask}

    def _read(self, layer: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first ``stop`` slots of a layer: the cache's own memory, or a copy where it keeps another dtype."""
        return self.k[layer, :, :, :stop].to(dtype), self.v[layer, :, :, :stop].to(dtype)

    def _common_length(self) -> int | None:
        """The rows' length if they all have the same."""
        first = int(self.lengths[0])
        return first if bool((self.lengths == first).all()) else None

    def _write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        rows = torch.arange(self.batch, device=k.device)[:, None]  # (B, 1)
        slots = positions % self.slots  # (B, T)
        self.k[layer][rows, :, slots] = k.transpose(1, 2).to(self.k.dtype)  # indexed dims first: (B, T, Hkv, D)
        self.v[layer][rows, :, slots] = v.transpose(1, 2).to(self.v.dtype)

    def _check(self, k: Tensor, v: Tensor) -> None:
        for name, new, held in (("keys", k, self.k), ("values", v, self.v)):
            want = (self.batch, held.shape[2], held.shape[4])
            if new.dim() != 4 or (new.shape[0], new.shape[1], new.shape[3]) != want or new.shape[2] != k.shape[2]:
                raise ShapeError(
                    f"this cache takes {name} of (B, Hkv, T, D) with B, Hkv, D = {want}; got {tuple(new.shape)}"
                    + (f" beside {tuple(k.shape)}" if new is v else "")
                )


class RollingKVCache(KVCache):
    """The last ``window`` tokens and no more: exactly ``window`` slots a row, slot = position mod window.

    This loses nothing that a model with this window could see (Mistral 7B, arXiv 2310.06825, section 2).

    Worked example, window 3, tokens at positions 0 … 4::

        after 0 1 2      slots hold 0 1 2
        after 3          3 1 2          position 3 goes to slot 0, over position 0, which no later query may see
        after 4          3 4 2          the query at 4 sees 2, 3 and 4: all that is there

    Several tokens at once (a prefill chunk) first attend to what is kept *and* to each other, and are written after:
    writing first would overwrite keys that the chunk's first queries still need.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        window: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        static: bool = False,
    ) -> None:
        super().__init__(n_layers, batch, n_kv_heads, head_dim, window, window, dtype, device, static)

    @property
    def max_len(self) -> None:
        return None

    def held_positions(self, lengths: Int[Tensor, " B"]) -> Int[Tensor, "B slots"]:
        """Which position each slot holds when ``lengths`` tokens have been seen; below 0: nothing yet.

        Slot s holds the largest position p < length with p mod window = s.
        """
        slots = torch.arange(self.slots, device=lengths.device)
        last = lengths[:, None] - 1
        return last - (last - slots) % self.slots  # (B, W)

    def update(self, layer, k, v):
        self._check(k, v)
        T, W = k.shape[2], self.slots
        start = None if self.static else self._common_length()
        positions = self.positions(T)  # (B, T)
        if T == 1:  # the token it overwrites has just left the window
            self._write(layer, k, v, positions)
            if start is not None:  # every filled slot is within the window: nothing to mask
                filled = min(start + 1, W)
                return *self._read(layer, filled, k.dtype), {}
            held = self.held_positions(positions[:, 0] + 1)
            return *self._read(layer, W, k.dtype), {"mask": visible(positions, held, W)[:, None]}

        def kept(x: Tensor) -> Tensor:
            """As it will be read again, so that a prompt and the same tokens one by one see the same numbers."""
            return x.to(self.k.dtype).to(x.dtype)

        if start == 0:
            keys, values, sees = kept(k), kept(v), {"causal": True, "window": W}
        else:
            held = self.held_positions(self.lengths.to(k.device))
            keys, values = self._read(layer, W, k.dtype)
            keys, values = (
                torch.cat((keys, kept(k)), dim=2),
                torch.cat((values, kept(v)), dim=2),
            )  # copies: slots will change
            mask = visible(positions, torch.cat((held, positions), dim=1), W)
            sees = {"mask": mask[:, None]}  # (B, 1, T, W + T)
        keep = slice(max(0, T - W), T)  # two tokens of one chunk must not meet in one slot
        self._write(layer, k[:, :, keep], v[:, :, keep], positions[:, keep])
        return keys, values, sees


class QuantizedKVCache(KVCache):
    """Keys and values in int8: D whole numbers and their scale for each token and K/V head, ``head_dim`` + 2 bytes.

    A number is q · scale, with q from -127 to 127; the largest of a head's D numbers has 127 or -127. The scale is a bfloat16
    and lies behind the D numbers in the same tensor, so a packed key is moved, rolled over and read as any other.

    What comes out of ``update`` is restored, in the dtype that came in, and the new tokens read themselves restored too: a
    prompt and the same tokens one by one see the same numbers. Only memory is saved: a layer's keys and values exist in full
    for as long as it works, and a step that restores them moves more bytes, not fewer.

    Args as for ``KVCache``, without a dtype.

    Raises ConfigError for sizes below 1 (or a CapacityError where memory for them is not to be had).
    """

    def __init__(self, n_layers: int, batch: int, n_kv_heads: int, head_dim: int, *sizes: int | None, **where) -> None:
        super().__init__(n_layers, batch, n_kv_heads, packed_bytes(head_dim), *sizes, dtype=torch.int8, **where)

    def update(self, layer, k, v):
        if k.shape[-1] != self.k.shape[4] - SCALE_BYTES:
            raise ShapeError(f"this cache takes keys of {self.k.shape[4] - SCALE_BYTES} numbers; got {tuple(k.shape)}")
        keys, values, sees = super().update(layer, quantize_heads(k), quantize_heads(v))
        return restore_heads(keys, k.dtype), restore_heads(values, v.dtype), sees


class QuantizedRollingKVCache(QuantizedKVCache, RollingKVCache):
    """The last ``window`` tokens in int8: a ``RollingKVCache`` that packs what it keeps as ``QuantizedKVCache`` does."""


def packed_bytes(head_dim: int) -> int:
    """What ``quantize_heads`` makes of one vector of ``head_dim`` numbers. Raises ConfigError for fewer than 1."""
    if head_dim < 1:
        raise ConfigError(f"a cache needs head_dim of 1 or more; got {head_dim}")
    return head_dim + SCALE_BYTES


def quantize_heads(x: Float[Tensor, "*b D"]) -> Int[Tensor, "*b packed"]:
    """Each vector of D numbers as D + 2 bytes: whole numbers from -127 to 127, and the bfloat16 scale they share.

    Numbers are rounded after their scale was, so that none is further off than half of it.

    >>> quantize_heads(torch.tensor([254.0, -3.0, 0.5]))[:3]
    tensor([127,  -2,   0], dtype=torch.int8)
    """
    codes, scale = rounded_to_int8(x.detach().float())
    return torch.cat((codes, scale.view(torch.int8)), dim=-1)


def rounded_to_int8(x: Float[Tensor, "*b D"]) -> tuple[Int[Tensor, "*b D"], Float[Tensor, "*b 1"]]:
    """Whole numbers from -127 to 127, and the bfloat16 scale that the D numbers of each vector share."""
    tiny = torch.finfo(torch.bfloat16).tiny  # zeros need a scale that can be divided by
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(tiny).to(torch.bfloat16)  # (…, 1)
    return (x / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


def restore_heads(packed: Int[Tensor, "*b packed"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*b D"]:
    """The numbers that stand for those that were quantized, in ``dtype``."""
    # A copy: in place the two bytes of a scale may start at an odd address.
    pairs = packed[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
    scale = pairs.view(torch.bfloat16)  # (…, 1)
    return (packed[..., :-SCALE_BYTES].float() * scale.float()).to(dtype)
