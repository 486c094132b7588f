"""Writes down what a Python process opens for writing and whom it calls: put this folder on PYTHONPATH.

Python's own audit events (PEP 578), so that attempts count, whether they succeed or not. A line each, into a file for each
process in the folder that WATCHED names: ``write PATH`` or ``call ADDRESS``.
"""

import os
import sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
PATHS = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "sqlite3.connect": 0}  # where the target stands
CALLS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
NAMES = {"socket.getaddrinfo", "socket.gethostbyname"}


def watch(folder: str) -> None:
    logs: dict[int, int] = {}  # by process: a fork inherits this one's

    def note(line: str) -> None:
        if (process := os.getpid()) not in logs:
            logs[process] = os.open(f"{folder}/{process}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(logs[process], (line.replace("\n", "?") + "\n").encode(errors="backslashreplace"))

    def note_path(path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike) and path != ":memory:":  # SQLite's name for no file
            path = os.path.abspath(os.fsdecode(path))
            if not path.startswith(folder):  # to open the log is an event too
                note(f"write {path}")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if set(mode) & set("wax+") if mode else flags & WRITES:
                note_path(path)
        elif event in PATHS and not (event == "os.mkdir" and os.path.isdir(arguments[0])):  # what is there isn't made
            note_path(arguments[PATHS[event]])
        elif event in CALLS:
            address = arguments[1]
            note(f"call {address[0] if isinstance(address, tuple) else 'a socket file'}")
        elif event in NAMES:
            note(f"call {arguments[0]}")

    sys.addaudithook(hook)


if "WATCHED" in os.environ:
    watch(os.environ["WATCHED"])
