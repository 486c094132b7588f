"""The attention explorer: a record's maps in 8 bits, and the numbers that sort its heads.

What goes into the page is small: 8-bit bytes of what the masks leave, a layer at a time, compressed, in base64. Not JSON
floats, which take ten bytes and more a weight.
"""

import base64
import zlib

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from attnlab import plots
from attnlab.attention import causal_mask
from attnlab.errors import CapacityError, ConfigError, InputError, ShapeError
from attnlab.explorer.base import Explorer
from attnlab.record import AttentionRecord, encode, sent_cells

MAX_TOKENS = 512  # a label each: more is no map a person reads
MAX_BYTES = 16_000_000  # of 8-bit weights, before they are compressed
WHOLE = 400_000  # up to so many bytes the layers come at once and make the thumbnails themselves
THUMBNAIL = 16  # cells a side, at most, of thumbnails sent beside the layers


class AttentionExplorer(Explorer):
    """Every head of a record as a thumbnail, one as a heat map, and its weights between the tokens of the text.

    Args:
        record: what ``attnlab.record_attention`` gives, or any ``AttentionRecord``: decoder, encoder, cross-attention.
        head: (layer, head) to open first; the still picture shows this one.

    Raises InputError for what is not a record or holds no attention weights (not numbers, rows beyond 1, weight where
    the record's mask forbids it), ShapeError for nothing to show or tokens that do not match, ConfigError for a head
    that is not there, CapacityError for more than a page can hold.
    """

    kind = "attention"

    def __init__(self, record: AttentionRecord, head: tuple[int, int] = (0, 0)) -> None:
        check(record, head)
        self.record, self.head = record, head
        super().__init__(data=payload(record, head))

    @property
    def alt(self) -> str:
        layer, head = self.head
        return (
            f"Heat map of layer {layer}, head {head} of {self.record.model_name}: a row for each of "
            f"{len(self.record.query_tokens)} queries, a column for each of {len(self.record.key_tokens)} keys"
        )

    def still(self) -> Figure:
        layer, head = self.head
        return plots.attention_map(
            self.record.weights[layer, head],
            self.record.query_tokens,
            self.record.key_tokens,
            title=f"layer {layer}, head {head}",
            mask=visible(self.record),
        )


def check(record: AttentionRecord, head: tuple[int, int]) -> None:
    """Everything that can be wrong, before anything is sent to a page."""
    if not isinstance(record, AttentionRecord):
        raise InputError(
            f"expected an AttentionRecord; got {type(record).__name__}: attnlab.record_attention(model, text) makes one"
        )
    weights = record.weights
    if weights.ndim != 4 or 0 in weights.shape:
        raise ShapeError(f"at least one layer, head, query and key are needed; got weights {weights.shape}")
    L, H, T, S = weights.shape
    if (len(record.query_tokens), len(record.key_tokens)) != (T, S):
        raise ShapeError(
            f"weights over {T} queries and {S} keys need as many tokens; "
            f"got {len(record.query_tokens)} and {len(record.key_tokens)}"
        )
    if wrong := [token for token in (*record.query_tokens, *record.key_tokens) if not isinstance(token, str)]:
        raise InputError(f"tokens are text; got {wrong[0]!r}")
    if not (isinstance(head, tuple) and len(head) == 2 and 0 <= head[0] < L and 0 <= head[1] < H):
        raise ConfigError(f"head is (layer, head), up to ({L - 1}, {H - 1}); got {head!r}")
    check_size(L, H, T, S, record.causal)
    mask = visible(record)
    for layer in range(L):  # a layer at a time: float32 copies of all would be large
        w = weights[layer].astype(np.float32)
        _refuse(~np.isfinite(w), layer, "is not a number; record the model again in float32")
        _refuse((w < 0) | (w > 1.001), layer, "is not between 0 and 1, as attention weights are")
        _refuse((w > 0) & ~mask, layer, "is forbidden by the record's own mask; are its causal and window right?")
        if (beyond := w.sum(-1) > 1.01).any():
            h, q = np.argwhere(beyond)[0]
            raise InputError(f"layer {layer}, head {h}, query {q}: the row sums to {w[h, q].sum():.3g}, more than 1")


def _refuse(wrong: np.ndarray, layer: int, why: str) -> None:
    if wrong.any():
        h, q, k = np.argwhere(wrong)[0]
        raise InputError(f"layer {layer}, head {h}: the weight from query {q} to key {k} {why}")


def visible(record: AttentionRecord) -> np.ndarray:
    """(T, S), True where a query may look at a key; the last query stands beside the last key."""
    T, S = record.weights.shape[2:]
    return causal_mask(T, S, record.window).numpy() if record.causal else np.ones((T, S), dtype=bool)


def map_bytes(n_layers: int, n_heads: int, T: int, S: int, causal: bool) -> int:
    """Bytes of all maps before they are compressed: one for every weight that is sent, and one for every row's scale.

    >>> map_bytes(n_layers=32, n_heads=32, T=24, S=24, causal=True)
    331776
    """
    sent = sent_cells(T, S, causal)
    return n_layers * n_heads * int(sent.sum() + sent.any(-1).sum())


def check_size(n_layers: int, n_heads: int, T: int, S: int, causal: bool) -> None:
    """Raises CapacityError for more than a page can hold."""
    tokens, nbytes = max(T, S), 0
    if tokens <= MAX_TOKENS:
        nbytes = map_bytes(n_layers, n_heads, T, S, causal)
    if tokens > MAX_TOKENS or nbytes > MAX_BYTES:
        came = f"{nbytes / 1e6:.0f} MB of maps" if nbytes else f"{tokens} tokens"
        raise CapacityError(
            f"{n_layers} layers × {n_heads} heads × {tokens} tokens are too many for a page: it holds {MAX_TOKENS} tokens "
            f"and {MAX_BYTES // 10**6} MB of maps, and {came} came. Record a shorter text, or keep some of the layers: "
            f"dataclasses.replace(record, weights=record.weights[:n])"
        )


def payload(record: AttentionRecord, head: tuple[int, int] = (0, 0)) -> dict:
    """All that the page gets: plain JSON, ``layers`` one string a layer, so that a page can fetch them one by one."""
    L, H, T, S = record.weights.shape
    sent = sent_cells(T, S, record.causal)
    groups = group_means(record.weights, record.n_kv_heads)
    return {
        "model_name": record.model_name,
        "n_layers": L,
        "n_heads": H,
        "n_kv_heads": record.n_kv_heads,
        "query_tokens": list(record.query_tokens),
        "key_tokens": list(record.key_tokens),
        "cross": is_cross(record),
        "causal": record.causal,
        "window": record.window,
        "head": [int(place) for place in head],
        "numbers": {
            "heads": numbers(record, record.weights),
            "groups": numbers(record, groups) if record.group_size > 1 else None,
        },
        "thumbnails": None if map_bytes(L, H, T, S, record.causal) <= WHOLE else packed(thumbnails(record.weights)),
        "layers": [packed(encode(layer, sent)) for layer in record.weights],
    }


def is_cross(record: AttentionRecord) -> bool:
    """Queries and keys are of two texts, so that there is no distance between them. A causal record's queries may be
    the last of its keys."""
    queries, keys = list(record.query_tokens), list(record.key_tokens)
    return queries != (keys[-len(queries) :] if record.causal else keys)


def packed(data: np.ndarray) -> str:
    """Bytes as text: zlib's format, which a browser inflates itself, in base64."""
    return base64.b64encode(zlib.compress(data.tobytes(), 9)).decode("ascii")


def group_means(weights: Float[np.ndarray, "L H T S"], n_kv_heads: int) -> Float[np.ndarray, "L Hkv T S"]:
    """The mean of the query heads that share a K/V head."""
    L, H, T, S = weights.shape
    return weights.reshape(L, n_kv_heads, H // n_kv_heads, T, S).mean(2, dtype=np.float32)


def thumbnails(weights: Float[np.ndarray, "L H T S"]) -> UInt8[np.ndarray, "L H t s"]:
    """At most THUMBNAIL cells a side, each the largest weight in it, so that a thin line stays a line."""
    T, S = weights.shape[2:]
    for axis, n in ((2, T), (3, S)):
        weights = np.maximum.reduceat(weights, np.arange(0, n, -(-n // THUMBNAIL)), axis=axis)
    return np.rint(255 * np.minimum(weights, 1).astype(np.float32)).astype(np.uint8)


def numbers(record: AttentionRecord, weights: Float[np.ndarray, "L n T S"]) -> dict[str, list[float] | None]:
    """What sorts heads, each a mean over the queries that have a choice of keys; in the order of layers and heads.

    - ``entropy``: -Σ w log2 w in bits. 0: all on one key; log2 n: evenly on n keys.
    - ``distance``: Σ w |query - key| in tokens; None for cross-attention.
    - ``first``: the weight on the first key.
    - ``…_without_first``: the same two of rows whose first key is taken out and the rest rescaled to what it was.
    """
    T, S = record.weights.shape[2:]
    mask = visible(record)
    apart = np.abs(np.arange(T)[:, None] + (S - T) - np.arange(S))  # (T, S)
    found = {"entropy": [], "distance": [], "first": [], "entropy_without_first": [], "distance_without_first": []}
    for layer in weights:
        w = layer.astype(np.float64)
        found["first"] += _mean(w[..., 0], mask.sum(-1) > 1)
        for suffix in ("", "_without_first"):
            seen = mask.copy()
            if suffix:
                w[..., 0] = 0
                seen[:, 0] = False
                total = w.sum(-1, keepdims=True)
                w = np.divide(w, total, out=np.zeros_like(w), where=total > 0)
            choice = seen.sum(-1) > 1
            logs = np.log2(w, out=np.zeros_like(w), where=w > 0)
            found["entropy" + suffix] += _mean(-(w * logs).sum(-1), choice)
            found["distance" + suffix] += _mean((w * apart).sum(-1), choice)
    return found | ({"distance": None, "distance_without_first": None} if is_cross(record) else {})


def _mean(values: Float[np.ndarray, "n T"], chosen: np.ndarray) -> list[float]:
    """Over the chosen queries, for each head; 0 where none is chosen. Two decimals are what a page shows."""
    return [round(float(v) + 0.0, 2) for v in values[:, chosen].mean(-1)] if chosen.any() else [0.0] * len(values)
