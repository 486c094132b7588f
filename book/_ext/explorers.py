"""Explorers on pages: each module once in the build, on the pages that hold one, and large data in files of their own.

An output's HTML (attnlab.explorer.base) brings data and a still picture, but no code. The code is written here, as classic
scripts, since a page opened from a folder may neither import modules nor fetch data. Of a payload that is large, the long
strings become files ``data/<hash>.js``, which the host loads when a module first asks for them. Where a page holds the live
companion, the models' weights are written there too, in int8.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

FOLDER = "explorer"
LARGE = 300_000  # characters of JSON that a page may carry itself
LONG = 20_000  # characters of a string that is worth a file
FIGURE = re.compile(
    r'(<figure class="attnlab-explorer" data-explorer="([\w-]+)"><script type="application/json">)(.*?)(</script>)',
    re.DOTALL,
)
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def write(path: Path, text: str) -> None:
    """All or nothing: pages are written side by side, and two may hold the same data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def split(payload: str, folder: Path) -> str:
    """A large payload without its long strings, each of which goes into a file; a small one as it is."""
    if len(payload) <= LARGE:
        return payload
    return script_json(without_long_strings(json.loads(payload), folder))


def without_long_strings(value: object, folder: Path) -> object:
    if isinstance(value, dict):
        return {key: without_long_strings(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [without_long_strings(item, folder) for item in value]
    if not (isinstance(value, str) and len(value) >= LONG):
        return value
    name = hashlib.sha256(value.encode()).hexdigest()[:16] + ".js"
    write_data(folder, name, value)
    return {"file": name, "length": len(value)}


def write_data(folder: Path, name: str, text: str) -> None:
    from attnlab.explorer import base

    write(folder / name, base.data_script(name, text) + "\n")


def write_live_models(folder: Path) -> None:
    """What the live companion asks for when its button is pressed: made from the weights that ship, and not fetched before."""
    from attnlab.explorer import live

    for model in live.MODELS:
        for name, text in live.files(model).items():
            if not (folder / name).exists():
                write_data(folder, name, text)


def script_json(value: object) -> str:
    from attnlab.explorer import base

    return base.script_json(value)


def split_large_payloads(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    data = Path(app.outdir) / "_static" / FOLDER / "data"
    for raw in doctree.findall(nodes.raw):
        if "html" in raw.get("format", "") and 'class="attnlab-explorer"' in raw.astext():
            text = FIGURE.sub(lambda found: found[1] + split(found[3], data) + found[4], raw.astext())
            raw.clear()
            raw += nodes.Text(text)


def bring_scripts(app: Sphinx, pagename: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """The host, and the modules of this page's explorers."""
    kinds = sorted({found[2] for found in FIGURE.finditer(context.get("body", ""))})
    if not kinds:
        return
    from attnlab.explorer import base

    static = Path(app.outdir) / "_static" / FOLDER
    write(static / "explorer.css", base.style_sheet(*base.kinds()))
    write(static / "host.js", base.source("host.js"))
    for kind in kinds:
        write(static / f"{kind}.js", base.classic(kind))
    if "live" in kinds:
        write_live_models(static / "data")
    app.add_css_file(f"{FOLDER}/explorer.css")
    for name in ("host", *kinds):
        app.add_js_file(f"{FOLDER}/{name}.js", loading_method="defer")


def leave_out_widget_states(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    """What a widget manager would read, a second copy of all data; here there is none."""
    scripts = context["script_files"]
    scripts[:] = [script for script in scripts if getattr(script, "attributes", {}).get("type") != WIDGET_STATE]


def setup(app: Sphinx) -> dict:
    app.connect("doctree-resolved", split_large_payloads)
    app.connect("html-page-context", bring_scripts, priority=400)  # before another listener copies the lists
    app.connect("html-page-context", leave_out_widget_states, priority=900)  # after myst-nb has added them
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
