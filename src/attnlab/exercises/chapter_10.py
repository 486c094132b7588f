"""Chapter 10: what a rolling buffer holds, and a chunk of a prompt read with it."""

from typing import Any

import torch
from torch import Tensor

from attnlab.attention import visible
from attnlab.exercises._tools import Mistake, call, compare, parts, tensor

WINDOW = 4
SEEN = (0, 1, 3, 4, 5, 7, 8, 10, 23)


def held(answer: Any) -> str:
    """10.1: ``f(seen, window)`` gives the position that each slot holds once ``seen`` tokens were read; -1 for none."""
    got = []
    for seen in SEEN:
        one = tensor(call(answer, seen, WINDOW), "the positions")
        if one.shape == (WINDOW + 1,):
            raise Mistake(f"There are {WINDOW + 1} slots; a window of {WINDOW} keeps {WINDOW}, the newest included.")
        if one.shape != (WINDOW,):
            raise Mistake(f"A position for each of the {WINDOW} slots is asked for; got {tuple(one.shape)}.")
        got.append(one)
    ring = {seen: _held(seen, WINDOW) for seen in SEEN}
    compare(torch.stack(got), _table(ring), {
        "The newest token is at position seen - 1: positions count from 0.":
            _table({seen: _held(seen + 1, WINDOW) for seen in SEEN}),
        "Those are the right positions in order of age. Nothing is moved in a ring: position p stays in slot p mod window.":
            _table({seen: torch.arange(seen - WINDOW, seen) for seen in SEEN}),
        "Those are the right positions from the newest back. Position p stays in slot p mod window.":
            _table({seen: torch.arange(seen - 1, seen - WINDOW - 1, -1) for seen in SEEN}),
        "Empty slots hold something: until position s was read, slot s holds nothing, which is -1.":
            torch.stack([ring[seen].clamp(min=0) for seen in SEEN]),
        "Empty slots are below 0, which is right as a mark; -1 is asked for.": torch.stack(list(ring.values())),
        "A slot keeps what came first; the later position overwrites it.":
            _table({seen: torch.arange(WINDOW).where(torch.arange(WINDOW) < seen, -1) for seen in SEEN}),
        "That is slot (seen - p) mod window; a slot depends on the position alone, p mod window.":
            _table({seen: _by_age(seen) for seen in SEEN}),
    }, what="the positions")  # fmt: skip
    other = tensor(call(answer, 1000, 7), "the positions")
    compare(other, _held(1000, 7), what="the positions after 1,000 tokens with a window of 7")
    return "right: slot s holds the newest position that leaves the remainder s, and nothing before the first of them."


def _held(seen: int, window: int) -> Tensor:
    """Below 0 where nothing is held."""
    return seen - 1 - (seen - 1 - torch.arange(window)) % window


def _by_age(seen: int) -> Tensor:
    slots = torch.full((WINDOW,), -1)
    for p in range(max(0, seen - WINDOW), seen):
        slots[(seen - p) % WINDOW] = p
    return slots


def _table(rows: dict[int, Tensor]) -> Tensor:
    """A row of slots for each number of tokens seen, -1 where nothing is held."""
    return torch.stack([row.clamp(min=-1) for row in rows.values()])


def chunk(answer: Any) -> str:
    """10.2: ``f(q, k, v, kept_k, kept_v, seen)`` reads a chunk with a ring's keys and values: output, and the ring after."""
    g = torch.Generator().manual_seed(0)
    names = ("the output", "the keys kept", "the values kept")
    # a prompt's beginning, a ring that isn't full, one that has wrapped around, one token, a chunk longer than the ring
    for seen, T in ((0, 3), (2, 3), (6, 3), (9, 1), (7, 6)):
        q, k, v = torch.randn(3, T, 8, generator=g)
        kept_k, kept_v = torch.randn(2, WINDOW, 8, generator=g)  # what is stale is there, and must not be read
        given = q, k, v, kept_k, kept_v, seen
        got = parts(call(answer, *given), 3, "the output, the keys kept and the values kept")
        right = _read(*given)
        where = f" ({T} token{'s' * (T > 1)} after {seen})"
        for i, name in enumerate(names):
            mistakes = {message: _read(*given, how)[i] for message, how in MISTAKES.items()}
            compare(got[i], right[i], mistakes, what=name + where)
    return "right: attend to the ring and the chunk by position, then write the chunk's last tokens to their slots."


MISTAKES = {
    "You write first and attend then: the chunk's first queries have lost keys that they may still see.": "write first",
    "You mask by slot, as if the ring were in order: ask each slot which position it holds.": "by slot",
    "The chunk attends to itself alone; it sees what is kept as well.": "no ring",
    "A query sees one key too many: window keys, its own included.": "one too many",
    "Within the chunk a token sees the ones after it.": "future",
    "Slots that hold nothing yet are attended to: what lies in them is left over from before.": "stale",
    "The chunk is written from slot 0 on: the slot is the position (seen + t) mod window.": "from 0",
    "Of a chunk longer than the ring the last tokens must stay; you keep the first.": "first stay",
    "Nothing was written: the ring is as it was.": "nothing written",
}


def _read(
    q: Tensor, k: Tensor, v: Tensor, kept_k: Tensor, kept_v: Tensor, seen: int, mistake: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk's output, and keys and values kept after it, as it should be or with one of ``MISTAKES``."""
    T, W = len(q), len(kept_k)
    positions, slots = torch.arange(seen, seen + T), torch.arange(W)
    held = seen - 1 - (seen - 1 - slots) % W
    new_k, new_v = kept_k.clone(), kept_v.clone()
    if mistake != "nothing written":
        keep = range(min(T, W)) if mistake == "first stay" else range(max(0, T - W), T)
        for t in keep:
            slot = (t if mistake == "from 0" else seen + t) % W
            new_k[slot], new_v[slot] = k[t], v[t]

    keys, values, held_by = torch.cat([kept_k, k]), torch.cat([kept_v, v]), torch.cat([held, positions])
    sees = visible(positions, held_by, W)  # (T, W + T)
    if mistake == "write first":
        keys, values, last = new_k, new_v, seen + T - 1
        sees = visible(positions, last - (last - slots) % W, W)
    elif mistake == "by slot":
        sees = visible(torch.arange(W, W + T), torch.arange(W + T), W) & (held_by >= 0)
    elif mistake == "no ring":
        sees = sees & (torch.arange(W + T) >= W)
    elif mistake == "one too many":
        sees = visible(positions, held_by, W + 1)
    elif mistake == "future":
        sees = (held_by >= 0) & (held_by > positions[:, None] - W)
    elif mistake == "stale":
        sees = sees | ((held_by < 0) & (torch.arange(W + T) < W))
    weights = (q @ keys.T / q.shape[1] ** 0.5).masked_fill(~sees, -torch.inf).softmax(-1)
    return weights @ values, new_k, new_v


CHECKS = {"10.1": held, "10.2": chunk}
