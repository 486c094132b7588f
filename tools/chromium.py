"""Find the Chromium that the browser checks drive; as root on Debian or Ubuntu, install it if there is none.

Prints its path. Without one it says so in a line, and fails where CI is set. Standard library only.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
MISSING = "no Chromium for the browser checks: install it (Debian, Ubuntu: apt-get install chromium) or set CHROMIUM to its path"
# Headless, and asking nothing of the network on its own account.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    if chosen := os.environ.get("CHROMIUM"):
        return shutil.which(chosen)
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (MAC if Path(MAC).exists() else None)


def install(*packages: str) -> None:
    """From the distribution's packages, where that can be done; its output is shown only when it fails."""
    if not (shutil.which("apt-get") and os.geteuid() == 0):
        return
    print(f"installing {' and '.join(packages)} with apt-get", flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "--yes", "--no-install-recommends", *packages],
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr.strip())
            return


def provide(find: Callable[[], str | None], missing: str, *packages: str) -> int:
    """Print what ``find`` finds, after installing the packages if it found nothing; ``missing``, and 1 in CI, if that failed."""
    if find() is None:
        install(*packages)
    path = find()
    print(path or missing)
    return 1 if path is None and os.environ.get("CI") else 0


if __name__ == "__main__":
    raise SystemExit(provide(find, MISSING, "chromium", "fonts-dejavu-core"))
