"""Files that others wrote: how much of one is read, and how a name or a value out of it is shown.

What Python makes of JSON takes up to 24 times the file's bytes, and a file may be a pipe that never ends or a device that
never does. So kind and size are asked first, and a message never carries more than a line of what it complains about.
"""

import json
import locale
import os
import reprlib
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attnlab.errors import AttnlabError, CheckpointError

JSON_LIMIT = 4_000_000  # bytes; configs, indices and headers of a model of a hundred layers have a tenth

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_NAME_LENGTH = 200


def check_file(file: Path, limit: int | None = None) -> None:
    """Raises CheckpointError for what is missing, no regular file, or larger than ``limit`` bytes. Links are followed."""
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: cannot be read: expected a file; it is a folder, a pipe or a device")
    if limit is not None and status.st_size > limit:
        raise CheckpointError(
            f"{file}: expected at most {limit:,} bytes; got {status.st_size:,} bytes. Download the file again"
        )


def read_text(file: Path, limit: int = JSON_LIMIT) -> str:
    """A whole file of UTF-8, with U+FFFD for bytes that are none. Raises CheckpointError as ``check_file`` does."""
    check_file(file, limit)
    try:
        with open(file, "rb") as opened:
            return opened.read(limit).decode("utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def read_json(file: Path, limit: int = JSON_LIMIT) -> dict:
    """The object in a JSON file. Raises CheckpointError for another file."""
    text = read_text(file, limit)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable as JSON: {error}. Download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} should hold a JSON object {{…}}; it holds a {type(content).__name__}")
    return content


@contextmanager
def damage_is_said(say: Callable[[str], str]) -> Iterator[None]:
    """Whatever a library stumbles over in a file, a dozen kinds of exceptions, is a CheckpointError: ``say`` makes its message."""
    try:
        yield
    except (AttnlabError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # those in Rust panic, which is no Exception
        raise CheckpointError(say(line(error))) from error


@contextmanager
def utf8_by_default() -> Iterator[None]:
    """What others open without naming an encoding is read as UTF-8 meanwhile, in a locale that says otherwise too.

    torch opens its compiler's templates so, at the first ``torch.compile``. Python asks the locale anew for every file; where the
    system has no UTF-8 one, nothing changes.
    """
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        if locale.getpreferredencoding(False).lower() != "utf-8":
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    except locale.Error:
        pass
    try:
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def brief(value: object) -> str:
    """``repr(value)``, cut where it is long."""
    return _BRIEF.repr(value)


def line(error: BaseException) -> str:
    """What an error of a library says, in one line that can be printed: it may quote names out of the file."""
    words = " ".join(str(error).split())[:300] or type(error).__name__
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)


def shown(name: str) -> str:
    """A name as it is if it can be printed in a line; else quoted, its unprintable characters escaped, and cut."""
    plain = name.isprintable() and len(name) <= _NAME_LENGTH
    return name if plain else brief(name)
