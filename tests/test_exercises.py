"""Every exercise, as the notebooks have it: what holds of all of them. What each check catches: test_exercises_NN."""

import re
from pathlib import Path

import nbformat
import pytest
from exercise_cells import NOTEBOOKS, answer, exercises, solution

from attnlab.exercises import _checks, check

CHAPTERS = sorted(int(path.name[:2]) for path in NOTEBOOKS.glob("*.ipynb"))
NUMBERS = sorted(_checks(), key=lambda number: [int(part) for part in number.split(".")])


def test_every_check_belongs_to_an_exercise_of_its_chapter_and_the_other_way_round():
    assert [number for chapter in CHAPTERS for number in exercises(chapter)] == NUMBERS


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_in_the_notebook_is_right(number, capsys):
    result = check(number, solution(number))
    assert result.ok, result.message
    assert capsys.readouterr().out == f"{number}: {result.message}\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_the_starting_cell_fails_kindly(number):
    result = check(number, answer(number, "start"))
    assert not result.ok
    assert re.search("not answered yet|returned nothing|not yet", result.message)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "wrong", [None, ..., 7, "text", [], {}, object(), lambda *a: None, lambda *a: 1 / 0, lambda *a: "no", lambda: 0]
)
def test_no_answer_makes_a_check_raise(number, wrong):
    result = check(number, wrong)
    assert not result.ok and result.message


def test_an_unknown_number_is_told_which_there_are(capsys):
    assert not check("99.1", 0)
    assert "1.1" in capsys.readouterr().out


@pytest.mark.parametrize("chapter", [c for c in CHAPTERS if c <= 4])
def test_a_chapter_has_two_checked_exercises_and_an_open_one(chapter):
    (path,) = Path(NOTEBOOKS).glob(f"{chapter:02}_*.ipynb")
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    titles = re.findall(r"^### Exercise (\d+\.\d)( \(open\))?: ", text, flags=re.M)
    assert titles == [(f"{chapter}.1", ""), (f"{chapter}.2", ""), (f"{chapter}.3", " (open)")]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_is_folded_on_the_page(number):
    from exercise_cells import BEGIN, code_cells

    (cell,) = [
        cell
        for cell in code_cells(int(number.split(".")[0]))
        if cell.source == exercises(int(number.split(".")[0]))[number][1]
    ]
    assert cell.source.startswith(BEGIN) and "hide-input" in cell.metadata.tags
