"""What the checks of chapter 15 catch, and what they say."""

import pytest
import torch

from attnlab.exercises import check


def attend(q, w_uk, w_uv, latents, root=None, out="hs,sc,hdc->hd"):
    """Right unless told otherwise, and without keys."""
    asked = torch.einsum("hd,hdc->hc", q, w_uk)
    weights = (asked @ latents.T / (root or q.shape[1] ** 0.5)).softmax(-1)
    average = weights @ latents
    return average if out == "latent" else torch.einsum("hc,hdc->hd", average, w_uv)


def restored(q, w_uk, w_uv, latents):
    k, v = torch.einsum("hdc,sc->hsd", w_uk, latents), torch.einsum("hdc,sc->hsd", w_uv, latents)
    return ((q[:, None] @ k.mT / q.shape[1] ** 0.5).softmax(-1) @ v)[:, 0]


def without_softmax(q, w_uk, w_uv, latents):
    scores = torch.einsum("hd,hdc,sc->hs", q, w_uk, latents) / q.shape[1] ** 0.5
    return torch.einsum("hc,hdc->hd", scores @ latents, w_uv)


def turned_round(q, w_uk, w_uv, latents):
    return attend(q, w_uk.mT if w_uk.shape[1] == w_uk.shape[2] else w_uk, w_uv, latents)


WRONG = {
    "not scaled": lambda *a: attend(*a, root=1),
    "root of the latent's size": lambda *a: attend(*a, root=a[1].shape[2] ** 0.5),
    "still a latent": lambda *a: attend(*a, out="latent"),
    "first head's W_UK": lambda q, uk, uv, c: attend(q, uk[:1].expand_as(uk), uv, c),
    "first head's W_UV": lambda q, uk, uv, c: attend(q, uk, uv[:1].expand_as(uv), c),
    "matrix of their own": lambda q, uk, uv, c: attend(q, uk, uk, c),
    "missing their softmax": without_softmax,
    "wrong way round": turned_round,
    "keys or values are restored": restored,
    "raised": lambda q, uk, uv, c: q @ uk @ c,
    "returned nothing": lambda *a: None,
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_absorption_is_told_why(words):
    result = check("15.1", WRONG[words])
    assert not result.ok and words in result.message


def test_another_right_absorption_is_right():
    assert check("15.1", attend)


def merge(outs, maxima, sums, shares=None, total=None):
    shares = (maxima - maxima.amax(0)).exp() * sums if shares is None else shares
    return (outs * (shares / (shares.sum(0) if total is None else total))[..., None]).sum(0)


def below(maxima):
    return (maxima - maxima.amax(0)).exp()


WRONG_MERGE = {
    "All parts count alike": lambda o, m, s: o.mean(0),
    "sums alone": lambda o, m, s: merge(o, m, s, s),
    "maxima alone": lambda o, m, s: merge(o, m, s, below(m)),
    "sum of the parts' averages": lambda o, m, s: o.sum(0),
    "don't add up to 1": lambda o, m, s: merge(o, m, s, total=1),
    "divide again": lambda o, m, s: merge(o, m, s, below(m), (below(m) * s).sum(0)),
    "wrong sign": lambda o, m, s: merge(o, m, s, (m.amin(0) - m).exp() * s),
    "thrown away": lambda o, m, s: torch.stack([o[i, h] for h, i in enumerate(m.argmax(0))]),
    "not finite": lambda o, m, s: merge(o, m, s, m.exp() * s),
    "shape of the output": lambda o, m, s: merge(o, m, s)[0],
    "returned nothing": lambda o, m, s: None,
}


@pytest.mark.parametrize("words", WRONG_MERGE)
def test_a_wrong_merge_is_told_why(words):
    result = check("15.2", WRONG_MERGE[words])
    assert not result.ok and words in result.message


def test_other_right_merges_are_right():
    assert check("15.2", merge)
    assert check("15.2", lambda o, m, s: ((m + s.log()).softmax(0)[..., None] * o).sum(0))
