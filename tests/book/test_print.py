"""The pages on paper: as a browser prints one, and as tools/pdf.py prints them together."""

import re
import subprocess
import sys
import zlib

import pytest
from conftest import ROOT, cannot, chapters

pytestmark = pytest.mark.browser
CHAPTER = "notebooks/03_multi_head_attention"  # has explorers, folded code and folded outputs
NAVIGATION = [
    *(".bd-sidebar-primary", ".bd-sidebar-secondary", ".bd-header-article", ".prev-next-footer", ".bd-footer-content"),
    *("#jb-print-docs-body", ".headerlink", ".search-button__wrapper", "#pst-back-to-top"),
]
SEEN = "elements => elements.filter(e => e.checkVisibility({ contentVisibilityAuto: true })).length"


@pytest.fixture(scope="module")
def paper(browser, http):
    """A chapter as print media show it, opened in the dark theme."""
    page = browser.new_page(viewport={"width": 794, "height": 1123}, color_scheme="dark")
    page.goto(f"{http}/{CHAPTER}.html")
    page.wait_for_selector("figure.attnlab-explorer > [data-ready]", state="attached")
    page.emulate_media(media="print")
    yield page
    page.close()


def test_a_printed_page_is_its_chapter_without_navigation(paper):
    assert paper.locator("article.bd-article h1").is_visible()
    for selector in NAVIGATION:
        assert paper.eval_on_selector_all(selector, SEEN) == 0, selector
    assert paper.eval_on_selector_all("article button", SEEN) == 0


def test_explorers_are_printed_as_their_still_pictures(paper):
    figures = paper.locator("figure.attnlab-explorer")
    assert figures.count() >= 2
    for figure in figures.all():
        assert figure.locator("> img").is_visible() and not figure.locator("> div.attnlab-explorer").is_visible()
        assert "can be moved" in figure.evaluate("figure => getComputedStyle(figure, '::after').content")


def test_folded_outputs_are_printed_and_folded_code_is_not(paper):
    listings = paper.locator("details.below-input pre")
    assert listings.count() >= 1
    assert all(listing.bounding_box()["height"] > 100 for listing in listings.all())
    assert paper.locator("details.above-input").count() >= 2  # the solutions
    assert paper.eval_on_selector_all("details.above-input", SEEN) == 0


def test_nothing_is_cut_at_the_edge_of_the_paper(paper):
    wide = """() => [...document.querySelectorAll("article pre, article table, article img")]
        .filter(e => e.checkVisibility() && (e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth + 1))
        .filter(e => !e.closest("div.attnlab-explorer")).map(e => e.outerHTML.slice(0, 80))"""
    assert paper.evaluate(wide) == []


def test_figures_are_sharp_on_paper(paper):
    images = """() => Promise.all([...document.querySelectorAll("article img")].filter(e => e.checkVisibility()).map(async e => {
        e.loading = "eager"; await e.decode(); return e.naturalWidth / e.getBoundingClientRect().width; }))"""
    finenesses = paper.evaluate(images)
    assert (
        len(finenesses) >= 8 and min(finenesses) > 1.9
    )  # pixels of the picture for each of the paper's, at 96 an inch


def test_a_dark_page_is_printed_light_and_is_dark_again_afterwards(paper):
    theme = "() => document.documentElement.dataset.theme"
    assert paper.evaluate(theme) == "dark"
    assert paper.evaluate(f"() => {{ dispatchEvent(new Event('beforeprint')); return ({theme})(); }}") == "light"
    assert paper.evaluate(f"() => {{ dispatchEvent(new Event('afterprint')); return ({theme})(); }}") == "dark"


# --- all pages in one file


@pytest.fixture(scope="module")
def pdf(html, tmp_path_factory):
    """What tools/pdf.py makes of a chapter and the glossary, as bytes with every stream unpacked."""
    from chromium import MISSING, find

    if find() is None:
        cannot(MISSING)
    out = tmp_path_factory.mktemp("pdf") / "two.pdf"
    command = [sys.executable, str(ROOT / "tools" / "pdf.py"), CHAPTER, "book/glossary"]
    done = subprocess.run(
        [*command, "--out", str(out), "--address", "https://example.org/book"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    assert [path.name for path in out.parent.iterdir()] == ["two.pdf"]  # and nothing beside it
    return out.read_bytes()


def outline(pdf: bytes) -> list[str]:
    """Titles of the outline's entries."""
    titles = []
    for hexed, plain in re.findall(rb"/Title (?:<([0-9A-Fa-f]+)>|\(((?:[^()\\]|\\.)*)\))", pdf):
        raw = bytes.fromhex(hexed.decode()) if hexed else re.sub(rb"\\(.)", rb"\1", plain)
        titles.append(raw[2:].decode("utf-16-be") if raw.startswith(b"\xfe\xff") else raw.decode("latin-1"))
    return titles


def test_the_pdf_has_an_outline_of_headings_and_a_page_of_its_own_for_each_chapter(pdf):
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    titles = [" ".join(title.split()) for title in outline(pdf)]
    assert any(title.startswith("3. Multi-head attention") for title in titles)
    assert any(title.startswith("Glossary") for title in titles)
    assert any("On one slide" in title for title in titles)
    assert len(re.findall(rb"/Type /Page\b(?!s)", pdf)) >= 12


def test_the_pdf_s_text_is_text_and_not_a_picture_of_it(pdf):
    assert (
        pdf.count(b"/ToUnicode") >= 3
    )  # each font says what its glyphs mean, so that they can be searched and read aloud
    assert b"/StructTreeRoot" in pdf and b"/Lang" in pdf
    shown = b"".join(unpacked(pdf))
    assert shown.count(b" Tj") + shown.count(b" TJ") > 1000


def unpacked(pdf: bytes) -> list[bytes]:
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            found.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return found


def test_the_pdf_links_inside_itself_and_from_each_explorer_to_its_page(pdf):
    addresses = {address.decode() for address in re.findall(rb"/URI \(([^)]*)\)", pdf)}
    assert f"https://example.org/book/{CHAPTER}.html" in addresses  # where the figure moves
    assert not [address for address in addresses if address.startswith(("file:", "https://book.invalid"))]
    assert len(re.findall(rb"/Dest\b", pdf)) > 20  # words of the glossary, and the contents


def test_the_pdf_names_no_path_of_this_machine(pdf):
    everything = pdf + b"".join(unpacked(pdf))
    assert str(ROOT).encode() not in everything


def test_a_document_that_is_not_in_the_book_is_refused():
    command = [sys.executable, str(ROOT / "tools" / "pdf.py"), "book/nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "_toc.yml names no book/nothing" in done.stderr
    assert chapters()[0] in done.stderr
