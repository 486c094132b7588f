"""What the stock pages lack for those who don't see them, or run no scripts: checked by axe-core in tests/book and tests/trust.

- A table written without a head (`| | |` in Markdown) has no row of empty head cells.
- A table that scrolls inside itself on a narrow screen can be reached, and so scrolled, by keyboard; code that was folded, too.
- The sidebar, its logo included, is one landmark.
- A button that shows words is called by them.
- What the bibliography lists are items of a list (the role that docutils gives them is out of use).
- A signature's parameters are a list, not definitions of nothing.
- Without scripts a page is light, and says what is missing. (With them the theme's first script decides.)
- The page that leads to the first one has a language, a title and a link.
"""

import re
from html import escape

import page_mends
from docutils import nodes
from sphinx.application import Sphinx

SIDEBAR = '<div class="bd-sidebar-primary bd-sidebar"'
SEARCH = 'search-button-field search-button__button" title="Search"'
PARAMETERS = re.compile(r'(<span class="sig-paren">[(\[]</span>\s*)<dl>(.*?)</dl>', re.DOTALL)
ARTICLE = re.compile(r'<article class="bd-article"[^>]*>')
NEEDS_SCRIPTS = ('class="math notranslate', 'class="attnlab-explorer"')
WITHOUT_SCRIPTS = (
    '<noscript><p class="without-scripts">This page shows formulas as their TeX source, and pictures in place of what moves, '
    "since scripts are switched off.</p></noscript>"
)
# The theme sees what scrolls when a page is loaded or resized; what is folded then scrolls later.
UNFOLDED = "<script>addEventListener('toggle', () => dispatchEvent(new Event('resize')), true);</script>"
REFRESH = re.compile(r'\s*<meta http-equiv="Refresh" content="0; url=([^"]+)" />\s*')
FIRST_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Refresh" content="0; url={url}" />
<title>{title}</title>
<link rel="icon" href="_static/favicon.svg">
</head>
<body>
<main><h1>{title}</h1><p><a href="{url}">To the first page</a></p></main>
</body>
</html>
"""


def drop_empty_heads(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for head in list(doctree.findall(nodes.thead)):
        if not head.astext().strip():
            head.parent.remove(head)


def listed(found: re.Match) -> str:
    items = found[2].replace("<dd>", "<li>").replace("</dd>", "</li>")
    return f'{found[1]}<ul class="sig-parameters">{items}</ul>'


def accessible(page: str, title: str) -> str:
    """A page as Sphinx wrote it, mended."""
    if found := REFRESH.fullmatch(page):
        return FIRST_PAGE.format(url=found[1], title=escape(title))
    page = page.replace(f"{SIDEBAR}>", f'{SIDEBAR} role="navigation" aria-label="The book">')
    for scrolls in ('<table class="table"', '<div class="pst-scrollable-table-container"'):
        page = page.replace(f"{scrolls}>", f'{scrolls} tabindex="0">')
    page = page.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    page = page.replace('data-theme="auto">', 'data-theme="light">', 1)
    page = page.replace(f'{SEARCH} aria-label="Search"', SEARCH)
    page = page.replace('role="doc-biblioentry"', 'role="listitem"')
    page = PARAMETERS.sub(listed, page)
    if "<details" in page and UNFOLDED not in page:
        page = page.replace("</body>", f"{UNFOLDED}\n</body>")
    if WITHOUT_SCRIPTS not in page and any(mark in page for mark in NEEDS_SCRIPTS):
        page = ARTICLE.sub(lambda found: f"{found[0]}\n{WITHOUT_SCRIPTS}", page, count=1)
    return page


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", drop_empty_heads)
    page_mends.mend(app, lambda page: accessible(page, app.config.html_title))
    app.setup_extension("policy")  # last: it names the scripts that a page has then
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
