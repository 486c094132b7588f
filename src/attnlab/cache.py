"""Key/value caches: what a decoder keeps of the past so that it need not compute it again.

Keys are stored already rotated: a key's rotation depends on its own position, which never changes, so a slot can be read
in any order. Every row of the batch has a position of its own.

A forward pass of T tokens is: ``positions = cache.positions(T)``; for every layer ``k, v, sees = cache.update(layer, k, v)``
and attention with ``**sees``; then ``cache.advance(T)``.
"""

from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.attention import check_window, visible
from attnlab.errors import CapacityError, ConfigError, ShapeError


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
            if size < 1:
                raise ConfigError(f"a cache needs {name} of 1 or more; got {size}")
        shape = (n_layers, batch, n_kv_heads, max_len, head_dim)
        try:
            self.k = torch.zeros(shape, dtype=dtype, device=device)  # (L, B, Hkv, slots, D)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            self.k = None  # keys that found room where values did not
            raise CapacityError(f"no room for a cache of shape {shape} twice: {error}") from error
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
        return (
            f"{type(self).__name__}({tuple(self.k.shape)} twice, {self.k.dtype}, {self.nbytes:,} bytes, seen {lengths})"
        )

    def reset(self) -> None:
        """Forget every row. What is left in the slots is never read: it lies beyond the rows' lengths."""
        self.lengths.zero_()

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
        if not self.static and self.max_len is not None and int(self.lengths.max()) + T > self.max_len:
            raise CapacityError(
                f"the cache holds {self.max_len} tokens a row, {int(self.lengths.max())} are in it and {T} more came; "
                f"make it longer (max_len) or the text shorter"
            )
        ahead = torch.arange(T, device=self.lengths.device)
        return (self.lengths[:, None] + ahead).to(self.k.device)

    def advance(self, T: int) -> None:
        """Count ``T`` tokens as seen, once every layer has them."""
        self.lengths += T

    def update(
        self, layer: int, k: Float[Tensor, "B Hkv T D"], v: Float[Tensor, "B Hkv T D"]
    ) -> tuple[Float[Tensor, "B Hkv S D"], Float[Tensor, "B Hkv S D"], dict]:
        """Take in a layer's new keys and values; return all that the new queries may read, and what they see of it.

        The third value goes to ``scaled_dot_product_attention`` as keywords: ``causal`` where all rows stand at the same
        position, else a ``mask`` of (B, 1, T, S).
        """
        self._check(k)
        T = k.shape[2]
        if not self.static and (start := self._common_length()) is not None:
            stop = start + T
            self.k[layer, :, :, start:stop] = k
            self.v[layer, :, :, start:stop] = v
            return self.k[layer, :, :, :stop], self.v[layer, :, :, :stop], {"causal": True, "window": self.window}
        positions = self.positions(T)
        self._write(layer, k, v, positions)
        stop = self.slots if self.static else int(self.lengths.max()) + T
        held = torch.arange(stop, device=k.device).expand(self.batch, stop)
        mask = visible(positions, held, self.window)[
            :, None
        ]  # (B, 1, T, S): what lies beyond a row's length is its future
        return self.k[layer, :, :, :stop], self.v[layer, :, :, :stop], {"mask": mask}

    def _common_length(self) -> int | None:
        """The rows' length if they all have the same."""
        first = int(self.lengths[0])
        return first if bool((self.lengths == first).all()) else None

    def _write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        rows = torch.arange(self.batch, device=k.device)[:, None]  # (B, 1)
        slots = positions % self.slots  # (B, T)
        self.k[layer][rows, :, slots] = k.transpose(1, 2).to(self.k.dtype)  # indexed dims first: (B, T, Hkv, D)
        self.v[layer][rows, :, slots] = v.transpose(1, 2).to(self.v.dtype)

    def _check(self, k: Tensor) -> None:
        want = (self.batch, self.k.shape[2], self.k.shape[4])
        if (k.shape[0], k.shape[1], k.shape[3]) != want:
            raise ShapeError(f"this cache takes keys of (B, Hkv, T, D) with B, Hkv, D = {want}; got {tuple(k.shape)}")


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
        self._check(k)
        T, W = k.shape[2], self.slots
        start = None if self.static else self._common_length()
        positions = self.positions(T)  # (B, T)
        if T == 1:  # the token it overwrites has just left the window
            self._write(layer, k, v, positions)
            if start is not None:  # every filled slot is within the window: nothing to mask
                filled = min(start + 1, W)
                return self.k[layer, :, :, :filled], self.v[layer, :, :, :filled], {}
            held = self.held_positions(positions[:, 0] + 1)
            return self.k[layer], self.v[layer], {"mask": visible(positions, held, W)[:, None]}
        if start == 0:
            keys, values, sees = k, v, {"causal": True, "window": W}
        else:
            held = self.held_positions(positions[:, 0])
            keys = torch.cat((self.k[layer], k.to(self.k.dtype)), dim=2)  # a copy: the slots are about to change
            values = torch.cat((self.v[layer], v.to(self.v.dtype)), dim=2)
            mask = visible(positions, torch.cat((held, positions), dim=1), W)
            sees = {"mask": mask[:, None]}  # (B, 1, T, W + T)
        keep = slice(max(0, T - W), T)  # two tokens of one chunk must not meet in one slot
        self._write(layer, k[:, :, keep], v[:, :, keep], positions[:, keep])
        return keys, values, sees
