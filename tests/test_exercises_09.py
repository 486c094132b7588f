"""What the checks of chapter 9 catch, and what they say."""

import pytest
import torch

from attnlab.exercises import check


def turn(x, positions, theta, sign=1, power=2, layout="halves", first=0, dtype=torch.float32):
    D = x.shape[-1]
    frequencies = theta ** (-power * torch.arange(D // 2, dtype=torch.float32) / D)
    angles = (((positions + first).to(dtype)[:, None] * frequencies.to(dtype)) * sign).float()
    cos, sin = angles.cos(), angles.sin()
    x = x.float()
    a, b = (x[:, : D // 2], x[:, D // 2 :]) if layout == "halves" else (x[:, 0::2], x[:, 1::2])
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat(turned, -1) if layout == "halves" else torch.stack(turned, -1).flatten(-2)


WRONG_TURNS = {
    "interleaved layout": lambda x, p, t: turn(x, p, t, layout="interleaved"),
    "the other way": lambda x, p, t: turn(x, p, t, sign=-1),
    "exponent is off": lambda x, p, t: turn(x, p, t, power=1),
    "grow with i": lambda x, p, t: turn(x, p, t, power=-2),
    "fixed at 10 000": lambda x, p, t: turn(x, p, 1e4),
    "use the ones that are given": lambda x, p, t: turn(x, torch.arange(len(p)), t),
    "counted from 1": lambda x, p, t: turn(x, p, t, first=1),
    "same speed": lambda x, p, t: turn(x, p, t, power=0),
    "Nothing is turned": lambda x, p, t: x,
    "in float32": lambda x, p, t: turn(x, p, t, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32),
    "changes its input": lambda x, p, t: x.copy_(turn(x, p, t)),
    "raised": lambda x, p: x,
}


@pytest.mark.parametrize("words", WRONG_TURNS)
def test_a_wrong_rotation_is_told_why(words):
    result = check("9.1", WRONG_TURNS[words])
    assert not result.ok and words in result.message


def test_another_right_rotation_is_right():
    assert check("9.1", turn)


def order(weight, n_heads, rows):
    """Reorder each head's rows as ``rows(head_dim)`` says."""
    D = len(weight) // n_heads
    return torch.cat([weight[h * D + i][None] for h in range(n_heads) for i in rows(D)])


def evens_first(D):
    return [*range(0, D, 2), *range(1, D, 2)]


WRONG_ORDERS = {
    "Nothing has moved": lambda w, n: w.clone(),
    "way back": lambda w, n: order(w, n, lambda D: [i + j * D // 2 for i in range(D // 2) for j in (0, 1)]),
    "heads mix": lambda w, n: order(w, 1, evens_first),
    "the wrong way": lambda w, n: order(w, 1, lambda D: [i + j * D // 2 for i in range(D // 2) for j in (0, 1)]),
    "even rows first": lambda w, n: order(w, n, lambda D: [*range(1, D, 2), *range(0, D, 2)]),
    "outermost axis": lambda w, n: w.view(-1, n, 2, w.shape[1]).transpose(1, 2).reshape(w.shape),
    "transposed": lambda w, n: order(w, n, evens_first).T,
    "smaller matrix": lambda w, n: order(w, 3, evens_first) if len(w) == 24 else w,
}


@pytest.mark.parametrize("words", WRONG_ORDERS)
def test_a_wrong_order_of_rows_is_told_why(words):
    result = check("9.2", WRONG_ORDERS[words])
    assert not result.ok and words in result.message


def test_another_right_order_of_rows_is_right():
    assert check("9.2", lambda w, n: order(w, n, evens_first))
