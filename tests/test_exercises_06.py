"""What the checks of chapter 6 catch, and what they say."""

import math

import pytest
import torch

from attnlab.exercises import check


def multi_query(x, w_q, w_k, w_v, w_o, n, *, hidden=lambda T: torch.ones(T, T).triu(1), root=math.sqrt, swap=True):
    B, T, d = x.shape
    q = x @ w_q.T
    q = q.view(B, T, n, -1).transpose(1, 2) if swap else q.view(B, n, T, -1)
    k, v = ((x @ w.T)[:, None] for w in (w_k, w_v))
    scores = q @ k.mT / root(q.shape[-1])
    weights = scores.masked_fill(hidden(T).bool(), -math.inf).softmax(-1).nan_to_num(0)
    return (weights @ v).transpose(1, 2).reshape(B, T, -1) @ w_o.T


def first_query_only(x, w_q, w_k, w_v, w_o, n):
    return multi_query(x, w_q[: w_k.shape[0]].repeat(n, 1), w_k, w_v, w_o, n)


def mean_query(x, w_q, w_k, w_v, w_o, n):
    return multi_query(x, w_q.view(n, -1, x.shape[-1]).mean(0).repeat(n, 1), w_k, w_v, w_o, n)


def strided_queries(x, w_q, w_k, w_v, w_o, n):
    return multi_query(x, w_q.view(-1, n, x.shape[-1]).transpose(0, 1).reshape(w_q.shape), w_k, w_v, w_o, n)


WRONG = {
    "The mask is missing": lambda *a: multi_query(*a, hidden=lambda T: torch.zeros(T, T)),
    "hides the token itself": lambda *a: multi_query(*a, hidden=lambda T: torch.ones(T, T).triu(0)),
    "the wrong way round": lambda *a: multi_query(*a, hidden=lambda T: torch.ones(T, T).tril(-1)),
    "the same question": first_query_only,
    "averaged over the heads": mean_query,
    "mixed where you cut": lambda *a: multi_query(*a, swap=False),
    "every H-th": strided_queries,
    "√d_model": lambda *a: multi_query(*a, root=lambda D: math.sqrt(24)),
    "not scaled": lambda *a: multi_query(*a, root=lambda D: 1),
    "root is missing": lambda *a: multi_query(*a, root=lambda D: D),
    "swapped": lambda x, q, k, v, o, n: multi_query(x, q, v, k, o, n),
    "W_O is missing": lambda x, q, k, v, o, n: multi_query(x, q, k, v, torch.eye(o.shape[1]), n),
    "shape of the output": lambda *a: multi_query(*a)[0],
    "raised": lambda x, q, k, v, o, n: (x @ k.T).view(x.shape[0], x.shape[1], n, q.shape[0] // n),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_multi_query_is_told_why(words):
    result = check("6.1", WRONG[words])
    assert not result.ok and words in result.message


def wide(w_q, w_k, w_v, w_o, n, *, factor=lambda n: n**0.5, part=True, whole_q=False, whole_o=False):
    d = w_q.shape[1]
    D = d // n
    q, o = torch.zeros(n * d, d), torch.zeros(d, n * d)
    for h in range(n):
        own, start = slice(h * D, (h + 1) * D), h * d + h * D * part
        q[start : start + D] = w_q[own] * factor(n)
        o[:, start : start + D] = w_o[:, own]
        if whole_q:
            q[h * d : (h + 1) * d] = w_q * factor(n)
        if whole_o:
            o[:, h * d : (h + 1) * d] = w_o
    return q, w_k, w_v, o


WRONG_WIDE = {
    "√(H·D), not by √D": lambda *a: wide(*a, factor=lambda n: 1),
    "differ by √H": lambda *a: wide(*a, factor=lambda n: n),
    "don't divide": lambda *a: wide(*a, factor=lambda n: n**-0.5),
    "starts at h·D": lambda *a: wide(*a, part=False),
    "not right either": lambda *a: wide(*a, part=False, factor=lambda n: 1),
    "takes all of every head's value": lambda *a: wide(*a, whole_o=True),
    "All of W_Q is in every head": lambda *a: wide(*a, whole_q=True),
    "4 things": lambda *a: wide(*a)[:3],
    "The shape of W_Q": lambda w_q, w_k, w_v, w_o, n: (w_q, w_k, w_v, w_o),
    "not right": lambda w_q, w_k, w_v, w_o, n: wide(w_q + 1, w_k, w_v, w_o, n),
}


@pytest.mark.parametrize("words", WRONG_WIDE)
def test_a_wrong_wide_head_is_told_why(words):
    result = check("6.2", WRONG_WIDE[words])
    assert not result.ok and words in result.message


def test_other_ways_of_being_right_pass():
    assert check("6.1", multi_query)  # the page's own solutions: test_exercises.py

    def keys_moved(w_q, w_k, w_v, w_o, n):  # the factor may sit in the keys as well
        q, k, v, o = wide(w_q, w_k, w_v, w_o, n, factor=lambda n: 1)
        return q, k * n**0.5, v, o

    assert check("6.2", keys_moved)
