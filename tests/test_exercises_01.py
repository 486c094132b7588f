"""What the checks of chapter 1 catch, and what they say."""

import math

import pytest
import torch

from attnlab.exercises import check


def attention(q, k, v, mask, *, root=True, fill=-math.inf, dim=-1, nothing=True):
    scores = q @ k.mT / (q.shape[-1] ** 0.5 if root else 1)
    weights = scores.masked_fill(~mask, fill).softmax(dim)
    if nothing:
        weights = weights.nan_to_num(0)
    return weights @ v, weights


def after(q, k, v, mask):
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) * mask
    return weights @ v, weights


def in_place(q, k, v, mask):
    q /= math.sqrt(q.shape[-1])
    return attention(q, k, v, mask, root=False)


WRONG = {
    "not scaled": lambda *a: attention(*a, root=False),
    "root is missing": lambda q, k, v, m: attention(q / q.shape[-1], k, v, m, root=False),
    "applied after the softmax": after,
    "wrong way round": lambda q, k, v, m: attention(q, k, v, ~m),
    "over the queries": lambda *a: attention(*a, dim=-2),
    "added as numbers": lambda *a: _added(*a),
    "multiplied by the mask": lambda q, k, v, m: _multiplied(q, k, v, m),
    "not used": lambda q, k, v, m: attention(q, k, v, torch.ones_like(m)),
    "0/0": lambda *a: attention(*a, nothing=False),
    "not minus infinity": lambda *a: attention(*a, fill=-1e9),
    "2 things": lambda *a: attention(*a)[0],
    "changes its input": in_place,
    "raised": lambda q, k, v, m: attention(q, k.mT, v, m),
}  # fmt: skip


def _added(q, k, v, mask):
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
    return weights @ v, weights


def _multiplied(q, k, v, mask):
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) * mask).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_attention_is_told_why(words):
    result = check("1.1", WRONG[words])
    assert not result.ok and words in result.message


def merge(a, b, *, combine=torch.maximum, sign=1, rescale=(True, True), sums=(1, 1)):
    m = combine(a[0], b[0])
    fa, fb = (torch.exp(sign * (x[0] - m)) if on else 1.0 for x, on in zip((a, b), rescale, strict=True))
    return m, a[1] * (fa if sums[0] else 1) + b[1] * (fb if sums[0] else 1), a[2] * fa + b[2] * fb


def naive(a, b):
    total = a[1] * a[0].exp() + b[1] * b[0].exp()
    m = torch.maximum(a[0], b[0])
    return m, total / m.exp(), (a[2] * a[0].exp() + b[2] * b[0].exp()) / m.exp()


def finished(a, b):
    m, total, weighted = merge(a, b)
    return m, total, weighted / total


WRONG_MERGES = {
    "maxima are added": lambda a, b: merge(a, b, combine=torch.add),
    "added as they are: each": lambda a, b: merge(a, b, sums=(0, 0)),
    "upside down": lambda a, b: merge(a, b, sign=-1),
    "weighted sums are added": lambda a, b: (*merge(a, b)[:2], a[2] + b[2]),
    "Always the first": lambda a, b: (
        torch.maximum(a[0], b[0]),
        a[1] * torch.exp(a[0] - b[0]) + b[1],
        a[2] * torch.exp(a[0] - b[0]) + b[2],
    ),
    "finished answer": finished,
    "overflow": naive,
    "see nothing give NaN": merge,
}


@pytest.mark.parametrize("words", WRONG_MERGES)
def test_a_wrong_merge_is_told_why(words):
    result = check("1.2", WRONG_MERGES[words])
    assert not result.ok and words in result.message
