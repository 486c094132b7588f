"""Words of the glossary, explained where they stand: on a page of prose the first use of each is a link to its entry, and the
link's title is the definition, which a pointer shows and a screen reader reads.

Chapters stay plain Markdown, since they are read raw as well: words are found in the text, the longest first, not in headings,
code, formulas, links or tables. A word that also has an everyday sense is left alone unless its page marks it ({term}`key`).
"""

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

GLOSSARY = "book/glossary"
WITHOUT = {
    GLOSSARY,
    "book/api",
    "book/bibliography",
    "book/measured",
}  # the entries, reference and records are no prose
ORDINARY = {
    *(
        "attention",
        "companion",
        "control",
        "decode",
        "key",
        "projection",
        "query",
        "reach",
        "ridge",
        "token",
        "tokenizer",
    ),
    *("value", "window"),
}
ANCHOR = re.compile(r"#(term-[^#]+)$")
SEE = re.compile(r"[.:]?\s*[Ss]ee [^.]*\.$")  # "See (2)." leads somewhere on a page; in a title it leads nowhere
TEX = {r"^\top": "ᵀ", r"\bmod": "mod", r"\pi": "π", r"\theta": "θ", r"\,": " "}


class Terms:
    """Every entry: what it is called in a text, where it stands, and its definition in plain words."""

    def __init__(self, glossary: nodes.document) -> None:
        self.anchors: dict[str, str] = {}
        self.definitions: dict[str, str] = {}
        for item in glossary.findall(nodes.definition_list_item):
            meaning = " ".join(plain(child) for child in item.findall(nodes.definition))
            meaning = SEE.sub(".", " ".join(meaning.split()))
            for term in item.findall(nodes.term):
                anchor = term["ids"][0]
                self.anchors[re.sub(r" \(.*\)$", "", term.astext())] = anchor
                self.definitions[anchor] = meaning
        names = sorted((name for name in self.anchors if name not in ORDINARY), key=len, reverse=True)
        words = "|".join(r"\s+".join(map(re.escape, name.split())) for name in names)
        self.pattern = re.compile(rf"(?<![\w-])(?i:({words}))s?(?![\w-])") if names else None

    def named(self, text: str) -> str:
        """The anchor of what ``text``, a match of the pattern, names."""
        text = " ".join(text.lower().split())
        return next(anchor for name, anchor in self.anchors.items() if name.lower() == text)


def plain(node: nodes.Node) -> str:
    """Text without citations, and with letters for the little TeX that definitions hold."""
    if isinstance(node, addnodes.pending_xref) and node.get("refdomain") == "cite":
        return ""
    if isinstance(node, nodes.math):
        text = node.astext()
        for tex, letters in TEX.items():
            text = text.replace(tex, letters)
        return text
    if isinstance(node, nodes.Text):
        return node.astext()
    text = "".join(plain(child) for child in node.children)
    return re.sub(r"\s+([.,;])", r"\1", text) + (" " if isinstance(node, nodes.paragraph) else "")


def terms(app: Sphinx) -> Terms | None:
    """Of this build; None for a book without a glossary."""
    if not hasattr(app, "glossary_terms"):
        here = GLOSSARY in app.env.found_docs
        app.glossary_terms = Terms(app.env.get_doctree(GLOSSARY)) if here else None
    return app.glossary_terms


def prose(doctree: nodes.document) -> Iterator[nodes.Text]:
    """Text that stands in a paragraph itself: not in a heading, a table, code, a link or anything else inside it."""
    for text in list(doctree.findall(nodes.Text)):
        if isinstance(text.parent, nodes.paragraph) and not inside_table(text):
            yield text


def inside_table(node: nodes.Node) -> bool:
    while node := node.parent:
        if isinstance(node, nodes.table):
            return True
    return False


def explain(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    if docname in WITHOUT or app.builder.format != "html" or not (known := terms(app)) or not known.pattern:
        return
    page = app.builder.get_relative_uri(docname, GLOSSARY)
    seen = set()
    for link in doctree.findall(nodes.reference):  # what the page marks itself
        target = ANCHOR.search(link.get("refuri", ""))
        if target and target[1] in known.definitions:
            link["reftitle"] = known.definitions[target[1]]
            link["classes"].append("glossary-term")
            seen.add(target[1])
    for text in prose(doctree):
        parts: list[nodes.Node] = []
        done = 0
        for found in known.pattern.finditer(text.astext()):
            anchor = known.named(found[1])
            if anchor in seen:
                continue
            seen.add(anchor)
            parts.append(nodes.Text(text.astext()[done : found.start()]))
            link = nodes.reference("", found[0], internal=True, refuri=f"{page}#{anchor}", classes=["glossary-term"])
            link["reftitle"] = known.definitions[anchor]
            parts.append(link)
            done = found.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(text.astext()[done:])])


def written_again(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Pages carry definitions: when one has changed, all are written again."""
    now = known.definitions if (known := terms(app)) else {}
    before, env.glossary_definitions = getattr(env, "glossary_definitions", None), now
    return sorted(env.found_docs) if before not in (None, now) else []


def setup(app: Sphinx) -> dict:
    app.connect("env-updated", written_again)
    app.connect("doctree-resolved", explain, priority=600)  # after links are made of what pages mark
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
