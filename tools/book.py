"""Build the book into _build/html: executes what changed, fails on any warning, prints the path of the first page.

jupyter-cache looks at a notebook's own cells only. What they run on (the package, its weights, the recorded measurements,
the pins) is hashed here: when that changes, every notebook is executed again. `--clean` starts from nothing.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
INPUTS = BUILD / "inputs"
FIRST_PAGE = BUILD / "html" / "index.html"
WATCHED = ["src", "benchmarks/results", "requirements.txt", "book/_ext", "_config.yml", "_toc.yml"]


def inputs_hash() -> str:
    """One hash over every file the notebooks' outputs can depend on, other than the notebooks themselves."""
    digest = hashlib.sha256(sys.version.encode())
    for watched in WATCHED:
        top = ROOT / watched
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def forget(*names: str) -> None:
    for name in names:
        shutil.rmtree(BUILD / name, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", action="store_true", help="execute and build everything anew")
    if parser.parse_args().clean:
        shutil.rmtree(BUILD, ignore_errors=True)
    now = inputs_hash()
    if not INPUTS.exists() or INPUTS.read_text() != now:
        forget(".jupyter_cache", ".doctrees", "html")  # and pages of what is gone
        BUILD.mkdir(exist_ok=True)
        INPUTS.write_text(now)
    # by way of Python, since a script's first line breaks when .venv is moved
    jupyter_book = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command = [*jupyter_book, "build", str(ROOT), "-W", "--keep-going"]
    env = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1", "TQDM_DISABLE": "1"}
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    if code or not FIRST_PAGE.exists():
        forget(".doctrees")  # else the pages that warned would count as up to date next time, and pass
        print("book: not built; what is wrong is said above", file=sys.stderr)
        return code or 1
    print(FIRST_PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
