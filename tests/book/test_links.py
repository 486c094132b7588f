"""The built pages as files: which there are, and where their links lead."""

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from conftest import ROOT, chapters

GENERATED = {"index", "search", "genindex", "py-modindex"}


class Links(HTMLParser):
    """Ids, and the addresses that a page leads to (`goes`) or loads by itself (`loads`)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.goes: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value for key, value in attributes if value}
        self.ids.update(values[key] for key in ("id", "name") if key in values)
        if tag == "a" and "href" in values:
            self.goes.append(values["href"])
        elif tag == "link" and "href" in values:
            self.loads.append(values["href"])
        elif "src" in values:
            self.loads.append(values["src"])


@cache
def read(path: Path) -> Links:
    return Links(path.read_text(encoding="utf-8"))


def pages(html: Path) -> list[Path]:
    return sorted(path for path in html.rglob("*.html") if "_static" not in path.relative_to(html).parts)


def test_there_is_a_page_for_every_chapter_and_no_other(html):
    names = {path.relative_to(html).with_suffix("").as_posix() for path in pages(html)}
    sources = {name for name in names if name.startswith("_modules/")}
    assert names - sources == {*chapters(), *GENERATED}
    modules = {p.relative_to(ROOT / "src").with_suffix("").as_posix() for p in (ROOT / "src" / "attnlab").rglob("*.py")}
    assert {name.removeprefix("_modules/") for name in sources} - {"index"} <= {
        m.removesuffix("/__init__") for m in modules
    }


def test_no_link_inside_the_book_is_broken(html):
    broken = []
    for page in pages(html):
        for link in read(page).goes + read(page).loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if target.is_dir():
                target = target / "index.html"
            if not target.exists():
                broken.append(f"{page.relative_to(html)}: {link}")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).ids:
                broken.append(f"{page.relative_to(html)}: {link} (no such place)")
    assert broken == []


def test_nothing_is_loaded_from_another_host(html):
    foreign = [
        (str(page.relative_to(html)), link)
        for page in pages(html)
        for link in read(page).loads
        if urlsplit(link).netloc or link.startswith("//")
    ]
    assert foreign == []


def test_of_mathjax_only_what_is_needed_is_there(html):
    vendored = html / "_static" / "vendor" / "mathjax"
    files = [path for path in vendored.rglob("*") if path.is_file()]
    assert (vendored / "tex-mml-chtml.js") in files
    assert sum(path.stat().st_size for path in files) < 3_000_000


def test_pages_can_be_served_by_github(html):
    assert (html / ".nojekyll").exists()
