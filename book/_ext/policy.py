"""A content security policy in every page: it may load what came with it, and run no script but those it was built with.

Scripts written into a page are named by their hash (Content Security Policy Level 3, 2.3.1), so that markup which slips in
by way of a token or an output finds nothing that would run it, and nobody to send anything to. Styles may stand in a page:
MathJax and outputs write them. `file:` is for pages opened from a folder; a page from a server can't reach it anyway.
"""

import base64
import hashlib
import re
from html.parser import HTMLParser

import page_mends
from sphinx.application import Sphinx

META = '<meta http-equiv="Content-Security-Policy" content="{}">'
BEFORE = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n?')
HEAD = re.compile(r"<head>\s*(<meta charset=[^>]*>\n?)?", re.IGNORECASE)
OURS = "'self' file:"
# What is not named here, frames, objects, forms to others, falls under the first line or is refused by name.
SOURCES = {
    "default-src": OURS,
    "style-src": f"{OURS} 'unsafe-inline'",
    "img-src": f"{OURS} data: blob:",
    "font-src": f"{OURS} data:",
    "worker-src": "blob:",  # the live companion's
    "form-action": OURS,  # the search box
    "base-uri": "'none'",
    "object-src": "'none'",
    "frame-src": "'none'",
}


class Inline(HTMLParser):
    """The scripts written into a page, and the handlers in its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: set[str] = set()
        self.handlers: set[str] = set()
        self._in_script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self._in_script = tag == "script" and "src" not in values and "json" not in (values.get("type") or "")
        self.handlers.update(value for name, value in attributes if name.startswith("on") and value)

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.add(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False


def hashes(texts: set[str]) -> list[str]:
    return sorted(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


def policy(page: str) -> str:
    """The directives for a page, in one line."""
    inline = Inline(page)
    scripts = [OURS, *hashes(inline.scripts)]
    if inline.handlers:
        scripts += ["'unsafe-hashes'", *hashes(inline.handlers)]
    return "; ".join(f"{name} {value}" for name, value in {**SOURCES, "script-src": " ".join(scripts)}.items())


def with_policy(page: str) -> str:
    """The page with its policy, which replaces an older one, before anything that it speaks of."""
    page = BEFORE.sub("", page)
    head = HEAD.search(page)
    return f"{page[: head.end()]}{META.format(policy(page))}\n{page[head.end() :]}" if head else page


def setup(app: Sphinx) -> dict:
    page_mends.mend(app, with_policy)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
