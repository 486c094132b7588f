"""Find Node.js, which runs the book's Worker and brings what slides need; as root on Debian or Ubuntu, install it if there is none.

Prints its path. Without one it says so in a line, and fails where CI is set. Standard library only.
"""

import shutil
import subprocess
from pathlib import Path

from chromium import provide

BUILD = Path(__file__).resolve().parent.parent / "_build"

MISSING = (
    "no Node.js, for the Worker of chapter 13 and for slides: install it (Debian, Ubuntu: apt-get install nodejs npm)"
)


def find() -> str | None:
    """The path of node, if npm is there as well, or None."""
    return shutil.which("node") if shutil.which("npm") else None


def with_packages(source: Path) -> Path:
    """A copy of a folder in _build with what its package-lock.json names, kept while that stays. Raises OSError if npm fails."""
    target, lock = BUILD / source.name, (source / "package-lock.json").read_text()
    shutil.copytree(source, target, dirs_exist_ok=True)
    installed = target / "node_modules" / "installed"
    if not installed.exists() or installed.read_text() != lock:
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        try:
            done = subprocess.run(command, cwd=target, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise OSError(f"npm brought nothing for {source.name} in five minutes") from None
        if done.returncode:
            raise OSError(f"npm could not bring what {source.name} needs\n{done.stderr}")
        installed.write_text(lock)
    return target


if __name__ == "__main__":
    raise SystemExit(provide(find, MISSING, "nodejs", "npm"))
