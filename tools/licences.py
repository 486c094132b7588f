"""Write THIRD_PARTY.md, the licences of what this project is installed with: `python tools/licences.py`, after new pins.

What each package says of itself is read from the environment's metadata. A licence that asks for more than its own notice is
explained below, or nothing is written. `--check` only says whether the file is up to date.
"""

import argparse
import json
import re
import sys
from importlib import metadata

from requirements import ROOT, TARGET, parse_pins

PAGE = ROOT / "THIRD_PARTY.md"
# Licences that ask for no more than that their notice is kept.
PERMISSIVE = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "public domain", "Unlicense", "Zlib",
}  # fmt: skip
UNCHANGED = "It is installed from its own index, unchanged, beside this project, and isn't handed on with it."
LESSER = f"Its conditions concern the library itself; code that only calls it keeps its own licence. {UNCHANGED}"
REASONS = {
    "MPL-2.0": f"Its conditions concern its own files, where they are changed. {UNCHANGED}",
    "LGPL-2.1-only": LESSER,
    "LGPL-2.1-or-later": LESSER,
    "LGPL-3.0-or-later": LESSER,
    "GPL": "docutils: one mode for the editor Emacs, which its wheel leaves out. The rest is public domain, BSD and PSF-2.0.",
}
# As packages write them, in the field License or as a classifier.
NAMES = {
    "Apache 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0", "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0", "Apache Software License": "Apache-2.0", "Apache-2.0": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause", "BSD 2-Clause License": "BSD-2-Clause", "BSD": "BSD", "BSD License": "BSD",
    "BSD 3-Clause License": "BSD-3-Clause", "BSD-3-Clause": "BSD-3-Clause",
    "GNU General Public License (GPL)": "GPL", "ISC License (ISCL)": "ISC", "MIT": "MIT", "MIT License": "MIT",
    "LGPL-2.1-or-later": "LGPL-2.1-or-later", "LGPL-3.0-or-newer": "LGPL-3.0-or-later", "MIT license": "MIT",
    "The MIT License (MIT)": "MIT", "MIT OR Apache-2.0": "MIT OR Apache-2.0", "MPL-2.0 AND MIT": "MPL-2.0 AND MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "Public Domain": "public domain",
    "Python Software Foundation License": "PSF-2.0",
}  # fmt: skip
# Whose metadata say nothing, or not all: read in the files that come with them.
READ = {
    "axe-playwright-python": "MIT AND MPL-2.0",  # axe-core, which it holds, is under the second
    "sphinx-mathjax-offline": "MIT AND Apache-2.0",  # MathJax, which it holds, is under the second
}
# What the pages in _build/html are made with and carry, each file with its own notice.
ON_PAGES = {
    "Bootstrap": "MIT",
    "clipboard.js": "MIT",
    "Font Awesome Free": "MIT (code), OFL-1.1 (fonts), CC-BY-4.0 (icons)",
    "MathJax": "Apache-2.0",
    "PyData Sphinx Theme, Sphinx Book Theme": "BSD-3-Clause",
    "Sphinx": "BSD-2-Clause",
    "sphinx-copybutton, sphinx-design, sphinx-togglebutton": "MIT",
}


def licence(name: str) -> str:
    """An expression such as `MIT` or `MPL-2.0 AND MIT`; what can't be read stays as it is written."""
    if name in READ:
        return READ[name]
    said = metadata.metadata(name)
    if expression := said.get("License-Expression"):
        return expression
    if (field := said.get("License", "").strip().split("\n")[0]) in NAMES and NAMES[field] != "BSD":
        return NAMES[field]
    classifiers = [line.split(" :: ")[-1] for line in said.get_all("Classifier", []) if line.startswith("License ::")]
    return " AND ".join(NAMES.get(c, c) for c in classifiers) or field or "not said"


def asking_more(expression: str) -> set[str]:
    """The licences in an expression that need a reason: of alternatives, none if one of them needs none."""
    found = set()
    for clause in re.split(r" AND ", expression.replace("(", "").replace(")", "")):
        alternatives = set(clause.split(" OR "))
        if not alternatives & PERMISSIVE:
            found |= alternatives
    return found


def python_packages() -> dict[str, str]:
    """Package -> licence, for every pin."""
    found, missing = {}, []
    for name in sorted(parse_pins(TARGET.read_text(encoding="utf-8"))):
        try:
            found[name] = licence(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise SystemExit(f"licences: not in this environment: {', '.join(missing)}; make venv brings it up to date")
    return found


def worker_packages() -> dict[str, str]:
    """The same for the Worker of chapter 13, as its lock file has it."""
    lock = json.loads((ROOT / "book" / "worker" / "package-lock.json").read_text(encoding="utf-8"))
    return {
        path.rpartition("node_modules/")[2]: entry.get("license", "not said")
        for path, entry in sorted(lock["packages"].items())
        if path
    }


def unexplained() -> dict[str, set[str]]:
    """Packages whose licence asks for more than its notice, without a reason above."""
    both = {**python_packages(), **worker_packages()}
    return {name: more for name, text in both.items() if (more := asking_more(text) - set(REASONS))}


def table(heads: tuple[str, str], rows: dict[str, str]) -> list[str]:
    return [f"| {heads[0]} | {heads[1]} |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items()), ""]


def render() -> str:
    packages, worker = python_packages(), worker_packages()
    used = {more for text in (*packages.values(), *worker.values()) for more in asking_more(text)}
    lines = ["# Licences of what is used", ""]
    lines += [
        "Written by `tools/licences.py` from what each package says of itself. None of these packages is part of this"
    ]
    lines += ["repository; versions are in `requirements.txt` and `book/worker/package-lock.json`.", ""]
    lines += ["## Not merely permissive", ""]
    lines += table(("licence", "why it is no obstacle"), {name: REASONS[name] for name in sorted(used)})
    lines += ["## Python packages", "", *table(("package", "licence"), packages)]
    lines += ["## The Worker's packages", "", "From npm, only to run the Worker of chapter 13.", ""]
    lines += table(("package", "licence"), worker)
    lines += ["## In the built pages", "", "What `_build/html` carries of others, each file with its own notice.", ""]
    lines += table(("what", "licence"), ON_PAGES)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the file is not up to date")
    check = parser.parse_args().check
    if more := unexplained():
        for name, which in more.items():
            print(
                f"licences: {name}: {' and '.join(sorted(which))} is neither permissive nor explained", file=sys.stderr
            )
        return 1
    text = render()
    if check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} is {'up to date' if same else 'not up to date: python tools/licences.py'}")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.name}: {text.count(chr(10))} lines")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
