"""A place where little is there, for a process to run in: what the tests of this folder share.

On Linux, where namespaces may be made: no network but a loopback of its own, a checkout that can't be written to, and another,
unprivileged user if the tests run as root. Everywhere: one core, 4 GB, an environment of a few variables, ASCII.
"""

import functools
import os
import pwd
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WATCH = Path(__file__).resolve().parent / "watch"
NOBODY = 65534
MEMORY = 4 * 10**9  # bytes a process may have of its own; a reservation that nothing is written to doesn't count
# $1 is the checkout. No loopback, no Jupyter: kernels are spoken to through it.
ENTER = """set -e
ip link set lo up
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
shift
exec "$@"
"""
LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "a socket file", "None", "")


@functools.cache
def can_isolate() -> bool:
    """Whether this machine has the programs, and lets this process make namespaces."""
    if not all(map(shutil.which, ("unshare", "ip", "mount", "setpriv"))):
        return False
    return subprocess.run([*namespaces(), "true"], capture_output=True).returncode == 0


def namespaces() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount", "sh", "-c", ENTER, "sh", str(ROOT)]


def unprivileged() -> list[str]:
    """Nobody, who may read what root may read (the interpreter can lie in root's home) and write what anybody may."""
    if os.geteuid() != 0:
        return []
    able = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *able]


def small() -> None:
    """One core and little memory, for this process and what it starts."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def environment(scratch: Path) -> dict[str, str]:
    """No home, no UTF-8, and Jupyter's own files, for which there must be a place, in ``scratch``."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "TMPDIR": str(scratch / "tmp"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "jupyter"),
        "IPYTHONDIR": str(scratch / "ipython"),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(WATCH),
        "WATCHED": str(scratch / "watched"),
    }


def run(command: list[str | Path], scratch: Path, timeout: float) -> subprocess.CompletedProcess:
    """Run a Python program (path and arguments) in such a place, in ``scratch``, a folder that it makes anybody's.

    Output and errors together in ``stdout``.
    """
    for name in ("tmp", "jupyter", "ipython", "watched", "here", "out"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
        (scratch / name).chmod(0o777)
    place = [*namespaces(), *unprivileged()] if can_isolate() else []
    return subprocess.run(
        [*place, sys.executable, *map(str, command)],
        cwd=scratch / "here",
        env=environment(scratch),
        preexec_fn=small,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
    )


def watched(scratch: Path) -> tuple[set[str], set[str]]:
    """The paths that were opened for writing, or meant to be, and the addresses that were called."""
    lines = [line for file in (scratch / "watched").iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines, "nobody was watched"
    written = {line.removeprefix("write ") for line in lines if line.startswith("write ")}
    return written, {line.removeprefix("call ") for line in lines if line.startswith("call ")}


def strangers(called: set[str]) -> set[str]:
    """Addresses that are not this machine's."""
    return {name for name in called if not (name in LOCAL or name.startswith("127."))}


def astray(written: set[str], scratch: Path) -> set[str]:
    """Paths outside temporary and cache folders, and not where matplotlib looks for its user's settings, which it makes."""
    allowed = (f"{scratch}/", "/tmp/", "/var/tmp/", "/dev/")
    home = Path(pwd.getpwuid(NOBODY if os.geteuid() == 0 and can_isolate() else os.geteuid()).pw_dir)
    settings = home / ".config" / "matplotlib"

    def may(path: str) -> bool:  # a checkout may itself lie in a temporary folder, and is none
        return path.startswith(allowed) and (path.startswith(f"{scratch}/") or not path.startswith(f"{ROOT}/"))

    found = {Path(path) for path in written if not may(path)} - {settings, *settings.parents}
    return {str(path) for path in found if not {".cache", "__pycache__"} & set(path.parts)}
