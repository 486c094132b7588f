"""What the stock pages lack for those who don't see them: checked by axe-core in tests/book.

- A table written without a head (`| | |` in Markdown) has no row of empty head cells.
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


def name_sidebar(app: Sphinx, exception: Exception | None) -> None:
    if exception is None:
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text(encoding="utf-8")
            if f"{SIDEBAR}>" in text:
                page.write_text(
                    text.replace(f"{SIDEBAR}>", f'{SIDEBAR} role="navigation" aria-label="The book">'), encoding="utf-8"
                )


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", drop_empty_heads)
    app.connect("build-finished", name_sidebar)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
