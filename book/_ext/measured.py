"""`{measured} SCRIPT`: the records benchmarks/results/SCRIPT-<machine>.json as tables, or the words "not yet measured".

A record is a JSON object. Plain values and short objects (machine, date, versions, commit …) say where it comes from; a list of
objects becomes a table; an object of such objects, a part with a heading of its own. Nothing is left out.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPREAD = {"median", "min", "max", "repetitions"}


def words(value: object) -> str:
    """One value, or a short list or object of them, as a reader would write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(words(item) for item in value)
    if isinstance(value, dict) and value.keys() == SPREAD:
        return f"{words(value['median'])} ({words(value['min'])}–{words(value['max'])}, {value['repetitions']} times)"
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(item)}" for key, item in value.items())
    return str(value)


def label(key: str) -> str:
    return key.replace("_", " ")


def cell(key: str, value: object) -> str:
    """The same where the key says what is counted: a memory's speed is read in GB/s."""
    if isinstance(value, dict) and value.keys() != SPREAD:
        return ", ".join(f"{label(name)} {cell(name, item)}" for name, item in value.items())
    if not key.endswith("bytes_per_second") or value is None:
        return words(value)
    if isinstance(value, dict):
        low, middle, high = (cell(key, value[which]) for which in ("min", "median", "max"))
        return f"{middle} ({low}–{high}, {value['repetitions']} times)"
    return f"{words(float(f'{value / 1e9:.3g}'))} GB/s"


def table(head: list[str], rows: list[list[str]]) -> nodes.container:
    """A table that scrolls inside itself when the page is narrow."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]

    def row(cells: list[str]) -> nodes.row:
        return nodes.row("", *[nodes.entry("", nodes.paragraph(text=cell)) for cell in cells])

    group += nodes.thead("", row(head))
    group += nodes.tbody("", *[row(cells) for cells in rows])
    return nodes.container("", nodes.table("", group, classes=["measured"]), classes=["measured-scroll"])


def table_of_objects(items: list[dict]) -> nodes.container:
    keys = list(dict.fromkeys(key for item in items for key in item))
    return table(
        [label(key) for key in keys], [[cell(key, item[key]) if key in item else "" for key in keys] for item in items]
    )


def objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def holds_objects(value: object) -> bool:
    return isinstance(value, dict) and any(objects(item) or holds_objects(item) for item in value.values())


def render(record: dict) -> list[nodes.Node]:
    """Origin first, as a list; then everything that is a table; then the parts."""
    origin, rest = nodes.bullet_list(classes=["measured-origin"]), []
    for key, value in record.items():
        if value == []:
            continue  # a section that came to nothing says why under "left out"
        if objects(value):
            rest += [nodes.rubric(text=label(key)), table_of_objects(value)]
        elif holds_objects(value):
            for name, part in value.items():
                rest += [nodes.rubric(text=label(name)), *(render(part) if isinstance(part, dict) else [])]
        else:
            text = nodes.paragraph("", "", nodes.strong(text=f"{label(key)}: "), nodes.Text(cell(key, value)))
            origin += nodes.list_item("", text)
    return [origin, *rest]


class Measured(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        paths = sorted(RESULTS.glob(f"{self.arguments[0]}-*.json"))
        if not paths:
            return [nodes.paragraph("", "", nodes.strong(text="Not yet measured."), classes=["not-measured"])]
        found: list[nodes.Node] = []
        for path in paths:
            self.env.note_dependency(str(path))
            found += render(json.loads(path.read_text(encoding="utf-8")))
        return found


def setup(app: Sphinx) -> dict:
    app.add_directive("measured", Measured)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
