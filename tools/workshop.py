"""Write what a teacher needs on the day into dist/workshop: `make workshop`.

    student/     the chapters without solutions, with their checks, and the quiz: what is handed out
    solutions/   the same chapters with solutions, which is what nbgrader calls the source
    slides/      one deck a chapter, opened from the folder, without a network
    teacher/     the key of the quiz
    nbgrader_config.py, gradebook.db    so that `nbgrader autograde chapters` works in this folder

All of it comes from the notebooks as they are. They carry no metadata of nbgrader's: an exercise is four cells, and
here its starting cell and its solution become one cell that nbgrader empties, and its check one that gives a point.
The outputs of a student's copy stay, for a room without time or power to run everything; those of exercises go.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from node import find as find_node
from node import with_packages

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
NOTEBOOKS = ROOT / "notebooks"
ASSIGNMENT = "chapters"
BEGIN = "### BEGIN SOLUTION"
CHECK = re.compile(r'attnlab\.exercises\.check\("(\d+\.\d+)".*\)', re.DOTALL)
BESIDE = re.compile(r'"\.\./([\w./-]+)"')  # what a chapter reads of the repository, such as "../benchmarks/results"
NO_NODE = "no slides: reveal.js comes from npm; install Node.js (Debian, Ubuntu: apt-get install nodejs npm)"

README = """\
# The workshop

- `student/` is what you hand out. The participants need the package `attnlab` and Jupyter besides.
- `solutions/` are the same chapters with solutions.
- `slides/index.html` lists a deck for each chapter. S opens the speaker's notes; nothing is asked of any network.
- `teacher/quiz_key.md` is the key of `student/quiz.md`.

To grade, put what you collect into `submitted/NAME/chapters/`, activate the environment (`. .venv/bin/activate` in the
repository) and run, in this folder,

    nbgrader autograde chapters --notebook 03_multi_head_attention
    nbgrader export

A check gives one point. Without `--notebook` every chapter is run for everybody, about half a minute each.
Grades are kept in `gradebook.db`. `make workshop` refuses to write over a folder that has submissions.
The plans for the day are in the book's teacher's guide.
"""

STUDENT_README = """\
# Attention, from the dot product to Mistral 7B

Open a chapter of `chapters/` in Jupyter. Run the first code cell of the chapter, then what you are asked to run.
The outputs that you see were made elsewhere; running a cell replaces them.

An exercise is a task, a cell to fill in, and a check under it. The check says whether the answer is right and, if not,
what the likely mistake is. It needs the chapter's first cell, your own cell, and nothing else of the page.

`quiz.md` has four questions for before and eleven for after.
"""


# Exercises: from four cells to nbgrader's


def solution_cells(notebook: NotebookNode) -> Iterator[tuple[str, int]]:
    """The number of each checked exercise and where its solution stands, between its starting cell and its check."""
    cells = notebook.cells
    for at, cell in enumerate(cells):
        if cell.cell_type != "code" or not cell.source.startswith(BEGIN):
            continue
        after = CHECK.search(cells[at + 1].source) if at + 1 < len(cells) else None
        if after is None or at == 0 or cells[at - 1].cell_type != "code":
            raise SystemExit(
                f"cell {at}: a solution stands between its starting cell and its check; here it doesn't:\n{cell.source}"
            )
        yield after[1], at


def graded(name: str, **kind) -> dict:
    """Metadata that nbgrader goes by; the tag is for clearing outputs."""
    known = {"schema_version": 3, "grade_id": name, "grade": False, "solution": False, "locked": False, "task": False}
    return {"tags": ["exercise"], "nbgrader": known | kind}


def as_source(notebook: NotebookNode) -> NotebookNode:
    """A chapter as nbgrader's source. Emptied of its solution, an exercise is its starting cell and its check.

    The check is the book's own, which says in words what is wrong and raises nothing. What fails an answer when it is
    graded is a hidden test behind it.
    """
    source = nbformat.from_dict(notebook)  # a copy
    cells = source.cells
    for number, at in list(solution_cells(source)):
        start, solution, check = cells[at - 1 : at + 2]
        name = number.replace(".", "-")
        solution.source = f"{start.source}\n\n\n{solution.source}"
        solution.metadata = NotebookNode(graded(f"exercise-{name}", solution=True))
        call = CHECK.search(check.source)[0]
        check.source += f"\n### BEGIN HIDDEN TESTS\nassert {call}.ok\n### END HIDDEN TESTS"
        check.metadata = NotebookNode(graded(f"check-{name}", grade=True, locked=True, points=1))
        start.metadata = NotebookNode(tags=["joined"])
    source.cells = [cell for cell in cells if "joined" not in cell.metadata.get("tags", [])]
    return source


def bring_along(notebook: NotebookNode, folder: Path) -> None:
    """Put what the notebook reads of the repository beside it: nbgrader carries the files of an assignment's folder."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for name in BESIDE.findall(cell.source):
                put(ROOT / name, folder / name)
            cell.source = BESIDE.sub(r'"\1"', cell.source)


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(
            source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules", "__pycache__")
        )
    else:
        shutil.copyfile(source, target)


def write_course(out: Path, notebooks: list[Path]) -> None:
    """solutions/, and from it student/ and the gradebook, by nbgrader."""
    folder = out / "solutions" / ASSIGNMENT
    folder.mkdir(parents=True)
    for path in notebooks:
        source = as_source(nbformat.read(path, as_version=4))
        bring_along(source, folder)
        nbformat.write(source, folder / path.name)
    shutil.copyfile(TOOLS / "nbgrader_config.py", out / "nbgrader_config.py")
    done = nbgrader(out, "generate_assignment", ASSIGNMENT)
    if done.returncode:
        raise SystemExit(done.stderr)


def nbgrader(course: Path, *arguments: str) -> subprocess.CompletedProcess:
    """An nbgrader command in the folder of a course. It looks for alembic, which keeps its gradebook, on the PATH."""
    command = [sys.executable, "-c", "from nbgrader.apps.nbgraderapp import main; main()", *arguments]
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    return subprocess.run(command, cwd=course, env=env, capture_output=True, text=True)


# Slides: a chapter's own parts


def plain(text: str) -> str:
    """Markdown without what only the book's build understands."""
    text = re.sub(r"^\([\w-]+\)=\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\{cite:[pt]\}`([^`]+)`", lambda m: "[" + ", ".join(map(reference, m[1].split(","))) + "]", text)
    text = re.sub(r"\{\w+\}`([^`<]+?)\s*<[^`]*>`", r"\1", text)
    return re.sub(r"\{\w+\}`([^`]+)`", r"\1", text)


def reference(key: str) -> str:
    """``vaswani2017attention`` as Vaswani 2017."""
    parts = re.match(r"([a-z]+)(\d{4})", key.strip())
    return f"{parts[1].title()} {parts[2]}" if parts else key


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; bold type, brackets and mathematics are not cut through."""
    found: list[str] = []
    unfinished = False
    for piece in re.split(r"(?<=[.!?])\s+|(?<=[.!?]\*\*)\s+|(?<=[.!?]\))\s+", " ".join(paragraph.split())):
        if unfinished:
            found[-1] += f" {piece}"
        else:
            found.append(piece)
        last = found[-1]
        unfinished = last.count("**") % 2 or last.count("$") % 2 or last.count("(") > last.count(")")
    return found


def said(text: str) -> list[str]:
    """What a slide shows of a section's prose: its formulas and the sentences with bold type, or else the first one."""
    blocks = [
        part for part in re.split(r"\n\n|\n(?=- |\d\. )", text) if part and not part.startswith(("|", "```", "#"))
    ]
    shown = []
    for block in blocks:
        if block.startswith("$$"):
            shown.append(block)
        elif "**" in block:
            of_block = sentences(block.removeprefix("- "))
            for sentence, following in zip(of_block, [*of_block[1:], ""], strict=True):
                if "**" in sentence:  # bold from end to end announces the sentence behind it
                    lead = re.fullmatch(r"\*\*[^*]+\*\*", sentence) and "**" not in following
                    shown.append(f"{sentence} {following}".strip() if lead else sentence)
    return shown[:6] or [sentences(block)[0] for block in blocks[:1]]


def printed(cell: NotebookNode) -> str | None:
    """A cell's printed table, if it is one that a slide has room for."""
    if {"hide-output", "hide-input"} & set(cell.metadata.get("tags", [])):
        return None
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream").rstrip()
    lines = text.split("\n")
    return f"```text\n{text}\n```" if 3 <= len(lines) <= 16 and max(map(len, lines)) <= 90 else None


def picture(cell: NotebookNode) -> str | None:
    """A cell's figure with its description."""
    for output in cell.outputs:
        if data := output.get("data", {}).get("image/png"):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").replace('"', "&quot;")
            return f'<img alt="{alt}" src="data:image/png;base64,{"".join(data.split())}">'
    return None


def slides_of(notebook: NotebookNode) -> NotebookNode:
    """A chapter's deck, from what its cells are: title and question, one slide a section, its figures and tables below
    it, each with what the text says of it, the exercises, and the last section, which was written to stand on one slide.
    The prose is in the notes.
    """
    deck = nbformat.v4.new_notebook(metadata=notebook.metadata)

    def add(kind: str, *parts: str) -> None:
        cell = nbformat.v4.new_markdown_cell("\n\n".join(filter(None, parts)))
        cell.metadata["slideshow"] = {"slide_type": kind}
        deck.cells.append(cell)

    heading, begins, room = "", "slide", False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for shown in filter(None, (picture(cell), printed(cell))):
                if room:  # on the slide of its section
                    add("-", shown)
                elif heading and not heading.startswith("Exercise"):
                    add("subslide", f"### {heading}", shown)
                room = False
            continue
        for part in re.split(r"^(?=#{1,3} )", plain(cell.source), flags=re.MULTILINE):
            title, _, text = part.strip().partition("\n")
            text = text.strip()
            if title.startswith("# "):
                add("slide", title, re.sub(r"^\|.*\n?", "", text, flags=re.MULTILINE))
            elif title.startswith("## Sources"):
                return deck
            elif title.startswith("#"):
                heading = title.lstrip("# ")
                begins = "slide" if title.startswith("## ") else begins
                if not text and "Exercises" in heading:
                    continue  # the first exercise begins the slide
                whole = re.search(r"Predict first|On one slide|^Exercise \d", heading)
                shown = text if whole else "\n\n".join(said(text))
                add(begins, title, shown)
                add("notes", text or heading)
                begins, room = "subslide", not whole and len(shown) < 240 and "$$" not in shown
            elif part.strip() and deck.cells:
                if answers := [sentence for sentence in said(part.strip()) if "**" in sentence]:
                    add("fragment", "\n\n".join(answers))
                    room = False
                add("notes", part.strip())
    return deck


def reveal_js() -> Path | None:
    """The folder of reveal.js, from npm, kept in _build while its version stays; None, and why, if it can't be had."""
    if find_node() is None:
        print(NO_NODE, file=sys.stderr)
        return None
    try:
        return with_packages(TOOLS / "reveal") / "node_modules" / "reveal.js"
    except OSError as error:
        print(f"no slides: {error}", file=sys.stderr)
        return None


def write_slides(out: Path, notebooks: list[Path], reveal: Path) -> None:
    """A deck a notebook, a list of them, and all that they load."""
    from nbconvert import SlidesExporter

    folder = out / "slides"
    for part in ("dist", "plugin/notes", "LICENSE"):
        put(reveal / part, folder / "reveal.js" / part)
    mathjax = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0]
    put(Path(mathjax) / "static" / "mathjax" / "tex-svg.js", folder / "mathjax" / "tex-svg.js")
    exporter = SlidesExporter(
        template_file=str(TOOLS / "slides.html.j2"),
        reveal_url_prefix="reveal.js",
        reveal_theme="white",  # its font is in the folder; others ask for theirs on the web
        reveal_number="h.v",
        exclude_input_prompt=True,
        exclude_anchor_links=True,
    )
    titles = []
    for path in notebooks:
        deck = slides_of(nbformat.read(path, as_version=4))
        titles.append(re.search(r"^# (.+)", deck.cells[0].source, re.MULTILINE)[1])
        html, _ = exporter.from_notebook_node(deck, {"metadata": {"name": titles[-1]}})
        (folder / f"{path.stem}.html").write_text(html, encoding="utf-8")
    links = "\n".join(f'<li><a href="{p.stem}.html">{title}</a>' for p, title in zip(notebooks, titles, strict=True))
    (folder / "index.html").write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Slides</title>\n<h1>Slides</h1>\n'
        f'<ul style="font: 1.2em/1.8 sans-serif; list-style: none">\n{links}\n</ul>\n</html>\n',
        encoding="utf-8",
    )


# The quiz


def quiz_key(key: dict) -> str:
    """The key as a page: the letter, and why, for each question."""
    lines = [f"{number}. **{entry['answer']}** ({entry['section']}). {entry['why']}" for number, entry in key.items()]
    return "# Key of the quiz\n\nIn brackets: the section that answers it.\n\n" + "\n".join(lines) + "\n"


def write_quiz(out: Path) -> None:
    shutil.copyfile(ROOT / "book" / "quiz.md", out / "student" / "quiz.md")
    (out / "teacher").mkdir()
    key = json.loads((TOOLS / "quiz_key.json").read_text(encoding="utf-8"))
    (out / "teacher" / "quiz_key.md").write_text(quiz_key(key), encoding="utf-8")


def build(out: Path, notebooks: list[Path], reveal: Path | None) -> None:
    """All of it into ``out``, which is made anew."""
    if any((out / kept).exists() for kept in ("submitted", "autograded", "feedback")):
        raise SystemExit(f"{out} has submissions or grades: move it away, or name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    write_course(out, notebooks)
    write_quiz(out)
    (out / "README.md").write_text(README, encoding="utf-8")
    (out / "student" / "README.md").write_text(STUDENT_README, encoding="utf-8")
    if reveal is not None:
        write_slides(out, notebooks, reveal)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="notebooks; all of notebooks/ if none is named")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "workshop")
    options = parser.parse_args()
    reveal = reveal_js()
    build(options.out, options.files or sorted(NOTEBOOKS.glob("*.ipynb")), reveal)
    print(options.out)
    return 1 if reveal is None and os.environ.get("CI") else 0


if __name__ == "__main__":
    raise SystemExit(main())
