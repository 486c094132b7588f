"""Make .venv from requirements.txt, or bring it up to date; does nothing when it already is. Standard library only.

A stamp inside .venv, written last, says what it was made from. Without a stamp an install was cut short: it starts anew.

torch comes first. On PyPI the Linux build is the CUDA one, gigabytes that a machine without an NVIDIA card can't use; there
the CPU build is taken from PyTorch's own index, unless pip has been told where to look (pip.conf, PIP_* variables).
"""

from __future__ import annotations  # an old python3 must get as far as the message below

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "made-from"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def inputs() -> str:
    """What the environment depends on, in one line: the pins, the package's own metadata, and where it stands."""
    content = b"".join((ROOT / name).read_bytes() for name in ("requirements.txt", "pyproject.toml"))
    return f"{hashlib.sha256(content).hexdigest()} {ROOT}\n"


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def index_for_torch() -> list[str]:
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        return []
    configured = subprocess.run(
        [PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    if any(word in configured for word in ("index-url", "find-links", "no-index")):
        return []
    return ["--extra-index-url", CPU_INDEX]


def main() -> None:
    wanted = inputs()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    if sys.version_info < (3, 11):  # noqa: UP036 (whatever python3 is on this machine runs this file)
        raise SystemExit(
            f"attnlab needs Python 3.11 or newer; this is {sys.version.split()[0]}: make PYTHON=python3.12 …"
        )
    if not STAMP.exists() or not STAMP.read_text().endswith(f" {ROOT}\n"):
        run(sys.executable, "-m", "venv", "--clear", VENV)
    STAMP.unlink(missing_ok=True)
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    torch = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    run(*pip, *index_for_torch(), torch)
    run(*pip, "-r", "requirements.txt")
    run(*pip, "--no-deps", "--editable", ".")
    beside = STAMP.with_suffix(".new")
    beside.write_text(wanted)
    os.replace(beside, STAMP)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"environment: {' '.join(map(str, error.cmd))} failed; run it again, it starts where it must"
        ) from None
    except OSError as error:  # a full disk, mostly
        raise SystemExit(f"environment: {error}; run it again, it starts where it must") from None
