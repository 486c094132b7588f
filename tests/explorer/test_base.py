"""What holds of every explorer: what a cell shows, what a page and a saved file hold, and what happens when it goes wrong."""

import json
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from attnlab.errors import InputError
from attnlab.explorer import DotProductExplorer, base

HOSTILE = ["<img src=x onerror=window.hacked=1>", "</script><script>window.hacked=1</script>", "<!--<script>"]
STILL = "figure > img"


def hostile() -> DotProductExplorer:
    made = DotProductExplorer()
    made.data = {**made.data, "labels": HOSTILE}
    return made


def payload(page: str) -> str:
    return re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1]


# ---- in Python


def test_a_cell_offers_the_widget_and_html_without_code():
    bundle, _ = DotProductExplorer()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == "DotProductExplorer()"
    shown = bundle["text/html"]
    assert re.findall(r"<script[^>]*>", shown) == ['<script type="application/json">']
    assert re.search(r'<img alt="[^"]{20,}" src="data:image/png;base64,iVBOR', shown)
    assert 'data-explorer="dot-product"' in shown


def test_the_html_is_the_same_each_time():
    assert DotProductExplorer().figure_html() == DotProductExplorer().figure_html()


def test_text_in_the_data_cannot_end_the_script_and_comes_back_as_it_was():
    shown = hostile().figure_html()
    assert not any(text in shown for text in HOSTILE)
    assert shown.count("<script") == shown.count("</script>") == 1 and "<!--" not in shown
    assert json.loads(payload(shown))["labels"] == HOSTILE


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_data_that_json_cannot_hold_are_refused(value):
    class Bad(base.Explorer):
        kind = "dot-product"

    with pytest.raises(InputError, match="a page can hold numbers"):
        Bad({"value": value})


def test_the_widget_carries_its_module_and_its_style_sheet():
    made = DotProductExplorer()
    assert made._esm == base.module("dot-product") and made._css == base.style_sheet("dot-product")
    assert {"_esm", "_css", "data"} <= set(made.keys)


@pytest.mark.parametrize("kind", base.kinds())
def test_a_module_exports_once_imports_nothing_and_can_stand_in_a_page(kind):
    source = base.module(kind)
    assert len(re.findall(r"^export ", source, re.MULTILINE)) == 1
    assert not re.search(r"^import |\bimport\(|https?://(?!www\.w3\.org/2000/svg)", source, re.MULTILINE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function|document\.write", source)
    for text in (base.classic(kind), base.source("host.js"), base.style_sheet(kind)):
        assert "</script" not in text and "</style" not in text and "<!--" not in text


def test_a_module_without_its_export_is_refused(monkeypatch):
    monkeypatch.setattr(base, "module", lambda kind: "const nothing = 1;\n")
    with pytest.raises(ValueError, match="must have one line that starts with 'export default'"):
        base.classic("dot-product")


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "one.html"
    path.write_text("before")
    assert DotProductExplorer().save_html(path, title="A & <b>") == path
    assert "<title>A &amp; &lt;b&gt;</title>" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match="name a file in a folder that is there"):
        DotProductExplorer().save_html(tmp_path / "nowhere" / "one.html")
    with pytest.raises(InputError, match="cannot write"):
        DotProductExplorer().save_html(tmp_path)  # a folder, not a file


def test_importing_attnlab_brings_no_widgets():
    code = "import sys, attnlab; print([name for name in ('anywidget', 'ipywidgets', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- in the browser


@pytest.mark.browser
def test_map_colours_are_matplotlibs_and_text_on_them_can_be_read(browser):
    page = browser.new_page()
    places = np.linspace(0, 1, 256)
    script = base.source("common.js") + "; return places.map((t) => [...cividisRGB(t), textOn(t)]);"
    drawn = page.evaluate("([script, places]) => new Function('places', script)(places)", [script, places.tolist()])
    page.close()
    ground = np.array([colour[:3] for colour in drawn])
    assert np.abs(ground - 255 * matplotlib.colormaps["cividis"](places)[:, :3]).max() < 12
    light = np.where(ground <= 0.04045 * 255, ground / 255 / 12.92, ((ground / 255 + 0.055) / 1.055) ** 2.4)
    light = light @ [0.2126, 0.7152, 0.0722] + 0.05
    ink = np.array([1.05 if colour[3] == "#ffffff" else 0.05 for colour in drawn])
    assert (np.maximum(light, ink) / np.minimum(light, ink)).min() >= 4.5


@pytest.mark.browser
def test_a_saved_file_draws_itself_asks_nobody_and_complains_of_nothing(opened):
    page = opened(DotProductExplorer())
    assert page.root.count() == 1
    assert page.root.get_attribute("data-explorer") == "dot-product"
    assert not page.page.is_visible(STILL)
    assert page.strangers() == [] and page.complaints == []


@pytest.mark.browser
def test_hostile_text_is_shown_and_not_run(opened):
    page = opened(hostile())
    shown = page.root.inner_text()
    assert all(text in shown for text in HOSTILE)
    assert page.page.evaluate("window.hacked") is None
    assert page.root.locator("img, script").count() == 0
    assert page.complaints == []


def cut_off(page: str) -> str:
    data = payload(page)
    return page.replace(data, data[: len(data) // 2])


def emptied(page: str) -> str:
    return page.replace(payload(page), "{}")


@pytest.mark.browser
@pytest.mark.parametrize(
    "change, sentence", [(cut_off, "The data of this figure are damaged"), (emptied, "This figure could not be drawn")]
)
def test_damaged_data_give_a_sentence_and_leave_the_picture(opened, change, sentence):
    page = opened(DotProductExplorer(), change=change, wait=False)
    page.page.wait_for_selector("[role=alert]")
    assert sentence in page.root.inner_text()
    assert page.root.get_attribute("data-ready") is None
    assert page.page.is_visible(STILL)
    assert page.complaints == []


@pytest.mark.browser
def test_without_javascript_the_picture_shows(opened):
    page = opened(DotProductExplorer(), wait=False, java_script_enabled=False)
    assert page.page.is_visible(STILL)
    assert page.page.locator(STILL).bounding_box()["width"] > 200
    assert page.page.inner_text("main").count("{") == 0  # the data are not shown


@pytest.mark.browser
def test_on_paper_the_picture_shows(opened):
    page = opened(DotProductExplorer()).page
    page.emulate_media(media="print")
    assert page.is_visible(STILL) and not page.is_visible("[data-explorer]")


@pytest.mark.browser
def test_new_data_draw_it_anew(opened):
    """As when a notebook sets ``explorer.data``: the module is driven with a model that changes."""
    page = opened(DotProductExplorer()).page
    labels = page.evaluate(
        """async () => {
          let listener;
          const data = JSON.parse(document.querySelector("script[type='application/json']").textContent);
          const model = { get: () => data, on: (name, f) => (listener = f), off: () => (listener = undefined) };
          const el = document.createElement("div");
          let module;
          const host = attnlabExplorers;
          globalThis.attnlabExplorers = { module: (kind, make) => (module = make()) };
          new Function(document.scripts[document.scripts.length - 1].textContent)();
          globalThis.attnlabExplorers = host;
          const end = await module.render({ model, el });
          const before = el.querySelector("tbody th").textContent;
          data.labels = ["a", "b", "c"];
          await listener();
          const after = el.querySelector("tbody th").textContent;
          const tables = el.querySelectorAll("table").length;
          end();
          return [before, after, tables, listener === undefined];
        }"""
    )
    assert labels == ["0", "a", 1, True]


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_follow_the_system_and_whoever_shows_the_page(opened, theme):
    page = opened(DotProductExplorer(), theme=theme).page
    ground = "getComputedStyle(document.querySelector('[data-explorer]')).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 24, 30)"
    assert page.evaluate(ground) == (dark if theme == "dark" else light)
    for says, expected in (
        ("document.documentElement.dataset.theme = 'dark'", dark),
        ("document.documentElement.dataset.theme = 'light'", light),
        ("delete document.documentElement.dataset.theme; document.body.dataset.jpThemeLight = 'false'", dark),
        ("document.body.dataset.jpThemeLight = 'true'", light),
        ("delete document.body.dataset.jpThemeLight; document.body.className = 'vscode-dark'", dark),
        ("document.body.className = 'vscode-light'", light),
    ):
        page.evaluate(says)
        assert page.evaluate(ground) == expected, says
