"""Find Node.js, which runs the book's Worker and brings what slides need; as root on Debian or Ubuntu, install it if there is none.

Prints its path. Without one it says so in a line, and fails where CI is set. Standard library only.
"""

import shutil

from chromium import provide

MISSING = (
    "no Node.js, for the Worker of chapter 13 and for slides: install it (Debian, Ubuntu: apt-get install nodejs npm)"
)


def find() -> str | None:
    """The path of node, if npm is there as well, or None."""
    return shutil.which("node") if shutil.which("npm") else None


if __name__ == "__main__":
    raise SystemExit(provide(find, MISSING, "nodejs", "npm"))
