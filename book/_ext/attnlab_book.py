"""What this book asks of Sphinx beyond the stock Jupyter Book.

- Mathematics from files in the build: MathJax's one script and its fonts, out of the package sphinx-mathjax-offline.
- Every figure says in words what it shows; one that doesn't fails the build.
- A figure is fetched when the reader comes near it.
- No "live code" scripts, which would point at another host.
- Buttons that lead to where a notebook runs (ways_in), words of the glossary explained where they stand (glossary_terms).
- A page in its dark theme is printed in its light one.
- No hints to fetch fonts early, which a browser refuses on a page opened from a folder.
- `.nojekyll`, so that GitHub Pages serves folders whose names begin with an underscore.
"""

import re
import shutil
from importlib import metadata
from pathlib import Path

import page_mends
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)

MATHJAX_FOLDER = "vendor/mathjax"
MATHJAX_FILES = re.compile(r"static/mathjax/(tex-mml-chtml\.js|output/chtml/fonts/woff-v2/.*\.woff)$")
IMG = re.compile(r"<img\b[^>]*>", re.IGNORECASE)
ALT = re.compile(r"""\balt\s*=\s*("[^"]*"|'[^']*')""", re.IGNORECASE)
FONT_HINT = re.compile(r'<link rel="preload" as="font"[^>]*>\s*')
FILE_NAME = re.compile(r"\.(png|jpe?g|svg|gif|webp|pdf)$", re.IGNORECASE)


def bring_mathjax(app: Sphinx) -> None:
    """Copy the script and its fonts (1.7 of the package's 24 MB) to where `mathjax_path` points."""
    target = Path(app.outdir) / "_static" / MATHJAX_FOLDER
    for file in metadata.files("sphinx-mathjax-offline"):
        if match := MATHJAX_FILES.search(file.as_posix()):
            source, copy = Path(file.locate()), target / match[1]
            if not copy.exists() or copy.stat().st_size != source.stat().st_size:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
    if not (target / "tex-mml-chtml.js").exists():
        log.warning("no MathJax in the package sphinx-mathjax-offline: formulas would stay raw TeX")


def silence_thebe(app: Sphinx) -> None:
    """Unhook sphinx-thebe, which Jupyter Book loads even with thebe: false, and which declares its constants twice."""
    for listeners in app.events.listeners.values():
        listeners[:] = [
            listener for listener in listeners if not listener.handler.__module__.startswith("sphinx_thebe")
        ]


def leave_out_thebe_styles(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    context["css_files"] = [css for css in context["css_files"] if "sphinx-thebe" not in str(css)]


def says_what_it_shows(alt: str, uri: str) -> bool:
    """A file's name, or nothing, is what tools put where an author wrote no alternative text."""
    alt = alt.strip()
    return len(alt) >= 10 and not FILE_NAME.search(alt) and alt != uri


def check_alternative_texts(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for image in doctree.findall(nodes.image):
        if not says_what_it_shows(image.get("alt", ""), image.get("uri", "")):
            log.warning(
                "figure without alternative text (for a notebook's output: cell metadata mystnb.image.alt)",
                location=image if image.line else docname,
                type="attnlab",
                subtype="alt",
            )
    for raw in doctree.findall(nodes.raw):
        for tag in IMG.findall(raw.astext()) if "html" in raw.get("format", "") else ():
            alt = ALT.search(tag)
            if alt is None or not says_what_it_shows(alt[1][1:-1], ""):
                log.warning(
                    f"image without alternative text: {tag[:80]}", location=docname, type="attnlab", subtype="alt"
                )


def fetch_figures_late(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """A chapter's figures weigh as much as everything else; a browser with `loading=lazy` fetches those in reach."""
    for image in doctree.findall(nodes.image):
        image["loading"] = "lazy"


def drop_font_hints(page: str) -> str:
    """Opened from a folder, a browser refuses to fetch fonts early, and says so on the console."""
    return FONT_HINT.sub("", page)


def leave_nojekyll(app: Sphinx, exception: Exception | None) -> None:
    if exception is None:
        (Path(app.outdir) / ".nojekyll").touch()


def setup(app: Sphinx) -> dict:
    for extension in ("measured", "ways_in", "glossary_terms"):
        app.setup_extension(extension)
    app.add_js_file("print.js")
    app.config.mathjax_path = f"{MATHJAX_FOLDER}/tex-mml-chtml.js"
    app.connect("builder-inited", silence_thebe)
    app.connect("builder-inited", bring_mathjax)
    app.connect("html-page-context", leave_out_thebe_styles)
    app.connect("doctree-resolved", check_alternative_texts)
    app.connect("doctree-resolved", fetch_figures_late)
    app.connect("build-finished", leave_nojekyll)
    page_mends.mend(app, drop_font_hints)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
