"""A small book with hostile text in its outputs, built with this book's settings while what it calls is written down."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from .isolation import ROOT, WATCH

HOSTILE = [
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "</pre></div><svg onload=window.hacked=1>",
    "javascript:window.hacked=1",
    "\x1b[31m<b onclick=window.hacked=1>red</b>\x1b[0m",
    "$\\href{javascript:window.hacked=1}{x}$",
]
# What text can come from: a print, a value, an error, a warning, a table, a token, a name.
CELLS = [
    f"HOSTILE = {HOSTILE!r}\nprint(*HOSTILE, sep='\\n')",
    "HOSTILE",
    "raise ValueError(HOSTILE[1] + HOSTILE[0])",
    "import pandas\npandas.DataFrame({HOSTILE[0]: HOSTILE})",
    "class Named:\n    __repr__ = lambda self: HOSTILE[3] + HOSTILE[1]\nNamed()",
    """
import attnlab, numpy as np
w = np.tril(np.ones((1, 2, len(HOSTILE), len(HOSTILE))))
attnlab.explore(attnlab.AttentionRecord(
    weights=(w / w.sum(-1, keepdims=True)).astype(np.float16), query_tokens=HOSTILE, key_tokens=HOSTILE,
    n_kv_heads=1, window=None, causal=True, model_name=HOSTILE[0],
))""",
    "print(attnlab.generate(attnlab.load('companion'), HOSTILE[0], max_new_tokens=4))",
]
RAISES = 2  # the number of the cell that is meant to
SETTINGS = ("_config.yml", "tools/book.py", "book/_ext", "book/_static")


class Book:
    """The folder of pages, and the folder where it was written down what the build called."""

    def __init__(self, tree: Path) -> None:
        self.html, self.scratch = tree / "_build" / "html", tree.with_name("scratch")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that another user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="attnlab-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def hostile_book(tmp_path_factory) -> Book:
    tree = tmp_path_factory.mktemp("hostile") / "book"
    for name in SETTINGS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    (tree / "_toc.yml").write_text("format: jb-book\nroot: book/page\nchapters:\n  - file: notebooks/one\n")
    (tree / "book" / "page.md").write_text("# A page\n\nWithout explorers, with $x^2$.\n")
    (tree / "book" / "references.bib").write_text("")
    (tree / "requirements.txt").touch()
    cells = [nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(CELLS)]
    cells[RAISES].metadata = {"tags": ["raises-exception"]}
    title = nbformat.v4.new_markdown_cell("# One", id="title")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (tree / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[title, *cells], metadata=kernel), tree / "notebooks" / "one.ipynb")
    book = Book(tree)
    (book.scratch / "watched").mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(WATCH), "WATCHED": str(book.scratch / "watched")}
    command = [sys.executable, str(tree / "tools" / "book.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return book
