"""What the stock pages lack for those who don't see them: checked by axe-core in tests/book.

- A table written without a head (`| | |` in Markdown) has no row of empty head cells.
- A table that scrolls inside itself on a narrow screen can be reached, and so scrolled, by keyboard.
- The sidebar, its logo included, is one landmark.
"""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

SIDEBAR = '<div class="bd-sidebar-primary bd-sidebar"'


def drop_empty_heads(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for head in list(doctree.findall(nodes.thead)):
        if not head.astext().strip():
            head.parent.remove(head)


def finish_pages(app: Sphinx, exception: Exception | None) -> None:
    if exception is None:
        for page in Path(app.outdir).rglob("*.html"):
            before = page.read_text(encoding="utf-8")
            text = before.replace(f"{SIDEBAR}>", f'{SIDEBAR} role="navigation" aria-label="The book">')
            text = text.replace('<table class="table">', '<table class="table" tabindex="0">')
            if text != before:
                page.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", drop_empty_heads)
    app.connect("build-finished", finish_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
