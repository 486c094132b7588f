"""Figures: what they hold is what was passed, every axis is labelled, nothing overlaps or is cut off."""

import io
import itertools
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from attnlab import causal_mask, memory, plots
from attnlab.errors import ConfigError, ShapeError
from attnlab.record import AttentionRecord

TOKENS = [
    "<s>",
    "·def",
    "·read",
    "_",
    "lines",
    "(",
    "path",
    ",",
    "encoding",
    "=",
    "None",
    ")",
    ":",
    "⏎",
    "····with",
    "·open",
    "(",
    "path",
    ")",
]


def causal_weights(T: int, window: int | None = None, seed: int = 0) -> np.ndarray:
    scores = torch.randn(T, T, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(~causal_mask(T, T, window), -torch.inf).softmax(-1).numpy()


def record(n_layers=2, n_heads=4, n_kv_heads=2, T=6, window=None, causal=True) -> AttentionRecord:
    heads = [causal_weights(T, window, seed) for seed in range(n_layers * n_heads)]
    weights = np.stack(heads).reshape(n_layers, n_heads, T, T).astype(np.float16)
    tokens = (TOKENS * 4)[:T]
    return AttentionRecord(weights, tokens, tokens, n_kv_heads, window, causal, "test")


def maps(fig: Figure) -> list[np.ma.MaskedArray]:
    """The values of every heat map in the figure; colour bars are not among them."""
    return [mesh.get_array() for ax in fig.axes for mesh in ax.collections if ax.get_label() != "<colorbar>" and mesh.get_array() is not None and mesh.get_array().shape != (256, 1) and mesh.get_array().shape != (1, 256)]  # fmt: skip


def texts(fig: Figure) -> list[Text]:
    """Every text that is really drawn (an axis also keeps ticks beyond its ends, which are not)."""
    drawn = []
    with mock.patch.object(Text, "draw", autospec=True, side_effect=lambda text, renderer: drawn.append(text)):
        FigureCanvasAgg(fig).draw()
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


def png(fig: Figure) -> bytes:
    file = io.BytesIO()
    fig.savefig(file, format="png")
    return file.getvalue()


def typical() -> dict[str, Figure]:
    x = 2 ** np.arange(7, 16)
    names = ("llama-2-7b", "mistral-7b-v0.2", "mistral-7b-v0.1", "falcon-7b")
    caches = {name: [memory.kv_cache_bytes(name, int(n)) / 2**30 for n in x] for name in names}
    T = len(TOKENS)
    return {
        "small map": plots.attention_map(causal_weights(5), TOKENS[:5], TOKENS[:5], mask=causal_mask(5), title="one"),
        "map": plots.attention_map(causal_weights(T), TOKENS, TOKENS, mask=causal_mask(T)),
        "large map": plots.attention_map(causal_weights(70), ["token"] * 70, ["token"] * 70),
        "grid": plots.head_grid(record(n_heads=8), layer=1),
        "multi-head grid": plots.head_grid(record(n_heads=4, n_kv_heads=4)),
        "lines": plots.lines(x, caches, "context (tokens)", "cache (GiB)", logx=True, logy=True, title="a row's cache"),
        "bars": plots.bars(["32 K/V heads", "8 K/V heads"], [524_288, 131_072], "bytes a token"),
        "bytes": plots.stacked_bytes(memory.compare(names[:3], 32_768, 2), 24e9),
        "roofline": plots.roofline({"a machine": (1e11, 1e10)}, {"products": ([0.5, 4, 64], [4e9, 3e10, 9e10])}),
    }


FIGURES = typical()


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_at_the_canvas(name):
    fig = FIGURES[name]
    seen = texts(fig)
    assert len(seen) > 3
    width, height = fig.canvas.get_width_height()
    for text in seen:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text.get_text()


@pytest.mark.parametrize("name", FIGURES)
def test_no_two_texts_overlap(name):
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(FIGURES[name])]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        shared = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(shared) < 2, f"{one!r} and {other!r}"


@pytest.mark.parametrize("name", FIGURES)
def test_the_ground_is_opaque_and_light_so_that_dark_pages_do_not_matter(name):
    assert min(FIGURES[name].get_facecolor()[:3]) > 0.95
    assert FIGURES[name].get_facecolor()[3] == 1


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_closed_for_pyplot_so_that_a_notebook_shows_it_once(name):
    assert FIGURES[name].number not in plt.get_fignums()


def test_the_same_call_makes_the_same_picture():
    def draw():
        return png(plots.lines([1, 2, 4], {"a": [1, 2, 3], "b": [1, 2, 3]}, "x", "y")), png(
            plots.head_grid(record(), 0)
        )

    assert draw() == draw()


def test_line_colours_stand_out_from_the_ground_by_three_to_one():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    for colour in plots.COLOURS:
        assert (luminance(plots.GROUND) + 0.05) / (luminance(colour) + 0.05) >= 3


def test_a_map_holds_the_weights_and_its_labels():
    weights = causal_weights(5)
    fig = plots.attention_map(weights, TOKENS[:5], TOKENS[:5], title="one head")
    (values,) = maps(fig)
    assert np.array_equal(values, weights)
    ax = fig.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("key", "query", "one head")
    for axis in (ax.xaxis, ax.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == TOKENS[:5]
    assert ax.yaxis_inverted()
    assert ax.collections[0].get_cmap().name == "cividis"


def test_a_small_map_carries_its_numbers_and_a_larger_one_a_scale():
    weights = causal_weights(5)
    written = {text.get_text() for text in texts(plots.attention_map(weights, TOKENS[:5], TOKENS[:5]))}
    assert {f"{weight:.2f}" for weight in weights.flat} <= written
    fig = plots.attention_map(causal_weights(9), TOKENS[:9], TOKENS[:9])
    assert fig.axes[1].get_ylabel() == "attention weight"


def test_what_a_mask_forbids_is_hatched_and_a_zero_is_not():
    weights = causal_weights(5)
    weights[4, 0] = 0.0
    fig = plots.attention_map(weights, TOKENS[:5], TOKENS[:5], mask=causal_mask(5))
    (values,) = maps(fig)
    assert np.array_equal(np.ma.getmaskarray(values), ~causal_mask(5).numpy())
    assert values[4, 0] == 0 and not np.ma.getmaskarray(values)[4, 0]
    assert fig.axes[0].patch.get_hatch()


def test_of_many_tokens_every_nth_is_labelled_where_it_stands():
    tokens = [f"t{i}" for i in range(90)]
    ax = plots.attention_map(causal_weights(90), tokens, tokens).axes[0]
    for axis in (ax.xaxis, ax.yaxis):
        labels = [(label.get_text(), place) for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)]  # fmt: skip
        assert 10 < len(labels) <= plots.MAX_LABELS
        assert all(name == f"t{place - 0.5:.0f}" for name, place in labels)


def test_labels_are_drawn_as_they_are():
    tokens = ["$x$", "$", "a" * 50, "中"]
    fig = plots.attention_map(np.eye(4), tokens, tokens)
    shown = [label.get_text() for label in fig.axes[0].yaxis.get_ticklabels()]
    assert shown[0].replace("\\$", "$") == "$x$" and shown[2].endswith("…") and len(shown[2]) == 12
    assert shown[3] == "□"  # the font has no face for it
    assert png(fig)


def test_a_grid_shows_every_head_of_the_layer_under_its_kv_head():
    rec = record(n_heads=8, n_kv_heads=2)
    fig = plots.head_grid(rec, layer=1)
    values = maps(fig)
    assert len(values) == 8
    for head in range(8):
        assert np.array_equal(values[head].filled(0), np.where(causal_mask(6), rec.weights[1, head], 0))
    titles = [text.get_text() for text in texts(fig)]
    order = [title for title in titles if "head" in title]
    assert sorted(order) == sorted([f"head {h}" for h in range(8)] + ["K/V head 0", "K/V head 1"])
    assert "layer 1" in titles and "layer 0" not in titles
    frames = [frame for frame in fig.findobj(lambda a: hasattr(a, "subfigs")) if (t := getattr(frame, "_suptitle", None)) and t.get_text().startswith("K/V")]  # fmt: skip
    assert [[ax.get_xlabel() for ax in frame.axes] for frame in frames] == [
        ["head 0", "head 1", "head 2", "head 3"],
        ["head 4", "head 5", "head 6", "head 7"],
    ]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
def test_a_grid_holds_all_layers_whatever_the_group_size(n_kv_heads):
    rec = record(n_layers=3, n_heads=6, n_kv_heads=n_kv_heads)
    assert len(maps(plots.head_grid(rec))) == 18
    assert len(maps(plots.head_grid(rec, layer=[2, 0]))) == 12


def test_a_grid_cuts_a_long_text_and_keeps_its_window():
    rec = record(T=30, window=4)
    values = maps(plots.head_grid(rec, layer=0, max_tokens=10))[0]
    assert values.shape == (10, 10)
    assert np.array_equal(np.ma.getmaskarray(values), ~causal_mask(10, 10, 4).numpy())


def test_lines_hold_their_data_differ_in_stroke_and_marker_and_carry_their_names():
    x, series = [1, 2, 4, 8], {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4.01], "c": [4, 3, np.nan, np.nan]}
    fig = plots.lines(x, series, "tokens", "bytes", logx=True)
    (ax,) = fig.axes
    for line, (name, y) in zip(ax.get_lines(), series.items(), strict=True):
        assert np.array_equal(line.get_xdata(), x) and np.array_equal(line.get_ydata(), y, equal_nan=True)
        assert line.get_label() == name
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.get_lines()}) == 3
    assert {text.get_text() for text in ax.texts} == {"a", "b", "c"}
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("tokens", "bytes", "log")
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert all(below.y1 < above.y0 + 2 for below, above in itertools.pairwise(boxes))


def test_bars_hold_their_values_and_write_them():
    fig = plots.bars(["one", "two"], [131_072, 0.5], "bytes")
    (ax,) = fig.axes
    assert [bar.get_width() for bar in ax.patches] == [131_072, 0.5]
    assert [text.get_text() for text in ax.texts] == ["131,072", "0.5"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert ax.get_xlabel() == "bytes"


def test_stacked_bytes_are_weights_and_cache_against_the_device():
    rows = memory.compare(["llama-2-7b", "mistral-7b-v0.1"], 32_768)
    (ax,) = plots.stacked_bytes(rows, 24e9).axes
    weights, cache = ax.containers[:2]
    for i, row in enumerate(rows):
        assert weights[i].get_width() == pytest.approx(row["weight_bytes"] / 2**30)
        assert cache[i].get_width() == pytest.approx(row["cache_bytes"] / 2**30)
        assert cache[i].get_x() == pytest.approx(weights[i].get_width())
    assert not weights[0].get_hatch() and cache[0].get_hatch()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["22.4 GiB device", "weights", "cache"]
    assert ax.get_xlabel() == "GiB"


def test_a_drawing_goes_to_the_axes_it_is_given():
    fig, axes = plt.subplots(1, 2)
    assert plots.bars(["a"], [1], "bytes", ax=axes[0]) is fig
    assert plots.lines([1, 2], {"a": [1, 2]}, "x", "y", ax=axes[1]) is fig
    assert fig.number in plt.get_fignums() and len(axes[1].get_lines()) == 1
    plt.close(fig)


@pytest.mark.parametrize(
    "call, error, expected",
    [
        (lambda: plots.attention_map(np.eye(3), ["a"], ["a"]), ShapeError, "labels"),
        (lambda: plots.attention_map(np.ones(3), ["a"], ["a"]), ShapeError, "one head"),
        (lambda: plots.attention_map(np.eye(2), ["a"] * 2, ["a"] * 2, mask=np.eye(3)), ShapeError, "mask"),
        (lambda: plots.head_grid(record(), layer=2), ConfigError, "layers 0 to 1"),
        (lambda: plots.head_grid(record(), max_tokens=0), ConfigError, "max_tokens"),
        (lambda: plots.lines([1, 2], {"a": [1]}, "x", "y"), ShapeError, "a value for each"),
        (lambda: plots.bars(["a"], [1, 2], "bytes"), ShapeError, "values"),
        (lambda: plots.stacked_bytes(memory.compare([memory.ModelShape("mine", 2, 4, 2, 8)])), ConfigError, "mine"),
    ],
)
def test_bad_input_raises_one_error_and_leaves_no_figure_behind(call, error, expected):
    before = plt.get_fignums()
    with pytest.raises(error, match=expected):
        call()
    assert plt.get_fignums() == before


def test_a_knob_is_stills_on_a_page_and_a_slider_in_a_notebook():
    drawn = []
    knob = plots.knob(lambda ax, n: drawn.append(n) or ax.plot([0, n]), "n", [1, 2, 3, 5, 8, 13])
    bundle = knob._repr_mimebundle_()
    assert bundle["image/png"].startswith(b"\x89PNG") and "application/vnd.jupyter.widget-view+json" in bundle
    assert [ax.get_title(loc="left") for ax in knob.stills().axes] == ["n = 1", "n = 3", "n = 5", "n = 13"]
    slider, image = knob.widget().children
    before = image.value
    drawn.clear()
    slider.value = 5
    assert drawn == [5] and image.value != before
    slider.value = 1
    assert drawn == [5] and image.value == before  # what was drawn is kept


def test_a_knob_with_nothing_to_turn_through_is_refused():
    with pytest.raises(ConfigError, match="needs values"):
        plots.knob(lambda ax, n: None, "n", [])


def test_a_roofline_rises_with_the_bandwidth_to_the_peak_and_holds_its_points():
    fig = plots.roofline({"machine": (100.0, 10.0)}, {"work": ([1, 20], [8, 90])}, title="a roof")
    roof, work = fig.axes[0].lines
    assert roof.get_ydata().max() == 100 and np.allclose(work.get_xydata(), [[1, 8], [20, 90]])
    below = roof.get_xdata() < 10
    assert np.allclose(roof.get_ydata()[below], 10 * roof.get_xdata()[below])
    assert fig.axes[0].get_xlabel() and fig.axes[0].get_ylabel()
