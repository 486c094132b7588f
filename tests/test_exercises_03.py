"""What the checks of chapter 3 catch, and what they say."""

import math

import pytest
import torch
from einops import rearrange

from attnlab.exercises import check


def cut(x, n):
    return rearrange(x, "B T (H D) -> B H T D", H=n)


def viewed(x, n):
    return x.view(x.shape[0], n, x.shape[1], -1)


def interleaved(x, n):
    return rearrange(x, "B T (D H) -> B H T D", H=n)


def join(y):
    return rearrange(y, "B H T D -> B T (H D)")


def run_together(y):
    return y.reshape(y.shape[0], y.shape[2], -1)


def rejoin(y):
    return rearrange(y, "B H T D -> B T (D H)")


def multi_head(x, w_q, w_k, w_v, w_o, n, *, cut=cut, join=join, root=None, transpose=True, mix=True):
    if not transpose:
        w_q, w_k, w_v, w_o = w_q.T, w_k.T, w_v.T, w_o.T
    q, k, v = (cut(x @ w.T, n) for w in (w_q, w_k, w_v))
    weights = (q @ k.mT / (root(x.shape[-1], q.shape[-1]) if root else math.sqrt(q.shape[-1]))).softmax(-1)
    out = join(weights @ v)
    return out @ w_o.T if mix else out


WRONG = {
    "mixed, twice": lambda *a: multi_head(*a, cut=viewed, join=run_together),
    "mixed where you cut": lambda *a: multi_head(*a, cut=viewed),
    "swap H and T back": lambda *a: multi_head(*a, join=run_together),
    "every H-th": lambda *a: multi_head(*a, cut=interleaved, join=rejoin),
    "they were cut as H blocks": lambda *a: multi_head(*a, join=rejoin),
    "√d_model": lambda *a: multi_head(*a, root=lambda d, D: math.sqrt(d)),
    "not scaled": lambda *a: multi_head(*a, root=lambda d, D: 1),
    "root is missing": lambda *a: multi_head(*a, root=lambda d, D: D),
    "one wide head": lambda x, q, k, v, o, n: multi_head(x, q, k, v, o, 1),
    "W_O is missing": lambda *a: multi_head(*a, mix=False),
    "(out, in)": lambda *a: multi_head(*a, transpose=False),
    "averaged": lambda *a: multi_head(*a, join=lambda y: y.mean(1).repeat(1, 1, y.shape[1])),
    "shape of the output": lambda *a: multi_head(*a)[0],
    "raised": lambda *a: multi_head(*a, join=lambda y: y),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_heads_are_told_why(words):
    result = check("3.1", WRONG[words])
    assert not result.ok and words in result.message


def nested(weights, pairs, *, back=1, pick=lambda inside: max(inside)[0], everywhere=False, mean=True, which=(0, 1)):
    found = []
    for opener, closer in pairs:
        inside = [(o, c) for o, c in pairs if opener < o and c < closer]
        if inside:
            found.append((weights[closer - back, opener], weights[closer - back, pick(inside)]))
    means = [torch.stack(x).mean() if mean else sum(x) for x in zip(*found, strict=True)]
    if everywhere:
        means[0] = torch.stack([weights[c - back, o] for o, c in pairs]).mean()
    return means[which[0]], means[which[1]]


WRONG_CONTROLS = {
    "counted for the score": lambda *a: nested(*a, everywhere=True),
    "The query is the closer": lambda *a: nested(*a, back=0),
    "the first is taken": lambda *a: nested(*a, pick=lambda inside: min(inside)[0]),
    "the pair that closed last": lambda *a: nested(*a, pick=lambda inside: max(inside, key=lambda p: p[1])[0]),
    "wrong way round": lambda *a: nested(*a, which=(1, 0)),
    "swapped": lambda w, pairs: nested(w.T, pairs),
    "a sum": lambda *a: nested(*a, mean=False),
    "2 things": lambda *a: nested(*a)[0] - nested(*a)[1],
    "not right": lambda *a: (torch.tensor(0.5), torch.tensor(0.1)),
}


@pytest.mark.parametrize("words", WRONG_CONTROLS)
def test_a_wrong_control_is_told_why(words):
    result = check("3.2", WRONG_CONTROLS[words])
    assert not result.ok and words in result.message


def test_other_ways_of_being_right_pass():
    assert check("3.1", multi_head)  # the page's own solution: test_exercises.py
    assert check("3.2", lambda weights, pairs: [float(x) for x in nested(weights, pairs)])
