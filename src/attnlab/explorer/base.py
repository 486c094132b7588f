"""What explorers share: a figure that moves in a live notebook, on a page without a kernel, and in a file of its own.

An explorer is one ES module, ``static/<kind>.js``, which draws plain data into an element. In a notebook anywidget runs it;
on a page and in a saved file ``static/host.js`` does. The output of a cell offers both: the widget, and HTML that holds the
data and a still picture but no code, so that the picture shows wherever nothing may run.
"""

import base64
import html
import io
import json
import os
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import traitlets
from matplotlib.figure import Figure
from PIL import Image

from attnlab import plots
from attnlab.errors import InputError

STATIC = files("attnlab.explorer") / "static"
EXPORT = re.compile(r"^export default ", re.MULTILINE)
USES = {"live": ("attention",)}  # a kind that draws with another's functions
WORKERS = {"live": "live_model.js"}  # what a kind runs beside the page


@cache
def source(name: str) -> str:
    """A file of ``static/``."""
    return (STATIC / name).read_text(encoding="utf-8")


def module(kind: str) -> str:
    """The ES module of a kind of explorer, as any host can import it: the helpers, then the explorer's own file.

    Between them, the functions of another kind that it draws with, and as a string the source of the worker it starts.
    """
    parts = [source("common.js")]
    parts += [EXPORT.sub("void ", source(file_name(used, ".js"))) for used in USES.get(kind, ())]
    if worker := WORKERS.get(kind):
        parts.append(f"const WORKER_SOURCE = {script_json(source(worker))};")
    return "\n".join([*parts, source(file_name(kind, ".js"))])


def file_name(kind: str, suffix: str) -> str:
    return kind.replace("-", "_") + suffix


def kinds() -> list[str]:
    """Every kind of explorer there is a module for."""
    names = {file.name.removesuffix(".js") for file in STATIC.iterdir() if file.name.endswith(".js")}
    others = {"common", "host", *(worker.removesuffix(".js") for worker in WORKERS.values())}
    return sorted(name.replace("_", "-") for name in names - others)


def style_sheet(*kinds: str) -> str:
    """What all explorers share, then what these kinds have of their own."""
    own = dict.fromkeys(file_name(used, ".css") for kind in kinds for used in (*USES.get(kind, ()), kind))
    return "\n".join(source(name) for name in ("explorer.css", *own) if (STATIC / name).is_file())


def classic(kind: str) -> str:
    """The same as a classic script that hands itself to the host, since a page opened from a folder can import nothing."""
    body, found = EXPORT.subn("const explorerModule = ", module(kind))
    if found != 1:
        raise ValueError(
            f"{file_name(kind, '.js')} must have one line that starts with 'export default'; it has {found}"
        )
    return f'attnlabExplorers.module("{kind}", () => {{\n{body}\nreturn explorerModule;\n}});\n'


def script_json(value: object) -> str:
    """JSON that can stand in a script element: no text in it can end the element, or open a comment."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def data_script(name: str, text: str) -> str:
    """A data file, as a classic script that hands its text to the host."""
    return f"attnlabExplorers.data({script_json(name)}, {script_json(text)});"


def small_png(figure: Figure) -> bytes:
    """A figure in 256 colours, which a still picture does well with: a third of the bytes."""
    file = io.BytesIO()
    Image.open(io.BytesIO(plots.png(figure))).convert("RGB").quantize(256).save(file, "png", optimize=True)
    return file.getvalue()


class Explorer(anywidget.AnyWidget):
    """A figure to explore: make it the last value of a cell, or save it as a page of its own.

    A subclass names its ``kind``, draws its ``still()`` and says in ``alt`` what that shows. (Widgets have a metaclass of
    their own, so abstract methods can't be marked as such.)

    Args:
        data: all that the module gets: what JSON can hold.

    Raises InputError for data that JSON cannot hold, such as NaN.
    """

    kind: ClassVar[str]
    _esm = traitlets.Unicode().tag(sync=True)
    _css = traitlets.Unicode().tag(sync=True)
    data = traitlets.Dict().tag(sync=True)

    def __init__(self, data: dict) -> None:
        try:
            script_json(data)
        except (ValueError, TypeError) as error:
            raise InputError(f"a page can hold numbers, text, lists and objects; got {error}") from None
        super().__init__(data=data, _esm=module(self.kind), _css=style_sheet(self.kind))

    def still(self) -> Figure:
        """The picture for where nothing moves."""
        raise NotImplementedError

    @property
    def alt(self) -> str:
        """What the still picture shows, in words."""
        raise NotImplementedError

    def files(self) -> dict[str, str]:
        """Text by file name that the module asks its host for when it is needed: in a saved file it stands beside the data."""
        return {}

    def figure_html(self) -> str:
        """The data and the still picture, without code."""
        picture = base64.b64encode(small_png(self.still())).decode("ascii")
        return (
            f'<figure class="attnlab-explorer" data-explorer="{self.kind}">'
            f'<script type="application/json">{script_json(self.data)}</script>'
            f'<img alt="{html.escape(self.alt)}" src="data:image/png;base64,{picture}"></figure>'
        )

    def save_html(self, path: str | os.PathLike, title: str = "") -> Path:
        """Write one file that holds everything and asks nothing of any host: open it in a browser, send it, put it online.

        Raises InputError for a folder that is not there or cannot be written to.
        """
        path = Path(path)
        title = html.escape(title or f"attnlab: {self.kind} explorer")
        data = "".join(f"<script>{data_script(name, text)}</script>\n" for name, text in self.files().items())
        page = (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>\n{style_sheet(self.kind)}{PAGE_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
            f"{self.figure_html()}\n</main>\n"
            f"<script>\n{source('host.js')}</script>\n{data}<script>\n{classic(self.kind)}</script>\n</body>\n</html>\n"
        )
        beside = path.with_name(path.name + ".new")
        try:
            beside.write_text(page, encoding="utf-8")
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True) if beside.parent.is_dir() else None
            raise InputError(f"cannot write {path}: {error.strerror}; name a file in a folder that is there") from None
        return path

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        """Both, for the front end to choose from."""
        bundle, metadata = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "text/html": self.figure_html(), "text/plain": repr(self)}, metadata


PAGE_STYLE = """
body { margin: 0; background: #ffffff; color: #1a1a1a; font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 0.75rem; }
h1 { font-size: 1.1rem; }
@media (prefers-color-scheme: dark) { body { background: #14181e; color: #e9ebee; } }
"""
