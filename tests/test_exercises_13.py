"""What the checks of chapter 13 catch, and what they say."""

import json
import math

import pytest
from exercise_cells import solution

from attnlab.exercises import check


def read(chunks, ends=b"\n", done=True, key="response"):
    """An answer to 13.1 that is right but for what is asked."""
    found = []
    for line in b"".join(chunks).split(ends):
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            if done:
                break
            continue
        found.append(json.loads(data)[key])
    return found


def each_chunk_is_an_event(chunks):
    return [json.loads(c.decode().removeprefix("data: "))["response"] for c in chunks if b"[DONE]" not in c]


def characters_at_once(chunks):
    """Keeps lines together, but decodes each chunk by itself."""
    return read(["".join(chunk.decode() for chunk in chunks).encode()])


def lines_of_each_chunk(chunks):
    return [piece for chunk in chunks for piece in read([chunk])]


WRONG_STREAM = {
    "is no JSON yet: keep it until its line ends": lines_of_each_chunk,
    "A chunk may end within a character": characters_at_once,
    "not cut as the events are": lambda chunks: ["".join(read(chunks))],
    "lines end in \\r\\n": lambda chunks: read(chunks, ends=b"\n\n"),
    "something follows after [DONE]": lambda chunks: read(chunks, done=False),
    "when the stream comes in one chunk": each_chunk_is_an_event,
    "A list of texts is asked for": lambda chunks: "".join(read(chunks)),
    "when the stream comes in one chunk: [] instead of": lambda chunks: [],
    "KeyError": lambda chunks: read(chunks, key="text"),
}


def answers_that_wait(lengths, rows):
    return sum(max(lengths[i : i + rows]) for i in range(0, len(lengths), rows))


def continuous(lengths, rows):
    ends = [0] * rows
    for length in lengths:
        first = ends.index(min(ends))
        ends[first] += length
    return max(ends)


WRONG_STEPS = {
    "which waits for its longest answer": answers_that_wait,
    "answers could be cut to fill every row": lambda lengths, rows: math.ceil(sum(lengths) / rows),
    "one answer after the other": lambda lengths, rows: sum(lengths),
    "the longest answer alone": lambda lengths, rows: max(lengths),
    "longest answers first": lambda lengths, rows: continuous(sorted(lengths, reverse=True), rows),
    "got '5'": lambda lengths, rows: str(continuous(lengths, rows)),
    "got 6": lambda lengths, rows: continuous(lengths, rows) + 1,
}


@pytest.mark.parametrize("words", WRONG_STREAM)
def test_a_wrong_reader_is_told_why(words):
    result = check("13.1", WRONG_STREAM[words])
    assert not result.ok and words.lower() in result.message.lower()


@pytest.mark.parametrize("words", WRONG_STEPS)
def test_a_wrong_number_of_steps_is_told_why(words):
    result = check("13.2", WRONG_STEPS[words])
    assert not result.ok and words in result.message


@pytest.mark.parametrize("number", ["13.1", "13.2"])
def test_the_solutions_pass_and_nothing_else_said_is_no_answer(number):
    assert check(number, solution(number)).ok
    assert "not answered yet" in check(number, None).message
