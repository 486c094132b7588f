"""Attention records: every head's weights over one text, from attnlab models and from any ``transformers`` model.

A record is what the figures and ``attnlab.heads`` read. It is plain data: no model is needed to open one.
"""

import errno
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from attnlab.attention import causal_mask
from attnlab.errors import CapacityError, CheckpointError, ConfigError, InputError, ShapeError
from attnlab.mistral import Mistral

FORMATS = {16: 1, 8: 2}  # bits a weight: version of the file
SCALES_PER_HALVING = 16  # of 8-bit rows: scales are 2^(-byte/16), at most 4.5% above the row's largest weight
LARGE = 100_000_000  # bytes from which on a record is announced before it is made


@dataclass
class AttentionRecord:
    """Who looked at whom. ``weights[layer, head, query, key]``; every row sums to 1, within float16.

    ``query_tokens`` and ``key_tokens`` are labels, the same list unless it is cross-attention. ``window`` counts keys,
    the query's own included; None: no window, or not the same one in every layer. ``causal``: no query sees what follows.

    Raises ShapeError where the parts do not fit together.
    """

    weights: Float16[np.ndarray, "L H T S"]
    query_tokens: list[str]
    key_tokens: list[str]
    n_kv_heads: int
    window: int | None
    causal: bool
    model_name: str

    def __post_init__(self) -> None:
        if not isinstance(self.weights, np.ndarray) or self.weights.dtype != np.float16 or self.weights.ndim != 4:
            raise ShapeError(f"a record's weights are a float16 array (layers, heads, T, S); got {_what(self.weights)}")
        _, H, T, S = self.weights.shape
        if (len(self.query_tokens), len(self.key_tokens)) != (T, S):
            raise ShapeError(
                f"weights over {T} queries and {S} keys need as many labels; "
                f"got {len(self.query_tokens)} and {len(self.key_tokens)}"
            )
        if self.n_kv_heads < 1 or H % self.n_kv_heads:
            raise ShapeError(f"{H} heads cannot share {self.n_kv_heads} key/value heads evenly")

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.weights.nbytes

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.weights.shape[1] // self.n_kv_heads

    def __repr__(self) -> str:
        shape = " × ".join(str(n) for n in self.weights.shape)
        return f"AttentionRecord({self.model_name}: {shape} (layers, heads, queries, keys), {self.nbytes:,} bytes)"

    def save(self, path: str | Path, bits: int = 16) -> None:
        """Write one ``.npz`` file (no pickle in it), beside its place first.

        ``bits=8`` keeps every weight within 1/510 (see ``encode``) and none that causality forbids, compressed: a quarter
        and less of 16 bits. ``load`` gives 16 bits again, in rows that sum to 1.

        Raises ConfigError for other bits, InputError for a folder that is not there, CapacityError for a full disk.
        """
        if bits not in FORMATS:
            raise ConfigError(f"a weight is saved in {' or '.join(map(str, FORMATS))} bits; got {bits!r}")
        path = Path(path)
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "weights"}
        L, H, T, S = self.weights.shape
        if bits == 8:
            facts["n_heads"] = H
            sent = sent_cells(T, S, self.causal)
            arrays = {"maps": np.stack([encode(layer, sent) for layer in self.weights])}  # (L, bytes)
        else:
            arrays = {"weights": self.weights}
        facts = json.dumps({"format": FORMATS[bits], **facts}).encode()
        write = np.savez_compressed if bits == 8 else np.savez
        beside = path.with_name(path.name + ".tmp")
        try:
            with open(beside, "wb") as file:
                write(file, facts=np.frombuffer(facts, dtype=np.uint8), **arrays)
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            if error.errno == errno.ENOSPC:
                raise CapacityError(
                    f"no room for {self.nbytes:,} bytes at {path}: free some, or save elsewhere"
                ) from error
            raise InputError(
                f"cannot write a record to {path}: {error.strerror}; give a file in a folder that exists"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote. Raises InputError where there is no file, CheckpointError for a damaged or foreign one."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no record at {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(file["facts"].tobytes())
                version = facts.pop("format")
                if version not in FORMATS.values():
                    known = " and ".join(map(str, FORMATS.values()))
                    raise CheckpointError(f"{path} is a record of format {version}; this attnlab reads {known}")
                if version == FORMATS[16]:
                    return cls(weights=file["weights"], **facts)
                n_heads = facts.pop("n_heads")
                sent = sent_cells(len(facts["query_tokens"]), len(facts["key_tokens"]), facts["causal"])
                layers = [_rescaled(decode(layer, n_heads, sent)) for layer in file["maps"]]
                return cls(weights=np.stack(layers), **facts)
        except CheckpointError:
            raise
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise CheckpointError(f"{path} is not a whole record ({error}); record and save it again") from error


def sent_cells(T: int, S: int, causal: bool) -> np.ndarray:
    """(T, S), True where an 8-bit map has a byte: what a window hides has one too, zero, which compresses to nothing."""
    return causal_mask(T, S).numpy() if causal else np.ones((T, S), dtype=bool)


def encode(weights: Float[np.ndarray, "H T S"], sent: np.ndarray) -> UInt8[np.ndarray, " bytes"]:
    """One layer's weights as bytes: head by head, row by row, each row its scale and then the keys that ``sent`` keeps.

    The first key's byte is its weight in 255ths. The other keys' are in 255ths of the row's scale, 2^(-byte/16), the
    smallest that reaches the row's largest weight beside the first key's. So every weight is within 1/510 of the truth,
    and where a sink takes nearly all, what the row has left is as fine as any: the page can hide the sink and rescale.
    """
    H, T, S = weights.shape
    w = weights.astype(np.float64)
    largest = np.maximum(w[..., 1:].max(-1, initial=0.0), 2.0**-16)
    exponents = np.clip(np.floor(-SCALES_PER_HALVING * np.log2(largest)), 0, 255)  # (H, T)
    scales = np.repeat(np.exp2(-exponents / SCALES_PER_HALVING)[..., None], S, axis=-1)
    scales[..., 0] = 1.0
    rows = np.empty((H, T, 1 + S), dtype=np.uint8)
    rows[..., 0] = exponents
    rows[..., 1:] = np.minimum(np.rint(255 * w / scales), 255)
    keep = np.concatenate([sent.any(-1, keepdims=True), sent], axis=-1)  # (T, 1 + S): a row without keys has no scale
    return rows[:, keep].ravel()


def decode(data: UInt8[np.ndarray, " bytes"], n_heads: int, sent: np.ndarray) -> Float[np.ndarray, "H T S"]:
    """The weights again, from ``encode``'s bytes, as ``load`` and the page of an explorer read them."""
    keep = np.concatenate([sent.any(-1, keepdims=True), sent], axis=-1)
    rows = np.zeros((n_heads, *keep.shape))
    rows[:, keep] = data.reshape(n_heads, -1)
    weights = rows[..., 1:] / 255
    weights[..., 1:] *= np.exp2(-rows[..., :1] / SCALES_PER_HALVING)
    return weights


def _rescaled(weights: Float[np.ndarray, "H T S"]) -> Float16[np.ndarray, "H T S"]:
    """Rows brought back to a sum of 1, from which rounding each weight took them a percent or so away."""
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=weights, where=total > 0).astype(np.float16)


def record_bytes(n_layers: int, n_heads: int, n_tokens: int) -> int:
    """Bytes of a record: a float16 for every layer, head, query and key.

    >>> record_bytes(n_layers=32, n_heads=32, n_tokens=1000)
    2048000000
    """
    return n_layers * n_heads * n_tokens**2 * 2


def record_attention(
    model, text: str | Sequence[int] | Tensor, tokenizer=None, max_bytes: int = 2_000_000_000
) -> AttentionRecord:
    """Run ``model`` once over ``text`` and keep every head's weights.

    Args:
        model: a ``LanguageModel`` (what ``attnlab.load`` gives), an ``attnlab.Mistral``, or any ``transformers`` model
            that is an encoder or a decoder. The latter runs with its eager attention, the only one that has weights to
            show, and gets its own back afterwards. An encoder-decoder is refused: pass its encoder.
        text: text, taken as it stands (no chat template), or ids.
        tokenizer: attnlab's or transformers'. It encodes the text and labels the tokens; without it, ids are labels.
        max_bytes: of the record. The call itself holds one more layer of an attnlab model, in the model's dtype, and
            all layers of a transformers model.

    Says on stderr how much it will take from 100 MB on. Raises CapacityError beyond ``max_bytes``, InputError for no
    tokens, text without a tokenizer or ids outside the vocabulary, ConfigError for a model that gives no weights.
    """
    if isinstance(getattr(model, "model", None), Mistral):  # a LanguageModel
        tokenizer = tokenizer or model.tokenizer
        model = model.model
    ids = _as_ids(text, tokenizer)
    record = _record_attnlab if isinstance(model, Mistral) else _record_transformers
    facts, weights = record(model, ids, max_bytes)
    labels = _labels(ids, tokenizer)
    return AttentionRecord(weights=weights, query_tokens=labels, key_tokens=labels, **facts)


def _record_attnlab(model: Mistral, ids: list[int], max_bytes: int) -> tuple[dict, np.ndarray]:
    config = model.config
    _check_ids(ids, config.vocab_size)
    weights = _room(config.n_layers, config.n_heads, len(ids), max_bytes)

    def keep(layer: int, layer_weights: Tensor) -> None:
        weights[layer] = _checked(layer, layer_weights, weights.shape[1:])

    with _evaluating(model):
        model(torch.tensor([ids], device=model.device), last_only=True, on_weights=keep)
    return {
        "n_kv_heads": config.n_kv_heads,
        "window": config.window,
        "causal": True,
        "model_name": config.name,
    }, weights


def _record_transformers(model, ids: list[int], max_bytes: int) -> tuple[dict, np.ndarray]:
    if not hasattr(model, "config") or not hasattr(model, "set_attn_implementation"):
        raise InputError(
            f"expected a LanguageModel, an attnlab.Mistral or a transformers model; got {type(model).__name__}"
        )
    parts = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if (
        getattr(model.config, "is_encoder_decoder", False) and {"encoder", "decoder"} <= parts
    ):  # the encoder's config says so as well
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder with three kinds of attention; record its encoder alone: "
            f"record_attention(model.get_encoder(), ...)"
        )
    config = model.config.get_text_config()
    n_layers, n_heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not isinstance(n_layers, int) or not isinstance(n_heads, int):
        raise ConfigError(f"the config of {type(model).__name__} counts no layers and heads of attention to record")
    _check_ids(ids, config.vocab_size)
    weights = _room(n_layers, n_heads, len(ids), max_bytes)
    with _evaluating(model), _eager(model):
        device = model.get_input_embeddings().weight.device
        try:
            out = model(input_ids=torch.tensor([ids], device=device), output_attentions=True)
        except (IndexError, RuntimeError) as error:
            longest = getattr(config, "max_position_embeddings", None)
            if isinstance(longest, int) and len(ids) > longest:
                raise InputError(f"{len(ids)} tokens came and the model has positions for {longest}") from error
            raise
    maps = getattr(out, "attentions", None) or ()
    if len(maps) != n_layers or any(m is None for m in maps):
        given = sum(m is not None for m in maps)
        raise ConfigError(
            f"{type(model).__name__} gave weights for {given} of its {n_layers} layers: "
            f"not every layer is softmax attention, so it cannot be recorded"
        )
    causal = True
    for layer, layer_weights in enumerate(maps):
        weights[layer] = _checked(layer, layer_weights, weights.shape[1:])
        causal = causal and not layer_weights.triu(1).any().item()  # seen, before float16 rounds small weights to 0
    return {
        "n_kv_heads": _n_kv_heads(config),
        "window": _window(config),
        "causal": causal,
        "model_name": config.name_or_path or config.model_type,
    }, weights


def _n_kv_heads(config) -> int:
    """Key/value heads by the names that configs use. Falcon's ``multi_query`` counts only without its new decoder."""
    if isinstance(n := getattr(config, "num_key_value_heads", None), int):
        return n
    if getattr(config, "new_decoder_architecture", False):
        return config.num_kv_heads
    return 1 if getattr(config, "multi_query", False) else config.num_attention_heads


def _window(config) -> int | None:
    """The window that every layer has; transformers counts as we do (``masking_utils``: kv_idx > q_idx - window)."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    return window if window and all(kind == "sliding_attention" for kind in kinds) else None


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout, which would leave rows that do not sum to 1; modes are put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _eager(model) -> Iterator[None]:
    """The model's readable attention. Other kinds give no weights: not an error, an empty tuple."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before == "eager":
        yield
        return
    problem = "it kept its own"  # some models only log that they cannot: Falcon in transformers 5.24
    try:
        model.set_attn_implementation("eager")
    except Exception as error:
        problem = str(error)
    if config._attn_implementation != "eager":
        raise ConfigError(
            f'{type(model).__name__} runs {before!r} attention, which gives no weights, and could not be set to "eager" '
            f'({problem}); load it with attn_implementation="eager"'
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _room(n_layers: int, n_heads: int, T: int, max_bytes: int) -> np.ndarray:
    nbytes = record_bytes(n_layers, n_heads, T)
    size = f"a record of {T} tokens × {n_layers} layers × {n_heads} heads takes {nbytes:,} bytes"
    if nbytes > max_bytes:
        raise CapacityError(f"{size}, more than max_bytes={max_bytes:,}; shorten the text or raise max_bytes")
    if nbytes >= LARGE:
        print(size, file=sys.stderr)
    try:
        return np.empty((n_layers, n_heads, T, T), dtype=np.float16)
    except MemoryError as error:
        raise CapacityError(f"{size}, and there is no such room; shorten the text") from error


def _checked(layer: int, weights: Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    if tuple(weights.shape) != (1, *shape):
        raise ShapeError(
            f"layer {layer}: expected weights (1, heads, T, T) = {(1, *shape)}; got {tuple(weights.shape)}"
        )
    if not torch.isfinite(weights).all():
        raise InputError(f"layer {layer} has weights that are not numbers; try the model in float32")
    return weights[0].to("cpu", torch.float16).numpy()


def _as_ids(text, tokenizer) -> list[int]:
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("text needs a tokenizer: pass one, or pass ids")
        ids = tokenizer.encode(text) if text else []
    else:
        array = np.asarray(text)
        if array.ndim == 2 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise InputError(f"expected text or one row of ids; got {_what(array)}")
        ids = array.tolist()
    if not ids:
        raise InputError("no tokens came: a record needs at least one")
    return ids


def _check_ids(ids: list[int], vocab_size: int) -> None:
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise InputError(
            f"ids must be 0 to {vocab_size - 1}; got {wrong[0]}: was the text encoded by another model's tokenizer?"
        )


def _labels(ids: list[int], tokenizer) -> list[str]:
    piece: Callable[[int], str] = str
    if hasattr(tokenizer, "piece"):
        piece = tokenizer.piece
    elif tokenizer is not None:
        return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    return [piece(i) for i in ids]


def _what(x) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if hasattr(x, "shape") else type(x).__name__
