"""What `make notebooks` keeps of an output: what another run, elsewhere, would write again."""

import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from reads_python import COMMITTED_WITH, leave_uncompared

from notebooks import WIDGET_VIEW, normalise

v4 = nbformat.v4


def test_of_an_explorer_the_html_stays_and_the_widget_goes():
    data = {WIDGET_VIEW: {"model_id": "4f2a"}, "text/html": "<figure></figure>", "text/plain": "Explorer()"}
    notebook = v4.new_notebook(cells=[v4.new_code_cell("x", outputs=[v4.new_output("execute_result", data=data)])])
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {"4f2a": {}}}}
    normalise(notebook)
    assert notebook.cells[0].outputs[0].data == {"text/html": "<figure></figure>", "text/plain": "Explorer()"}
    assert "widgets" not in notebook.metadata
    nbformat.validate(notebook)


def test_a_widget_with_nothing_beside_it_is_left_for_its_author_to_see():
    data = {WIDGET_VIEW: {"model_id": "4f2a"}}
    notebook = v4.new_notebook(cells=[v4.new_code_cell("x", outputs=[v4.new_output("display_data", data=data)])])
    normalise(notebook)
    assert WIDGET_VIEW in notebook.cells[0].outputs[0].data


def test_what_reads_pythons_source_is_compared_on_the_python_that_made_it_alone():
    cells = [v4.new_code_cell("x", metadata={"tags": tags}) for tags in ([], ["hide-input"], ["reads-python"])]
    items = [SimpleNamespace(cell=cell, options={"check": True}) for cell in cells] + [SimpleNamespace()]
    assert leave_uncompared(items, COMMITTED_WITH) == []
    assert leave_uncompared(items, "3.14") == [items[2]]
    assert [item.options["check"] for item in items[:3]] == [True, True, False]
