"""Explorers on built pages, over http and from a folder: on a small book made here, and on the chapters that hold one."""

import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from urllib.parse import urlsplit

import nbformat
import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT, QuietHandler

import attnlab
from attnlab import memory
from attnlab.explorer import DotProductExplorer, live
from attnlab.explorer.rolling_buffer import steps

pytestmark = pytest.mark.browser
HOSTILE = ["<img src=x onerror=window.hacked=1>", "</script><script>window.hacked=1</script>", "<!--<script>"]
CELLS = [
    "from attnlab.explorer import DotProductExplorer\nDotProductExplorer()",
    "DotProductExplorer(d_k=1024, divide=False)",
    f"""
import attnlab
import numpy as np
w = np.tril(np.random.default_rng(0).random((2, 16, 130, 130)))
tokens = {HOSTILE!r} + [f"t{{i}}" for i in range(127)]
attnlab.explore(attnlab.AttentionRecord(
    weights=(w / w.sum(-1, keepdims=True)).astype(np.float16), query_tokens=tokens, key_tokens=tokens,
    n_kv_heads=4, window=None, causal=True, model_name="random",
))""",
    "from attnlab import plots\nplots.knob(lambda ax, n: ax.plot([0, n]), 'n', [1, 2])",
]
KNOB = {"mystnb": {"image": {"alt": "Two stills of a line, the second steeper"}}}
KINDS = ["dot-product", "dot-product", "attention"]  # of these cells
PAGE = "notebooks/one.html"
NUMBERS = [  # on a second page
    "from attnlab.explorer import MemoryExplorer, ShapeExplorer\nShapeExplorer(4096, 32, 8)",
    "MemoryExplorer('mistral-7b-v0.1', 'llama-2-7b')",
    "from attnlab.explorer import RollingBufferExplorer\nRollingBufferExplorer(window=4, tokens=12, chunk=3)",
]
LIVE = ["from attnlab.explorer import LiveExplorer\nLiveExplorer('def add(a, b):')"]  # on a third
STILL = "figure.attnlab-explorer > img"


def the_keyboard_moves(page, root) -> bool:
    """Whether keys change what an explorer shows, sent to the first control that answers to them."""
    before = root.inner_html()
    root.locator("input[type=range], select, button").first.focus()
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    return root.inner_html() != before


# ---- a small book with this book's settings


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of pages."""
    tree = tmp_path_factory.mktemp("book")
    for folder in ("book", "notebooks", "tools"):
        (tree / folder).mkdir()
    for name in ("_config.yml", "tools/book.py"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / name, tree / "book" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "_toc.yml").write_text(
        "format: jb-book\nroot: book/page\nchapters:\n  - file: notebooks/one\n  - file: notebooks/two\n"
        "  - file: notebooks/three\n"
    )
    (tree / "book" / "page.md").write_text("# A page\n\nWithout explorers.\n")
    (tree / "book" / "references.bib").write_text("")
    cells = [nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(CELLS)]
    cells[-1].metadata = KNOB
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    title = nbformat.v4.new_markdown_cell("# One\n\n| | |\n|---|---|\n| a | b |\n", id="title")
    nbformat.write(nbformat.v4.new_notebook(cells=[title, *cells], metadata=kernel), tree / "notebooks" / "one.ipynb")
    for name, sources in (("two", NUMBERS), ("three", LIVE)):
        cells = [nbformat.v4.new_code_cell(source, id=f"{name}{i}") for i, source in enumerate(sources)]
        title = nbformat.v4.new_markdown_cell(f"# {name.title()}", id="title")
        made = nbformat.v4.new_notebook(cells=[title, *cells], metadata=kernel)
        nbformat.write(made, tree / "notebooks" / f"{name}.ipynb")
    (tree / "requirements.txt").touch()
    command = [sys.executable, str(tree / "tools" / "book.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return tree / "_build" / "html"


@pytest.fixture(scope="module")
def server():
    """``server(folder)``: its address on loopback."""
    servers = []

    def serve(folder) -> str:
        at = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
        threading.Thread(target=at.serve_forever, daemon=True).start()
        servers.append(at)
        return f"http://127.0.0.1:{at.server_port}"

    yield serve
    for at in servers:
        at.shutdown()
        at.server_close()


class Visit:
    """A page in a context of its own, which may speak to its own host and to nobody else."""

    def __init__(self, browser, url, width=1280, theme="light", **context) -> None:
        self.home = urlsplit(url)[:2]
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme, **context)
        self.context.route("**/*", self._only_home)
        self.page = self.context.new_page()
        self.strangers: list[str] = []
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.goto(url, wait_until="load")

    def _only_home(self, route) -> None:
        url = route.request.url
        if urlsplit(url)[:2] == self.home or url.startswith(("data:", "blob:")):
            return route.continue_()
        self.strangers.append(url)
        route.abort()

    def wait_until_drawn(self, n: int) -> None:
        self.page.wait_for_function(
            f"() => document.querySelectorAll('[data-explorer][data-ready=true]').length === {n}"
        )

    def violations(self) -> list:
        found = Axe().run(self.page).response["violations"]
        return [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found]


@pytest.fixture
def visit(browser):
    visits = []

    def open_page(url, **how) -> Visit:
        visits.append(Visit(browser, url, **how))
        return visits[-1]

    yield open_page
    for opened in visits:
        opened.context.close()


@pytest.fixture(params=["http", "file"])
def home(request, small, server) -> str:
    return server(small) if request.param == "http" else small.as_uri()


def test_explorers_draw_themselves_and_ask_no_other_host(visit, home):
    opened = visit(f"{home}/{PAGE}")
    opened.wait_until_drawn(len(KINDS))
    assert opened.strangers == [] and opened.complaints == []
    kinds = opened.page.locator("[data-explorer]").evaluate_all("all => all.map(e => e.dataset.explorer)")
    assert kinds == KINDS
    assert not any(still.is_visible() for still in opened.page.locator(STILL).all())
    first, second, *others = opened.page.locator("[data-explorer]").all()
    untouched = second.inner_text()
    assert the_keyboard_moves(opened.page, first)
    first.locator("input[type=range]").focus()
    opened.page.keyboard.press("End")
    assert first.locator("input[type=range]").get_attribute("aria-valuetext") == "1,024"
    assert second.inner_text() == untouched  # each has a state of its own
    assert all(the_keyboard_moves(opened.page, other) for other in others)


def test_on_a_page_dragging_the_query_moves_the_weights(visit, home):
    opened = visit(f"{home}/{PAGE}")
    opened.wait_until_drawn(len(KINDS))
    root = opened.page.locator("[data-explorer=dot-product]").first
    plane = root.locator(".dot-plane")
    plane.scroll_into_view_if_needed()
    box = plane.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.page.mouse.move(x + box["width"] / 4, y - box["height"] / 6)  # (1.5, 1.0), where the query stands
    opened.page.mouse.down()
    opened.page.mouse.move(x - box["width"] / 3, y, steps=4)  # (-2, 0), on the last key
    opened.page.mouse.up()
    says = root.locator(".dot-handle").get_attribute("aria-valuetext").replace("−", "-")
    query = [float(part) for part in re.findall(r"-?[\d.]+", says)]
    assert query == pytest.approx([-2, 0], abs=0.03)
    right = DotProductExplorer().numbers(query, 2)["weights"].tolist()
    shown = root.locator("tbody tr td:last-child").all_inner_texts()
    assert [float(text) for text in shown] == pytest.approx(right, abs=0.006)


@pytest.mark.parametrize("width, theme", [(1280, "light"), (1280, "dark"), (320, "light")])
def test_the_themes_own_styles_leave_explorers_alone(visit, small, width, theme):
    """It hides what has the class toggle, restyles rows, and puts a light ground under outputs in the dark."""
    opened = visit(f"{small.as_uri()}/{PAGE}", width=width, theme=theme)
    opened.wait_until_drawn(len(KINDS))
    page = opened.page
    article = page.locator("article h1").bounding_box()["width"]
    for root in page.locator("[data-explorer]").all():
        assert root.bounding_box()["width"] > 0.9 * article
        for control in root.locator(":scope > .x-row .x-control").all():
            assert control.is_visible() and control.locator("input, select").is_visible()
    assert page.locator("[data-explorer] .toggle-details, [data-explorer] .toggle-button").count() == 0
    grounds = "all => all.map(e => getComputedStyle(e).backgroundColor)"
    assert set(page.locator(".text_html").evaluate_all(grounds)) == {"rgba(0, 0, 0, 0)"}


def test_hostile_tokens_are_shown_and_not_run(visit, home):
    opened = visit(f"{home}/{PAGE}")
    opened.wait_until_drawn(len(KINDS))
    text = opened.page.locator("[data-explorer=attention]").text_content()
    assert all(token in text for token in HOSTILE)
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.locator("[data-explorer] :is(img[src=x], script)").count() == 0


def test_a_page_ships_each_module_once_and_other_pages_none(small):
    scripts = re.findall(r'<script[^>]*src="[^"]*/explorer/([\w-]+)\.js', (small / PAGE).read_text(encoding="utf-8"))
    assert sorted(scripts) == ["attention", "dot-product", "host"]
    assert "explorer/" not in (small / "book" / "page.html").read_text(encoding="utf-8")


def test_large_data_lie_in_files_and_a_page_holds_neither_code_nor_widgets_twice(small):
    page = (small / PAGE).read_text(encoding="utf-8")
    payloads = [
        json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    ]
    layers = payloads[KINDS.index("attention")]["layers"]
    files = {path.name: path.stat().st_size for path in (small / "_static" / "explorer" / "data").iterdir()}
    files = {name: size for name, size in files.items() if not name.startswith(live.MODELS)}
    assert len(layers) == 2 and {layer["file"] for layer in layers} == set(files)
    assert all(files[layer["file"]] > layer["length"] > 20_000 for layer in layers)
    assert len(page) < 400_000
    assert "jupyter.widget" not in page and "_esm" not in page


def test_a_knob_is_a_picture(visit, home):
    opened = visit(f"{home}/{PAGE}")
    knob = opened.page.locator('img[alt="Two stills of a line, the second steeper"]')
    knob.scroll_into_view_if_needed()
    assert knob.evaluate("async image => { await image.decode(); return image.naturalWidth; }") > 100


@pytest.fixture
def copy(small, tmp_path):
    """The pages, to be damaged."""
    live_models = shutil.ignore_patterns(*(f"{name}-*" for name in live.MODELS))  # nobody damages these here
    shutil.copytree(small, tmp_path / "html", ignore=live_models)
    return tmp_path / "html"


def remove(path) -> None:
    path.unlink()


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shorten(path) -> None:
    path.write_text(re.sub(r'"[A-Za-z0-9+/]{100}', '"', path.read_text()))


@pytest.mark.parametrize("damage", [remove, cut, shorten])
@pytest.mark.parametrize("via", ["http", "file"])
def test_a_data_file_that_is_missing_or_cut_off_gives_a_sentence_and_leaves_the_picture(
    visit, server, copy, damage, via
):
    for path in (copy / "_static" / "explorer" / "data").iterdir():
        damage(path)
    opened = visit(f"{server(copy) if via == 'http' else copy.as_uri()}/{PAGE}")
    root = opened.page.locator("[data-explorer=attention]")
    root.locator("[role=alert]").wait_for()
    assert re.search("is missing" if damage is remove else "is incomplete", root.inner_text())
    assert opened.page.locator(STILL).nth(2).is_visible()
    opened.wait_until_drawn(len(KINDS) - 1)  # the others are drawn all the same


def test_without_its_module_a_page_keeps_the_picture(visit, copy):
    (copy / "_static" / "explorer" / "attention.js").unlink()
    opened = visit(f"{copy.as_uri()}/{PAGE}")
    opened.wait_until_drawn(len(KINDS) - 1)
    assert opened.page.locator(STILL).nth(2).is_visible()


def test_without_javascript_the_pictures_show(visit, home):
    opened = visit(f"{home}/{PAGE}", java_script_enabled=False)
    for still in opened.page.locator(STILL).all():
        assert still.is_visible() and still.bounding_box()["width"] > 200 and len(still.get_attribute("alt")) > 20
    assert opened.page.locator(STILL).count() == len(KINDS)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 320])
def test_axe_finds_nothing_and_nothing_sticks_out(visit, small, width, theme):
    opened = visit(f"{small.as_uri()}/{PAGE}", width=width, theme=theme)
    opened.wait_until_drawn(len(KINDS))
    assert opened.violations() == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_colours_follow_the_pages_switch(visit, small):
    opened = visit(f"{small.as_uri()}/{PAGE}")
    opened.wait_until_drawn(len(KINDS))
    seen = set()
    for _ in range(3):  # auto, light, dark and round again
        opened.page.locator("button.theme-switch-button:visible").first.click()
        theme = opened.page.evaluate("document.documentElement.dataset.theme")
        ground = opened.page.locator("[data-explorer]").first.evaluate("e => getComputedStyle(e).backgroundColor")
        seen.add((theme, ground))
    assert seen == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 30)")}


# ---- shapes and bytes


def row(root, name) -> list[str]:
    """The cells of a table's row, without its name."""
    return root.get_by_role("rowheader", name=name, exact=True).first.locator("xpath=..").locator("td").all_inner_texts()  # fmt: skip


def test_shapes_and_bytes_on_a_page_are_the_packages(visit, home):
    opened = visit(f"{home}/notebooks/two.html")
    opened.wait_until_drawn(len(NUMBERS))
    shape, account, _ = opened.page.locator("[data-explorer]").all()
    shape.get_by_role("button", name="multi-query").click()
    with torch.device("meta"):
        layer = attnlab.GroupedQueryAttention(4096, 32, 1)
    n_params = sum(p.numel() for p in layer.parameters())
    per_token = memory.kv_bytes_per_token(memory.ModelShape("layer", 1, 32, 1, 128))
    assert row(shape, "multi-query (chosen)") == ["1", f"{n_params:,}", f"{per_token:,}", "32 ×"]
    assert shape.locator(".shape-line").count() == 32

    account.get_by_role("spinbutton", name="context, tokens, exactly").fill("10000")
    account.get_by_role("combobox", name="card").select_option(label="H200, 141 GB")
    account.get_by_text("In bytes, exactly").click()
    exact = account.get_by_role("table", name="Exact numbers")
    fits = [memory.fits(name, 141e9, 10_000) for name in ("mistral-7b-v0.1", "llama-2-7b")]
    for name in ("cache", "total", "spare"):
        label = {"cache": "cache, all rows", "total": "together"}.get(name, name)
        assert row(exact, label) == [f"{getattr(fit, name):,}" for fit in fits]
    assert opened.strangers == [] and opened.complaints == []


@pytest.mark.parametrize("width, theme", [(1280, "light"), (1280, "dark"), (320, "light"), (320, "dark")])
def test_axe_finds_nothing_on_a_page_of_shapes_and_bytes(visit, small, width, theme):
    opened = visit(f"{small.as_uri()}/notebooks/two.html", width=width, theme=theme)
    opened.wait_until_drawn(len(NUMBERS))
    assert opened.violations() == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(
        control.is_visible() for control in opened.page.locator("[data-explorer] .x-control:not([hidden])").all()
    )


def test_on_a_page_the_rolling_buffer_steps_as_the_cache_does(visit, home):
    opened = visit(f"{home}/notebooks/two.html")
    opened.wait_until_drawn(len(NUMBERS))
    root = opened.page.locator("[data-explorer=rolling-buffer]")
    root.get_by_role("button", name="First").click()
    for step in steps(window=4, n_tokens=12, chunk=3):
        held = root.locator(".rolling-held").all_inner_texts()
        assert held == ["–" if position is None else str(position) for position in step.held]
        opened.page.keyboard.press("ArrowRight")
    assert opened.strangers == [] and opened.complaints == []


def test_on_a_page_the_attention_explorer_opens_heads_shows_weights_and_finds_tokens(visit, home):
    opened = visit(f"{home}/{PAGE}")
    root = opened.page.locator("[data-explorer=attention][data-ready=true]")
    root.get_by_role("button", name="layer 1, head 5 (K/V head 1)").click()
    root.locator(".attention-title", has_text="Layer 1, head 5").wait_for()
    w = np.tril(np.random.default_rng(0).random((2, 16, 130, 130)))[1, 5]  # as in CELLS
    w /= w.sum(-1, keepdims=True)
    root.locator(".attention-token").nth(20).hover()
    looked_at = re.findall(
        r"“t(\d+)” (0\.\d\d)", root.locator(".attention-readout").inner_text().partition("looks at")[2]
    )
    assert len(looked_at) >= 1
    for name, weight in looked_at:
        assert abs(float(weight) - w[20, 3 + int(name)]) < 0.008
    root.get_by_label("Find a token").fill("t12")
    assert root.locator(".attention-token.attention-found").count() == 8  # t12, t120 to t126
    assert opened.strangers == [] and opened.complaints == []


# ---- the live companion


def data_files(opened) -> list[str]:
    """What a page asked for of its data, in order."""
    return [url.rsplit("/", 1)[1] for url in opened.requests if "/explorer/data/" in url]


def test_on_a_page_the_companion_runs_and_loads_nothing_before_and_nothing_twice(visit, home):
    opened = visit(f"{home}/notebooks/three.html")
    opened.wait_until_drawn(1)
    page = opened.page
    assert data_files(opened) == [] and page.locator(STILL).is_visible()
    page.get_by_role("button", name=re.compile("^Run the companion")).click()
    page.wait_for_selector(".live-maps .attention-title")
    assert data_files(opened) == list(live.files("companion"))
    assert not page.locator(STILL).is_visible()
    for name in ("multi-query", "companion", "multi-query"):
        page.get_by_role("button", name=re.compile(f"^{name}:")).click()
        page.wait_for_selector(f"[aria-pressed=true]:text('{name}:')")
    assert data_files(opened) == [*live.files("companion"), *live.files("multi-query")]
    page.get_by_role("button", name="Next token").click()
    page.wait_for_function("() => document.querySelector('.live-text b').textContent !== ''")
    assert opened.strangers == [] and opened.complaints == []


def test_a_connection_that_breaks_during_loading_is_said_and_the_rest_is_loaded_later(visit, small, server):
    opened = visit(f"{server(small)}/notebooks/three.html")
    opened.wait_until_drawn(1)
    files = list(live.files("companion"))
    opened.context.route(f"**/{files[4]}", lambda route: route.abort())
    run = opened.page.get_by_role("button", name=re.compile("^Run the companion"))
    run.click()
    opened.page.get_by_role("alert").filter(has_text="What has come is kept").wait_for()
    assert data_files(opened) == files[:5] and opened.page.locator(STILL).is_visible()
    opened.context.unroute(f"**/{files[4]}")
    run.click()
    opened.page.wait_for_selector(".live-maps .attention-title")
    assert data_files(opened) == files[:5] + files[4:]


def test_a_file_that_never_comes_is_given_up_and_can_be_asked_for_again(visit, small, server):
    opened = visit(f"{server(small)}/notebooks/three.html")
    opened.wait_until_drawn(1)
    files = list(live.files("companion"))
    opened.page.clock.install()
    stuck = []
    opened.context.route(f"**/{files[2]}", lambda route: stuck.append(route))
    run = opened.page.get_by_role("button", name=re.compile("^Run the companion"))
    with opened.page.expect_request(f"**/{files[2]}"):
        run.click()
    opened.page.clock.run_for(61_000)
    opened.page.get_by_role("alert").filter(has_text="does not come").wait_for()
    opened.context.unroute(f"**/{files[2]}")
    stuck[0].abort()  # else the browser would have the second request wait for the first
    run.click()
    opened.page.wait_for_selector(".live-maps .attention-title")
    assert data_files(opened) == files[:3] + files[2:]


@pytest.mark.parametrize("width, theme", [(1280, "dark"), (320, "light")])
def test_axe_finds_nothing_on_a_page_where_the_companion_runs(visit, small, width, theme):
    opened = visit(f"{small.as_uri()}/notebooks/three.html", width=width, theme=theme)
    opened.wait_until_drawn(1)
    opened.page.get_by_role("button", name=re.compile("^Run the companion")).click()
    opened.page.wait_for_selector(".live-maps .attention-title")
    assert opened.violations() == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


# ---- the chapters


def shows_an_explorer(path) -> bool:
    cells = nbformat.read(path, as_version=4).cells
    return any(cell.cell_type == "code" and re.search(r"Explorer\(|\bexplore\(", cell.source) for cell in cells)


CHAPTERS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if shows_an_explorer(path)]


@pytest.mark.parametrize("via", ["http", "file"])
@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapters_explorers_draw_themselves(visit, html, http, name, via):
    n = (html / "notebooks" / f"{name}.html").read_text(encoding="utf-8").count('<figure class="attnlab-explorer"')
    opened = visit(f"{http if via == 'http' else html.as_uri()}/notebooks/{name}.html")
    assert n > 0
    opened.wait_until_drawn(n)
    assert opened.strangers == [] and opened.complaints == []
    for root in opened.page.locator("[data-explorer]").all():
        assert the_keyboard_moves(opened.page, root)


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_committed_output_of_an_explorer_is_html_without_a_widget(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    shown = [
        o.data
        for c in cells
        for o in c.get("outputs", [])
        if "attnlab-explorer" in str(o.get("data", {}).get("text/html", ""))
    ]
    assert shown
    assert all(set(data) == {"text/html", "text/plain"} for data in shown)
