"""Every built page in Chromium: for those who don't see it, who enlarge it, who run no scripts, and against what slips in."""

import functools
import importlib.util
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from axe_playwright_python.base import AXE_SCRIPT

from .conftest import HOSTILE
from .isolation import ROOT

# The pages, their server and the browser are those of tests/book.
_spec = importlib.util.spec_from_file_location("book_fixtures", ROOT / "tests" / "book" / "conftest.py")
_book = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_book)
browser, html, http = _book.browser, _book.html, _book.http

pytestmark = pytest.mark.browser
PAGES = [f"{name}.html" for name in _book.chapters()] + [
    "index.html",
    "search.html",
    "genindex.html",
    "py-modindex.html",
]
SOON = [(1280, "light"), (320, "dark")]
LATER = [(320, "light"), (1280, "dark")]  # in test-long: the same rules and colours in the other order
WAYS = [*SOON, *(pytest.param(*way, marks=pytest.mark.long) for way in LATER)]
# A page whose first script has run: mathematics, fonts and explorers drawn, what is folded unfolded.
READY = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  document.querySelectorAll('details').forEach(e => { e.open = true; });
}"""
DRAWN = """() => document.querySelectorAll('figure.attnlab-explorer').length
  === document.querySelectorAll('[data-explorer][data-ready=true]').length"""
# What two elements of one style have in common is every tag, class and style attribute up to the root, and which row of two
# they are in.
STYLE = """
const style = e => !e ? '' : `${style(e.parentElement)} ${e.localName}.${e.className}${e.getAttribute('style')}`
  + (e.localName === 'tr' ? e.sectionRowIndex % 2 : '');
"""
# axe takes a minute for the API page, with 20,000 pieces of coloured code that look like a few dozen: one of each style is
# kept, and the others become plain text.
THIN = f"""() => {{
  {STYLE}
  const seen = new Set();
  for (const e of [...document.querySelectorAll('article :is(.highlight, .sig) :is(span, em)')].reverse()) {{
    if (e.id || e.closest('[data-explorer]')) continue;
    const key = style(e);
    if (seen.has(key)) e.replaceWith(...e.childNodes); else seen.add(key);
  }}
}}"""
# Two runs: every rule but contrast over the page, and contrast over one text of each style, for the same reason.
# A rule that axe leaves out unless asked is asked for by name.
AXE = f"""async () => {{
  {STYLE}
  const texts = new Map();
  for (const e of document.querySelectorAll('body, body *')) {{
    if ([...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.checkVisibility()) texts.set(style(e), e);
  }}
  const options = {{ resultTypes: ['violations'], selectors: false, preload: false }};
  const rules = {{ 'color-contrast': {{ enabled: false }}, 'label-content-name-mismatch': {{ enabled: true }} }};
  const found = [
    await axe.run(document, {{ ...options, rules }}),
    await axe.run([...texts.values()], {{ ...options, runOnly: ['color-contrast'] }}),
  ];
  return found.flatMap(f => f.violations).map(v => `${{v.id}}: ` + v.nodes.map(n => n.html.slice(0, 120)).join(' | '));
}}"""
TEXT = r"() => (document.querySelector('article') ?? document.querySelector('main')).innerText.replace(/\s+/g, '')"
# Text, or a formula, that is cut off by what holds it.
CUT_OFF = """() => {
  const hides = v => v === 'hidden' || v === 'clip';
  const out = [];
  for (const e of document.querySelectorAll('article *')) {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    const seen = box.width > 1 && box.height > 1 && e.checkVisibility({ visibilityProperty: true });
    if (!seen || !e.innerText?.trim() || e.closest('.math, svg')) continue;
    const x = hides(style.overflowX) && e.scrollWidth > e.clientWidth + 1;
    const y = hides(style.overflowY) && e.scrollHeight > e.clientHeight + 2 && e.clientHeight > 0;
    if (x || y) out.push(e.outerHTML.slice(0, 120));
  }
  for (const e of document.querySelectorAll('article span.math')) { // for those who only hear, it holds a second, hidden copy
    const formula = e.querySelector('mjx-math').getBoundingClientRect(), box = e.getBoundingClientRect();
    if (formula.right > box.right + 1 && hides(getComputedStyle(e).overflowX)) out.push(e.innerText.slice(0, 120));
  }
  return out;
}"""
VIOLATIONS = """() => {
  window.refused = [];
  document.addEventListener('securitypolicyviolation', e => window.refused.push(`${e.effectiveDirective} ${e.blockedURI}`));
}"""


class Opened:
    """A page, and everything it complained about."""

    def __init__(self, context, url: str) -> None:
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.add_init_script(f"({VIOLATIONS})()")
        self.page.goto(url, wait_until="load")
        if url.endswith("/index.html"):
            self.page.wait_for_url("**/book/*.html")
        self.page.evaluate(READY)
        self.page.wait_for_function(DRAWN)

    def look(self, width: int, theme: str = "light") -> None:
        if self.page.viewport_size["width"] != width:
            self.page.set_viewport_size({"width": width, "height": 800})
            self.page.wait_for_timeout(500)  # the theme waits 300 ms to see what scrolls now
        self.page.emulate_media(color_scheme=theme)
        self.page.wait_for_function(f"() => document.documentElement.dataset.theme === '{theme}'")

    def violations(self) -> list[str]:
        if not self.page.evaluate("() => 'axe' in window"):
            self.page.evaluate(THIN)
            self.page.evaluate(AXE_SCRIPT)
        return self.page.evaluate(AXE)


@pytest.fixture(scope="module")
def context(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield context
    context.close()


@pytest.fixture(scope="module", params=[name for name in PAGES if name != "index.html"])
def opened(request, context, http):
    """Each page once; the tests look at it in turns."""
    opened = Opened(context, f"{http}/{request.param}")
    yield opened
    opened.page.close()


def test_at_twice_the_size_nothing_is_lost(opened):
    """A window of 1280 pixels that shows everything at 200 % has room for 640."""
    opened.look(1280)
    wide = opened.page.evaluate(TEXT)
    opened.look(640)
    assert opened.page.evaluate("() => document.documentElement.scrollWidth") <= 640
    assert opened.page.evaluate(TEXT) == wide
    assert opened.page.evaluate(CUT_OFF) == []


def test_a_page_keeps_to_its_policy(opened):
    assert opened.page.evaluate("() => window.refused") == []
    assert opened.complaints == []


@pytest.mark.parametrize("width, theme", WAYS)
def test_axe_finds_nothing_on_any_page(opened, width, theme):
    opened.look(width, theme)
    assert opened.violations() == []


# ---- the policy


def policies(page: str) -> list[dict[str, list[str]]]:
    texts = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    return [{line.split()[0]: line.split()[1:] for line in text.split("; ")} for text in texts]


ALLOWED = re.compile(r"'self'|'none'|file:|data:|blob:|'unsafe-hashes'|'sha256-[A-Za-z0-9+/]{43}='")


def every_page(html: Path) -> list[Path]:
    return sorted(path for path in html.rglob("*.html") if "_static" not in path.relative_to(html).parts)


def test_every_page_has_one_policy_before_all_else_and_it_names_no_other_host(html):
    pages = every_page(html)
    assert len(pages) > len(PAGES)
    for path in pages:
        page = path.read_text(encoding="utf-8")
        (policy,) = policies(page)
        assert not re.search("<(script|link|style|img)", page[: page.index("Content-Security-Policy")]), path
        sources = [(name, source) for name, given in policy.items() for source in given]
        inline = [("style-src", "'unsafe-inline'")]
        assert [s for s in sources if not ALLOWED.fullmatch(s[1])] == inline, path
        assert {"default-src", "script-src", "object-src", "base-uri", "form-action"} <= set(policy), path
        assert "data:" not in policy["script-src"] + policy["default-src"], path


@pytest.mark.parametrize("via", ["http", "file"])
@pytest.mark.parametrize("name", ["notebooks/01_scaled_dot_product_attention.html", "search.html", "index.html"])
def test_pages_work_under_their_policy_over_http_and_from_a_folder(context, html, http, name, via):
    opened = Opened(context, f"{http if via == 'http' else html.as_uri()}/{name}")
    assert (opened.page.locator("mjx-container").count() > 0) == name.startswith("notebooks/")
    assert opened.page.evaluate("() => window.refused") == [] and opened.complaints == []
    assert opened.page.evaluate("() => getComputedStyle(document.querySelector('main')).display") != "inline"
    opened.page.close()


INJECTED = """async other => {
  const add = markup => { const e = document.createElement('div'); e.innerHTML = markup; document.body.append(e); };
  const script = text => { const e = document.createElement('script'); e.text = text; document.body.append(e); };
  add('<img src="missing.png" onerror="window.hacked = 1">');
  add(`<img src="${other}/image">`);
  add(`<iframe src="${other}/frame"></iframe>`);
  add('<iframe srcdoc="<script>parent.hacked = 1</' + 'script>"></iframe>');
  script('window.hacked = 2');
  const e = document.createElement('script'); e.src = `${other}/script`; document.body.append(e);
  document.head.insertAdjacentHTML('beforeend', `<link rel="stylesheet" href="${other}/style">`);
  await fetch(`${other}/fetch`, { mode: 'no-cors' }).catch(() => {});
  navigator.sendBeacon(`${other}/beacon`, 'x');
  await new Promise(done => setTimeout(done, 300));
  return [window.hacked ?? null, window.refused.length];
}"""


@pytest.mark.parametrize("via", ["http", "file"])
def test_what_slips_into_a_page_neither_runs_nor_calls_anybody(context, html, http, tmp_path, via):
    asked = []

    class Other(_book.QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Other, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    other = f"http://127.0.0.1:{server.server_port}"
    opened = Opened(context, f"{http if via == 'http' else html.as_uri()}/book/glossary.html")
    hacked, refused = opened.page.evaluate(INJECTED, other)
    opened.page.close()
    server.shutdown()
    server.server_close()
    assert hacked is None and asked == []
    assert refused >= 8


# ---- without scripts


@pytest.fixture(scope="module")
def scriptless(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, java_script_enabled=False)
    yield context.new_page()
    context.close()


@pytest.mark.parametrize("name", [name for name in PAGES if name not in ("index.html", "search.html")])
def test_without_scripts_a_page_has_its_text_its_formulas_and_its_pictures(scriptless, html, http, name):
    source = (html / name).read_text(encoding="utf-8")
    page = scriptless
    page.goto(f"{http}/{name}", wait_until="load")
    article = page.locator("article")
    text = article.inner_text()
    assert len(text) > 300
    headings = article.locator("h1, h2").all_inner_texts()
    assert headings and all(heading.strip() in text for heading in headings)
    formulas = article.locator(".math")
    assert sum(r"\(" in formula or r"\[" in formula for formula in formulas.all_text_contents()) == formulas.count()
    assert formulas.count() == source.partition("<article")[2].partition("</article>")[0].count(
        'class="math notranslate'
    )
    says = page.locator(".without-scripts")
    assert says.count() == (formulas.count() > 0 or 'class="attnlab-explorer"' in source)
    for image in article.locator("img:not(.toggler)").all():
        image.scroll_into_view_if_needed()
        assert image.is_visible() and image.bounding_box()["width"] > 50
    ground = (
        "() => getComputedStyle(document.body).backgroundColor + getComputedStyle(document.querySelector('h1')).color"
    )
    assert page.evaluate(ground).startswith("rgb(255, 255, 255)")


def test_without_scripts_the_first_page_leads_on(scriptless, http):
    scriptless.goto(f"{http}/index.html")
    scriptless.wait_for_url(f"**/{PAGES[0]}")


# ---- what slips in by way of outputs


def test_hostile_text_in_outputs_is_shown_and_not_run(context, hostile_book):
    opened = Opened(context, f"{hostile_book.html.as_uri()}/notebooks/one.html")
    page = opened.page
    assert page.evaluate("() => window.hacked ?? null") is None
    assert page.evaluate("() => window.refused") == []  # it is text; the policy had nothing to stop
    text = page.locator("article").inner_text()
    plain = [line for line in HOSTILE if "\x1b" not in line]
    for cell in (0, 1):
        said = page.locator("div.cell_output").nth(cell).text_content()
        assert [line for line in plain if line not in said and repr(line)[1:-1] not in said] == []
    assert HOSTILE[0] in text and "ValueError" in text
    assert page.locator("article :is(img[src=x], [onerror], [onload], [onclick], a[href^=javascript])").count() == 0
    page.close()
