"""Chapter 13: reading a stream that arrives in pieces, and how many steps continuous batching takes."""

import heapq
import json
import math
from typing import Any

from attnlab.exercises._tools import Mistake, call

_ANSWER = ("Né", "w York", " – ", "ok")


def _frames(pieces: tuple[str, ...], done: str = "data: [DONE]\n\n") -> bytes:
    events = [json.dumps({"response": piece, "p": "x" * (i % 3)}, ensure_ascii=False) for i, piece in enumerate(pieces)]
    return ("".join(f"data: {event}\n\n" for event in events) + done).encode()


def pieces(answer: Any) -> str:
    """13.1: ``f(chunks)`` is the list of the texts in a stream of events that arrives cut anywhere."""
    whole = _frames(_ANSWER)
    right = list(_ANSWER)
    _same(call(answer, [whole]), right, "the stream comes in one chunk")
    by_event = [part + b"\n\n" for part in whole.split(b"\n\n") if part]
    _same(call(answer, by_event), right, "every chunk is one event")
    for n in (25, 7, 3, 2):
        cut = [whole[i : i + n] for i in range(0, len(whole), n)]
        try:
            got = call(answer, cut)
        except Mistake as mistake:
            reason = str(mistake)
            if "Unicode" in reason:
                raise Mistake(
                    "A chunk may end within a character, which then can't be decoded: keep bytes until a line is complete."
                ) from None
            if "JSON" in reason:
                raise Mistake(
                    "A chunk may end within an event, which is no JSON yet: keep it until its line ends."
                ) from None
            raise
        _same(got, right, f"the stream comes in chunks of {n} bytes")
    bare = _frames(_ANSWER, done="data: [DONE]")
    _same(call(answer, [bare[: len(bare) // 2], bare[len(bare) // 2 :]]), right, "the last line has no line end")
    unfinished = _frames(_ANSWER[:2], done="")[:-2]
    _same(
        call(answer, [unfinished]), right[:2], "the stream ends after an event, without [DONE] and without a line end"
    )
    noisy = b": a comment\r\n\r\n" + _frames(_ANSWER).replace(b"\n", b"\r\n")
    _same(call(answer, [noisy]), right, "lines end in \\r\\n and a comment stands before them")
    after = _frames(_ANSWER) + _frames(("too late",), done="")
    _same(call(answer, [after]), right, "something follows after [DONE]")
    usage = _frames(_ANSWER, done='data: {"response": "", "usage": {"total_tokens": 9}}\n\ndata: [DONE]\n\n')
    got = call(answer, [usage])
    _same([piece for piece in got if piece != ""], right, "the last event has an empty text and the usage")
    return "right: bytes wait for the end of their line, and of an event only the response counts."


def _same(got: Any, right: list[str], when: str) -> None:
    if not isinstance(got, list | tuple) or not all(isinstance(piece, str) for piece in got):
        raise Mistake(f"A list of texts is asked for; got {type(got).__name__}.")
    if list(got) != right:
        joined = "".join(got) == "".join(right)
        hint = "the text is right, but not cut as the events are" if joined else f"{list(got)!r} instead of {right!r}"
        raise Mistake(f"When {when}: {hint}.")


def steps(answer: Any) -> str:
    """13.2: ``f(lengths, rows)`` is the number of decode steps when a row that ends is filled again before the next step."""
    for lengths, rows in (
        ([5], 1), ([3, 4, 5], 1), ([1, 1, 1, 9], 4), ([9, 1, 1, 1], 2), ([10, 2, 2, 2, 10], 2),
        ([7, 3, 50, 2, 2, 2, 31, 8, 8], 3), ([20, 1, 1, 1, 20, 1, 1, 1], 4), ([2, 3], 8),
    ):  # fmt: skip
        right = _continuous(lengths, rows)
        got = call(answer, list(lengths), rows)
        if isinstance(got, bool) or not isinstance(got, int | float) or got != right:
            mistakes = {
                "that is what a batch takes which waits for its longest answer; here a row is filled again at once":
                    sum(max(lengths[i : i + rows]) for i in range(0, len(lengths), rows)),
                "that would be so if answers could be cut to fill every row; one answer's tokens come one after another":
                    math.ceil(sum(lengths) / rows),
                "that is one answer after the other": sum(lengths),
                "that is the longest answer alone; the others have to find a row as well": max(lengths),
                "that is with the longest answers first; requests are taken in the order they came":
                    _continuous(sorted(lengths, reverse=True), rows),
            }  # fmt: skip
            named = next((words for words, value in mistakes.items() if got == value), None)
            raise Mistake(f"{lengths} on {rows} rows: {right} steps, got {got!r}" + (f"; {named}." if named else "."))
    return "right: whoever waits longest takes the row that ends first."


def _continuous(lengths: list[int], rows: int) -> int:
    ends = [0] * rows  # when each row is free
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


CHECKS = {"13.1": pieces, "13.2": steps}
