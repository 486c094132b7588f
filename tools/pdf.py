"""The book as one PDF, printed by Chromium from the built pages: `python tools/pdf.py`, or with the documents to print.

The articles of the pages stand one after another in one document under the pages' own print styles, so that a link from one
chapter to another stays a link, headings become the PDF's outline and pages are numbered through. Explorers are the stills that
they carry; where the address of the pages is known (--address; in GitHub's CI that of Pages) each links to the page on which it
moves. Prints the path of the PDF.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag
from chromium import FLAGS, MISSING, find
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
OUT = ROOT / "dist" / "attention.pdf"
HERE = "https://book.invalid/"  # stands for the pages' address while links are resolved
STYLE = """
html { background: #fff; }
article.bd-article { break-before: page; }
.book-cover { padding-top: 30vh !important; }
.book-contents { break-before: page; columns: 1; }
.book-contents ol { list-style: none; padding-inline-start: 1em; }
@media print { figure.attnlab-explorer::after { content: none !important; } }
"""
NUMBERS = (
    '<div style="width: 100%; font: 8pt sans-serif; color: #333; text-align: center">'
    '<span class="pageNumber"></span></div>'
)


def contents() -> tuple[dict, list[tuple[str, list[str]]]]:
    """The book's settings, and its parts: caption, documents."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    parts = [("", [toc["root"]])]
    parts += [(part.get("caption", ""), [chapter["file"] for chapter in part["chapters"]]) for part in toc["parts"]]
    return settings, parts


def slug(document: str) -> str:
    return document.replace("/", "-")


class Print:
    """One document out of the articles of several pages.

    Args:
        html: the folder of the built pages.
        documents: what is printed, in order, without suffix.
        address: where the pages can be read, or "".
    """

    def __init__(self, html: Path, documents: list[str], address: str = "") -> None:
        self.html, self.documents, self.address = html, documents, address
        self.styles: dict[str, None] = {}  # in order, each once
        self.mathjax: list[str] = []
        self.titles: dict[str, str] = {}
        self.articles = [self.article(document) for document in documents]

    def article(self, document: str) -> str:
        page = BeautifulSoup((self.html / f"{document}.html").read_text(encoding="utf-8"), "html.parser")
        url = f"{HERE}{document}.html"
        for link in page.select("link[rel=stylesheet]"):
            self.styles.setdefault(self.file(link["href"], url))
        if not self.mathjax:
            for script in page.select("head script"):
                if "mathjax" in (script.get("src") or script.string or "").lower():
                    self.mathjax.append(
                        f'<script src="{self.file(script["src"], url)}"></script>' if script.get("src") else str(script)
                    )
        article = page.select_one("article.bd-article")
        self.titles[document] = heading_text(article)
        for figure in article.select("figure.attnlab-explorer"):
            figure.append(self.where_it_moves(page, document))
        for unwanted in article.select("script, button, a.headerlink, a:has(> .viewcode-link)"):
            unwanted.decompose()
        self.name_apart(article, document)
        for image in article.select("img[src]"):
            image.attrs.pop("loading", None)  # all of it is in reach of a printer
            if not image["src"].startswith("data:"):
                image["src"] = self.file(image["src"], url)
        for link in article.select("a[href]"):
            self.lead(link, url)
        article["id"] = slug(document)
        return str(article)

    def file(self, reference: str, url: str) -> str:
        """A file of the build, as the printed document refers to it."""
        return (self.html / urlsplit(urljoin(url, reference)).path.lstrip("/")).as_uri()

    def name_apart(self, article: Tag, document: str) -> None:
        """Two pages may have a heading of the same name: a page's names begin with the page's."""
        for element in article.select("[id]"):
            element["id"] = f"{slug(document)}--{element['id']}"
        for name in ("aria-labelledby", "aria-describedby", "for"):
            for element in article.select(f"[{name}]"):
                del element[name]

    def lead(self, link: Tag, url: str) -> None:
        """A link within what is printed leads there; one to another page of the book, to its address, or nowhere."""
        target, anchor = urldefrag(urljoin(url, link["href"]))
        if not target.startswith(HERE):
            return
        document = urlsplit(target).path.strip("/").removesuffix(".html")
        if document in self.documents:
            link["href"] = f"#{slug(document)}--{anchor}" if anchor else f"#{slug(document)}"
        elif self.address:
            link["href"] = urljoin(self.address, target.removeprefix(HERE)) + (f"#{anchor}" if anchor else "")
        else:
            link.unwrap()

    def where_it_moves(self, page: BeautifulSoup, document: str) -> Tag:
        caption = page.new_tag("figcaption")
        caption.append("This figure can be moved on the page ")
        if self.address:
            link = page.new_tag("a", href=urljoin(self.address, f"{document}.html"))
            link.string = self.titles[document]
            caption.append(link)
        else:
            caption.append(f"{document}.html")
        caption.append(".")
        return caption

    def text(self, title: str, author: str, parts: list[tuple[str, list[str]]]) -> str:
        """The whole document, as HTML."""
        styles = "\n".join(f'<link rel="stylesheet" href="{escape(style)}">' for style in self.styles)
        lines = []
        for caption, documents in parts:
            entries = [
                f'<li><a href="#{slug(document)}">{escape(self.titles[document])}</a></li>'
                for document in documents
                if document in self.titles
            ]
            if entries:
                lines.append(f"<p><strong>{escape(caption)}</strong></p><ol>{''.join(entries)}</ol>")
        cover = (
            f'<section class="bd-article book-cover"><h1>{escape(title)}</h1><p>{escape(author)}</p></section>\n'
            f'<nav class="bd-article book-contents" aria-label="Contents"><h1>Contents</h1>{"".join(lines)}</nav>'
        )
        body = "\n".join([cover, *self.articles])
        return (
            f'<!doctype html>\n<html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8">'
            f"<title>{escape(title)}</title>\n{styles}\n<style>{STYLE}</style>\n{''.join(self.mathjax)}</head>\n"
            f'<body><main class="bd-main"><div class="bd-content"><div class="bd-article-container">{body}'
            "</div></div></main></body></html>\n"
        )


def heading_text(article: Tag) -> str:
    """The first heading, without the sign that links to it."""
    heading = article.select_one("h1")
    return "".join(heading.find_all(string=True, recursive=False)).strip() or heading.get_text().rstrip("#").strip()


def print_pdf(source: Path, out: Path) -> None:
    if (chromium := find()) is None:
        raise SystemExit(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(color_scheme="light")
        page.goto(source.as_uri(), wait_until="load", timeout=120_000)
        page.evaluate("async () => { await window.MathJax?.startup?.promise; await document.fonts.ready; }")
        page.evaluate("() => Promise.all([...document.images].map(image => image.decode()))")
        page.pdf(
            path=out,
            format="A4",
            tagged=True,
            outline=True,
            print_background=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=NUMBERS,
            margin={"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
        )
        browser.close()


def pages_address() -> str:
    """Where GitHub Pages shows what this CI run builds."""
    owner, _, name = os.environ.get("GITHUB_REPOSITORY", "").partition("/")
    return f"https://{owner.lower()}.github.io/{name}/" if name else ""


def selected(asked: list[str], parts: list[tuple[str, list[str]]]) -> Iterator[str]:
    everything = [document for _, documents in parts for document in documents]
    for document in asked or everything:
        if document not in everything:
            raise SystemExit(f"pdf: _toc.yml names no {document}; it has {', '.join(everything)}")
        if not (HTML / f"{document}.html").exists():
            raise SystemExit(f"pdf: no page {document}.html in _build/html: run make book first")
        yield document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "documents", nargs="*", help="as in _toc.yml, such as notebooks/03_multi_head_attention; else all"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the PDF to write")
    parser.add_argument(
        "--address", default=pages_address(), help="where the pages can be read, for links to what moves"
    )
    args = parser.parse_args()
    settings, parts = contents()
    address = args.address and args.address.rstrip("/") + "/"
    document = Print(HTML, list(selected(args.documents, parts)), address)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    source = args.out.with_suffix(".html").resolve()
    source.write_text(document.text(settings["title"], f"by {settings['author']}", parts), encoding="utf-8")
    try:
        print_pdf(source, args.out)
    finally:
        source.unlink()
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
