"""What the checks of chapter 14 catch, and what they say."""

import pytest
import torch
import torch.nn.functional as F
from exercise_cells import solution

from attnlab.exercises import check


def queries(rank, ranks, n_heads):
    return range(rank * n_heads // ranks, (rank + 1) * n_heads // ranks)


WRONG_HEADS = {
    "no K/V head at all": lambda r, R, H, K: list(range(r * (K // R), (r + 1) * (K // R))),
    "a K/V head for each query head": lambda r, R, H, K: [h // (H // K) for h in queries(r, R, H)],
    "those are its query heads": lambda r, R, H, K: list(queries(r, R, H)),
    "all of them": lambda r, R, H, K: list(range(K)),
    "dealt like cards": lambda r, R, H, K: list(range(r, K, R)) or [r % K],
    "divide and don't take the remainder": lambda r, R, H, K: (
        [r % K] if R > K else list(range(r * K // R, (r + 1) * K // R))
    ),
    "shape of": lambda r, R, H, K: list(range(r * K // R, (r + 1) * K // R + 1)),
    "returned nothing": lambda r, R, H, K: None,
    "raised ZeroDivisionError": lambda r, R, H, K: [r // (K // 100)],
    "Numbers are asked for": lambda r, R, H, K: "all",
}


@pytest.mark.parametrize("words", WRONG_HEADS)
def test_wrong_heads_are_told_why(words):
    result = check("14.1", WRONG_HEADS[words])
    assert not result.ok and words in result.message


def ff(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def cut(n, ranks):
    return [slice(r * n // ranks, (r + 1) * n // ranks) for r in range(ranks)]


def by_inputs(x, gate, up, down, ranks):
    return [ff(x[:, s], gate[:, s], up[:, s], down) for s in cut(x.shape[1], ranks)]


def columns_of_another(x, gate, up, down, ranks):
    n = gate.shape[0]
    return [ff(x, gate[s], up[s], down[:, r::ranks]) for r, s in enumerate(cut(n, ranks))]


WRONG_PARTS = {
    "too large, and nothing was saved": lambda x, g, u, d, R: [ff(x, g, u, d)] * R,
    "computed all of it and divided": lambda x, g, u, d, R: [ff(x, g, u, d) / R] * R,
    "silu of a part is not a part of silu": by_inputs,
    "those of the hidden numbers that the rank has": columns_of_another,
    "Cut down_proj by its inputs": lambda x, g, u, d, R: [ff(x, g, u, d[s]) for s in cut(d.shape[0], R)],
    "2 things are asked for": lambda x, g, u, d, R: [ff(x, g, u, d)],
    "not right": lambda x, g, u, d, R: [ff(x, g, u, d) + 1] + [torch.zeros(3, x.shape[1])] * (R - 1),
    "changes its input": lambda x, g, u, d, R: [ff(x.mul_(2), g, u, d)] * R,
}


@pytest.mark.parametrize("words", WRONG_PARTS)
def test_wrong_parts_are_told_why(words):
    result = check("14.2", WRONG_PARTS[words])
    assert not result.ok and words in result.message


def test_another_way_to_deal_the_hidden_numbers_is_right_too():
    assert check("14.2", lambda x, g, u, d, R: [ff(x, g[r::R], u[r::R], d[:, r::R]) for r in range(R)])


@pytest.mark.parametrize("number", ["14.1", "14.2"])
def test_the_notebooks_solution_is_right(number):
    assert check(number, solution(number))
