"""What the checks of chapter 8 catch, and what they say."""

import math

import pytest
from exercise_cells import solution

from attnlab import memory
from attnlab.exercises import check


def more_weights(model, other):
    return memory.bytes_per_step(model, 0) - memory.bytes_per_step(other, 0)


def saved(model, other):
    return memory.kv_bytes_per_token(other) - memory.kv_bytes_per_token(model)


def crossing(exact):
    """An answer with the two special cases right and ``exact(model, other)`` tokens otherwise."""

    def f(model, other):
        if saved(model, other) <= 0:
            return None
        return max(0, math.ceil(exact(model, other)))

    return f


right_crossing = crossing(lambda model, other: more_weights(model, other) / saved(model, other))
WRONG_CROSSINGS = {
    "Rounded down": lambda m, o: right_crossing(m, o) and more_weights(m, o) // saved(m, o),
    "one row of the embedding": crossing(lambda m, o: (memory.weight_bytes(m) - memory.weight_bytes(o)) / saved(m, o)),
    "Parameters are counted": crossing(lambda m, o: more_weights(m, o) / 2 / saved(m, o)),
    "the other's bytes per token": crossing(lambda m, o: more_weights(m, o) / memory.kv_bytes_per_token(o)),
    "model's own bytes per token": crossing(lambda m, o: more_weights(m, o) / memory.kv_bytes_per_token(m)),
    "reads less from the start, so 0": lambda m, o: math.ceil(more_weights(m, o) / saved(m, o)),
    "never, so None": lambda m, o: right_crossing(m, o) or 0,
    "off by up to": lambda m, o: 4096,
    "raised ZeroDivisionError": lambda m, o: 1 / 0,
    "returned nothing": lambda m, o: None,
    "A function is asked for": 2560,
}


@pytest.mark.parametrize("words", WRONG_CROSSINGS)
def test_a_wrong_crossing_is_told_why(words):
    result = check("8.1", WRONG_CROSSINGS[words])
    assert not result.ok and words in result.message


def test_a_crossing_that_raises_where_there_is_none_is_told_so():
    def f(model, other):
        if model == "llama-2-13b":
            raise ValueError("never")
        return right_crossing(model, other)

    result = check("8.1", f)
    assert not result.ok and "For llama-2-13b" in result.message


def rate(name, batch, context):
    return batch / memory.bytes_per_step(name, context, batch)


def most(name, device, context):
    return memory.largest_batch(name, device, context)


WRONG_FILLED = {
    "ratio of the largest batches": lambda m, o, d, n: most(m, d, n) / most(o, d, n),
    "ratio of bytes per step": lambda m, o, d, n: (
        memory.bytes_per_step(o, n, most(o, d, n)) / memory.bytes_per_step(m, n, most(m, d, n))
    ),
    "Upside down": lambda m, o, d, n: memory.speed_up_filled(o, m, d, n),
    "one row on each": lambda m, o, d, n: memory.speed_up(m, o, n),
    "first model's batch": lambda m, o, d, n: memory.speed_up(m, o, n, most(m, d, n)),
    "second model's batch": lambda m, o, d, n: memory.speed_up(m, o, n, most(o, d, n)),
    "ratio of cache bytes per token": lambda m, o, d, n: memory.kv_bytes_per_token(o) / memory.kv_bytes_per_token(m),
    "kept free": lambda m, o, d, n: memory.speed_up_filled(m, o, d, n, reserve=0),
    "not right": lambda m, o, d, n: 1.0,
    "Numbers are asked for": lambda m, o, d, n: "four",
}


@pytest.mark.parametrize("words", WRONG_FILLED)
def test_a_wrong_ratio_of_full_cards_is_told_why(words):
    result = check("8.2", WRONG_FILLED[words])
    assert not result.ok and words in result.message


def test_the_notebook_s_own_solutions_and_other_right_answers_are_right():
    assert check("8.1", solution("8.1")) and check("8.1", right_crossing)
    assert check("8.2", solution("8.2"))
    assert check("8.2", lambda m, o, d, n: rate(m, most(m, d, n), n) / rate(o, most(o, d, n), n))
    assert check("8.2", memory.speed_up_filled)
