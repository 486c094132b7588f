"""The checks behind the exercises, one file a chapter. They run offline, in seconds, and name the likely mistake.

A chapter's file has ``CHECKS``: for each number a function that takes the answer, returns the sentence for a right one,
and raises ``Mistake`` with what is likely wrong otherwise.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnlab.exercises._tools import Mistake


@dataclass(frozen=True)
class Result:
    """``ok``, and the sentence that was printed."""

    ok: bool
    message: str

    def __bool__(self) -> bool:
        return self.ok

    def _ipython_display_(self) -> None:
        """A notebook shows nothing more: ``check`` has printed the message."""


def check(number: str, answer: Any = None) -> Result:
    """Try ``answer`` on exercise ``number`` ("3.2"), print what came of it, and return it. A wrong answer raises nothing.

    >>> check("1.1", lambda q, k, v, mask: None).ok
    1.1: not yet. Your function returned nothing: is there a return?
    False
    """
    number = str(number)
    checks = _checks()
    if number not in checks:
        result = Result(False, f"there is no check for it; there is one for {', '.join(checks)}")
    elif answer is None or answer is ...:
        result = Result(False, "not answered yet")
    else:
        try:
            result = Result(True, checks[number](answer))
        except Mistake as mistake:
            result = Result(False, f"not yet. {mistake}")
    print(f"{number}: {result.message}")
    return result


def _checks() -> dict[str, Callable[[Any], str]]:
    chapters = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("chapter_"))
    found = {}
    for chapter in chapters:
        found |= importlib.import_module(f"{__name__}.{chapter}").CHECKS
    return found
