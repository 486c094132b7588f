"""What the checks of chapter 10 catch, and what they say."""

import pytest
import torch

from attnlab.exercises import check


def ring(seen, window):
    slots = [-1] * window
    for position in range(seen):
        slots[position % window] = position
    return slots


def recent(seen, window):
    return [max(position, -1) for position in range(seen - window, seen)]


def first_come(seen, window):
    return [s if s < seen else -1 for s in range(window)]


def unmarked(seen, window):
    return [seen - 1 - (seen - 1 - s) % window for s in range(window)]


WRONG_SLOTS = {
    "positions count from 0": lambda seen, window: ring(seen + 1, window),
    "in order of age": recent,
    "from the newest back": lambda seen, window: recent(seen, window)[::-1],
    "Empty slots hold something": lambda seen, window: [max(p, 0) for p in ring(seen, window)],
    "-1 is asked for": unmarked,
    "keeps what came first": first_come,
    "5 slots": lambda seen, window: ring(seen, window + 1),
    "1,000 tokens": lambda seen, window: ring(seen, 4) if window == 4 else ring(seen - 1, window),
    "returned nothing": lambda seen, window: None,
}


@pytest.mark.parametrize("words", WRONG_SLOTS)
def test_wrong_slots_are_told_why(words):
    result = check("10.1", WRONG_SLOTS[words])
    assert not result.ok and words in result.message


def test_other_right_slots_are_right():
    assert check("10.1", ring) and check("10.1", lambda seen, window: torch.tensor(ring(seen, window)))


def reader(mask=None, first=None, keep=slice(None), start=None, write_first=False, cached=True):
    """A ``read_chunk`` position by position, right unless told otherwise."""

    def sees(query, key, window):
        return query - window < key <= query

    def read(q, k, v, kept_k, kept_v, seen):
        T, W = len(q), len(kept_k)
        where = ring(seen, W)
        new_k, new_v, new_where = kept_k.clone(), kept_v.clone(), list(where)
        for t in range(T)[keep]:
            slot = (t if start == 0 else seen + t) % W
            new_k[slot], new_v[slot], new_where[slot] = k[t], v[t], seen + t
        keys, values, places = torch.cat([kept_k, k]), torch.cat([kept_v, v]), where + list(range(seen, seen + T))
        if write_first:
            keys, values, places = new_k, new_v, new_where
        if not cached:
            keys, values, places = k, v, places[W:]
        out = torch.zeros(T, v.shape[1])
        for t in range(T):
            allowed = [
                s for s, p in enumerate(places)
                if (mask or sees)(seen + t, s + seen - W if first == "place" and p >= 0 else p, W)
                and (p >= 0 or first == "stale")
            ]  # fmt: skip
            if allowed:
                scores = q[t] @ keys[allowed].T / q.shape[1] ** 0.5
                out[t] = scores.softmax(-1) @ values[allowed]
        return out, new_k, new_v

    return read


WRONG_CHUNKS = {
    "You mask by slot": reader(first="place"),
    "attends to itself alone": reader(cached=False),
    "one key too many": reader(mask=lambda query, key, window: query - window <= key <= query),
    "sees the ones after it": reader(mask=lambda query, key, window: key > query - window),
    "left over from before": reader(
        mask=lambda query, key, window: key < 0 or query - window < key <= query, first="stale"
    ),
    "from slot 0 on": reader(start=0),
    "you keep the first": reader(keep=slice(0, 4)),
    "Nothing was written": reader(keep=slice(0, 0)),
    "changes its input": lambda q, k, v, kept_k, kept_v, seen: (kept_k.zero_(), kept_k, kept_v),
    "3 things": lambda q, k, v, kept_k, kept_v, seen: q,
}


@pytest.mark.parametrize("words", WRONG_CHUNKS)
def test_a_wrong_chunk_is_told_why(words):
    result = check("10.2", WRONG_CHUNKS[words])
    assert not result.ok and words in result.message


def test_writing_first_is_not_right():
    assert not check("10.2", reader(write_first=True))


def test_another_right_chunk_is_right():
    assert check("10.2", reader())
