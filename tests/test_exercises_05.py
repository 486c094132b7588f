"""What the checks of chapter 5 catch, and what they say."""

import math

import pytest
import torch

from attnlab import memory
from attnlab.exercises import check


def take_in(k_kept, v_kept, q, k, v, *, diagonal=0, scale=True, see_kept=True, keep=lambda old, new: (old, new)):
    keys, values = torch.cat([k_kept, k], 2), torch.cat([v_kept, v], 2)
    a, b = (keys, values) if see_kept else (k, v)
    T, S = q.shape[2], a.shape[2]
    scores = q @ a.mT / (math.sqrt(q.shape[3]) if scale else 1)
    if diagonal is not None:
        start = 0 if diagonal == "first" else S - T + diagonal
        scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(start), -math.inf)
    return scores.softmax(-1) @ b, torch.cat(keep(k_kept, k), 2), torch.cat(keep(v_kept, v), 2)


WRONG = {
    "their own future": lambda *a: take_in(*a, diagonal=None),
    "starts at the first key": lambda *a: take_in(*a, diagonal="first"),
    "does not see itself": lambda *a: take_in(*a, diagonal=-1),
    "see only each other": lambda *a: take_in(*a, see_kept=False),
    "not scaled": lambda *a: take_in(*a, scale=False),
    "handed back are the old ones": lambda *a: take_in(*a, keep=lambda old, new: (old,)),
    "only the new ones": lambda *a: take_in(*a, keep=lambda old, new: (new,)),
    "stand before the old": lambda *a: take_in(*a, keep=lambda old, new: (new, old)),
    "3 things": lambda *a: take_in(*a)[0],
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_cache_is_told_why(words):
    result = check("5.1", WRONG[words])
    assert not result.ok and words in result.message


def rows(model, context, peak, bandwidth, *, formula=lambda R, W, C, F: R * W / (F - R * C), end=math.ceil, never=None):
    W = memory.bytes_per_step(model, 0)
    C, F = memory.bytes_per_step(model, context) - W, memory.flops(model, 1, context)
    R = peak / bandwidth
    return end(formula(R, W, C, F)) if F > R * C else never


WRONG_BATCHES = {
    "cache is left out": lambda *a: rows(*a, formula=lambda R, W, C, F: R * W / F),
    "once for all rows": lambda *a: rows(*a, formula=lambda R, W, C, F: R * (W + C) / F),
    "the ridge itself": lambda *a: rows(*a, formula=lambda R, W, C, F: R),
    "round up": lambda *a: rows(*a, end=math.floor),
    "whole numbers": lambda *a: rows(*a, end=float),
    "no such batch": lambda *a: rows(*a, never=10**6),
    "None came": lambda *a: None,
}


@pytest.mark.parametrize("words", WRONG_BATCHES)
def test_a_wrong_batch_is_told_why(words):
    result = check("5.2", WRONG_BATCHES[words])
    assert not result.ok and words in result.message


def test_other_ways_of_being_right_pass():
    assert check("5.1", take_in)  # the page's own solution: test_exercises.py
    assert check("5.2", rows)
    assert not check("5.2", 7).ok
