"""What the checks of chapter 7 catch, and what they say."""

import pytest
import torch
from einops import rearrange, reduce

from attnlab.exercises import check


def attend(q, k, v, root=None):
    return (q @ k.mT / (root or q.shape[-1] ** 0.5)).softmax(-1) @ v


def folded(q, k, v, fold="B (n G) T D -> B n (G T) D", back="B n (G T) D -> B (n G) T D", root=None):
    n, G = k.shape[1], q.shape[1] // k.shape[1]
    out = attend(rearrange(q, fold, n=n), k, v, root)
    return rearrange(out, back, G=G) if back else out


def copied(q, k, v):
    G = q.shape[1] // k.shape[1]
    return attend(q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1))


WRONG = {
    "h % Hkv": lambda q, k, v: folded(q, k, v, "B (G n) T D -> B n (G T) D", "B n (G T) D -> B (G n) T D"),
    "first K/V head": lambda q, k, v: attend(q, k[:, :1], v[:, :1]),
    "not scaled": lambda q, k, v: folded(q, k, v, root=1),
    "root is missing": lambda q, k, v: folded(q, k, v, root=q.shape[-1]),
    "root of G": lambda q, k, v: folded(q, k, v, root=(q.shape[-1] * q.shape[1] // k.shape[1]) ** 0.5),
    "cut as T·G": lambda q, k, v: folded(q, k, v, back="B n (T G) D -> B (n G) T D"),
    "still folded": lambda q, k, v: folded(q, k, v, back=None),
    "axis of its own": lambda q, k, v: folded(q, k, v, back="B n (G T) D -> B n G T D"),
    "another order": lambda q, k, v: folded(q, k, v, back="B n (G T) D -> B (G n) T D"),
    "K or V is copied": copied,
    "raised": attend,
    "returned nothing": lambda q, k, v: None,
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_grouped_attention_is_told_why(words):
    result = check("7.1", WRONG[words])
    assert not result.ok and words in result.message


def pool(w, n, m, pattern="(m G D) d -> (m D) d", how="mean"):
    return reduce(w, pattern, how, m=m, D=w.shape[0] // n)


WRONG_POOLING = {
    "so pool neighbours": lambda w, n, m: pool(w, n, m, "(G m D) d -> (m D) d"),
    "Neighbouring rows": lambda w, n, m: pool(w, n, m, "(m D G) d -> (m D) d"),
    "the sum": lambda w, n, m: pool(w, n, m, how="sum"),
    "the first head": lambda w, n, m: w.view(m, n // m, w.shape[0] // n, -1)[:, 0].flatten(0, 1),
    "divided by the root": lambda w, n, m: pool(w, n, m, how="sum") / (n // m) ** 0.5,
    "axis of their own": lambda w, n, m: pool(w, n, m, "(m G D) d -> m D d"),
    "as many rows as before": lambda w, n, m: (
        pool(w, n, m, "(m G D) d -> m D d").repeat_interleave(n // m, 0).flatten(0, 1)
    ),
    "changes its input": lambda w, n, m: pool(w.mul_(1.5), n, m),
    "not right": lambda w, n, m: pool(w, n, m) + 1,
}


@pytest.mark.parametrize("words", WRONG_POOLING)
def test_wrong_pooling_is_told_why(words):
    result = check("7.2", WRONG_POOLING[words])
    assert not result.ok and words in result.message


def test_other_ways_of_being_right_pass():
    def with_an_axis(q, k, v):
        queries = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, T, D)
        return attend(queries, k[:, :, None], v[:, :, None]).flatten(1, 2)

    assert check("7.1", folded)
    assert check("7.2", lambda w, n, m: w.view(m, n // m, w.shape[0] // n, -1).mean(1).flatten(0, 1))
    numbers = torch.randn(1, 4, 2, 3), torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 3)
    assert torch.allclose(with_an_axis(*numbers), folded(*numbers), atol=1e-6)
