"""Static figures, and the one place that sets their style.

Every function returns a matplotlib ``Figure``: show it by making it the last value of a cell. It is already closed for
pyplot, so that a notebook doesn't show it twice. Where ``ax`` is given the drawing goes there, and the figure is its owner's.

The figures are small and coarse on purpose: legible at 320 pixels, sharp when wide. Their ground is opaque, so that they
read the same on a dark page. Nothing is told by colour alone: lines differ by marker and stroke too and carry their names,
bars their values, and what a mask forbids is hatched, which is not the colour of zero.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from attnlab.attention import causal_mask
from attnlab.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from attnlab.record import AttentionRecord

SIZE = (4.8, 3.2)  # inches
MAP = "cividis"  # for maps: even in lightness, and the same to most colour-blind eyes
SIGNED_MAP = "PuOr"  # for numbers of both signs: light where they are 0, and its two ends differ to colour-blind eyes
GROUND, INK, FAINT = "#ffffff", "#1a1a1a", "#8a8a8a"
# From viridis, where it is dark enough to stand out from the ground by 3:1; with them a stroke, a marker and a hatch.
COLOURS = ("#440154", "#3b528b", "#21918c", "#7a5195", "#2d708e")
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
MAX_LABELS = 40


def style() -> None:
    """Set matplotlib's defaults for the book. Called by every function here; call it for figures of your own."""
    plt.rcParams.update(
        {
            "figure.figsize": SIZE,
            "figure.dpi": 160,
            "figure.facecolor": GROUND,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.08,
            "figure.constrained_layout.w_pad": 0.08,
            "savefig.dpi": 160,
            "savefig.facecolor": GROUND,
            "savefig.pad_inches": 0.12,
            "axes.facecolor": GROUND,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
            "font.size": 10,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "lines.linewidth": 1.8,
            "lines.markersize": 4.5,
            "hatch.linewidth": 0.6,
            "image.cmap": MAP,
            "svg.hashsalt": "attnlab",
        }
    )


def attention_map(
    weights: ArrayLike,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    ax: Axes | None = None,
    title: str | None = None,
    *,
    mask: ArrayLike | None = None,
    vmax: float | None = None,
) -> Figure:
    """One head: a row for each query, a column for each key. A small map carries its numbers.

    Args:
        weights: (T, S). query_tokens, key_tokens: T and S labels; of many, every n-th is shown.
        mask: (T, S), True = may attend, as everywhere; the rest is hatched.
        vmax: the weight of the lightest colour; the largest one if not given.

    Raises ShapeError for labels or a mask that do not fit the weights.
    """
    weights = _matrix(weights)
    T, S = weights.shape
    if (len(query_tokens), len(key_tokens)) != (T, S):
        raise ShapeError(
            f"weights ({T}, {S}) need {T} query and {S} key labels; got {len(query_tokens)} and {len(key_tokens)}"
        )
    size = min(7.0, max(SIZE[0], 2.2 + 0.17 * S)), min(6.4, max(SIZE[1], 1.5 + 0.17 * T))
    ax = _canvas(ax, size)
    few = T * S <= 36
    _draw_map(ax, weights, mask, vmax, annot=few, fmt=".2f", annot_kws={"size": 8}, cbar=not few,
              cbar_kws={"label": "attention weight"})  # fmt: skip
    ax.set(xlabel="key", ylabel="query")
    ax.tick_params(axis="x", labelrotation=90)
    ax.tick_params(axis="y", labelrotation=0)
    for _ in range(2):  # labels take room, and how much room is left decides how many there can be
        width, height = ax.get_window_extent().size / ax.figure.dpi
        for axis, tokens, inches in ((ax.xaxis, key_tokens, width), (ax.yaxis, query_tokens, height)):
            shown = range(0, len(tokens), _step(len(tokens), inches))
            axis.set_ticks([i + 0.5 for i in shown], [_label(tokens[i]) for i in shown])
        ax.figure.draw_without_rendering()
    return _done(ax, title)


def head_grid(record: "AttentionRecord", layer: int | Sequence[int] | None = None, max_tokens: int = 24) -> Figure:
    """Every head of a layer (of several; of all if None): query heads that share a K/V head stand in one frame.

    The first ``max_tokens`` of the text are drawn. All maps have one scale, 0 to 1.

    Raises ConfigError for a layer that is not there.
    """
    n_layers, n_heads = record.weights.shape[:2]
    layers = list(range(n_layers)) if layer is None else [layer] if isinstance(layer, int) else list(layer)
    if not layers or not all(0 <= wanted < n_layers for wanted in layers):
        raise ConfigError(f"the record has layers 0 to {n_layers - 1}; got {layer!r}")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be 1 or more; got {max_tokens}")
    T, S = min(max_tokens, len(record.query_tokens)), min(max_tokens, len(record.key_tokens))
    mask = None
    if record.causal:
        mask = causal_mask(len(record.query_tokens), len(record.key_tokens), record.window).numpy()[:T, :S]

    group_size = n_heads // record.n_kv_heads
    wide = min(group_size, 4)  # heads side by side in a frame
    deep = -(-group_size // wide)
    across = min(record.n_kv_heads, 4 // wide)  # frames side by side
    down = -(-record.n_kv_heads // across)  # rows of frames in a layer
    style()
    heights = [len(layers) * (down * (1.1 * deep + 0.4) + 0.3), 0.7]
    fig = plt.figure(figsize=(SIZE[0], sum(heights)))
    plt.close(fig)
    body, foot = fig.subfigures(2, 1, height_ratios=heights)
    for at, block in zip(layers, body.subfigures(len(layers), 1, squeeze=False).flat, strict=True):
        block.suptitle(f"layer {at}", fontsize=10, weight="bold")
        frames = block.subfigures(down, across, squeeze=False)
        for kv in range(record.n_kv_heads):
            frame = frames[divmod(kv, across)]
            frame.set_facecolor("#e4e8eb" if sum(divmod(kv, across)) % 2 == 0 else "#f6f7f8")
            frame.suptitle(f"K/V head {kv}", fontsize=9)
            for g, ax in enumerate(frame.subplots(deep, wide, squeeze=False).flat):
                if g >= group_size:
                    ax.set_axis_off()
                    continue
                head = kv * group_size + g
                _draw_map(ax, record.weights[at, head, :T, :S].astype(np.float32), mask, 1.0, cbar=False, square=True)
                ax.set_xlabel(f"head {head}", fontsize=9)
    colours = foot.colorbar(
        ScalarMappable(Normalize(0, 1), MAP), cax=foot.add_axes((0.1, 0.72, 0.8, 0.2)), orientation="horizontal"
    )
    colours.set_label("attention weight (rows: queries, columns: keys)", fontsize=9)
    return fig


def lines(
    x: ArrayLike,
    series: Mapping[str, ArrayLike],
    xlabel: str,
    ylabel: str,
    *,
    logx: bool = False,
    logy: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Lines over one ``x``, each with its own stroke and marker, and its name where it ends."""
    x = np.asarray(x)
    ax = _canvas(ax, SIZE)
    names = []
    for i, (name, y) in enumerate(series.items()):
        y = np.asarray(y, dtype=float)
        if y.shape != x.shape:
            raise ShapeError(f"{name!r} needs a value for each of the {len(x)} x; got {y.shape}")
        look = {"color": COLOURS[i % 5], "linestyle": STROKES[i % 5], "marker": MARKERS[i % 5]}
        ax.plot(x, y, markevery=max(1, len(x) // 8), label=_label(name, 40), **look)
        if np.isfinite(y).any():
            last = int(np.flatnonzero(np.isfinite(y))[-1])
            names.append(
                ax.annotate(_label(name, 40), (x[last], y[last]), (6, 0), textcoords="offset points", va="center",
                            fontsize=9, color=look["color"], annotation_clip=False)
            )  # fmt: skip
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if logx:
        ax.set_xscale("log", base=2)
    if logy:
        ax.set_yscale("log")
    _done(ax, title)
    _spread(ax, names)
    return ax.figure


def bars(
    labels: Sequence[str],
    values: ArrayLike,
    unit: str,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Horizontal bars, the first on top, each with its value written at its end."""
    values = np.asarray(values, dtype=float)
    if values.shape != (len(labels),):
        raise ShapeError(f"{len(labels)} labels need as many values; got {values.shape}")
    ax = _canvas(ax, (SIZE[0], 0.9 + 0.36 * len(labels)))
    drawn = ax.barh(range(len(labels)), values, color=COLOURS[1], height=0.66)
    ax.bar_label(drawn, [_number(value) for value in values], padding=4, fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(lambda value, _: _number(value))
    ax.set_yticks(range(len(labels)), [_label(label, 30) for label in labels])
    ax.invert_yaxis()
    ax.margins(x=0.16)
    ax.set_xlabel(unit)
    return _done(ax, title)


def roofline(
    roofs: Mapping[str, tuple[float, float]],
    points: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Roofs of (peak operations a second, bytes a second), and points of (operations a byte, operations a second)."""
    ax = _canvas(ax, SIZE)
    points = {name: (np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in (points or {}).items()}
    ends = np.concatenate([[peak / bandwidth for peak, bandwidth in roofs.values()], *(x for x, _ in points.values())])
    x = np.geomspace(ends.min() / 4, ends.max() * 4, 200)
    for i, (name, (peak, bandwidth)) in enumerate(roofs.items()):
        y = np.minimum(peak, bandwidth * x)
        ax.plot(x, y, color=COLOURS[i % 5], linestyle=STROKES[i % 5], label=_label(name, 40))
    for i, (name, (across, up)) in enumerate(points.items()):
        ax.plot(across, up, linestyle="none", marker=MARKERS[i % 5], color=COLOURS[(i + 1) % 5], label=_label(name, 40))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="operations for each byte read", ylabel="operations a second")
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return _done(ax, title)


def stacked_bytes(
    rows: Sequence[Mapping],
    device_bytes: float | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Weights and cache of each row of ``memory.compare``, in GiB, against the memory of a device.

    Raises ConfigError for a model whose parameters are not known.
    """
    unknown = [row["model"] for row in rows if row["weight_bytes"] is None]
    if unknown:
        raise ConfigError(
            f"the parameters of {', '.join(unknown)} are not known: leave it out, or draw its cache alone"
        )
    ax = _canvas(ax, (SIZE[0], 1.4 + 0.42 * len(rows)))
    at, left = range(len(rows)), np.zeros(len(rows))
    for i, (name, key) in enumerate((("weights", "weight_bytes"), ("cache", "cache_bytes"))):
        gib = np.array([row[key] for row in rows]) / 2**30
        colour = COLOURS[(1, 2)[i]]
        face = {"color": colour} if i == 0 else {"facecolor": GROUND, "edgecolor": colour, "hatch": "//////"}
        drawn = ax.barh(at, gib, left=left, height=0.62, label=name, **face)
        left += gib
    clear = {"facecolor": GROUND, "edgecolor": "none", "pad": 1}  # of the device's line behind it
    ax.bar_label(drawn, [f"{total:,.1f}" for total in left], padding=4, fontsize=9, bbox=clear)
    ax.set_yticks(at, [_label(row["model"], 24) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(0, 1.16 * max(*left, (device_bytes or 0) / 2**30))
    ax.set_xlabel("GiB")
    if device_bytes is not None:
        ax.axvline(
            device_bytes / 2**30,
            color=INK,
            linestyle="--",
            linewidth=1.4,
            label=f"{device_bytes / 2**30:,.1f} GiB device",
        )
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9, frameon=False, borderaxespad=0.2,
              handlelength=1.6, columnspacing=1.2)  # fmt: skip
    if title:
        ax.set_title(title, pad=22)  # above the legend
    return ax.figure


class Knob:
    """A figure with a knob to turn: a slider in a live notebook; stills in a grid where no kernel answers."""

    def __init__(self, draw: Callable[[Axes, Any], object], name: str, values: Sequence, n_stills: int) -> None:
        self._draw, self.name, self.values, self._n_stills = draw, name, list(values), n_stills

    def stills(self) -> Figure:
        """Evenly chosen values, the first and the last among them, two side by side."""
        n = min(self._n_stills, len(self.values))
        chosen = [self.values[round(i * (len(self.values) - 1) / max(n - 1, 1))] for i in range(n)]
        down = -(-n // 2)
        style()
        fig, axes = plt.subplots(down, min(n, 2), figsize=(SIZE[0], 2.1 * down), squeeze=False)
        plt.close(fig)
        for ax in axes.flat[n:]:
            ax.set_axis_off()
        for ax, value in zip(axes.flat, chosen, strict=False):
            self._draw(ax, value)
            ax.set_title(f"{self.name} = {value}")
        return fig

    def still(self, value: Any) -> Figure:
        """The figure at one value."""
        style()
        fig, ax = plt.subplots(figsize=SIZE)
        plt.close(fig)
        self._draw(ax, value)
        ax.set_title(f"{self.name} = {value}")
        return fig

    def widget(self) -> Any:
        """The slider and the figure under it, which is drawn anew for each value and kept."""
        import ipywidgets

        slider = ipywidgets.SelectionSlider(options=self.values, description=self.name, continuous_update=False)
        image, drawn = ipywidgets.Image(format="png"), {}

        def show(_: object = None) -> None:
            if slider.index not in drawn:
                drawn[slider.index] = png(self.still(self.values[slider.index]))
            image.value = drawn[slider.index]

        slider.observe(show, "index")
        show()
        return ipywidgets.VBox([slider, image])

    def __repr__(self) -> str:
        return f"{self.name} from {self.values[0]} to {self.values[-1]}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        """Both, for the front end to choose from."""
        return {**self.widget()._repr_mimebundle_(), "image/png": png(self.stills()), "text/plain": repr(self)}


def knob(draw: Callable[[Axes, Any], object], name: str, values: Sequence, n_stills: int = 4) -> Knob:
    """``draw(ax, value)`` with a knob for ``value``: make it the last value of a cell.

    Raises ConfigError for no values.
    """
    if len(values) == 0:
        raise ConfigError(f"a knob needs values to turn through; {name!r} has none")
    return Knob(draw, name, values, n_stills)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, the same for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _canvas(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes to draw on: those given, or those of a new figure."""
    if ax is not None:
        return ax
    style()
    fig, ax = plt.subplots(figsize=size)
    plt.close(fig)
    return ax


def _done(ax: Axes, title: str | None) -> Figure:
    if title:
        ax.set_title(title)
    return ax.figure


def _matrix(weights: ArrayLike) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2 or 0 in weights.shape:
        raise ShapeError(f"a map is one head's weights (T, S); got {weights.shape}")
    return weights


def _draw_map(ax: Axes, weights: np.ndarray, mask: ArrayLike | None, vmax: float | None, **how) -> None:
    """A heat map over a hatched ground, which shows where there is nothing to see."""
    hidden = None
    if mask is not None:
        hidden = ~np.asarray(mask, dtype=bool)
        if hidden.shape != weights.shape:
            raise ShapeError(f"the mask must be {weights.shape}, as the weights are; got {hidden.shape}")
    vmax = (float(weights.max()) or 1.0) if vmax is None else vmax
    sns.heatmap(weights, ax=ax, mask=hidden, vmin=0.0, vmax=vmax, cmap=MAP, xticklabels=False, yticklabels=False, **how)
    ax.patch.set(facecolor=GROUND, edgecolor="#a0a0a0", hatch="//////", linewidth=0)


def _step(n: int, inches: float) -> int:
    """Label every so many of n tokens, so that the labels stand clear of each other and are no more than MAX_LABELS."""
    room = min(MAX_LABELS, max(1, int(inches / 0.15)))
    return -(-n // room)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _label(text: str, longest: int = 12) -> str:
    """Text that matplotlib draws as it is: no mathematics between dollar signs, a box for what the font lacks."""
    font = get_font(findfont("DejaVu Sans"))
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text).replace("$", r"\$")


def _spread(ax: Axes, names: list) -> None:
    """Move the names at the lines' ends apart, up or down, where they would lie on each other."""
    ax.figure.draw_without_rendering()  # only now is it known where the ends are
    points = 72 / ax.figure.dpi
    ends = sorted(((ax.transData.transform(name.xy)[1] * points, name) for name in names), key=lambda end: end[0])
    if not ends:
        return
    apart = 12.0
    wanted = [height for height, _ in ends]
    for i in range(1, len(wanted)):
        wanted[i] = max(wanted[i], wanted[i - 1] + apart)
    top = ax.bbox.y1 * points
    for i in reversed(range(len(wanted))):  # and back down where that went beyond the top
        limit = top if i == len(wanted) - 1 else wanted[i + 1] - apart
        wanted[i] = min(wanted[i], limit)
    for (height, name), goal in zip(ends, wanted, strict=True):
        name.set_position((6, goal - height))
