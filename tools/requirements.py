"""Compile requirements.txt from pyproject.toml: `make requirements`. Everything is pinned; nothing names a machine.

Pins already in requirements.txt are kept as long as they fit; `--upgrade` takes the newest of everything instead.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "requirements.txt"
EXTRAS = ["serve", "book", "test", "eval", "workshop", "dev"]
HEAD = ["torch", "jupyter-book", "transformers", "matplotlib", "seaborn", "ipywidgets", "nbval"]
# torch's CUDA build on Linux asks for these; it brings its own where it is wanted, and the CPU build needs none.
CUDA_ONLY = re.compile(r"^(nvidia-|cuda-|pytorch-triton)")
LINUX_ONLY = {"triton"}  # there is no wheel for other systems
INTRO = """\
# Every package the book, its tests and its tools need, pinned. Compiled from pyproject.toml, which says what each one is
# for: change it there, then run `make requirements`. Install torch first (tools/environment.py does).
"""


def parse_pins(text: str) -> dict[str, str]:
    """Name -> version, from lines such as `torch==2.13.0`; a local version (`+cpu`) is left off."""
    pins = {}
    for line in text.splitlines():
        if match := re.match(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;+]+)", line):
            pins[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return pins


def render(pins: dict[str, str]) -> str:
    """The file: the book's own packages first, then the rest."""
    pins = {name: version for name, version in pins.items() if not CUDA_ONLY.match(name)}
    if missing := [name for name in HEAD if name not in pins]:
        raise SystemExit(f"requirements: {', '.join(missing)} must be there, but pyproject.toml does not lead to it")
    rest = sorted(set(pins) - set(HEAD))

    def pin(name: str) -> str:
        return f"{name}=={pins[name]}" + ("; platform_system == 'Linux'" if name in LINUX_ONLY else "")

    lines = ["", "# The book's own packages"]
    lines += [pin(name) for name in HEAD]
    lines += ["", "# What they and the tests stand on"]
    lines += [pin(name) for name in rest]
    return INTRO + "\n".join(lines) + "\n"


def compile_pins(upgrade: bool) -> dict[str, str]:
    """Let pip-compile resolve pyproject.toml with its extras."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "requirements.txt"
        if TARGET.exists() and not upgrade:
            out.write_text("".join(f"{n}=={v}\n" for n, v in parse_pins(TARGET.read_text()).items()))
        command = [
            sys.executable,
            "-m",
            "piptools",
            "compile",
            "--quiet",
            "--strip-extras",
            "--no-annotate",
            "--no-header",
        ]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host", "--no-emit-options"]
        command += [*(f"--extra={name}" for name in EXTRAS), f"--output-file={out}", "pyproject.toml"]
        subprocess.run(command, cwd=ROOT, check=True)
        return parse_pins(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    text = render(compile_pins(parser.parse_args().upgrade))
    beside = TARGET.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, TARGET)
    print(f"{TARGET.name}: {len(parse_pins(text))} pins")


if __name__ == "__main__":
    main()
