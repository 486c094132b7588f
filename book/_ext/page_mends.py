"""Pages as Sphinx and its extensions wrote them, mended in one pass: whoever has something to mend registers it here."""

from collections.abc import Callable
from pathlib import Path

from sphinx.application import Sphinx


def mend(app: Sphinx, how: Callable[[str], str]) -> None:
    """Have ``how`` change the HTML of every page when the build is finished, after those that were registered before."""
    if not hasattr(app, "page_mends"):
        app.page_mends = []
        app.connect("build-finished", finish_pages, priority=900)  # the first page's address is written at 500
    app.page_mends.append(how)


def finish_pages(app: Sphinx, exception: Exception | None) -> None:
    if exception is None:
        for path in Path(app.outdir).rglob("*.html"):
            page = before = path.read_text(encoding="utf-8")
            for how in app.page_mends:
                page = how(page)
            if page != before:
                path.write_text(page, encoding="utf-8")
