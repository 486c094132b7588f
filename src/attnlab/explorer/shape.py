"""The shape explorer: which K/V head each query head reads, and what that makes of projections, parameters and cache."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attnlab import memory, plots
from attnlab.errors import ConfigError
from attnlab.explorer.base import Explorer
from attnlab.layers import GroupedQueryAttention

MAX_HEADS, MAX_HEAD_DIM, MAX_D_MODEL = 128, 512, 128 * 512


class ShapeExplorer(Explorer):
    """One attention layer, ``GroupedQueryAttention(d_model, n_heads, n_kv_heads, head_dim)``, with knobs on its numbers.

    Args:
        d_model, n_heads, n_kv_heads, head_dim: what it starts with, as for ``GroupedQueryAttention``.
        dtype: of the cache.

    Raises ConfigError for heads that do not divide, a dtype that is not known, or numbers beyond what a page draws.
    """

    kind = "shape"

    def __init__(
        self,
        d_model: int = 512,
        n_heads: int = 8,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        dtype: str | torch.dtype = "float16",
    ) -> None:
        memory.element_bytes(dtype)  # raises on what is not known
        asked = {
            "d_model": (d_model, MAX_D_MODEL),
            "n_heads": (n_heads, MAX_HEADS),
            "head_dim": (head_dim, MAX_HEAD_DIM),
        }
        for name, (given, largest) in asked.items():
            if given is not None and not (isinstance(given, int) and 1 <= given <= largest):
                raise ConfigError(f"{name} is a whole number from 1 to {largest:,} on a page; got {given!r}")
        with torch.device("meta"):  # shapes without memory
            layer = GroupedQueryAttention(d_model, n_heads, n_kv_heads, head_dim)
        if layer.head_dim > MAX_HEAD_DIM:
            raise ConfigError(
                f"head_dim goes up to {MAX_HEAD_DIM} on a page; got {layer.head_dim}: give it, or more heads"
            )
        self.layer = layer
        super().__init__(
            data={
                "d_model": layer.d_model,
                "n_heads": layer.n_heads,
                "n_kv_heads": layer.n_kv_heads,
                "head_dim": layer.head_dim,
                "dtype": str(dtype).removeprefix("torch."),
                "bytes_per_element": memory.BYTES_PER_ELEMENT,
                "max_heads": MAX_HEADS,
                "max_head_dim": MAX_HEAD_DIM,
                "max_d_model": MAX_D_MODEL,
                "presets": presets(),
            }
        )

    def still(self) -> Figure:
        H, Hkv, G = self.layer.n_heads, self.layer.n_kv_heads, self.layer.group_size
        plots.style()
        fig, ax = plt.subplots(figsize=(plots.SIZE[0], 2.4))
        plt.close(fig)
        for h in range(H):
            at = h // G * G + (G - 1) / 2  # the middle of its group
            ax.plot([at, h], [1, 0.4], color=plots.FAINT, linewidth=1, zorder=0)
            ax.add_patch(Rectangle((h - 0.4, 0), 0.8, 0.4, facecolor=plots.COLOURS[1]))
        for kv in range(Hkv):
            at, width = kv * G + (G - 1) / 2, min(1.6, G - 0.2)
            for row, colour in ((1, plots.COLOURS[2]), (1.5, plots.COLOURS[3])):
                ax.add_patch(Rectangle((at - width / 2, row), width, 0.4, facecolor=colour))
        ax.set_yticks([0.2, 1.2, 1.7], [f"{H} query heads", f"{Hkv} key heads", f"{Hkv} value heads"])
        ax.set(xlim=(-0.7, H - 0.3), ylim=(-0.1, 2.0), xticks=[])
        ax.tick_params(left=False)
        for side in ax.spines.values():
            side.set_visible(False)
        return fig

    @property
    def alt(self) -> str:
        H, Hkv, G = self.layer.n_heads, self.layer.n_kv_heads, self.layer.group_size
        each = "its own" if Hkv == H else "the one" if Hkv == 1 else "one that it shares with its neighbours"
        return f"Diagram of {H} query heads joined by lines to {Hkv} key and value heads, {G} to each: a query head reads {each}"


def presets() -> list[dict]:
    """The shapes of ``memory`` that one such layer describes: not those that keep a latent."""
    return [
        {
            "name": s.name, "n_layers": s.n_layers, "d_model": s.d_model, "n_heads": s.n_heads,
            "n_kv_heads": s.n_kv_heads, "head_dim": s.head_dim, "source": s.source,
        }
        for s in memory.SHAPES.values()
        if s.latent_dim is None
    ]  # fmt: skip
