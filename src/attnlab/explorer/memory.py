"""The memory explorer: two models' weights and caches against a card, and the speed that its bandwidth allows.

A page has no kernel, so ``static/memory.js`` does the arithmetic of ``attnlab.memory`` again, under the same names. What it
works on, the shapes, the cards and every constant, comes from there.
"""

import math
from itertools import groupby

import torch
from matplotlib.figure import Figure

from attnlab import memory, plots
from attnlab.errors import ConfigError
from attnlab.explorer.base import Explorer
from attnlab.memory import Card, Model, ModelShape

MAX_CONTEXT, MAX_BATCH = 2**20, 4096
EXACT = 2**53  # from here on a page's numbers have gaps


class MemoryExplorer(Explorer):
    """Weights and cache of two models against a card: what fits, what a step reads, and how fast that can be at most.

    Args:
        first, second: a ``MistralConfig``, a ``ModelShape`` or a name in ``memory.SHAPES``, as everywhere in ``memory``.
        context, batch: tokens of a row, and rows.
        dtype: of weights and cache. quantize: None, "int8" or "int4", of linear weights.
        card: a name in ``memory.CARDS``, or a ``Card`` with your own numbers.
        fill: give each model the largest batch that fits, in place of ``batch``.

    Raises ConfigError for a model whose parameters are not known or is too large for exact arithmetic on a page, a context
    or batch out of bounds, two different models of one name, or a dtype, quantization or card that is not known.
    """

    kind = "memory"

    def __init__(
        self,
        first: Model = "mistral-7b-v0.2",
        second: Model = "llama-2-7b",
        context: int = 4096,
        batch: int = 1,
        dtype: str | torch.dtype = "bfloat16",
        quantize: str | None = None,
        card: Card | str = "H100 SXM, 80 GB",
        *,
        fill: bool = False,
    ) -> None:
        self.shapes = tuple(memory.as_shape(model) for model in (first, second))
        for name, asked, largest in (("context", context, MAX_CONTEXT), ("batch", batch, MAX_BATCH)):
            if isinstance(asked, int) and asked > largest:
                raise ConfigError(f"{name} goes up to {largest:,} on a page; got {asked:,}")
        self.card = as_card(card)
        for shape in self.shapes:  # raises on what cannot work
            memory.fits(shape, self.card.nbytes, context, batch, dtype, quantize)
        self.setting = {
            "context": context, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "quantize": quantize,
            "card": self.card.name, "fill": bool(fill),
        }  # fmt: skip
        super().__init__(data=payload(self.shapes, self.card, self.setting))

    def rows(self) -> list[dict]:
        """What the still shows, as ``plots.stacked_bytes`` takes it."""
        s = self.setting
        rows = []
        for shape in self.shapes:
            batch = s["batch"]
            if s["fill"]:
                batch = memory.largest_batch(shape, self.card.nbytes, s["context"], s["dtype"], s["quantize"])
            rows.append(
                {
                    "model": shape.name,
                    "batch": batch,
                    "weight_bytes": memory.weight_bytes(shape, s["dtype"], s["quantize"]),
                    "cache_bytes": memory.kv_cache_bytes(shape, s["context"], batch, s["dtype"]) if batch else 0,
                }
            )
        return rows

    def still(self) -> Figure:
        return plots.stacked_bytes(self.rows(), self.card.nbytes, title=f"{self.setting['context']:,} tokens a row")

    @property
    def alt(self) -> str:
        totals = [row["weight_bytes"] + row["cache_bytes"] for row in self.rows()]
        one, other = (shape.name for shape in self.shapes)
        longer = "both are equally long"
        if totals[0] != totals[1]:
            longer = f"the bar of {one if totals[0] > totals[1] else other} is the longer one"
        return (
            f"Stacked bars of weights and cache of {one} and {other} against the memory of {self.card.name}: {longer}"
        )


def as_card(card: Card | str) -> Card:
    """As ``memory.as_card``. Raises ConfigError for sizes that are not positive as well."""
    card = memory.as_card(card)
    if not (isinstance(card.nbytes, int) and 0 < card.nbytes < EXACT and 0 < card.bandwidth < math.inf):
        raise ConfigError(
            f"a card has whole bytes and a bandwidth, both positive; got {card.nbytes} and {card.bandwidth}"
        )
    return card


def payload(shapes: tuple[ModelShape, ...], card: Card, setting: dict) -> dict:
    """All that the page gets: every model and card to choose from, the constants of the accounts, and the setting."""
    models = {shape.name: shape for shape in shapes}
    if any(models[shape.name] != shape for shape in shapes):
        raise ConfigError(f"two different models are called {shapes[0].name!r}: give one of them another name")
    for name, shape in memory.SHAPES.items():
        models.setdefault(name, shape)
    return {
        "models": [_model(shape) for shape in models.values()],
        "cards": [
            {"name": c.name, "nbytes": c.nbytes, "bandwidth": c.bandwidth, "source": c.source}
            for c in ({card.name: card} | {c.name: c for c in memory.CARDS.values() if c.name != card.name}).values()
        ],
        "bytes_per_element": memory.BYTES_PER_ELEMENT,
        "quantized": {name: list(how) for name, how in memory.QUANTIZED.items()},
        "reserve_bytes": memory.RESERVE_BYTES,
        "max_context": MAX_CONTEXT,
        "max_batch": MAX_BATCH,
        "setting": {"models": [shape.name for shape in shapes], **setting},
    }


def _model(shape: ModelShape) -> dict:
    w = shape.weights
    largest = memory.kv_cache_bytes(shape, MAX_CONTEXT, MAX_BATCH, "float32") + memory.weight_bytes(shape, "float32")
    if largest >= EXACT:
        raise ConfigError(f"{shape.name} is too large for exact arithmetic on a page; use attnlab.memory")
    return {
        "name": shape.name,
        "kind": shape.kind,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "elements_per_token": shape.elements_per_token,
        "windows": [[window, len(list(layers))] for window, layers in groupby(sorted(shape.windows, key=lambda w: w or 0))],
        "weights": {
            "linear": w.linear, "linear_rows": w.linear_rows, "embedding": w.embedding, "other": w.other,
            "idle": w.idle, "idle_rows": w.idle_rows,
        },
        "max_context": shape.max_context,
        "source": shape.source,
    }  # fmt: skip
