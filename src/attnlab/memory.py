"""The accounts: what a model's weights and its past cost in bytes, and so how fast it can decode at best.

Everything here is arithmetic on a model's shape, in exact whole bytes; nothing is measured and no model is made. A model is
given as a ``MistralConfig``, as a ``ModelShape``, or by the name of one in ``SHAPES``.

Per token and layer a cache holds one key and one value for each key/value head::

    2 · n_kv_heads · head_dim elements, or latent_dim of them for latent attention (DeepSeek-V2, arXiv 2405.04434)

and a decoded token reads every weight and every cached key and value once (Shazeer 2019, arXiv 1911.02150), which no
machine does faster than its memory allows.
"""

import difflib
import math
import textwrap
from dataclasses import dataclass, replace
from numbers import Real

import torch

from attnlab.attention import check_window
from attnlab.cache import packed_bytes
from attnlab.errors import CapacityError, ConfigError
from attnlab.layers import check_heads
from attnlab.mistral import PRESETS, MistralConfig

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
# Where linear weights are quantized: bits a weight, weights that share a scale (None: a whole row of the matrix), and bytes
# for it: a bfloat16, whatever is computed in, as torch's kernels take it; int4 has an offset of the same size with it.
QUANTIZED = {"int8": (8, None, 2), "int4": (4, 32, 4)}
RESERVE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Weights:
    """How many parameters a model has, apart by what a decoding step does with them.

    Args:
        linear: elements of the matrices every token is multiplied with, the output matrix among them.
        linear_rows: rows of all those matrices together (an int8 matrix has a scale for each).
        embedding: elements of a matrix that is only looked up: a token reads one row, which the accounts leave out.
        other: read at every step and never quantized: norms, biases, and a matrix that is both embedding and output.
        idle, idle_rows: of ``linear`` and ``linear_rows``, the experts that a token is not sent to.
        output: elements of the output matrix, which counts in ``linear`` or, where it is the embedding too, in ``other``.
    """

    linear: int
    linear_rows: int
    embedding: int = 0
    other: int = 0
    idle: int = 0
    idle_rows: int = 0
    output: int = 0

    @property
    def n_params(self) -> int:
        return self.linear + self.embedding + self.other


@dataclass(frozen=True)
class ModelShape:
    """What the accounts need to know of a model, of any family.

    Args:
        n_heads, n_kv_heads, head_dim: of one layer; all layers alike.
        windows: how many keys a query sees, its own included: one number (or None: all) for every layer, or one each.
        latent_dim: elements cached per token and layer in place of keys and values (latent attention).
        weights: None where the parameters were not counted; the accounts of weights then raise ConfigError.
        max_context: tokens the model was made for; None: not stated. The accounts go on beyond it, as arithmetic.
        d_model: size of a token's vector; the accounts do without it.
        source: where the numbers come from.
        kv_bias: whether the projections to keys and values have a bias; only ``with_kv_heads`` asks.

    Raises ConfigError for sizes below 1, heads that do not divide, or windows that are not one a layer.
    """

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    windows: int | tuple[int | None, ...] | None = None
    latent_dim: int | None = None
    weights: Weights | None = None
    max_context: int | None = None
    source: str = ""
    d_model: int | None = None
    kv_bias: bool = False

    def __post_init__(self) -> None:
        for field in ("n_layers", "head_dim", "latent_dim", "max_context", "d_model"):
            size = getattr(self, field)
            if size is None and field in ("latent_dim", "max_context", "d_model"):
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"{self.name}: {field} must be a whole number of 1 or more; got {size!r}")
        check_heads(self.n_heads, self.n_kv_heads)
        windows = self.windows if isinstance(self.windows, tuple) else (self.windows,) * self.n_layers
        if len(windows) != self.n_layers:
            raise ConfigError(f"{self.name}: {self.n_layers} layers need as many windows; got {len(windows)}")
        for window in windows:
            check_window(window)
        object.__setattr__(self, "windows", windows)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def kind(self) -> str:
        """The style of attention, as ``n_kv_heads`` decides it (or a latent)."""
        if self.latent_dim is not None:
            return "latent"
        if self.n_kv_heads == self.n_heads:
            return "multi-head"
        return "multi-query" if self.n_kv_heads == 1 else "grouped-query"

    @property
    def elements_per_token(self) -> int:
        """Elements one layer caches for one token."""
        return 2 * self.n_kv_heads * self.head_dim if self.latent_dim is None else self.latent_dim

    @classmethod
    def from_config(cls, config: MistralConfig, **changes) -> "ModelShape":
        """The shape of a Mistral decoder, with its parameters counted as ``Mistral(config)`` makes them."""
        c = config
        weights = _decoder_weights(
            c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.d_model, c.d_ff, c.vocab_size, tie=c.tie_embeddings
        )
        shape = {
            "name": c.name, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads,
            "head_dim": c.head_dim, "windows": c.window, "weights": weights, "source": "MistralConfig", "d_model": c.d_model,
        }  # fmt: skip
        return cls(**(shape | changes))


def _decoder_weights(
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    d_model: int,
    d_ff: int,
    vocab_size: int,
    *,
    tie: bool = False,  # one matrix is embedding and output
    gated: bool = True,  # feed-forward of three matrices; else of two
    norms: int = 2,  # a layer; one more follows the last
    norm_bias: bool = False,
    qkv_bias: bool = False,
    bias: bool = False,  # on every matrix of a layer
    positions: int = 0,  # that have a learned vector each
    experts: tuple[int, int] = (1, 1),  # feed-forward layers beside each other, and how many of them a token is sent to
) -> Weights:
    """The parameters of a decoder of attention and feed-forward layers."""
    queries, keys = n_heads * head_dim, n_kv_heads * head_dim
    hidden = (2 if gated else 1) * d_ff
    ff, ff_rows = d_model * (hidden + d_ff), hidden + d_model  # of one expert
    n_experts, active = experts
    router = n_experts if n_experts > 1 else 0
    linear = n_layers * (d_model * (2 * queries + 2 * keys) + n_experts * ff + d_model * router)
    rows = n_layers * (queries + 2 * keys + d_model + n_experts * ff_rows + router)
    biases = (queries + 2 * keys) * (qkv_bias or bias) + (d_model + ff_rows) * bias
    other = n_layers * biases + (norms * n_layers + 1) * d_model * (2 if norm_bias else 1)
    idle, idle_rows = (n_layers * (n_experts - active) * of_one for of_one in (ff, ff_rows))
    vocabulary, looked_up = vocab_size * d_model, positions * d_model
    if tie:
        return Weights(linear, rows, looked_up, other + vocabulary, idle, idle_rows, vocabulary)
    return Weights(linear + vocabulary, rows + vocab_size, looked_up + vocabulary, other, idle, idle_rows, vocabulary)


def _decoder(
    name: str, n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int, d_model: int, d_ff: int, vocab_size: int,
    windows: int | tuple[int | None, ...] | None = None, *, max_context: int, source: str, **parts,
) -> ModelShape:  # fmt: skip
    """A published shape with its parameters counted."""
    weights = _decoder_weights(n_layers, n_heads, n_kv_heads, head_dim, d_model, d_ff, vocab_size, **parts)
    return ModelShape(
        name, n_layers, n_heads, n_kv_heads, head_dim, windows,
        weights=weights, max_context=max_context, source=source, d_model=d_model,
        kv_bias=parts.get("qkv_bias", False) or parts.get("bias", False),
    )  # fmt: skip


def _deepseek(
    name: str, n_layers: int, n_dense: int, d_model: int, d_ff: int, expert_ff: int, experts: int, shared: int,
    active: int, vocab_size: int,
) -> ModelShape:  # fmt: skip
    """DeepSeek V2 and V3, which differ in these numbers: latent attention, and experts in all but the first layers.

    Left out: V3's layer that predicts a second token, and its 14,848 router biases.
    """
    n_heads, head_dim, rope_dim, q_rank, kv_rank = 128, 128, 64, 1536, 512
    q, kv = n_heads * (head_dim + rope_dim), n_heads * 2 * head_dim
    attention = d_model * (q_rank + kv_rank + rope_dim + n_heads * head_dim) + q_rank * q + kv_rank * kv
    attention_rows = q_rank + q + kv_rank + rope_dim + kv + d_model
    expert, expert_rows = 3 * d_model * expert_ff, 2 * expert_ff + d_model
    n_routed = n_layers - n_dense
    linear = n_layers * attention + n_dense * 3 * d_model * d_ff
    linear += n_routed * ((experts + shared) * expert + d_model * experts) + vocab_size * d_model
    rows = n_layers * attention_rows + n_dense * (2 * d_ff + d_model)
    rows += n_routed * (experts * expert_rows + 2 * shared * expert_ff + d_model + experts) + vocab_size
    norms = n_layers * (2 * d_model + q_rank + kv_rank) + d_model
    idle, idle_rows = (n_routed * (experts - active) * of_one for of_one in (expert, expert_rows))
    return ModelShape(
        name, n_layers, n_heads, n_heads, head_dim, latent_dim=kv_rank + rope_dim,
        weights=Weights(linear, rows, vocab_size * d_model, norms, idle, idle_rows, vocab_size * d_model), d_model=d_model,
        source="deepseek-ai/DeepSeek-V3 inference/configs @9b4e978; arXiv 2405.04434",
    )  # fmt: skip


_LITGPT = "Lightning-AI/litgpt litgpt/config.py @2685705 line "


def _alternating(n_layers: int, window: int) -> tuple[int | None, ...]:
    """Gemma 2: a window on layers 0, 2, 4 …, none on the others."""
    return tuple(window if layer % 2 == 0 else None for layer in range(n_layers))


# Layers, query heads, K/V heads, head dim; d_model, d_ff, vocabulary. What a family has beside that stands at the end.
_GPT = {"tie": True, "gated": False, "norm_bias": True, "bias": True}
_FALCON = {"tie": True, "gated": False, "norm_bias": True}
_GEMMA_2 = {"tie": True, "norms": 4, "max_context": 8192}
SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _decoder("gpt-2", 12, 12, 12, 64, 768, 3072, 50_257, max_context=1024, positions=1024, **_GPT,
                 source="karpathy/nanoGPT model.py line 217"),
        _decoder("llama-2-7b", 32, 32, 32, 128, 4096, 11_008, 32_000, max_context=4096, source=_LITGPT + "698"),
        _decoder("llama-2-13b", 40, 40, 40, 128, 5120, 13_824, 32_000, max_context=4096, source=_LITGPT + "712"),
        _decoder("llama-2-70b", 80, 64, 8, 128, 8192, 28_672, 32_000, max_context=4096, source=_LITGPT + "728"),
        _decoder("llama-3-8b", 32, 32, 8, 128, 4096, 14_336, 128_256, max_context=8192, source=_LITGPT + "758"),
        ModelShape.from_config(PRESETS["mistral-7b-v0.1"], max_context=32_768, source="arXiv 2310.06825, table 1"),
        ModelShape.from_config(PRESETS["mistral-7b-v0.2"], max_context=32_768, source=_LITGPT + "2076"),
        ModelShape.from_config(PRESETS["mistral-7b-v0.3"], max_context=32_768, source=_LITGPT + "2095"),
        _decoder("mixtral-8x7b", 32, 32, 8, 128, 4096, 14_336, 32_000, max_context=32_768, experts=(8, 2),
                 source=_LITGPT + "2009"),
        _decoder("falcon-7b", 32, 71, 1, 64, 4544, 18_176, 65_024, max_context=2048, norms=1, **_FALCON,
                 source=_LITGPT + "487"),
        _decoder("falcon-40b", 60, 128, 8, 64, 8192, 32_768, 65_024, max_context=2048, **_FALCON,
                 source=_LITGPT + "503"),
        _decoder("gemma-2b", 18, 8, 1, 256, 2048, 16_384, 256_000, max_context=8192, tie=True, source=_LITGPT + "1073"),
        _decoder("gemma-7b", 28, 16, 16, 256, 3072, 24_576, 256_000, max_context=8192, tie=True,
                 source=_LITGPT + "1092"),
        _decoder("gemma-2-2b", 26, 8, 4, 256, 2304, 9216, 256_000, _alternating(26, 4096), **_GEMMA_2,
                 source=_LITGPT + "1111"),
        _decoder("gemma-2-9b", 42, 16, 8, 256, 3584, 14_336, 256_000, _alternating(42, 4096), **_GEMMA_2,
                 source=_LITGPT + "1139"),
        _decoder("gemma-2-27b", 46, 32, 16, 128, 4608, 36_864, 256_000, _alternating(46, 4096), **_GEMMA_2,
                 source=_LITGPT + "1167"),
        _decoder("qwen2.5-7b", 28, 28, 4, 128, 3584, 18_944, 152_064, max_context=131_072, qkv_bias=True,
                 source=_LITGPT + "2327"),
        _decoder("phi-3-mini-4k", 32, 32, 32, 96, 3072, 8192, 32_064, 2048, max_context=4096, source=_LITGPT + "1817"),
        _decoder("starcoder-15b", 40, 48, 1, 128, 6144, 24_576, 49_152, max_context=8192, positions=8192, **_GPT,
                 source="bigcode/starcoder config.json"),
        _decoder("palm-540b", 118, 48, 1, 256, 18_432, 73_728, 256_000, max_context=2048, tie=True, norms=1,
                 source="arXiv 2204.02311, section 2 and table 1"),
        _deepseek("deepseek-v2", 60, 1, 5120, 12_288, 1536, 160, 2, 6, 102_400),
        _deepseek("deepseek-v3", 61, 3, 7168, 18_432, 2048, 256, 1, 8, 129_280),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A device: its memory in bytes, and what its maker says it does at most.

    Args:
        bandwidth: bytes a second read. flops: operations a second in float16 (bfloat16 where it has that), in dense
            matrix products; None where we found no figure that says which it is.
        source: of memory and bandwidth. flops_source: of the operations.
    """

    name: str
    nbytes: int
    bandwidth: float
    source: str = ""
    flops: float | None = None
    flops_source: str = ""


_PEAKS = "Lightning-AI/pytorch-lightning src/lightning/fabric/utilities/throughput.py @1526f84"
# The makers' GB are taken as 10⁹ bytes; most cards hold some percent more, and a driver keeps some for itself.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            "T4, 16 GB",
            16 * 10**9,
            320e9,
            "sysrqmts.com/gpus/compare/nvidia-a100-sxm4-40-gb-vs-nvidia-tesla-t4",
            flops=65e12,
            flops_source=_PEAKS,
        ),
        Card(
            "L4, 24 GB",
            24 * 10**9,
            300e9,
            "store.sourcecode.com/en-us/bg-bucket-compare/125/9820",
            flops=121e12,
            flops_source=_PEAKS,
        ),
        Card("RTX 4090, 24 GB", 24 * 10**9, 1008e9, "384 bit × 21 Gbit/s: notebookcheck.pl 677670"),
        Card(
            "L40S, 48 GB",
            48 * 10**9,
            864e9,
            "store.sourcecode.com/en-us/bg-bucket-compare/125/9820",
            flops=362e12,
            flops_source="winston-zhang-orz/gpu-specs specs.md",
        ),
        Card(
            "A100 SXM, 80 GB",
            80 * 10**9,
            2039e9,
            "NVIDIA's datasheet, in glennklockwood.com/garden/processors/A100",
            flops=312e12,
            flops_source=_PEAKS,
        ),
        Card(
            "H100 SXM, 80 GB",
            80 * 10**9,
            3350e9,
            "massivegrid.com/blog/nvidia-h100-vs-h200-key-differences-in-performance-memory-ai-power",
            flops=989.4e12,
            flops_source=_PEAKS,
        ),
        Card(
            "H200, 141 GB",
            141 * 10**9,
            4800e9,
            "NVIDIA/TensorRT-LLM docs/source/blogs/H200launch.md @1555478",
            flops=989.4e12,
            flops_source="glennklockwood.com/garden/processors/h100: as the H100",
        ),
    )
}

Model = MistralConfig | ModelShape | str


def as_card(card: Card | str) -> Card:
    """A card, or the one in ``CARDS`` whose name begins with these words ("h100"). Raises ConfigError for other names."""
    if isinstance(card, Card):
        return card
    if not isinstance(card, str):
        raise ConfigError(f"expected a memory.Card or a name; got {type(card).__name__}")
    begins = f"{card} ".lower().replace(",", "")
    found = [c for name, c in CARDS.items() if f"{name} ".lower().replace(",", "").startswith(begins)]
    if len(found) != 1:
        raise ConfigError(f"no one card is called {card!r}; there are {'; '.join(CARDS)}")
    return found[0]


def as_shape(model: Model) -> ModelShape:
    """The shape of a config, of a shape, or of a name in ``SHAPES``. Raises ConfigError, with near names, for another."""
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, MistralConfig):
        return ModelShape.from_config(model)
    if isinstance(model, str) and model.lower() in SHAPES:
        return SHAPES[model.lower()]
    if isinstance(model, str):
        begin_so = [name for name in SHAPES if model and name.startswith(model.lower())]
        near = begin_so or difflib.get_close_matches(model.lower(), SHAPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(SHAPES)}"
        raise ConfigError(f"no model shape is called {model!r}; {hint}")
    raise ConfigError(f"expected a MistralConfig, a ModelShape or a name; got {type(model).__name__}")


def with_kv_heads(model: Model, n_kv_heads: int) -> ModelShape:
    """The same model with another number of key/value heads: its style, parameters and cache change, and nothing else.

    >>> with_kv_heads("mistral-7b-v0.2", 32).kind, with_kv_heads("mistral-7b-v0.2", 1).kind
    ('multi-head', 'multi-query')

    Raises ConfigError for a number that doesn't divide ``n_heads``, latent attention, or a shape without ``d_model``.
    """
    shape = as_shape(model)
    if shape.latent_dim is not None:
        raise ConfigError(f"{shape.name} caches a latent in place of keys and values: it has no K/V heads to change")
    check_heads(shape.n_heads, n_kv_heads)
    more = 2 * shape.n_layers * (n_kv_heads - shape.n_kv_heads) * shape.head_dim  # rows of W_K and W_V, all layers
    if more == 0:
        return shape
    weights = shape.weights
    if weights is not None:
        if shape.d_model is None:
            raise ConfigError(f"{shape.name} needs its d_model: W_K and W_V have d_model columns")
        weights = replace(
            weights,
            linear=weights.linear + more * shape.d_model,
            linear_rows=weights.linear_rows + more,
            other=weights.other + more * shape.kv_bias,
        )
    return replace(
        shape,
        name=f"{shape.name}, {_heads(n_kv_heads)}",
        n_kv_heads=n_kv_heads,
        weights=weights,
        source=f"{shape.source}, changed",
    )


def n_params(model: Model) -> int:
    """How many parameters the model has; a matrix shared by embedding and output counts once."""
    return _weights(as_shape(model)).n_params


def weight_bytes(model: Model, dtype: str | torch.dtype = "bfloat16", quantize: str | None = None) -> int:
    """Bytes of the weights, in ``dtype``, with the linear ones stored in ``quantize`` if it is given.

    Quantized (:mod:`attnlab.quantize`), "int8" takes one byte a weight and a scale a row; "int4" half a byte a weight, and a
    scale and an offset for every 32. Scales and offsets take two bytes each; embedding and norms are in ``dtype``.
    """
    weights, size = _weights(as_shape(model)), element_bytes(dtype)
    return (weights.embedding + weights.other) * size + _linear_bytes(weights, size, quantize)


def kv_bytes_per_token(model: Model, dtype: str | torch.dtype = "float16", *, quantize_cache: str | None = None) -> int:
    """Bytes that one more token adds to the cache, as long as no layer's window is full.

    ``quantize_cache="int8"``: as a ``QuantizedKVCache`` keeps them, whatever the dtype.

    >>> kv_bytes_per_token("llama-2-7b") // kv_bytes_per_token("mistral-7b-v0.1")
    4
    """
    shape = as_shape(model)
    return shape.n_layers * _token_bytes(shape, dtype, quantize_cache)


def kv_cache_bytes(
    model: Model,
    context: int,
    batch: int = 1,
    dtype: str | torch.dtype = "float16",
    *,
    rolling: bool = True,
    quantize_cache: str | None = None,
) -> int:
    """Bytes of the cache for ``batch`` rows of ``context`` tokens: the ``nbytes`` of ``model.new_cache(batch, context)``.

    A layer with a window keeps no more than the window; ``rolling=False`` keeps everything and only masks.
    ``quantize_cache`` as in ``kv_bytes_per_token``.

    >>> kv_cache_bytes("mistral-7b-v0.1", 32_768) * 8 == kv_cache_bytes("mistral-7b-v0.2", 32_768) == 4 * 2**30
    True
    """
    shape = as_shape(model)
    _check_count("context", context)
    _check_count("batch", batch)
    slots = sum(min(context, window) if rolling and window else context for window in shape.windows)
    return batch * slots * _token_bytes(shape, dtype, quantize_cache)


def eager_map_bytes(
    model: Model,
    context: int,
    batch: int = 1,
    dtype: str | torch.dtype = "float16",
    *,
    layers: int | None = None,
    softmax: bool = True,
) -> int:
    """Bytes of attention weights where they are really made (``return_weights=True``), for a prefill of ``context`` tokens.

    Counted: the weights in ``dtype`` of ``layers`` layers that are kept (None: of all), B · H · T² elements each; and with
    ``softmax``, the float32 result of the softmax that the last of them is copied from (in float32 there is no copy).
    Not counted: scores and masks on the way there, so this is a lower bound of the peak.

    >>> eager_map_bytes("mistral-7b-v0.1", 4096, softmax=False) == 32 * 2**30
    True
    """
    shape, size = as_shape(model), element_bytes(dtype)
    _check_count("context", context)
    _check_count("batch", batch)
    layers = shape.n_layers if layers is None else layers
    if not 1 <= layers <= shape.n_layers:
        raise ConfigError(f"{shape.name} has layers 1 to {shape.n_layers} to keep the maps of; got {layers}")
    elements = batch * shape.n_heads * context * context
    return elements * (layers * size + (4 if softmax and size < 4 else 0))


def bytes_per_step(
    model: Model,
    context: int,
    batch: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
    *,
    quantize_cache: str | None = None,
) -> int:
    """Bytes read to decode one token for each of ``batch`` rows that have ``context`` tokens behind them (0: none yet).

    All weights but the embedding's rows, once for the whole batch, and every row's cache. One row of the embedding, some
    kilobytes, is left out. A matrix that is also the output is read in full. Of a mixture of experts only those of one
    token count, which is the least: rows that are sent to others read those too. ``quantize_cache`` as in
    ``kv_bytes_per_token``: what is stored is read once, by a kernel that restores it on the way.

    >>> bytes_per_step("mistral-7b-v0.2", 1000) == 14_221_320_192 + 131_072 * 1000
    True
    """
    shape, size = as_shape(model), element_bytes(dtype)
    weights = _weights(shape)
    _check_count("batch", batch)
    cache = kv_cache_bytes(shape, context, batch, dtype, quantize_cache=quantize_cache) if context else 0
    read = replace(weights, linear=weights.linear - weights.idle, linear_rows=weights.linear_rows - weights.idle_rows)
    return read.other * size + _linear_bytes(read, size, quantize) + cache


def decode_ceiling(
    model: Model,
    bandwidth: float,
    context: int,
    batch: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
    *,
    quantize_cache: str | None = None,
) -> float:
    """Tokens a second, all rows together, that memory of ``bandwidth`` bytes a second allows at most."""
    if not bandwidth > 0:
        raise ConfigError(f"bandwidth is in bytes a second and positive, such as 3.35e12; got {bandwidth}")
    return batch * bandwidth / bytes_per_step(model, context, batch, dtype, quantize, quantize_cache=quantize_cache)


def flops(model: Model, new_tokens: int, cached: int = 0, batch: int = 1, *, last_only: bool = True) -> int:
    """Operations to take in ``new_tokens`` a row that has ``cached`` behind it: prefill (many) and decode (1) alike.

    A multiplication and an addition count as two. Every matrix meets every new token, the output matrix only the last of
    them (``last_only=False``: all); and for each query head a query meets every key that it may see, itself included, once
    for its score and once for its value. What causality and windows hide isn't counted, though a kernel may compute it;
    nor are norms, rotations and the softmax, which no matrix product does.

    >>> flops("mistral-7b-v0.2", 1), round(flops("mistral-7b-v0.2", 2048) / 1e12, 1)
    (14221312000, 29.7)

    Raises ConfigError for latent attention, whose operations depend on how it is computed.
    """
    shape = as_shape(model)
    w = _weights(shape)
    _check_count("new_tokens", new_tokens)
    _check_count("batch", batch)
    if isinstance(cached, bool) or not isinstance(cached, int) or cached < 0:
        raise ConfigError(f"cached counts the tokens before: a whole number of 0 or more; got {cached!r}")
    if shape.latent_dim is not None:
        raise ConfigError(f"{shape.name} has latent attention: its operations are not counted here")
    tied = w.embedding < w.output  # then the output matrix is not among the linear ones
    inside = w.linear - w.idle - (0 if tied else w.output)
    products = inside * new_tokens + w.output * (1 if last_only else new_tokens)
    pairs = sum(_pairs(new_tokens, cached, window) for window in shape.windows)
    return 2 * batch * (products + 2 * shape.n_heads * shape.head_dim * pairs)


def _pairs(T: int, cached: int, window: int | None) -> int:
    """Query and key pairs of one layer and head: the query at position p sees p + 1 keys, or ``window`` of them."""
    last = cached + T
    if window is None or last <= window:
        return T * cached + T * (T + 1) // 2
    growing = max(0, window - cached)  # queries whose window isn't full yet
    return growing * cached + growing * (growing + 1) // 2 + (T - growing) * window


def intensity(
    model: Model,
    new_tokens: int,
    cached: int = 0,
    batch: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
) -> float:
    """Arithmetic intensity: ``flops`` for each byte that must be read, which is ``bytes_per_step``.

    What is written, and what passes between layers, is left out, so the true one is a little lower.
    """
    return flops(model, new_tokens, cached, batch) / bytes_per_step(model, cached, batch, dtype, quantize)


def attainable(flops_per_byte: float, peak_flops: float, bandwidth: float) -> float:
    """The roofline (Williams et al. 2009): operations a second at most, for work of this arithmetic intensity.

    Below ``peak_flops / bandwidth``, the ridge, memory is the limit; above it, arithmetic.

    >>> round(attainable(1.0, 989e12, 3.35e12) / 989e12, 4)  # a third of a percent of what an H100 can do
    0.0034
    """
    if not (flops_per_byte > 0 and peak_flops > 0 and bandwidth > 0):
        raise ConfigError(f"three positive numbers are needed; got {flops_per_byte}, {peak_flops}, {bandwidth}")
    return min(peak_flops, bandwidth * flops_per_byte)


def speed_up(
    model: Model,
    other: Model,
    context: int,
    batch: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
) -> float:
    """How many times the tokens a second of ``other`` the bytes of a step allow ``model``, both at the same batch.

    >>> round(speed_up("mistral-7b-v0.2", "llama-2-7b", 4096), 2), round(speed_up("mistral-7b-v0.2", "llama-2-7b", 1), 2)
    (1.04, 0.93)
    """
    return bytes_per_step(other, context, batch, dtype, quantize) / bytes_per_step(
        model, context, batch, dtype, quantize
    )


def speed_up_filled(
    model: Model,
    other: Model,
    device_bytes: float,
    context: int,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
    reserve: int | None = None,
) -> float:
    """The same where each fills one device with as many rows as fit: how many of them decides as much as the bytes do.

    >>> round(speed_up_filled("mistral-7b-v0.2", "llama-2-7b", 80e9, 2048), 1)
    3.9

    Raises CapacityError if not one row of either fits.
    """
    rates = []
    for one in (model, other):
        batch = largest_batch(one, device_bytes, context, dtype, quantize, reserve)
        if batch == 0:
            raise CapacityError(
                f"not one row of {context:,} tokens fits beside {as_shape(one).name} on {human_bytes(device_bytes)}: "
                f"take a larger device, a shorter context, or quantize"
            )
        rates.append(decode_ceiling(one, 1.0, context, batch, dtype, quantize))
    return rates[0] / rates[1]


def reserve_bytes(used: int) -> int:
    """What to leave free beside weights and cache for activations, the runtime and fragmentation: a tenth, at most 2 GB.

    An assumption, not a measurement; every function that uses it takes another as ``reserve``.
    """
    return min(RESERVE_BYTES, used // 10)


def largest_batch(
    model: Model,
    device_bytes: float,
    context: int,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
    reserve: int | None = None,
    *,
    quantize_cache: str | None = None,
) -> int:
    """How many rows of ``context`` tokens fit beside the weights on a device of ``device_bytes``; 0 if none does.

    >>> [largest_batch("mistral-7b-v0.2", 24e9, 8192, quantize_cache=form) for form in (None, "int8")]
    [7, 13]
    """
    free = _usable(_device(device_bytes), reserve) - weight_bytes(model, dtype, quantize)
    return max(0, free // kv_cache_bytes(model, context, 1, dtype, quantize_cache=quantize_cache))


@dataclass(frozen=True)
class Fit:
    """The answer of ``fits``: true if it does, and the sum when printed. All amounts in bytes."""

    model: str
    setting: str  # what was asked, in words
    device: int
    weights: int
    cache: int
    reserve: int
    advice: tuple[str, ...] = ()  # what would help; empty if it fits

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.reserve

    @property
    def spare(self) -> int:
        """What is left of the device; below 0: what is missing."""
        return self.device - self.total

    def __bool__(self) -> bool:
        return self.spare >= 0

    def __str__(self) -> str:
        sums = [
            ("weights", self.weights),
            ("cache", self.cache),
            ("reserve (activations, runtime)", self.reserve),
            ("together", self.total),
            ("device", self.device),
            ("spare" if self else "missing", abs(self.spare)),
        ]
        lines = [f"{self.model}, {self.setting}: {'fits' if self else 'does not fit'}"]
        lines += [f"  {what:<31}{human_bytes(amount):>11}" for what, amount in sums]
        if self.advice:
            lines += ["what would help:", *(f"  {line}" for line in self.advice)]
        return "\n".join(lines)


def fits(
    model: Model,
    device_bytes: float,
    context: int = 4096,
    batch: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
    reserve: int | None = None,
    *,
    quantize_cache: str | None = None,
) -> Fit:
    """Whether weights, cache and a reserve fit on a device. Usable as a truth value; ``print`` it for the sum.

    ``quantize``: how linear weights are stored, ``quantize_cache``: keys and values.

    >>> bool(fits("mistral-7b-v0.1", 16e9, context=8192)), bool(fits("mistral-7b-v0.1", 16e9, 8192, quantize="int8"))
    (False, True)
    """
    shape, device = as_shape(model), _device(device_bytes)
    weights = weight_bytes(shape, dtype, quantize)
    cache = kv_cache_bytes(shape, context, batch, dtype, quantize_cache=quantize_cache)
    kept_free = reserve_bytes(weights + cache) if reserve is None else _reserve(reserve)
    advice = ()
    if weights + cache + kept_free > device:
        advice = (
            *_what_would_help(shape, device, context, batch, dtype, quantize, reserve, quantize_cache),
            f"a device of {human_bytes(weights + cache + kept_free)}",
        )
    setting = setting_in_words(context, batch, dtype, quantize, quantize_cache)
    return Fit(shape.name, setting, device, weights, cache, kept_free, advice)


def setting_in_words(
    context: int, batch: int, dtype: str | torch.dtype, quantize: str | None = None, quantize_cache: str | None = None
) -> str:
    """What was asked of the accounts.

    >>> setting_in_words(4096, 2, "bfloat16", "int4", "int8")
    '2 × 4,096 tokens in bfloat16 with int4 weights and an int8 cache'
    """
    forms = [f"{quantize} weights"] * bool(quantize) + [f"an {quantize_cache} cache"] * bool(quantize_cache)
    return f"{batch} × {context:,} tokens in {_dtype_name(dtype)}{' with ' if forms else ''}{' and '.join(forms)}"


@dataclass(frozen=True)
class Stored:
    """One way to store a model's weights in a ``Plan``: what is computed in, what linear weights are kept in, its sum."""

    dtype: str
    quantize: str | None
    fit: Fit

    @property
    def name(self) -> str:
        return self.quantize or self.dtype


@dataclass(frozen=True)
class Plan:
    """The answer of ``plan``: the ways to store a model, most exact first, the chosen one (None: none fits), and why."""

    setting: str
    ways: tuple[Stored, ...]
    chosen: Stored | None
    reason: str

    def __str__(self) -> str:
        lines = [self.setting, f"{'':10}  {'weights':>10}  {'together':>10}"]
        for way in self.ways:
            fit = way.fit
            left = f"{human_bytes(abs(fit.spare))} {'spare' if fit else 'missing'}"
            lines.append(
                f"{way.name:10}  {human_bytes(fit.weights):>10}  {human_bytes(fit.total):>10}  "
                f"{'fits' if fit else 'does not fit'}, {left}"
            )
        name = "none" if self.chosen is None else self.chosen.name
        return "\n".join([*lines, *textwrap.wrap(f"take {name}: {self.reason}", 72)])


def plan(
    model: Model,
    device_bytes: float,
    context: int = 4096,
    batch: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    reserve: int | None = None,
) -> Plan:
    """How to store a model so that it runs on a device: in ``dtype`` as it is, or with int8 or int4 weights.

    Chosen is the first that fits, from the most exact on: what fits as it is need not be rounded. Bytes decide alone;
    whether a smaller form is also faster depends on the machine, and what it costs in quality on the model.

    >>> [plan("mistral-7b-v0.3", n, 4096).chosen.name for n in (24e9, 16e9, 8e9)]
    ['bfloat16', 'int8', 'int4']
    >>> plan("mistral-7b-v0.3", 4e9).chosen is None
    True
    """
    name = _dtype_name(dtype)
    ways = tuple(
        Stored(name, quantize, fits(model, device_bytes, context, batch, name, quantize, reserve))
        for quantize in (None, *QUANTIZED)
    )
    setting = f"{as_shape(model).name}, {batch} × {context:,} tokens, {human_bytes(_device(device_bytes))}"
    chosen = next((way for way in ways if way.fit), None)
    smallest = ways[-1].fit
    if chosen is None:
        reason = (
            f"even with {ways[-1].name} weights it needs {human_bytes(smallest.total)}; take a smaller model or context"
        )
    elif chosen is ways[0]:
        reason = "it fits as it is, nothing need be rounded"
    else:
        before = ways[ways.index(chosen) - 1]
        reason = f"with {before.name} weights {human_bytes(-before.fit.spare)} are missing"
    return Plan(setting, ways, chosen, reason)


def compare(
    models: list[Model],
    context: int = 4096,
    batch: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
    *,
    quantize_cache: str | None = None,
) -> list[dict]:
    """One row a model, for tables and figures; bytes are exact, and None where the parameters are not known.

    ``vs_multi_head`` is how many times fewer elements a token has in the cache than with a K/V head for each query head.
    """
    rows, in_cache = [], {"dtype": dtype, "quantize_cache": quantize_cache}
    for model in models:
        shape = as_shape(model)
        known = shape.weights is not None
        rows.append(
            {
                "model": shape.name,
                "kind": shape.kind,
                "n_layers": shape.n_layers,
                "n_heads": shape.n_heads,
                "n_kv_heads": shape.n_kv_heads,
                "head_dim": shape.head_dim,
                "windows": shape.windows,
                "kv_bytes_per_token": kv_bytes_per_token(shape, **in_cache),
                "vs_multi_head": 2 * shape.n_heads * shape.head_dim / shape.elements_per_token,
                "cache_bytes": kv_cache_bytes(shape, context, batch, **in_cache),
                "weight_bytes": weight_bytes(shape, dtype, quantize) if known else None,
                "bytes_per_step": bytes_per_step(shape, context, batch, quantize=quantize, **in_cache)
                if known
                else None,
                "beyond_max_context": shape.max_context is not None and context > shape.max_context,
                "source": shape.source,
            }
        )
    return rows


@dataclass(frozen=True)
class Style:
    """One number of key/value heads in a ``Choice``, all else alike; ``batch`` rows are those that were asked for."""

    shape: ModelShape
    fit: Fit
    largest_batch: int
    cache_share: float  # of the bytes a step reads for ``batch`` rows, how much is their cache
    ceiling: (
        float  # tokens a second that bandwidth allows at most, all ``batch`` rows together, whether they fit or not
    )


@dataclass(frozen=True)
class Choice:
    """The answer of ``choose``: every style from multi-head to multi-query, the chosen one (None: none fits), and why."""

    setting: str
    styles: tuple[Style, ...]
    chosen: Style | None
    reason: str

    def __str__(self) -> str:
        lines = [
            self.setting,
            f"{'K/V heads':>9}  {'':13}  {'together':>10}  fits  {'most rows':>9}  {'cache':>5}  {'tokens/s':>8}",
        ]
        for s in self.styles:
            lines.append(
                f"{s.shape.n_kv_heads:>9}  {s.shape.kind:13}  {human_bytes(s.fit.weights + s.fit.cache):>10}  "
                f"{'yes' if s.fit else 'no':4}  {s.largest_batch:>9,}  {s.cache_share:>5.0%}  {s.ceiling:>8,.0f}"
            )
        name = "none"
        if self.chosen is not None:
            name = f"{self.chosen.shape.kind}, {_heads(self.chosen.shape.n_kv_heads)}"
        return "\n".join([*lines, *textwrap.wrap(f"choose {name}: {self.reason}", 72)])


def choose(
    model: Model,
    card: Card | str,
    context: int = 4096,
    batch: int = 1,
    dtype: str | torch.dtype = "bfloat16",
    quantize: str | None = None,
    *,
    at_least: float = 0.5,
) -> Choice:
    """How many key/value heads to give a model, so that ``batch`` rows of ``context`` tokens decode well on a card.

    Chosen are the most heads that fit and keep ``at_least`` so much of the speed of the fastest style that fits. That
    is a rule, not a law: bytes say what sharing heads buys, and nothing of what it costs in quality, so the rule gives
    up no more heads than it must. Speeds are ceilings of bandwidth; with large batches arithmetic may bind first.

    >>> [choose("mistral-7b-v0.2", "A100 SXM, 80 GB", 4096, batch).chosen.shape.n_kv_heads for batch in (1, 16)]
    [32, 8]

    Raises ConfigError for ``at_least`` outside of 0 to 1, an unknown card, or a model that ``with_kv_heads`` refuses.
    """
    shape, card = as_shape(model), as_card(card)
    if not 0 <= at_least <= 1:
        raise ConfigError(f"at_least is a share of the fastest style's speed, 0 to 1; got {at_least}")
    styles = []
    for n_kv_heads in range(shape.n_heads, 0, -1):
        if shape.n_heads % n_kv_heads:
            continue
        one = with_kv_heads(shape, n_kv_heads)
        read = bytes_per_step(one, context, batch, dtype, quantize)
        styles.append(
            Style(
                shape=one,
                fit=fits(one, card.nbytes, context, batch, dtype, quantize),
                largest_batch=largest_batch(one, card.nbytes, context, dtype, quantize),
                cache_share=kv_cache_bytes(one, context, batch, dtype) / read,
                ceiling=decode_ceiling(one, card.bandwidth, context, batch, dtype, quantize),
            )
        )
    chosen, reason = _choice(styles, card, at_least)
    return Choice(f"{shape.name}, {styles[0].fit.setting}, {card.name}", tuple(styles), chosen, reason)


def _choice(styles: list[Style], card: Card, at_least: float) -> tuple[Style | None, str]:
    """The rule of ``choose``, and what binds, in words."""
    most, fewest, fitting = styles[0], styles[-1], [style for style in styles if style.fit]
    all_heads, device = _heads(most.shape.n_kv_heads), human_bytes(card.nbytes)
    if not fitting:
        return None, f"memory binds: even {_heads(1)} needs {human_bytes(fewest.fit.total)} of {device}"
    chosen = next(style for style in fitting if style.ceiling >= at_least * fewest.ceiling)
    if chosen is most:
        gain = fewest.ceiling / most.ceiling
        return chosen, (
            f"the weights bind: the cache is {most.cache_share:.0%} of what a step reads, so that sharing all heads "
            f"would make it {gain:.2f} times as fast and no more"
        )
    if chosen is fitting[0]:
        return chosen, (
            f"memory binds: {all_heads} need {human_bytes(most.fit.total)} of {device}; this is the most that fits"
        )
    return chosen, (
        f"the cache binds: with {all_heads} it is {most.cache_share:.0%} of what a step reads; this is the most that "
        f"keeps {at_least:.0%} of the speed of {_heads(1)}"
    )


def _heads(n_kv_heads: int) -> str:
    return f"{n_kv_heads} K/V head{'s' if n_kv_heads > 1 else ''}"


def human_bytes(amount: int | float) -> str:
    """Bytes in the largest binary unit that leaves a number of 1 or more: ``13.49 GiB``.

    >>> human_bytes(131_072), human_bytes(14_483_464_192), human_bytes(7)
    ('128.00 KiB', '13.49 GiB', '7 B')
    """
    if abs(amount) < 1024:
        return f"{amount:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if abs(amount) < 1024:
            return f"{amount:.2f} {unit}"
    return f"{amount / 1024:,.2f} TiB"


def element_bytes(dtype: str | torch.dtype) -> int:
    """Bytes an element takes. Raises ConfigError for a dtype the accounts do not know."""
    return BYTES_PER_ELEMENT[_dtype_name(dtype)]


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES_PER_ELEMENT:
        raise ConfigError(f"unknown dtype {name!r}; there are {', '.join(BYTES_PER_ELEMENT)}")
    return name


def _token_bytes(shape: ModelShape, dtype: str | torch.dtype, quantize_cache: str | None) -> int:
    """Bytes of one token in one layer's cache."""
    if quantize_cache is None:
        return shape.elements_per_token * element_bytes(dtype)
    if quantize_cache != "int8" or shape.latent_dim is not None:
        raise ConfigError(
            f"a cache of keys and values is quantized to 'int8' or not at all; got {quantize_cache!r} for {shape.name}, "
            f"which caches {'a latent' if shape.latent_dim is not None else 'keys and values'}"
        )
    return 2 * shape.n_kv_heads * packed_bytes(shape.head_dim)


def _linear_bytes(weights: Weights, size: int, quantize: str | None) -> int:
    if quantize is None:
        return weights.linear * size
    if quantize not in QUANTIZED:
        raise ConfigError(f"quantize is None, {' or '.join(map(repr, QUANTIZED))}; got {quantize!r}")
    bits, sharing, per_scale = QUANTIZED[quantize]
    scales = weights.linear_rows if sharing is None else weights.linear // sharing
    return weights.linear * bits // 8 + scales * per_scale


def _what_would_help(shape, device, context, batch, dtype, quantize, reserve, quantize_cache):
    """Changes to what was asked, each of which is enough by itself."""
    usable = _usable(device, reserve)
    weights = weight_bytes(shape, dtype, quantize)

    def cache(context: int = context, form: str | None = quantize_cache) -> int:
        return kv_cache_bytes(shape, context, batch, dtype, quantize_cache=form)

    for smaller in QUANTIZED:
        fewer = weight_bytes(shape, dtype, smaller)
        if fewer < weights and fewer + cache() <= usable:
            yield f'quantize="{smaller}": the weights take {human_bytes(fewer)} instead of {human_bytes(weights)}'
            break
    if quantize_cache is None and shape.latent_dim is None and weights + cache(form="int8") <= usable:
        yield f'quantize_cache="int8": the cache takes {human_bytes(cache(form="int8"))} instead of {human_bytes(cache())}'
    rows = largest_batch(shape, device, context, dtype, quantize, reserve, quantize_cache=quantize_cache)
    if 0 < rows < batch:
        yield f"a batch of {rows} instead of {batch}"
    if weights + cache(1) <= usable:
        shorter, too_long = 1, context
        while too_long - shorter > 1:
            middle = (shorter + too_long) // 2
            if weights + cache(middle) <= usable:
                shorter = middle
            else:
                too_long = middle
        yield f"a context of {shorter:,} tokens instead of {context:,}"


def _usable(device: int, reserve: int | None) -> int:
    """The most that weights and cache may take together, so that the reserve still fits beside them."""
    if reserve is not None:
        return device - _reserve(reserve)
    return max(
        device - RESERVE_BYTES, device // 11 * 10 + min(9, device % 11)
    )  # the latter: used + used // 10 = device


def _reserve(reserve: float) -> int:
    if not (isinstance(reserve, Real) and 0 <= reserve < math.inf):
        raise ConfigError(f"reserve is what to leave free, in bytes, 0 or more, such as 2e9; got {reserve!r}")
    return int(reserve)


def _weights(shape: ModelShape) -> Weights:
    if shape.weights is None:
        raise ConfigError(
            f"the parameters of {shape.name} are not counted here, only its cache; make its ModelShape with weights, "
            f"or take one of {', '.join(SHAPES)}"
        )
    return shape.weights


def _device(device_bytes: float) -> int:
    if not (isinstance(device_bytes, Real) and 0 < device_bytes < math.inf):
        raise ConfigError(
            f"device_bytes is the memory of the device in bytes, such as 16e9 (a card's is CARDS[…].nbytes); "
            f"got {device_bytes!r}"
        )
    return int(device_bytes)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of 1 or more; got {value!r}")
