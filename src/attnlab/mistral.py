"""Mistral, the whole decoder (Jiang et al. 2023, arXiv 2310.06825): embed, blocks, norm, logits."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.attention import check_window
from attnlab.cache import KVCache, QuantizedKVCache, QuantizedRollingKVCache, RollingKVCache
from attnlab.errors import CapacityError, ConfigError, InputError, ShapeError
from attnlab.layers import GroupedQueryAttention, RMSNorm, TransformerBlock, check_heads
from attnlab.rotary import rotary_angles


@dataclass(frozen=True)
class MistralConfig:
    """The numbers that make a Mistral model. Sizes count vector elements; ``window`` counts keys, the query's own included.

    Raises ConfigError for sizes below 1, heads that do not divide, an odd head_dim, a window below 1.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    head_dim: int | None = None  # d_model / n_heads if not given
    window: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # one matrix for the embedding and the output
    name: str = "mistral"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"):
            size = getattr(self, field)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"{field} must be a whole number of 1 or more; got {size!r}")
        check_heads(self.n_heads, self.n_kv_heads)
        check_window(self.window)
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                raise ConfigError(f"d_model={self.d_model} does not divide into {self.n_heads} heads; give head_dim")
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        rotary_angles(torch.zeros(1, dtype=torch.long), self.head_dim, self.rope_theta)  # raises on what cannot work
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be positive; got {self.norm_eps}")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    @classmethod
    def preset(cls, name: str) -> Self:
        """One of ``PRESETS`` by name. Raises ConfigError, naming them, for another."""
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    def replace(self, **changes) -> Self:
        """A copy with some numbers changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict:
        return asdict(self)


_V01 = MistralConfig(
    vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14_336,
    window=4096, rope_theta=1e4, name="mistral-7b-v0.1",
)  # fmt: skip
# v0.2 dropped the window and raised theta; v0.3 added 768 tokens for control and tools.
_V02 = _V01.replace(window=None, rope_theta=1e6, name="mistral-7b-v0.2")
_V03 = _V02.replace(vocab_size=32_768, name="mistral-7b-v0.3")
PRESETS: dict[str, MistralConfig] = {config.name: config for config in (_V01, _V02, _V03)}


class Mistral(nn.Module):
    """The decoder. ``model(ids)`` gives logits for the token after each position.

    >>> config = MistralConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, window=4)
    >>> model = Mistral(config)
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 50])
    """

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                GroupedQueryAttention(
                    c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, window=c.window, rope_theta=c.rope_theta
                ),
                c.d_ff,
                c.norm_eps,
            )
            for _ in range(c.n_layers)
        )
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        last_only: bool = False,
        on_weights: Callable[[int, Float[Tensor, "B H T S"]], None] | None = None,
    ) -> Float[Tensor, "B T vocab"]:
        """Logits for every position of ``ids``, or (B, 1, vocab) for the last alone.

        Args:
            cache: what the model has seen before ``ids``; it takes them in. Prefill, a chunk and one token are one call.
            on_weights: called as ``on_weights(layer, weights)`` with each layer's attention weights (B, H, T, S), one
                layer at a time, so that nobody need hold them all.

        Raises ShapeError for ids that are not (B, T), InputError for none or ids outside the vocabulary, CapacityError for a
        cache that is too short.
        """
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(
                f"expected ids (B, T), whole numbers of int64 or int32; got {tuple(ids.shape)} of {ids.dtype}"
            )
        B, T = ids.shape
        if T == 0 or B == 0:
            raise InputError("no tokens came: a model needs at least one")
        if cache is not None and cache.batch != B:
            raise ShapeError(f"the cache holds {cache.batch} rows and {B} came")
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions(T)
        rotation = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        try:
            x = self.embed(ids)  # (B, T, d)
        except IndexError:  # on a CPU; a GPU says it later, in its own words
            raise InputError(
                f"expected ids from 0 to {self.config.vocab_size - 1}; got {int(ids.min())} to {int(ids.max())}"
            ) from None
        for i, block in enumerate(self.blocks):
            x = block(x, rotation=rotation, cache=cache, layer=i, on_weights=on_weights)
        if cache is not None:
            cache.advance(T)
        return self.lm_head(self.norm(x[:, -1:] if last_only else x))  # (B, T or 1, vocab)

    def new_cache(
        self,
        batch: int = 1,
        max_len: int | None = None,
        *,
        rolling: bool = True,
        static: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
    ) -> KVCache:
        """An empty cache of the model's shape, dtype and device.

        With a window it keeps the last ``window`` tokens and takes any number; ``rolling=False`` keeps all of them and
        only masks. ``max_len`` is needed where everything is kept; a ``max_len`` within the window needs no rolling.
        ``quantize="int8"`` keeps keys and values in 8 bits (``QuantizedKVCache``).
        """
        c = self.config
        common = {"device": device or self.device, "static": static}
        if quantize is None:
            whole, last = KVCache, RollingKVCache
            common["dtype"] = dtype or self.dtype
        elif quantize == "int8" and dtype is None:
            whole, last = QuantizedKVCache, QuantizedRollingKVCache
        else:
            raise ConfigError(
                f"a cache is kept in a dtype, or quantized to 'int8'; got dtype={dtype} and quantize={quantize!r}"
            )
        if rolling and c.window is not None and (max_len is None or max_len > c.window):
            return last(c.n_layers, batch, c.n_kv_heads, c.head_dim, c.window, **common)
        if max_len is None:
            raise CapacityError("this cache keeps every token, so it must know how many will come: pass max_len")
        return whole(c.n_layers, batch, c.n_kv_heads, c.head_dim, max_len, c.window, **common)
