"""What a teacher hands out: copies without solutions, decks, the quiz and its key, the guide; and CONTRIBUTING's template."""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import test_repository as held_to
import workshop
from chromium import FLAGS, find
from chromium import MISSING as NO_CHROMIUM

import attnlab
from attnlab import memory

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEMPLATE = ROOT / "notebooks" / "template" / "chapter.ipynb"
CHAPTERS = {int(path.name[:2]): nbformat.read(path, as_version=4) for path in NOTEBOOKS}
NUMBERS = [number for chapter in CHAPTERS.values() for number, _ in workshop.solution_cells(chapter)]
KEY = json.loads((ROOT / "tools" / "quiz_key.json").read_text(encoding="utf-8"))
GUIDE = (ROOT / "book" / "teachers_guide.md").read_text(encoding="utf-8")


def cannot(reason):
    """What can't be checked fails where it must be, in CI, and is skipped elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def offline(patch, home):
    """A home where nothing is, and whoever asks the network is refused."""
    patch.setenv("HOME", str(home))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        patch.setenv(proxy, "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course of all chapters, as make workshop writes it."""
    out = tmp_path_factory.mktemp("workshop") / "course"
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, tmp_path_factory.mktemp("home"))
        workshop.build(out, NOTEBOOKS, reveal=None)
    return out


def chapter_of(number):
    return int(number.split(".")[0])


def copies(folder):
    """Each chapter's copy, by its number."""
    paths = sorted((folder / "chapters").glob("*.ipynb"))
    return {int(path.name[:2]): nbformat.read(path, as_version=4) for path in paths}


@pytest.fixture(scope="module")
def students(course):
    return copies(course / "student")


@pytest.fixture(scope="module")
def solved(course):
    return copies(course / "solutions")


def graded(notebook, name):
    (cell,) = (cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == name)
    return cell


def run(notebook, number):
    """What an exercise's check prints after the chapter's first code cell and the exercise's own."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    namespace, printed = {}, io.StringIO()
    name = number.replace(".", "-")
    with torch.set_grad_enabled(True):  # a chapter may turn gradients off
        exec(first.source, namespace)
        exec(graded(notebook, f"exercise-{name}").source, namespace)
        with contextlib.redirect_stdout(printed):
            exec(graded(notebook, f"check-{name}").source, namespace)
    return printed.getvalue()


# Copies


def test_a_copy_has_all_of_its_chapter_but_the_solutions(course, students):
    assert list(students) == list(CHAPTERS)
    for n, copy in students.items():
        solutions = list(workshop.solution_cells(CHAPTERS[n]))
        assert [number for number, _ in solutions] == [f"{n}.1", f"{n}.2"]
        assert len(copy.cells) == len(CHAPTERS[n].cells) - len(solutions)  # starting cell and solution are one
        nbformat.validate(copy)


@pytest.mark.parametrize("number", NUMBERS)
def test_untouched_every_check_fails_kindly(students, number):
    says = run(students[chapter_of(number)], number)
    assert re.match(rf"{number}: (not answered yet|not yet\. )", says)


@pytest.mark.parametrize("number", NUMBERS)
def test_solved_every_check_passes_and_the_hidden_test_lets_it(solved, number):
    copy = solved[chapter_of(number)]
    assert "assert attnlab.exercises.check(" in graded(copy, f"check-{number.replace('.', '-')}").source
    assert not re.search("not yet|not answered", run(copy, number))


def without_pictures(text):
    return re.sub(r'"image/png": "[^"]*"', "", text)


def test_no_line_of_a_solution_is_in_the_files_for_students(course):
    def in_json(line):
        return {json.dumps(line, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}

    secret, known = {}, ""
    for chapter in CHAPTERS.values():
        rest = nbformat.from_dict(chapter)
        for number, at in list(workshop.solution_cells(chapter)):
            lines = (line.strip() for line in rest.cells[at].source.split("\n"))
            secret[number] = {line for line in lines if len(line) >= 16}
            rest.cells[at].source = ""
        known += without_pictures(nbformat.writes(rest))
    handed_out = [p for p in (course / "student").rglob("*") if p.is_file()]
    assert {p.suffix for p in handed_out} <= {".ipynb", ".md", ".json", ".js"}
    text = "\n".join(without_pictures(p.read_text(encoding="utf-8")) for p in handed_out)
    for number, lines in secret.items():
        telling = {
            line for line in lines if not any(form in known for form in in_json(line))
        }  # of the rest, the page tells
        assert telling, number
        assert {line for line in telling if line in text or any(form in text for form in in_json(line))} == set(), (
            number
        )
    assert "HIDDEN TESTS" not in text and "END SOLUTION" not in text


def test_the_outputs_of_exercises_are_gone_and_the_others_stay(students):
    for chapter, copy in zip(CHAPTERS.values(), students.values(), strict=True):
        kept = [cell.outputs for cell in copy.cells if cell.cell_type == "code" and "nbgrader" not in cell.metadata]
        of_exercises = {i + d for _, i in workshop.solution_cells(chapter) for d in (-1, 0, 1)}
        expected = [c.outputs for i, c in enumerate(chapter.cells) if c.cell_type == "code" and i not in of_exercises]
        assert kept == expected and any(kept)
        for cell in copy.cells:
            assert "nbgrader" not in cell.metadata or not cell.get("outputs")


def test_what_a_copy_reads_lies_beside_it(course, students):
    read = set()
    for copy in students.values():
        for cell in copy.cells:
            if cell.cell_type == "code":
                assert '"../' not in cell.source
                read |= set(re.findall(r'Path\("([\w./-]+)"\)', cell.source))
    assert "benchmarks/results" in read
    for name in read:
        assert (course / "student" / "chapters" / name).exists(), name


def test_nbgrader_grades_what_students_hand_in(course, students, solved, monkeypatch, tmp_path):
    """Ada has both exercises, Bo the second only. Of the rest of the page they hand in the first code cell."""
    from nbgrader.api import Gradebook

    name = NOTEBOOKS[0].stem
    for student, right in (("ada", {"1.1", "1.2"}), ("bo", {"1.2"})):
        copy = nbformat.from_dict(students[1])
        first = next(cell for cell in copy.cells if cell.cell_type == "code")
        for number in right:
            place = f"exercise-{number.replace('.', '-')}"
            graded(copy, place).source = graded(solved[1], place).source
        copy.cells = [cell for cell in copy.cells if cell is first or "nbgrader" in cell.metadata]
        folder = course / "submitted" / student / "chapters"
        folder.mkdir(parents=True)
        nbformat.write(copy, folder / f"{name}.ipynb")
    offline(monkeypatch, tmp_path)
    done = workshop.nbgrader(course, "autograde", "chapters", "--notebook", name)
    assert done.returncode == 0, done.stderr
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        scores = {
            student: {
                grade.name: grade.score
                for grade in gradebook.find_submission_notebook(name, "chapters", student).grades
            }
            for student in ("ada", "bo")
        }
    assert scores == {"ada": {"check-1-1": 1, "check-1-2": 1}, "bo": {"check-1-1": 0, "check-1-2": 1}}
    with pytest.raises(SystemExit, match="submissions"):
        workshop.build(course, NOTEBOOKS[:1], reveal=None)


# Slides


def test_a_deck_is_made_of_the_chapters_own_parts():
    for n, chapter in CHAPTERS.items():
        deck = workshop.slides_of(chapter)
        shown = "\n".join(c.source for c in deck.cells if c.metadata.slideshow.slide_type != "notes")
        assert deck.cells[0].source.startswith(f"# {n}. ")
        assert "**The question.**" in deck.cells[0].source
        for heading in ("Predict first", "On one slide", f"Exercise {n}.1"):
            assert heading in shown
        exercise = next(i for i, c in enumerate(chapter.cells) if "### Exercise" in c.source)
        figures = sum(workshop.picture(c) is not None for c in chapter.cells[:exercise] if c.cell_type == "code")
        assert shown.count("<img alt=") == figures > 0
        assert 'alt=""' not in shown and "{cite" not in shown and ")=\n" not in shown
        for _, at in workshop.solution_cells(chapter):
            assert chapter.cells[at].source not in shown


def test_a_sentence_is_not_cut_within_bold_type_or_a_formula():
    text = "One. **It grows. To one.** So: $a.\\ b$ holds. (See below. Later.) Then the third prediction: **no.** That is all."
    assert workshop.sentences(text) == [
        "One.",
        "**It grows. To one.**",
        "So: $a.\\ b$ holds.",
        "(See below. Later.)",
        "Then the third prediction: **no.**",
        "That is all.",
    ]


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    if (reveal := workshop.reveal_js()) is None:
        cannot("no reveal.js: Node.js is missing, or npm could not bring it")
    out = tmp_path_factory.mktemp("slides")
    workshop.write_slides(out, [NOTEBOOKS[0], NOTEBOOKS[7]], reveal)
    return out / "slides"


def test_decks_open_without_a_network(decks):
    from playwright.sync_api import sync_playwright

    if find() is None:
        cannot(NO_CHROMIUM)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        asked, troubles = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: troubles.append(request.url))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: message.type == "error" and troubles.append(message.text))
        page.goto((decks / "index.html").as_uri())
        links = page.eval_on_selector_all("a", "all => all.map(a => a.href)")
        assert len(links) == 2
        for link in links:
            page.goto(link)
            page.wait_for_function("window.Reveal && Reveal.isReady() && window.MathJax?.startup?.promise")
            page.evaluate("MathJax.startup.promise")
            assert page.locator("mjx-container").count() > 5 and page.locator("mjx-merror").count() == 0
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 100 && i.alt)")
            assert page.locator("aside.notes").count() > 5
            heights = {}
            while True:  # an arrow key after another, through slides and the sentences that appear on them
                place = page.evaluate("({ h, v } = Reveal.getIndices(), `${h}.${v}`)")
                heights[place] = page.evaluate("Reveal.getCurrentSlide().scrollHeight")
                if page.evaluate("Reveal.isLastSlide()"):
                    break
                page.evaluate("Reveal.next()")
            assert len(heights) == page.evaluate("Reveal.getTotalSlides()") > 20
            assert max(heights.values()) <= page.evaluate("Reveal.getConfig().height")
        browser.close()
    assert troubles == []
    assert [url for url in asked if not url.startswith((decks.as_uri(), "data:", "blob:"))] == []


# The quiz


def questions():
    """Of each question of the page: its text and its answers by letter."""
    text = (ROOT / "book" / "quiz.md").read_text(encoding="utf-8")
    found = {}
    for part in re.split(r"^(?=\*\*\d+\.\*\*)", text, flags=re.MULTILINE)[1:]:
        number = re.match(r"\*\*(\d+)\.", part)[1]
        answers = dict(re.findall(r"^- ([A-Z])\. ((?:.|\n(?!- |\n))+)", part, flags=re.MULTILINE))
        found[number] = part, {letter: " ".join(answer.split()) for letter, answer in answers.items()}
    return found


def weights_and_answer():
    q, k, v = (torch.randn(1, 1, n, 8) for n in (1, 5, 5))
    out, weights = attnlab.scaled_dot_product_attention(q, k, v, return_weights=True)
    inside = (v.amin(2) <= out[:, :, 0]).all() and (out[:, :, 0] <= v.amax(2)).all()
    return "an average of the values" if torch.isclose(weights.sum(), torch.tensor(1.0)) and inside else ""


def too_late():
    q, k, v = torch.randn(3, 1, 1, 6, 8)
    other = k.clone()
    other[:, :, -1] += 3
    first = [((q @ keys.mT / 8**0.5).softmax(-1).tril() @ v)[:, :, :5] for keys in (k, other)]
    return "A future token still changes" if (first[0] - first[1]).abs().max() > 1e-3 else "Nothing"


def read_once_for_eight():
    shape = memory.as_shape("mistral-7b-v0.2")
    weights = memory.bytes_per_step(shape, 0)
    of_one = memory.bytes_per_step(shape, 1000) - weights
    return "The weights" if memory.bytes_per_step(shape, 1000, 8) == weights + 8 * of_one else ""


def grows_with_heads():
    one, many = (attnlab.GroupedQueryAttention(64, n) for n in (1, 16))
    maps = [layer(torch.randn(1, 10, 64), return_weights=True)[1].numel() for layer in (one, many)]
    same = sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in many.parameters())
    return "The attention weights" if same and maps[1] == 16 * maps[0] else ""


def shifted():
    q, k = torch.randn(2, 1, 1, 9, 32)
    scores = []
    for start in (0, 1000):
        angles = attnlab.rotary.rotary_angles(torch.arange(9) + start, 32)
        scores.append(attnlab.rotary.apply_rotary(q, *angles) @ attnlab.rotary.apply_rotary(k, *angles).mT)
    return "Nothing but rounding" if torch.allclose(*scores, atol=1e-2) else ""


def taken_by_a_copy():
    from attnlab.measure import grouped_query_forms, peak_bytes

    q, kv = torch.randn(1, 32, 1, 16), torch.randn(2, 1, 8, 256, 16)
    copied = peak_bytes(grouped_query_forms(q, *kv)["repeat"])
    return "a copy as large as multi-head's" if copied >= 4 * kv.nbytes else ""


def ring():
    cache = attnlab.RollingKVCache(n_layers=1, batch=1, n_kv_heads=1, head_dim=1, window=4)
    cache.advance(10)
    before = cache.held_positions(cache.lengths)[0].tolist()
    cache.advance(1)
    slot = cache.held_positions(cache.lengths)[0].tolist().index(10)
    return f"slot {slot}, where position {before[slot]} was"


def where_close_to_four():
    cards = [memory.as_card(card) for card in ("a100", "h200")]
    full = [memory.speed_up_filled("mistral-7b-v0.2", "llama-2-7b", card.nbytes, 4096) for card in cards]
    others = [memory.speed_up("mistral-7b-v0.2", "llama-2-7b", n, b) for n, b in ((100, 1), (4096, 1), (4096, 30))]
    return "as many users as its memory holds" if min(full) > 3.4 and max(others) < 3 else ""


def sees_at_10():
    seen = attnlab.causal_mask(16, window=4)[10].nonzero().flatten().tolist()
    return f"{seen[0]} to {seen[-1]}"


SAYS = {
    "1": weights_and_answer,
    "4": lambda: f"about {memory.decode_ceiling('mistral-7b-v0.2', 3.35e12, 0) // 10 * 10:.0f}",
    "5": too_late,
    "6": lambda: f"{round(float((torch.randn(20_000, 256) * torch.randn(20_000, 256)).sum(1).std()))}",
    "7": read_once_for_eight,
    "8": lambda: f"about {memory.speed_up('mistral-7b-v0.2', memory.with_kv_heads('mistral-7b-v0.2', 32), 100):.1f}",
    "9": grows_with_heads,
    "11": taken_by_a_copy,
    "12": sees_at_10,
    "13": ring,
    "14": shifted,
    "15": where_close_to_four,
}


def test_the_quiz_has_four_questions_before_and_eleven_after_and_a_key_to_each():
    page = (ROOT / "book" / "quiz.md").read_text(encoding="utf-8")
    before, after = page.split("## After")
    assert len(re.findall(r"^\*\*\d+\.\*\*", before, re.MULTILINE)) == 4
    assert len(re.findall(r"^\*\*\d+\.\*\*", after, re.MULTILINE)) == 11
    assert list(questions()) == list(KEY) == [str(n) for n in range(1, 16)]
    for number, (text, answers) in questions().items():
        assert list(answers) == ["A", "B", "C", "D"] and KEY[number]["answer"] in answers
        chapter, section = int(re.search(r"\(Chapter (\d+)\.\)", text)[1]), KEY[number]["section"]
        assert chapter_of(section) == chapter and section in SECTIONS
    letters = [entry["answer"] for entry in KEY.values()]
    assert max(map(letters.count, "ABCD")) <= 6  # no letter to bet on


@pytest.mark.parametrize("number", SAYS)
def test_the_key_says_what_the_code_says(number):
    torch.manual_seed(0)
    answers, right = questions()[number][1], SAYS[number]()
    fitting = [
        letter for letter, answer in answers.items() if right and re.search(rf"(?<!\d){re.escape(right)}(?!\d)", answer)
    ]
    assert KEY[number]["answer"] in fitting
    exact = [letter for letter in fitting if answers[letter].rstrip(".") == right]
    assert len(fitting) == 1 or exact == [KEY[number]["answer"]]


def test_the_key_is_with_the_teacher_alone(course):
    key = (course / "teacher" / "quiz_key.md").read_text(encoding="utf-8")
    assert all(f"{number}. **{entry['answer']}**" in key for number, entry in KEY.items())
    public = [ROOT / "book" / "quiz.md", ROOT / "book" / "teachers_guide.md"]
    public += [path for path in (course / "student").rglob("*") if path.is_file()]
    for path in public:
        text = " ".join(path.read_text(encoding="utf-8").split())
        assert not any(entry["why"] in text for entry in KEY.values()), path
    assert (course / "student" / "quiz.md").read_text() == (ROOT / "book" / "quiz.md").read_text()


# The guide


def sections():
    """The code of every numbered section of the chapters: {"3.7": …}."""
    found = {}
    for chapter in CHAPTERS.values():
        number = None
        for cell in chapter.cells:
            if cell.cell_type == "markdown":
                for heading in re.findall(r"^## (\d+\.\d+) ", cell.source, re.MULTILINE):
                    number = heading
                    found[number] = ""
            elif number:
                found[number] += cell.source + "\n"
    return found


SECTIONS = sections()
PROSE = re.sub(r"^```.*?^```", "", GUIDE, flags=re.MULTILINE | re.DOTALL)


def test_every_section_that_the_guide_names_exists():
    named = set(re.findall(r"(?<![\d.:v])(\d{1,2}\.\d{1,2})(?![\d.])", PROSE))
    assert len(named) > 40 and named - set(SECTIONS) == set()


def test_every_cell_that_the_guide_names_stands_in_its_section():
    cells = re.findall(r"(\d{1,2}\.\d{1,2}) `([^`]+)`", PROSE)
    assert len(cells) > 60
    assert [(s, word) for s, word in cells if not re.search(rf"\b{re.escape(word)}\b", SECTIONS[s])] == []


def test_every_exercise_that_the_guide_names_exists():
    named = set(re.findall(r"[Ee]xercises? (\d+\.\d)", PROSE)) | set(
        re.findall(r"[Ee]xercises \d+\.\d and (\d+\.\d)", PROSE)
    )
    everywhere = "\n".join(cell.source for chapter in CHAPTERS.values() for cell in chapter.cells)
    assert len(named) > 8
    assert {n for n in named if f"### Exercise {n}" not in everywhere} == set()


def minutes(clock):
    hours, _, rest = clock.rpartition(":")
    return 60 * int(hours or 0) + int(rest)


@pytest.mark.parametrize(
    "plan, length",
    [("Ninety minutes", 90), ("Half a day", 240), ("Day one", 7 * 60), ("Day two", 7 * 60)],
)
def test_a_plan_leaves_no_minute_out_and_counts_none_twice(plan, length):
    (text,) = re.findall(rf"^##+ {plan}\n(.*?)(?=^##)", GUIDE, flags=re.MULTILINE | re.DOTALL)
    rows = [tuple(map(minutes, row)) for row in re.findall(r"^\| ([\d:]+)–([\d:]+) \|", text, re.MULTILINE)]
    assert len(rows) > 10 and all(start < end for start, end in rows)
    assert [end for _, end in rows[:-1]] == [start for start, _ in rows[1:]]
    assert rows[-1][1] - rows[0][0] == length


# CONTRIBUTING


def test_contributing_has_ten_steps_and_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\d+)\. ", text, re.MULTILINE) == [str(n) for n in range(1, 11)]
    for name in re.findall(r"`((?:src|tests|book|benchmarks|notebooks|tools)/[\w./-]*\w)`", text):
        assert "NN" in name or (ROOT / name).exists(), name


CHECKS_OF_A_NOTEBOOK = [
    check
    for name, check in vars(held_to).items()
    if name.startswith("test_") and "path" in check.__code__.co_varnames[: check.__code__.co_argcount]
]


@pytest.mark.parametrize("check", CHECKS_OF_A_NOTEBOOK, ids=lambda check: check.__name__)
def test_the_template_is_held_to_what_chapters_are(check):
    check(TEMPLATE)


def test_the_template_has_the_parts_of_a_chapter_in_order():
    notebook = nbformat.read(TEMPLATE, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells)
    parts = ["**The question.**", "| You need |", "Predict first", "inspect.getsource", "Pitfall", "In the wild"]
    parts += ["Exercise 0.1: ", "Exercise 0.2: ", "Exercise 0.3 (open): ", "On one slide", "## Sources"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert len(list(workshop.solution_cells(notebook))) == 2
    workshop.slides_of(notebook)
