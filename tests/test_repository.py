"""What must hold of the files as such: sizes, names, notebooks, pins."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEBIBYTE = 2**20


def files() -> list[Path]:
    """What git keeps, or would keep: tracked files and new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> list[tuple[str, str]]:
    found = []
    for path in files():
        try:
            found.append((path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def test_no_file_is_large_and_the_tree_is_small():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in files()}
    assert {name: size for name, size in sizes.items() if size > 10 * MEBIBYTE} == {}
    assert sum(sizes.values()) < 55 * MEBIBYTE


def test_no_file_names_a_path_of_the_machine_it_was_made_on():
    home = re.escape(str(Path.home())) if len(str(Path.home())) > 5 else "/root"
    machine = re.compile(rf"{re.escape(str(ROOT))}/|{home}/|/(?:home|Users)/\w+/|/tmp/ipykernel_")
    excused = {"tests/test_repository.py", "tests/nbval_sanitize.cfg", "tools/notebooks.py"}
    found = {name: machine.findall(text)[:3] for name, text in texts() if name not in excused and machine.search(text)}
    assert found == {}


def test_no_unfinished_work_is_left():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    pictures = re.compile(r"[\w+/=]{60,}")  # base64 spells any word sooner or later
    found = [
        name
        for name, text in texts()
        if name.endswith((".py", ".md", ".ipynb", ".yml")) and marks.search(pictures.sub("", text))
    ]
    written_by_models = (
        "src/attnlab/companion/"  # their cards quote what they complete, and code is full of these marks
    )
    assert [n for n in found if n != "tests/test_repository.py" and not n.startswith(written_by_models)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_executed_in_order_and_without_errors(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        raised = [output for output in cell.outputs if output.output_type == "error"]
        assert not raised or "raises-exception" in cell.metadata.get("tags", []), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_of_a_notebook_says_what_it_shows(path):
    for cell in nbformat.read(path, as_version=4).cells:
        kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
        if any(kind.startswith("image/") for kind in kinds):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) >= 20, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_nothing_of_when_and_where_it_ran(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info", "mystnb"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags", "mystnb"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_hides_its_last_value_with_a_semicolon(path):
    # Under nbval the semicolon hides nothing, and the value it finds is not in the notebook.
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.source.rstrip().endswith(";")] == []


def test_the_contents_name_every_notebook_and_only_what_exists():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    named = {toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])}
    there = {name for name in named if (ROOT / f"{name}.md").exists() or (ROOT / f"{name}.ipynb").exists()}
    assert named == there
    pages = {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}
    assert named == pages | {f"notebooks/{path.stem}" for path in NOTEBOOKS}


def test_everything_pyproject_asks_for_is_pinned_to_something_that_fits():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from requirements import parse_pins

    pins = parse_pins((ROOT / "requirements.txt").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for line in asked:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_requirements_are_pins_and_nothing_else():
    from requirements import HEAD

    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [
        line
        for line in lines
        if not re.fullmatch(r"[a-z0-9.-]+==[0-9][A-Za-z0-9.]*(; platform_system == 'Linux')?", line)
    ] == []
    assert [line.split("==")[0] for line in lines[: len(HEAD)]] == HEAD
    assert lines[0] == "torch==2.13.0"
    assert [line for line in lines if re.match(r"nvidia-|pytorch-triton|cuda-", line)] == []


def test_every_public_module_is_on_the_api_page():
    package = ROOT / "src" / "attnlab"
    modules = {path.stem for path in package.glob("*.py") if not path.stem.startswith("_")}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    named = set(re.findall(r"automodule:: attnlab\.(\w+)", (ROOT / "book" / "api.md").read_text()))
    assert modules <= named


def test_ci_runs_the_tests_and_is_executable():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def test_workflows_are_valid_and_run_what_make_runs():
    for name, command in (("test", ".ci/run"), ("pages", "make book")):
        text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
        steps = [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]
        assert any(command in step.get("run", "") for step in steps)
