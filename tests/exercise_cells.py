"""Exercises as the notebooks have them: a test takes the solution from there, so that there is one."""

from pathlib import Path

import nbformat
import torch

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"


def code_cells(chapter: int) -> list[nbformat.NotebookNode]:
    (path,) = NOTEBOOKS.glob(f"{chapter:02}_*.ipynb")
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def exercises(chapter: int) -> dict[str, tuple[str, str, str]]:
    """For each checked exercise of a chapter: its starting cell, its solution cell and its checking cell."""
    cells = [cell.source for cell in code_cells(chapter)]
    found = {}
    for start, solution, checking in zip(cells, cells[1:], cells[2:], strict=False):
        if BEGIN in solution and END in solution:
            number = checking.split('check("')[1].split('"')[0]
            found[number] = (start, solution, checking)
    return found


def answer(number: str, cell: str):
    """What the notebook would hand to the check after running its imports and ``cell``: 0 the start, 1 the solution."""
    chapter = int(number.split(".")[0])
    namespace: dict = {}
    parts = exercises(chapter)[number]
    expression = parts[2].split(f'check("{number}",')[1].rstrip().removesuffix(")")
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # put back afterwards: a notebook may turn gradients off
        exec(code_cells(chapter)[0].source, namespace)
        exec(parts[("start", "solution").index(cell)], namespace)
        return eval(expression, namespace)


def solution(number: str):
    return answer(number, "solution")
