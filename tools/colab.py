"""Copies of the notebooks for Colab: `python tools/colab.py FOLDER`. The Pages workflow pushes them to the branch `colab`.

Colab begins with an empty machine, so a copy begins with a cell that fetches the repository at the commit of the copy and
installs its package. The notebooks in notebooks/ have no such cell: everywhere else there is nothing to install. Address and
commit come from GitHub's CI, or from --repository and --commit. Standard library only.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "/content/book"  # on Colab's machine, whose disk is /content
INSTALL = """\
# Colab begins with an empty machine: fetch the book at the commit of this copy and install its package (minutes, where its torch is too old).
!test -d {folder} || git clone --quiet {repository} {folder}
!git -C {folder} checkout --quiet {commit}
%pip install --quiet "{folder}[serve]"
%cd {folder}/notebooks"""


def copy(notebook: dict, repository: str, commit: str, folder: str = FOLDER) -> dict:
    """The notebook with the installing cell in front; all else is as it was."""
    source = INSTALL.format(repository=repository, commit=commit, folder=folder).splitlines(keepends=True)
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "install",
        "metadata": {},
        "outputs": [],
        "source": source,
    }
    return {**notebook, "cells": [cell, *notebook["cells"]]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where notebooks/ is written")
    given = os.environ
    in_ci = (
        f"{given.get('GITHUB_SERVER_URL')}/{given.get('GITHUB_REPOSITORY')}" if "GITHUB_REPOSITORY" in given else None
    )
    parser.add_argument("--repository", default=in_ci, help="address that the copies clone")
    parser.add_argument("--commit", default=given.get("GITHUB_SHA"), help="what they check out")
    args = parser.parse_args()
    if not (args.repository and args.commit):
        print("colab: name --repository and --commit; outside of GitHub's CI nothing else says them", file=sys.stderr)
        return 2
    target = args.folder / "notebooks"
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        notebook = copy(json.loads(path.read_text(encoding="utf-8")), args.repository, args.commit)
        (target / path.name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(target / path.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
