"""The built pages in a real browser: over http and from a folder, wide and narrow, light and dark."""

import gzip
import re
from urllib.parse import urlsplit

import pytest
from conftest import chapters

pytestmark = pytest.mark.browser
PAGES = [f"{name}.html" for name in chapters()]
OTHER_PAGES = ["search.html", "genindex.html", "py-modindex.html"]
BUDGET = 1_500_000  # bytes a page may transfer, compressed
PACKED_ALREADY = (".woff", ".woff2", ".png", ".jpg", ".jpeg", ".webp")


class Visit:
    """A page that has been opened, and everything it asked for and complained about."""

    def __init__(self, browser, url: str, width: int = 1280, theme: str = "light") -> None:
        self.url = url
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.goto(url, wait_until="load")
        self.page.evaluate("async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }")

    def strangers(self) -> list[str]:
        """What it asked of anybody else."""
        home = urlsplit(self.url)[:2]
        return [url for url in self.requests if urlsplit(url)[:2] != home and not url.startswith(("data:", "blob:"))]


@pytest.fixture(scope="module")
def visit(browser, http, html):
    """Opens a page, once for each way of looking at it; tests only look."""
    visits: dict[tuple, Visit] = {}

    def open_page(name: str, via: str = "http", width: int = 1280, theme: str = "light") -> Visit:
        key = (name, via, width, theme)
        if key not in visits:
            url = f"{http}/{name}" if via == "http" else f"{html.as_uri()}/{name}"
            visits[key] = Visit(browser, url, width, theme)
        return visits[key]

    yield open_page
    for opened in visits.values():
        opened.page.close()


# Three ways of looking: on a server, from a folder in the dark, and on a telephone.
WIDE = {"via": "http", "width": 1280, "theme": "light"}
DARK = {"via": "file", "width": 1280, "theme": "dark"}
NARROW = {"via": "http", "width": 320, "theme": "light"}


@pytest.mark.parametrize("way", [WIDE, DARK], ids=["http", "file"])
@pytest.mark.parametrize("name", PAGES + OTHER_PAGES)
def test_a_page_opens_without_complaint_and_asks_no_other_host(visit, name, way):
    seen = visit(name, **way)
    assert seen.complaints == []
    assert seen.strangers() == []
    assert len(seen.page.title()) > 3
    assert seen.page.get_attribute("html", "lang") == "en"


@pytest.mark.parametrize("way", [WIDE, DARK], ids=["http", "file"])
@pytest.mark.parametrize("name", PAGES)
def test_mathematics_is_drawn(visit, html, name, way):
    formulas = (html / name).read_text(encoding="utf-8").count('class="math notranslate')
    page = visit(name, **way).page
    assert page.locator("mjx-container").count() >= formulas
    assert page.locator("mjx-merror").count() == 0
    text = page.inner_text("article")
    assert r"\(" not in text and r"\[" not in text


def test_there_is_mathematics_to_draw(html):
    assert sum('class="math notranslate' in (html / name).read_text(encoding="utf-8") for name in PAGES) >= 3


@pytest.mark.parametrize("name", PAGES)
def test_every_image_is_there_and_says_what_it_shows(visit, name):
    for image in visit(name, **WIDE).page.locator("article img:not([data-explorer] img):visible").all():
        alt, source = image.get_attribute("alt") or "", image.get_attribute("src")
        assert len(alt) >= 10 and not re.search(r"\.(png|svg|jpe?g)$", alt), source
        image.scroll_into_view_if_needed()
        assert image.evaluate("async image => { await image.decode(); return image.naturalWidth > 0; }"), source


@pytest.mark.parametrize("name", PAGES + OTHER_PAGES)
def test_nothing_sticks_out_of_a_narrow_screen(visit, name):
    page = visit(name, **NARROW).page
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 320
    assert page.evaluate(STICKING_OUT) == []


@pytest.mark.parametrize("name", PAGES + OTHER_PAGES)
def test_nor_where_letters_stand_as_far_apart_as_a_reader_may_set_them(visit, name):
    """WCAG 2.2, 1.4.12. It also stands for other fonts: some are wider than the one that is here."""
    page = visit(name, **NARROW).page
    assert page.evaluate(WIDTH_WHEN_SPACED) <= 320


WIDTH_WHEN_SPACED = """() => {
  const spaced = new CSSStyleSheet();
  spaced.replaceSync('* { letter-spacing: 0.12em !important; word-spacing: 0.16em !important; }');
  document.adoptedStyleSheets.push(spaced);
  const width = document.documentElement.scrollWidth;
  document.adoptedStyleSheets.pop();
  return width;
}"""


# What is wider than the article must be inside something that scrolls.
STICKING_OUT = """() => {
  const scrolls = e => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX);
  const out = [];
  for (const e of document.querySelectorAll('article *')) {
    const box = e.getBoundingClientRect();
    if (box.width === 0 || box.right <= 321 || getComputedStyle(e).position === 'absolute') continue;
    let parent = e.parentElement;
    while (parent && !scrolls(parent)) parent = parent.parentElement;
    if (!parent || parent === document.body || parent === document.documentElement) out.push(e.outerHTML.slice(0, 80));
  }
  return out;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_switch(browser, http, theme):
    opened = Visit(browser, f"{http}/{PAGES[0]}", theme=theme)
    now = "() => document.documentElement.dataset.theme"
    assert opened.page.evaluate(now) == theme
    seen = set()
    for _ in range(3):  # auto, light, dark and round again
        opened.page.locator("button.theme-switch-button:visible").first.click()
        seen.add(opened.page.evaluate(now))
    assert seen == {"light", "dark"}
    assert opened.complaints == []
    opened.page.close()


@pytest.mark.parametrize("way", [WIDE, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_stands_out_from_its_ground(visit, name, way):
    page = visit(name, **way).page
    assert page.evaluate("() => document.documentElement.dataset.theme") == way["theme"]
    assert page.evaluate(CONTRAST, "article p, article li, article td, article h2, article pre") >= 4.5


# The lowest contrast (WCAG 2, 1.4.3) of text against the nearest ground that is not transparent.
CONTRAST = """selector => {
  const parse = c => (c.match(/[0-9.]+/g) || []).map(Number);
  const light = c => {
    const [r, g, b] = parse(c).slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0.5) return getComputedStyle(e).backgroundColor;
    }
    return 'rgb(255, 255, 255)';
  };
  let lowest = 21;
  for (const e of document.querySelectorAll(selector)) {
    if (!e.textContent.trim()) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    lowest = Math.min(lowest, (a + 0.05) / (b + 0.05));
  }
  return lowest;
}"""


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("notebooks/")])
def test_figures_keep_a_light_ground_in_the_dark(visit, name):
    figures = visit(name, **DARK).page.locator(".cell_output img:not([data-explorer] img)").all()
    assert figures
    for figure in figures:
        assert figure.evaluate("image => getComputedStyle(image).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_transfers_less_than_its_budget(visit, http, html, name):
    total = 0
    for path in {urlsplit(url).path for url in visit(name, **WIDE).requests if url.startswith(http)}:
        body = (html / path.lstrip("/")).read_bytes()
        total += len(body) if path.endswith(PACKED_ALREADY) else len(gzip.compress(body))
    assert 100_000 < total < BUDGET


@pytest.mark.parametrize("via", ["http", "file"])
def test_search_finds_a_word_without_another_host(visit, via):
    opened = visit("search.html?q=softmax", via=via)
    found = opened.page.locator(
        "#search-results li a[href*='book/glossary.html']"
    ).first  # they come one after the other
    found.wait_for(state="attached", timeout=20_000)
    assert opened.strangers() == []


def test_the_first_page_leads_to_every_other_one(browser, visit, http):
    page = browser.new_page()
    page.goto(f"{http}/index.html")
    page.wait_for_url(f"**/{PAGES[0]}*")
    links = page.locator("nav a.reference.internal").evaluate_all("links => links.map(link => link.href)")
    assert {f"{http}/{name}" for name in PAGES[1:]} <= {link.split("#")[0] for link in links}
    page.close()
