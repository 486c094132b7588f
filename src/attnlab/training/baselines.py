"""What the companion is compared with: a compressor and a 5-gram, on the same files and in the same bits per byte."""

import lzma

import numpy as np
from jaxtyping import Float, Int

from attnlab.errors import ConfigError, InputError

DICTIONARY_BYTES = 64 * 2**20  # xz looks this far back: past the whole training text


def xz_bits_per_byte(text: bytes, before: bytes = b"") -> float:
    """Bits that ``xz -9e`` with a 64 MiB dictionary needs per byte of ``text``, after it has packed ``before``.

    That is the difference of two packed sizes, so headers count only where ``before`` is empty.
    """
    if not text:
        raise InputError("no text came to compress")
    packed = _xz_size(before + text) - (_xz_size(before) if before else 0)
    return 8 * packed / len(text)


def _xz_size(data: bytes) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": DICTIONARY_BYTES}]
    packer = lzma.LZMACompressor(format=lzma.FORMAT_XZ, filters=filters)
    return len(packer.compress(data)) + len(packer.flush())


class KneserNey:
    """An interpolated Kneser-Ney n-gram over token ids (Chen & Goodman 1998, TR-10-98, section 3), counted with numpy.

        P(w | h) = max(c(h w) - D, 0) / c(h ·) + D · N(h ·) / c(h ·) · P(w | h without its first token)

    c counts occurrences at the highest order and, below it, the different tokens that came before; N counts the
    different tokens that came after h. Below one token: every token but ``bos`` alike. An n-gram never reaches across
    ``bos``, which nothing precedes, so one that starts with it keeps its occurrences as its count. A history never seen
    passes the question on unchanged.

    Tokens of an n-gram lie side by side in one uint64, so counting is ``np.unique`` and looking up is ``searchsorted``.

    Args:
        ids: the training files in one stream, each behind a ``bos``. order: the n, 5 by default.
    """

    def __init__(self, ids: Int[np.ndarray, " N"], vocab_size: int, bos: int, order: int = 5) -> None:
        self.vocab_size, self.bos, self.order = vocab_size, bos, order
        self.bits = np.uint64(max(1, (vocab_size - 1).bit_length()))
        if int(self.bits) * order > 64:
            raise ConfigError(
                f"{order} tokens of a vocabulary of {vocab_size} do not fit 64 bits; choose an order of {64 // int(self.bits)}"
            )
        if len(ids) == 0 or ids[0] != bos:
            raise InputError(f"the training stream must start with <s> ({bos})")
        self.tables = []  # lowest order first
        grams, counts = np.unique(self._grams(ids, order), return_counts=True)
        for n in range(order, 0, -1):
            self.tables.insert(0, _Table(grams, counts, self.bits))
            if n > 1:
                grams, counts = self._one_shorter(ids, grams, n - 1)

    def log2_probabilities(self, ids: Int[np.ndarray, " N"], discount: float) -> Float[np.ndarray, " N"]:
        """log₂ P of every token given all that the order allows before it in its file; 0 for ``bos``, which is given."""
        place = np.arange(len(ids))
        starts = np.where(ids == self.bos, place, 0)
        depth = place - np.maximum.accumulate(starts) + 1  # tokens of the file up to and with this one
        p = np.full(len(ids), 1.0 / (self.vocab_size - 1))
        for n, table in enumerate(self.tables, start=1):
            where = np.flatnonzero((depth >= n) & (ids != self.bos))
            p[where] = table.interpolate(self._pack(ids, where, n), discount, p[where])
        return np.where(ids == self.bos, 0.0, np.log2(p))

    def bits_per_byte(self, ids: Int[np.ndarray, " N"], n_bytes: int, discount: float) -> float:
        return float(-self.log2_probabilities(ids, discount).sum() / n_bytes)

    def _pack(self, ids: np.ndarray, last: np.ndarray, n: int) -> np.ndarray:
        """The n-grams that end at ``last``, first token in the highest bits."""
        packed = np.zeros(len(last), dtype=np.uint64)
        for back in range(n - 1, -1, -1):
            packed = (packed << self.bits) | ids[last - back].astype(np.uint64)
        return packed

    def _grams(self, ids: np.ndarray, n: int, first_bos: bool = False) -> np.ndarray:
        """Every n-gram with no ``bos`` behind its first token; with ``first_bos`` those alone that start with it."""
        last = np.arange(n - 1, len(ids))
        fine = np.ones(len(last), dtype=bool)
        for back in range(n - 1):
            fine &= ids[last - back] != self.bos
        if n == 1 or first_bos:
            fine &= (ids[last - (n - 1)] == self.bos) == (n > 1)
        return self._pack(ids, last[fine], n)

    def _one_shorter(self, ids: np.ndarray, longer: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n-grams with how many tokens came before each, from the (n+1)-grams; occurrences where ``bos`` is first."""
        grams, counts = np.unique(
            longer & ((np.uint64(1) << self.bits * np.uint64(n)) - np.uint64(1)), return_counts=True
        )
        if n == 1:
            return grams, counts
        at_start, occurrences = np.unique(self._grams(ids, n, first_bos=True), return_counts=True)
        grams, counts = np.concatenate((grams, at_start)), np.concatenate((counts, occurrences))
        order = np.argsort(grams)
        return grams[order], counts[order]


class _Table:
    """One order: sorted n-grams with counts, and for every history the sum of them and how many there are."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, bits: np.uint64) -> None:
        self.grams, self.counts, self.bits = grams, counts, bits
        self.histories, first = np.unique(grams >> bits, return_index=True)
        self.totals = np.add.reduceat(counts, first) if len(first) else counts  # c(h ·)
        self.kinds = np.diff(first, append=len(grams))  # N(h ·)

    def interpolate(self, grams: np.ndarray, discount: float, lower: np.ndarray) -> np.ndarray:
        if not len(self.grams):  # every training file is shorter than this
            return lower
        gram, known = _find(self.grams, grams)
        count = np.where(known, self.counts[gram], 0)
        history, seen = _find(self.histories, grams >> self.bits)
        total, kinds = self.totals[history], self.kinds[history]
        p = (np.maximum(count - discount, 0) + discount * kinds * lower) / total
        return np.where(seen, p, lower)


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each is in the sorted table, and whether it is there at all."""
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted
