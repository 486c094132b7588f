"""What the checks of chapter 2 catch, and what they say. The notebook's own solutions: test_exercises."""

import math

import pytest
import torch

from attnlab.exercises import check

NAME, WISH, PAYLOAD = (slice(16 * i, 16 * (i + 1)) for i in range(3))


def forms(layer, h, *, kv=None, rows=None):
    D = layer.head_dim
    kv = h // layer.group_size if kv is None else kv
    q = layer.q_proj.weight[D * h : D * (h + 1)] if rows is None else layer.q_proj.weight[rows]
    k, v = (m.weight[D * kv : D * (kv + 1)] for m in (layer.k_proj, layer.v_proj))
    return q.T @ k, layer.o_proj.weight[:, D * h : D * (h + 1)] @ v


def small(layer, h):
    """Both products the wrong way round: head_dim by head_dim."""
    D, kv = layer.head_dim, h // layer.group_size
    q, o = layer.q_proj.weight[D * h : D * (h + 1)], layer.o_proj.weight[:, D * h : D * (h + 1)]
    k, v = (m.weight[D * kv : D * (kv + 1)] for m in (layer.k_proj, layer.v_proj))
    return q @ k.T, v @ o


def rows_of_w_o(layer, h):
    D, kv = layer.head_dim, h // layer.group_size
    v = layer.v_proj.weight[D * kv : D * (kv + 1)]
    return forms(layer, h)[0], layer.o_proj.weight[D * h : D * (h + 1)].T @ v


WRONG_FORMS = {
    "not h % n_kv_heads": lambda layer, h: forms(layer, h, kv=h % layer.n_kv_heads),
    "W_Qᵀ W_K is transposed": lambda layer, h: (forms(layer, h)[0].T, forms(layer, h)[1]),
    "The scale is in it": lambda layer, h: (forms(layer, h)[0] / math.sqrt(layer.head_dim), forms(layer, h)[1]),
    "W_Q W_Kᵀ, head_dim by head_dim": small,
    "not every n-th": lambda layer, h: forms(layer, h, rows=slice(h, None, layer.n_heads)),
    "W_O W_V is transposed": lambda layer, h: (forms(layer, h)[0], forms(layer, h)[1].T),
    "W_V W_O, head_dim by head_dim": lambda layer, h: (forms(layer, h)[0], small(layer, h)[1]),
    "columns, not rows": rows_of_w_o,
    "2 things": lambda layer, h: forms(layer, h)[0],
    "should be (24, 24)": lambda layer, h: (layer.q_proj.weight.T @ layer.q_proj.weight[:, :5], forms(layer, h)[1]),
    "The numbers are not right": lambda layer, h: (2 * forms(layer, h)[0], forms(layer, h)[1]),
}


@pytest.mark.parametrize("words", WRONG_FORMS)
def test_wrong_products_are_told_why(words):
    result = check("2.1", WRONG_FORMS[words])
    assert not result.ok and words in result.message


def test_right_products_are_right():
    assert check("2.1", forms)


def head(asker=WISH, asked=NAME, read=PAYLOAD, write=WISH, *, size=1.0, sign=1.0, copy=1.0, n=16):
    q, k, v, o = torch.zeros(16, 48), torch.zeros(16, 48), torch.zeros(16, 48), torch.zeros(48, 16)
    some = torch.diag((torch.arange(16) < n).float())
    q[:, asker], k[:, asked] = sign * size * some, some
    v[:, read], o[write] = copy * torch.eye(16), torch.eye(16)
    return q, k, v, o


WRONG_HEADS = {
    "nearly equal": head(size=0.0),
    "W_Q and W_K are exchanged": head(NAME, WISH),
    "looks at itself": head(NAME, NAME),
    "of the tokens look at the one they wish for: compare": head(WISH, PAYLOAD),
    "Nearly: ": head(n=10),
    "leaves the payload where it was": head(write=PAYLOAD),
    "writes into the name part": head(write=NAME),
    "with a minus sign": head(copy=-1.0),
    "W_V reads its name": head(read=NAME),
    "W_V reads its wish": head(read=WISH),
    "isn't that token's payload": (*head()[:2], head()[2], head()[3].roll(1, 0)),
    "W_Q is (48, 16): nn.Linear stores (outputs, inputs)": tuple(w.T for w in head()),
    "W_V should be (16, 48)": (*head()[:2], torch.zeros(8, 48), head()[3]),
    "NaN": (head()[0] * math.nan, *head()[1:]),
    "4 things": head()[:3],
}


@pytest.mark.parametrize("words", WRONG_HEADS)
def test_a_wrong_head_is_told_why(words):
    result = check("2.2", WRONG_HEADS[words])
    assert not result.ok and words in result.message


def test_a_head_by_hand_is_right_and_so_is_its_double_negative():
    assert "every token has what it wished for" in check("2.2", head()).message
    assert "unexpected way" in check("2.2", head(sign=-1.0, copy=-100.0)).message
