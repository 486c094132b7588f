"""Words of the glossary where they stand: each is linked once a page, says what it means, and leads to its entry."""

import re

import pytest
from bs4 import BeautifulSoup
from conftest import ROOT, chapters

WITHOUT = {"book/glossary", "book/api", "book/bibliography", "book/measured"}
CHAPTERS = [name for name in chapters() if name.startswith("notebooks/")]


@pytest.fixture(scope="module")
def pages(html):
    """Articles by document."""
    return {
        name: BeautifulSoup((html / f"{name}.html").read_text(encoding="utf-8"), "html.parser").select_one("article")
        for name in chapters()
    }


def links(article) -> list:
    return article.select("a.glossary-term")


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_explains_words_where_it_first_uses_them(pages, name):
    found = links(pages[name])
    assert len(found) >= 3
    targets = [link["href"] for link in found if not link.select("span.xref")]  # those the page marks may come twice
    assert len(targets) == len(set(targets))
    for link in found:
        assert not link.find_parent(["h1", "h2", "h3", "pre", "code", "table"])


def test_every_definition_is_plain_words_and_every_link_leads_to_its_entry(pages):
    entries = {element["id"] for element in pages["book/glossary"].select("dt[id]")}
    for name, article in pages.items():
        for link in links(article):
            meaning = link["title"]
            assert len(meaning) > 15 and not re.search(r"[\\${}]|\s[.,;]|  ", meaning), (name, meaning)
            target, anchor = link["href"].split("#")
            assert target.endswith("glossary.html") and anchor in entries, name


def test_the_glossary_itself_and_the_reference_are_left_alone(pages):
    assert {name for name in WITHOUT if links(pages[name])} <= {"book/glossary"}  # whose entries mark words themselves
    assert not [link for link in links(pages["book/glossary"]) if not link.select("span.xref")]


def test_ordinary_words_are_linked_only_where_a_page_marks_them(pages):
    import sys

    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from glossary_terms import ORDINARY

    for name, article in pages.items():
        for link in links(article):
            if not link.select("span.xref"):
                assert link.get_text().lower() not in ORDINARY, name
