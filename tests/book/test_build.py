"""The build is strict: a book of one page and one notebook, made with this book's settings, and what must stop it."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

PAGE = "# A page\n\nIt leads to [the notebook](../notebooks/one.ipynb) and to [itself](#a-page).\n"
DRAW = """\
from IPython.display import SVG
SVG('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>')"""
ALT = {"mystnb": {"image": {"alt": "A black square, to have a figure"}}}


def write_notebook(tree, source="import tool; print(tool.VALUE)", figure=ALT):
    cells = [
        nbformat.v4.new_markdown_cell("# One\n", id="title"),
        nbformat.v4.new_code_cell(source, id="code"),
        nbformat.v4.new_code_cell(DRAW, id="figure", metadata=figure),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tree / "notebooks" / "one.ipynb")


@pytest.fixture
def tree(tmp_path):
    """A checkout in small: our settings, extension and build script, with a package of one line in src/."""
    for folder in ("book", "notebooks", "src", "tools"):
        (tmp_path / folder).mkdir()
    for name in ("_config.yml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "tools" / "book.py", tmp_path / "tools")
    shutil.copytree(ROOT / "book" / "_ext", tmp_path / "book" / "_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "book" / "_static", tmp_path / "book" / "_static")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/page\nchapters:\n  - file: notebooks/one\n")
    (tmp_path / "book" / "page.md").write_text(PAGE)
    (tmp_path / "book" / "references.bib").write_text("")
    (tmp_path / "src" / "tool.py").write_text("VALUE = 'first value'\n")
    write_notebook(tmp_path)
    return tmp_path


def build(tree):
    """Exit status and everything said."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    command = [sys.executable, str(tree / "tools" / "book.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_a_change_of_the_package_runs_the_notebooks_again(tree):
    status, said = build(tree)
    assert status == 0, said
    assert said.splitlines()[-1] == str(tree / "_build" / "html" / "index.html")
    page = tree / "_build" / "html" / "notebooks" / "one.html"
    assert "first value" in page.read_text()
    (tree / "src" / "tool.py").write_text("VALUE = 'second value'\n")
    status, said = build(tree)
    assert status == 0, said
    assert "second value" in page.read_text() and "first value" not in page.read_text()
    assert "Executed notebook" not in build(tree)[1]  # nothing changed


def test_a_cell_that_fails_stops_it(tree):
    write_notebook(tree, source="1 / 0")
    status, said = build(tree)
    assert status != 0 and "ZeroDivisionError" in said


def test_a_figure_without_alternative_text_stops_it(tree):
    write_notebook(tree, figure={})
    status, said = build(tree)
    assert status != 0 and "figure without alternative text" in said


def test_broken_links_stop_it_and_stop_it_again(tree):
    faults = ["[a](missing.md)", "[b](#no-such-heading)", "{py:func}`attnlab.no_such_function`", "{term}`no such word`"]
    (tree / "book" / "page.md").write_text(PAGE + "\n" + "\n".join(faults) + "\n")
    status, said = build(tree)
    assert status != 0
    for missing in ("missing.md", "no-such-heading", "attnlab.no_such_function", "no such word"):
        assert any(missing in line and "WARNING" in line for line in said.splitlines()), missing
    assert build(tree)[0] != 0  # pages that warned are not taken for finished
