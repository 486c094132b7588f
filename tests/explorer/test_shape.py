"""The shape explorer: heads, projections, parameters and cache are those of the package's layer."""

import pytest
import torch

from attnlab import GroupedQueryAttention, memory
from attnlab.errors import AttnlabError, ConfigError
from attnlab.explorer import ShapeExplorer

# Turns the sliders to the numbers and reads the tables: {row: cells} twice, and the lines of the diagram.
DRIVE = """settings => {
  const root = document.querySelector("[data-explorer]");
  const labelled = text => [...root.querySelectorAll("label")].find(label =>
    label.querySelector("span").textContent === text).querySelector("input, select");
  const set = (text, value) => {
    const input = labelled(text);
    if (input.type === "checkbox") input.checked = value; else input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  return settings.map(s => {
    set("n_heads", s.n_heads);
    const possible = [];
    for (let d = 1; d <= s.n_heads; d++) if (s.n_heads % d === 0) possible.push(d);
    set("n_kv_heads", possible.indexOf(s.n_kv_heads));
    set("head_dim", s.head_dim);
    set("d_model = n_heads · head_dim", s.d_model === null);
    if (s.d_model !== null) set("d_model", s.d_model);
    set("cache in", ["float32", "bfloat16", "float16"].indexOf(s.dtype));
    return {
      tables: [...root.querySelectorAll("table")].map(table => Object.fromEntries(
        [...table.tBodies[0].rows].map(row => [row.cells[0].textContent, [...row.cells].slice(1).map(cell => cell.textContent)]))),
      joined: [...root.querySelectorAll(".shape-line")].map(line => [Number(line.dataset.query), Number(line.dataset.kv)]),
    };
  });
}"""

SETTINGS = [
    {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "d_model": d_model, "dtype": dtype}
    for n_heads, n_kv_heads in [
        (1, 1), (7, 7), (7, 1), (8, 8), (8, 4), (8, 2), (8, 1), (12, 3), (32, 8), (71, 1), (128, 16), (128, 128),
    ]
    for head_dim, d_model, dtype in [(64, None, "float16"), (128, 4096, "float32"), (33, 77, "bfloat16")]
]  # fmt: skip


def layer_of(s: dict) -> GroupedQueryAttention:
    with torch.device("meta"):
        return GroupedQueryAttention(
            s["d_model"] or s["n_heads"] * s["head_dim"], s["n_heads"], s["n_kv_heads"], s["head_dim"]
        )


def cache_bytes(s: dict, n_kv_heads: int) -> int:
    return memory.kv_bytes_per_token(memory.ModelShape("one layer", 1, s["n_heads"], n_kv_heads, s["head_dim"]), s["dtype"])  # fmt: skip


def n_params(layer: torch.nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@pytest.fixture(scope="module")
def shown(kept_open):
    """What the page says at every setting."""
    return list(zip(SETTINGS, kept_open(ShapeExplorer()).evaluate(DRIVE, SETTINGS), strict=True))


def test_projections_and_parameters_are_those_of_the_layer(shown):
    for s, page in shown:
        layer = layer_of(s)
        rows = page["tables"][0]
        for name in "QKVO":
            weight = getattr(layer, f"{name.lower()}_proj").weight
            assert rows[f"W_{name}"] == [f"({weight.shape[0]}, {weight.shape[1]})", f"{weight.numel():,}"], s
        assert rows["together"] == ["", f"{n_params(layer):,}"], s


def test_every_style_has_the_parameters_and_the_cache_of_the_package(shown):
    for s, page in shown:
        rows = {name.removesuffix(" (chosen)"): cells for name, cells in page["tables"][1].items()}
        style = memory.ModelShape("it", 1, s["n_heads"], s["n_kv_heads"], s["head_dim"]).kind
        assert f"{style} (chosen)" in page["tables"][1]
        full = cache_bytes(s, s["n_heads"])
        for name, n in {"multi-head": s["n_heads"], "multi-query": 1, style: s["n_kv_heads"]}.items():
            if n == s["n_heads"] == 1 and name == "multi-query":
                continue  # with one head there is one style
            params, cache = n_params(layer_of(s | {"n_kv_heads": n})), cache_bytes(s, n)
            assert rows[name] == [f"{n}", f"{params:,}", f"{cache:,}", f"{full // cache} ×"], s


def test_a_query_head_is_joined_to_the_head_that_the_layer_lets_it_read(shown):
    for s, page in shown:
        if s["n_heads"] > 12:
            assert page["joined"] == [[h, h // layer_of(s).group_size] for h in range(s["n_heads"])]
            continue
        torch.manual_seed(0)
        layer = GroupedQueryAttention(8, s["n_heads"], s["n_kv_heads"], 4)
        read = []
        for kv in range(s["n_kv_heads"]):  # a K/V head's keys grow: whose weights change?
            x, D = torch.randn(1, 5, 8), layer.head_dim
            before = layer(x, return_weights=True)[1]
            with torch.no_grad():
                layer.k_proj.weight[kv * D : (kv + 1) * D] += 3
            changed = (layer(x, return_weights=True)[1] - before).abs().amax((0, 2, 3)) > 1e-4
            read += [[h, kv] for h in changed.nonzero().flatten().tolist()]
        assert page["joined"] == read, s


@pytest.mark.parametrize("shape", [s for s in memory.SHAPES.values() if s.latent_dim is None], ids=lambda s: s.name)
def test_a_preset_is_the_models_layer_and_its_bytes_a_token(opened_once, shape):
    page = opened_once
    page.get_by_role("combobox", name="model", exact=True).select_option(label=shape.name)
    for name in ("n_heads", "head_dim"):
        assert page.get_by_role("slider", name=name, exact=True).input_value() == str(getattr(shape, name))
    assert page.get_by_role("slider", name="n_kv_heads").get_attribute("aria-valuetext") == str(shape.n_kv_heads)
    said = page.locator(".shape-total").inner_text()
    assert f"= {memory.kv_bytes_per_token(shape):,} bytes a token" in said and shape.source in said
    assert page.get_by_role("rowheader", name="W_Q").locator("xpath=..").inner_text().split("\t")[1] == (
        f"({shape.n_heads * shape.head_dim}, {shape.d_model})"
    )
    assert page.get_by_role("checkbox").is_checked() == (shape.d_model == shape.n_heads * shape.head_dim)


@pytest.fixture(scope="module")
def opened_once(kept_open):
    return kept_open(ShapeExplorer())


# ---- turning the knobs


def test_only_divisors_can_be_reached_and_a_style_stays_when_the_heads_change(opened):
    page = opened(ShapeExplorer(768, 12, 3)).page
    kv = page.get_by_role("slider", name="n_kv_heads")
    kv.focus()
    kv.press("Home")
    seen = [kv.get_attribute("aria-valuetext")]
    for _ in range(5):
        kv.press("ArrowRight")
        seen.append(kv.get_attribute("aria-valuetext"))
    assert seen == ["1", "2", "3", "4", "6", "12"]
    heads = page.get_by_role("slider", name="n_heads")
    heads.press("ArrowRight")  # 13 is prime
    assert kv.get_attribute("aria-valuetext") == "13"  # it was multi-head
    page.get_by_role("button", name="multi-query").click()
    heads.press("ArrowRight")
    assert kv.get_attribute("aria-valuetext") == "1"
    assert page.get_by_role("button", name="multi-query").get_attribute("aria-pressed") == "true"


def test_the_style_buttons_turn_one_number(opened):
    page = opened(ShapeExplorer(4096, 32, 8)).page
    kv = page.get_by_role("slider", name="n_kv_heads")
    for style, n in (("multi-head", "32"), ("multi-query", "1"), ("grouped-query", "8")):
        page.get_by_role("button", name=style).click()
        assert kv.get_attribute("aria-valuetext") == n
        assert page.locator(".shape-box.shape-key").count() == int(n)
    page.get_by_role("slider", name="n_heads").fill("7")
    assert page.get_by_role("button", name="grouped-query").is_disabled()  # nothing between 7 and 1


def test_a_query_head_is_chosen_by_key_and_by_pointer(opened):
    made = opened(ShapeExplorer(512, 8, 2))
    page, reads = made.page, made.page.locator(".shape-reads")
    assert reads.inner_text() == "Query head 0 reads K/V head 0 (0 // 4), shared with heads 1, 2, 3."
    slider = page.get_by_role("slider", name="query head")
    slider.focus()
    for _ in range(5):
        slider.press("ArrowRight")
    assert reads.inner_text() == "Query head 5 reads K/V head 1 (5 // 4), shared with heads 4, 6, 7."
    assert page.locator(".shape-line.shape-chosen").evaluate_all("all => all.map(one => one.dataset.query)") == list("4567")  # fmt: skip
    page.wait_for_function("document.querySelector('.x-announcement')?.textContent.includes('Query head 5')")
    page.locator(".shape-box.shape-query").nth(2).hover()
    assert reads.inner_text().startswith("Query head 2 reads K/V head 0") and slider.input_value() == "2"
    page.locator(".shape-box.shape-key").nth(1).click()
    assert reads.inner_text().startswith("Query head 4 reads K/V head 1")
    page.get_by_role("button", name="multi-head").click()
    assert reads.inner_text() == "Query head 4 reads K/V head 4 (4 // 1), which no other head reads."
    assert not made.complaints and not made.strangers()


def test_a_finger_can_choose_too(opened):
    page = opened(ShapeExplorer(512, 8, 2), width=400, has_touch=True).page
    page.locator(".shape-box.shape-query").nth(6).tap()
    assert page.locator(".shape-reads").inner_text().startswith("Query head 6 reads K/V head 1")


def test_d_model_follows_until_it_is_let_go(opened):
    page = opened(ShapeExplorer(512, 8, 2)).page
    width = page.get_by_role("slider", name="d_model")
    assert not width.is_visible()
    page.get_by_role("slider", name="head_dim").fill("96")
    out = page.get_by_role("rowheader", name="W_O").locator("xpath=..")
    assert "(768, 768)" in out.inner_text()
    page.get_by_role("checkbox").uncheck()
    width.fill("1000")
    assert "(1000, 768)" in out.inner_text()
    page.get_by_role("slider", name="head_dim").fill("32")
    assert "(1000, 256)" in out.inner_text()
    page.get_by_role("checkbox").check()
    assert "(256, 256)" in out.inner_text()


def test_a_chosen_head_comes_into_view_where_there_are_many(opened):
    page = opened(ShapeExplorer(8192, 128, 8), width=320).page
    page.get_by_role("slider", name="query head").press("End")
    box = page.locator(".shape-query.shape-chosen").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 320


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 900])
def test_axe_finds_nothing_and_nothing_sticks_out(opened, theme, width):
    made = opened(ShapeExplorer(3072, 16, 4, 256), theme=theme, width=width)
    assert made.violations() == []
    assert not made.wider_than_the_screen()
    sizes = made.root.locator("input, select, button").evaluate_all(
        "all => all.filter(one => one.offsetParent).map(one => [one.offsetWidth, one.offsetHeight])"
    )
    assert sizes and all(wide >= 24 and high >= 24 for wide, high in sizes)


# ---- in Python


def test_it_takes_what_the_layer_takes():
    made = ShapeExplorer(512, 8)
    assert (made.data["n_kv_heads"], made.data["head_dim"]) == (8, 64)
    assert ShapeExplorer(100, 8, 2, 33, dtype=torch.float32).data["dtype"] == "float32"
    for shape in made.data["presets"]:
        ShapeExplorer(shape["d_model"], shape["n_heads"], shape["n_kv_heads"], shape["head_dim"])


@pytest.mark.parametrize("n_kv_heads, joined", [(8, "its own"), (2, "shares with its neighbours"), (1, "the one")])
def test_the_still_has_a_box_for_every_head_and_says_who_reads_what(n_kv_heads, joined):
    made = ShapeExplorer(512, 8, n_kv_heads)
    (ax,) = made.still().axes
    assert len(ax.patches) == 8 + 2 * n_kv_heads and len(ax.get_lines()) == 8
    assert joined in made.alt


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: ShapeExplorer(512, 8, 3), "multiple of n_kv_heads"),
        (lambda: ShapeExplorer(512, 0), "n_heads is a whole number"),
        (lambda: ShapeExplorer("mistral-7b-v0.1"), "d_model is a whole number"),
        (lambda: ShapeExplorer(4096, 4), "head_dim goes up to 512"),
        (lambda: ShapeExplorer(512, 7), "give head_dim"),
        (lambda: ShapeExplorer(512, 256, 1), "n_heads is a whole number from 1 to 128"),
        (lambda: ShapeExplorer(512, 8, 8, 1024), "head_dim is a whole number from 1 to 512"),
        (lambda: ShapeExplorer(0, 8, 8, 4), "d_model is a whole number from 1"),
        (lambda: ShapeExplorer(dtype="float8"), "unknown dtype"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(make, expected):
    with pytest.raises(AttnlabError, match=expected) as raised:
        make()
    assert isinstance(raised.value, ConfigError)
