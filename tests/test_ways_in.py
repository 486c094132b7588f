"""Every way in, as far as it can be tried on one machine: the wheel, the copies for Colab, what Binder installs, the workflows."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
WORKFLOWS = ROOT / ".github" / "workflows"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
sys.path[:0] = [str(ROOT / "book" / "_ext"), str(ROOT / "tools")]


def call(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def without_github() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}


# --- the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, in an environment of its own that has the dependencies beside it and nothing of the checkout: its bin/."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    names = ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT")
    shutil.copytree(ROOT / "src" / "attnlab", tree / "src" / "attnlab", ignore=shutil.ignore_patterns("__pycache__"))
    for name in names:
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    made = call(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", place, tree)
    assert made.returncode == 0, made.stderr
    (wheel,) = place.glob("attnlab-*.whl")
    shutil.rmtree(tree)
    venv.create(place / "env", with_pip=False, symlinks=True)
    scheme = sysconfig.get_paths(scheme="venv", vars={"base": str(place / "env"), "platbase": str(place / "env")})
    # Its directory is on the path, so that torch is found; its .pth files are not read, so that this checkout isn't.
    (Path(scheme["purelib"]) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    put = call(*pip, "--python", place / "env", "install", "--no-index", "--no-deps", "--ignore-installed", wheel)
    assert put.returncode == 0, put.stdout + put.stderr
    return Path(scheme["scripts"])


def test_the_wheel_holds_the_companion_and_runs_in_another_folder_without_a_network(installed, tmp_path):
    nowhere = "http://127.0.0.1:9"  # where nobody listens
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere}
    environment["HOME"] = str(tmp_path)
    written = call(installed / "attnlab", "generate", "def", "--max-new-tokens", "16", cwd=tmp_path, env=environment)
    assert written.returncode == 0, written.stderr
    assert len(written.stdout) > 10
    code = 'import attnlab; print(attnlab.load("multi-query").config.n_kv_heads, attnlab.__file__)'
    sibling = call(installed / "python", "-c", code, cwd=tmp_path, env=environment)
    assert sibling.returncode == 0, sibling.stderr
    n_kv_heads, file = sibling.stdout.strip().split(maxsplit=1)
    assert n_kv_heads == "1" and Path(file).is_relative_to(installed.parent) and str(ROOT / "src") not in file


def test_the_wheel_says_which_version_and_licences_it_has(installed):
    (folder,) = installed.parent.rglob("attnlab-*.dist-info")
    assert folder.name == f"attnlab-{VERSION}.dist-info"
    assert {path.name for path in (folder / "licenses").iterdir()} == {"LICENSE", "LICENSE-TEXT"}


# --- Colab


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colab")
    address, commit = "https://github.com/octo/attention", "0123abc"
    made = call(
        sys.executable, ROOT / "tools" / "colab.py", folder, "--repository", address, "--commit", commit,
        env=without_github(),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder / "notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_copy_for_colab_is_the_notebook_with_one_cell_in_front(copies, path):
    copy = nbformat.read(copies / path.name, as_version=4)
    nbformat.validate(copy)
    original = nbformat.read(path, as_version=4)
    assert copy.cells[1:] == original.cells and copy.metadata == original.metadata
    first = copy.cells[0].source
    assert "git clone --quiet https://github.com/octo/attention" in first and "checkout --quiet 0123abc" in first
    assert "%pip install" in first and first.endswith("/notebooks")  # chapters read records from beside it


def test_colab_s_first_cell_brings_the_tree_of_its_commit(tmp_path):
    """Its shell lines, run: all but the installing one, which needs the package index."""
    from colab import INSTALL

    source, commit = toy_repository(tmp_path / "source")
    (source / "later.txt").write_text("not of this commit")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "--message", "later")
    cell = INSTALL.format(folder=tmp_path / "book", repository=source, commit=commit)
    lines = [line[1:] for line in cell.splitlines() if line.startswith("!")]
    assert len(lines) == 2
    for _ in range(2):  # run again, it does no harm
        assert call("bash", "-ec", "\n".join(lines)).returncode == 0
    assert (tmp_path / "book" / "notebooks" / NOTEBOOKS[0].name).exists()
    assert not (tmp_path / "book" / "later.txt").exists()


def test_copies_are_not_made_for_nobody_knows_which_repository(tmp_path):
    made = call(sys.executable, ROOT / "tools" / "colab.py", tmp_path / "out", env=without_github())
    assert made.returncode == 2 and "--repository" in made.stderr and not (tmp_path / "out").exists()


def git(folder: Path, *arguments) -> str:
    done = call("git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def toy_repository(folder: Path) -> tuple[Path, str]:
    """One notebook and the tool, committed: folder and commit."""
    for name in ("notebooks", "tools"):
        (folder / name).mkdir(parents=True)
    shutil.copy(NOTEBOOKS[0], folder / "notebooks")
    shutil.copy(ROOT / "tools" / "colab.py", folder / "tools")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder, git(folder, "rev-parse", "HEAD")


# --- workflows


def steps(workflow: str, job: str) -> list[dict]:
    return yaml.safe_load((WORKFLOWS / f"{workflow}.yml").read_text())["jobs"][job]["steps"]


def commands(workflow: str, job: str) -> list[str]:
    return [step["run"] for step in steps(workflow, job) if "run" in step]


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yml")), ids=lambda path: path.stem)
def test_a_workflow_is_one_and_asks_for_no_more_than_it_needs(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] == path.stem and workflow[True]  # YAML 1.1 reads "on" as true
    assert workflow["permissions"].get("contents") == "read"
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            else:
                assert call("bash", "-n", "-c", step["run"]).returncode == 0


def test_the_pages_workflow_replaces_the_branch_that_colab_opens(tmp_path):
    here, commit = toy_repository(tmp_path / "here")
    git(tmp_path, "init", "--quiet", "--bare", "origin")
    git(here, "remote", "add", "origin", tmp_path / "origin")
    git(here, "push", "--quiet", "origin", "main")
    github = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "octo/attention", "GITHUB_SHA": commit}
    for _ in range(2):  # the second time the branch is there already
        for command in commands("pages", "colab"):
            done = call("bash", "-ec", command, cwd=here, env=without_github() | github)
            assert done.returncode == 0, done.stderr
        git(here, "switch", "--quiet", "--force", "main")
        git(here, "branch", "--quiet", "-D", "colab")
    git(here, "fetch", "--quiet", "origin", "colab")
    assert git(here, "ls-tree", "-r", "--name-only", "FETCH_HEAD") == f"notebooks/{NOTEBOOKS[0].name}"
    assert git(here, "rev-list", "--count", "FETCH_HEAD") == "1"
    text = git(here, "show", f"FETCH_HEAD:notebooks/{NOTEBOOKS[0].name}")
    assert commit in "".join(json.loads(text)["cells"][0]["source"])


def test_the_nightly_run_tests_with_the_newest_torch_and_transformers():
    workflow = yaml.safe_load((WORKFLOWS / "nightly.yml").read_text())
    assert re.fullmatch(r"\d+ \d+ \* \* \*", workflow[True]["schedule"][0]["cron"])
    run = commands("nightly", "drift")
    upgrade = next(i for i, command in enumerate(run) if "--upgrade" in command)
    assert {"torch", "transformers"} <= set(shlex.split(run[upgrade]))
    assert any(".ci/run" in command for command in run[upgrade + 1 :])
    assert workflow["permissions"] == {"contents": "read", "issues": "write"}


def test_the_nightly_run_tests_on_a_newer_python():
    (version,) = (step["with"]["python-version"] for step in steps("nightly", "python") if "with" in step)
    assert tuple(map(int, version.split("."))) > (3, 11)
    assert "bash .ci/run" in commands("nightly", "python")


@pytest.mark.parametrize(("open_issue", "said"), [("", "issue create"), ("7", "issue comment 7")])
def test_a_nightly_failure_opens_one_issue_and_then_adds_to_it(tmp_path, open_issue, said):
    (report,) = (step for step in steps("nightly", "drift") if step.get("if") == "failure()")
    tool = tmp_path / "gh"  # in the place of GitHub's own
    tool.write_text(
        f'#!/bin/sh\n[ "$2" = list ] && echo "{open_issue}" && exit\necho "$@" >> calls; cat body.md >> calls\n'
    )
    tool.chmod(0o755)
    (tmp_path / "moved.md").write_text("+torch==9.9.9\n")
    environment = without_github() | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TITLE": "Drift",
        "RUN": "https://run",
    }
    done = call("bash", "-ec", report["run"], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert said in calls and "+torch==9.9.9" in calls and "https://run" in calls


def test_the_nightly_run_shows_what_has_moved(tmp_path):
    (move,) = (command for command in commands("nightly", "drift") if "diff" in command)
    fake = tmp_path / ".venv" / "bin"
    fake.mkdir(parents=True)
    (fake / "python").write_text("#!/bin/sh\nprintf 'PyYAML==6.0.4\\ntorch==9.9.9+cpu\\n'\n")
    (fake / "python").chmod(0o755)
    (tmp_path / "requirements.txt").write_text("# pins\ntorch==2.13.0\npyyaml==6.0.4\n")
    done = call("bash", "-ec", move, cwd=tmp_path, env=os.environ | {"GITHUB_STEP_SUMMARY": "summary"})
    assert done.returncode == 0, done.stderr
    moved = (tmp_path / "summary").read_text()
    assert "-torch==2.13.0" in moved and "+torch==9.9.9" in moved and "yaml" not in moved


# --- Binder, a hub, a dev container


def test_what_binder_installs_is_the_package_at_the_pins_with_torch_for_a_cpu(tmp_path):
    """pip resolves it against what is installed here, which is the pins, without a network."""
    shutil.copytree(ROOT / "binder", tmp_path / "binder")
    (tmp_path / "src" / "attnlab").mkdir(parents=True)
    (tmp_path / "src" / "attnlab" / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = call(
        sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--no-index",
        "--no-build-isolation", "-r", "binder/requirements.txt", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(rf"Would install attnlab-{re.escape(VERSION)}\s*$", done.stdout)  # and nothing else is missing
    lines = (ROOT / "binder" / "requirements.txt").read_text().splitlines()
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in lines and "-c ../requirements.txt" in lines
    python = (ROOT / "binder" / "runtime.txt").read_text().strip()
    assert python == "python-3.11"  # what the workflows test with


def test_the_link_for_a_hub_names_what_is_there():
    page = (ROOT / "book" / "how_to_use.md").read_text(encoding="utf-8")
    (link,) = re.findall(r"https://HUB/\S+", page)
    asked = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
    assert asked["repo"] == "https://github.com/OWNER/REPOSITORY" and asked["branch"] == "main"
    assert asked["urlpath"].startswith("lab/tree/REPOSITORY/")
    assert (ROOT / asked["urlpath"].removeprefix("lab/tree/REPOSITORY/")).is_file()


def test_the_dev_container_runs_commands_that_exist():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["image"].startswith("mcr.microsoft.com/devcontainers/python:")
    venv_command, check = container["postCreateCommand"].split(" && ")
    assert venv_command == "make venv" and re.search(r"^venv:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    from attnlab import cli

    program, *arguments = shlex.split(check)
    assert program == ".venv/bin/attnlab" and cli.run([*arguments, "--help"]) == 0
    python = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert python.endswith("/.venv/bin/python")  # what tools/environment.py makes


# --- launch buttons


def test_a_fork_s_workflow_makes_links_to_the_fork(monkeypatch, tmp_path):
    import ways_in

    (tmp_path / "_config.yml").write_text("repository:\n  url: https://github.com/first/book/\n  branch: next\n")
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert ways_in.repository(tmp_path) == ("https://github.com/first/book", "next")
    monkeypatch.setenv("GITHUB_REPOSITORY", "fork/book")
    assert ways_in.repository(tmp_path)[0] == "https://github.com/fork/book"
    (tmp_path / "_config.yml").write_text("title: a book\n")
    monkeypatch.delenv("GITHUB_REPOSITORY")
    assert ways_in.repository(tmp_path) == ("", "main")


def test_colab_is_offered_for_github_alone(monkeypatch, tmp_path):
    import ways_in

    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    for address, colab in (("https://github.com/a/b", True), ("https://gitlab.com/a/b", False)):
        (tmp_path / "_config.yml").write_text(f"repository: {{url: {address}}}\n")
        config = SimpleNamespace(html_theme_options={"launch_buttons": {"thebe": False}})
        ways_in.link_repository(SimpleNamespace(srcdir=tmp_path), config)
        buttons = config.html_theme_options["launch_buttons"]
        assert buttons["binderhub_url"] == "https://mybinder.org" and ("colab_url" in buttons) == colab


def test_binder_is_offered_to_chapters_that_fit_it_and_says_how_much_they_take(tmp_path):
    import ways_in

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    rows = [{"chapter": "small", "peak_bytes": 700_000_000}, {"chapter": "large", "peak_bytes": 1_900_000_000}]
    record = {"limit_bytes": 2_000_000_000, "jupyterlab_bytes": 200_000_000, "rows": rows}
    (results / "notebook_memory-this.json").write_text(json.dumps(record))
    config = SimpleNamespace(html_theme_options={"repository_branch": "main"})
    offered = {}
    for name in ("small", "large", "unmeasured"):
        buttons = [
            {"text": "Binder", "tooltip": "Launch on Binder"},
            {"text": "Colab", "url": "https://c/x/blob/main/n"},
        ]
        context = {"header_buttons": [{"buttons": buttons}, {"text": "no group"}]}
        ways_in.suit_buttons(SimpleNamespace(config=config, srcdir=tmp_path), f"notebooks/{name}", "", context, None)
        assert buttons[-1]["url"] == "https://c/x/blob/colab/n"
        offered[name] = [button["tooltip"] for button in buttons[:-1]]
    assert offered == {
        "small": ["Launch on Binder: this chapter takes 0.9 of its 2 GB"],
        "large": [],
        "unmeasured": ["Launch on Binder"],
    }


@pytest.fixture(scope="module", params=["", "https://github.com/octo/attention"], ids=["nobody's", "somebody's"])
def pages(request, tmp_path_factory):
    """A book of two pages with this book's settings, for a repository that is known or not: its address, its pages' folder."""
    tree = tmp_path_factory.mktemp("book")
    for name in ("book", "notebooks", "src"):
        (tree / name).mkdir()
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / name, tree / "book" / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = (ROOT / "_config.yml").read_text().replace("execute_notebooks: cache", 'execute_notebooks: "off"')
    if request.param:
        settings += f"\nrepository:\n  url: {request.param}\n"
    (tree / "_config.yml").write_text(settings)
    (tree / "_toc.yml").write_text("format: jb-book\nroot: book/how_to_use\nchapters:\n  - file: notebooks/one\n")
    (tree / "book" / "how_to_use.md").write_text("# How\n\n`git clone https://github.com/OWNER/REPOSITORY`\n")
    (tree / "book" / "references.bib").write_text("")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# One\n\nWords.")])
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, tree / "notebooks" / "one.ipynb")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", tree, "-W"]
    environment = without_github() | {"PYTHONPATH": str(ROOT / "src")}
    built = call(*command, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    return request.param, tree / "_build" / "html"


def test_launch_buttons_appear_where_the_repository_is_known_and_nowhere_else(pages):
    address, html = pages
    page = (html / "notebooks" / "one.html").read_text()
    links = set(re.findall(r'href="(https://(?:mybinder|colab)[^"]*)"', page))
    if not address:
        assert links == set() and "executablebooks/jupyter-book" not in page and "launch-buttons" not in page
        return
    assert links == {
        "https://mybinder.org/v2/gh/octo/attention/main?urlpath=lab/tree/notebooks/one.ipynb",
        "https://colab.research.google.com/github/octo/attention/blob/colab/notebooks/one.ipynb",
    }
    assert f'href="{address}"' in page  # the repository's own button


def test_addresses_are_written_out_where_the_repository_is_known(pages):
    address, html = pages
    page = (html / "book" / "how_to_use.html").read_text()
    assert (address or "https://github.com/OWNER/REPOSITORY") in page
    assert ("OWNER" in page) == (not address)


# --- reading


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_begins_with_what_it_needs_and_how_long_it_takes(path):
    text = "\n".join(
        cell.source for cell in nbformat.read(path, as_version=4).cells[:3] if cell.cell_type == "markdown"
    )
    rows = dict(re.findall(r"^\| (You need|To read|To run|You get) \| (.+?) \|$", text, re.MULTILINE))
    assert list(rows) == ["You need", "To read", "To run", "You get"]
    assert re.fullmatch(r"(about )?\d+ minutes", rows["To read"])
    assert len(rows["You need"]) > 10 and len(rows["You get"]) > 10


def test_the_citation_file_is_of_this_version_and_has_what_its_format_asks():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(cited)
    known = {"cff-version", "message", "type", "title", "abstract", "version", "license", "authors", "keywords"}
    assert set(cited) <= known | {"date-released", "doi", "url", "repository-code"}  # of the format's, what we use
    assert cited["type"] == "software" and cited["version"] == VERSION
    assert all(set(author) & {"name", "family-names"} for author in cited["authors"])
    assert cited["title"] == yaml.safe_load((ROOT / "_config.yml").read_text())["title"]


def test_the_changelog_begins_with_this_version():
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest.rstrip(",") == VERSION


def test_the_chapters_that_do_not_fit_binder_are_named():
    """What the page says of the records, if any chapter is too large for one of them."""
    page = (ROOT / "book" / "how_to_use.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("notebook_memory-*.json"):
        record = json.loads(path.read_text())
        for row in record["rows"]:
            assert row["fits_with_server"] == (row["peak_bytes"] + record["jupyterlab_bytes"] < record["limit_bytes"])
            if not row["fits_with_server"]:
                assert f"`{row['chapter']}`" in page
