"""What the checks of chapter 12 catch, and what they say."""

import pytest
import torch
from exercise_cells import solution

from attnlab import memory
from attnlab.exercises import check


def four_bits(steps=15, nearest=torch.round, add=True, share=lambda W, n: n, turn=False):
    """An answer to 12.1 that is right but for what is asked."""

    def f(W, sharing):
        part = (W.T if turn else W).reshape(-1, share(W, sharing))
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = (high - low) / steps
        out = nearest((part - low) / step) * step + (low if add else 0)
        return out.reshape(W.T.shape).T if turn else out.reshape(W.shape)

    return f


def centred(W, sharing):
    part = W.reshape(-1, sharing)
    step = part.abs().amax(1, keepdim=True) / 7
    return ((part / step).round() * step).reshape(W.shape)


WRONG_BITS = {
    "nothing was rounded": lambda W, n: W,
    "17 levels": four_bits(steps=16),
    "Rounded down": four_bits(nearest=torch.floor),
    "the offset must be added again": four_bits(add=False),
    "levels are those of 8 bits": four_bits(steps=255),
    "One grid for the whole matrix": four_bits(share=lambda W, n: W.numel()),
    "One grid for a whole row": four_bits(share=lambda W, n: W.shape[1]),
    "down a column": four_bits(turn=True),
    "centred on 0": centred,
    "shape of": lambda W, n: W.reshape(-1, n),
    "not right": lambda W, n: W + 1,
    "changes its input": lambda W, n: W.mul_(2),
    "Numbers are asked for": lambda W, n: "four",
}


@pytest.mark.parametrize("words", WRONG_BITS)
def test_a_wrong_rounding_is_told_why(words):
    result = check("12.1", WRONG_BITS[words])
    assert not result.ok and words in result.message


def most(model, device, quantize, fits=memory.fits):
    """Right: the most tokens that ``memory.fits`` accepts, found by halving."""
    if memory.as_shape(model).windows[0] is not None:
        return None
    low, high = 0, 1
    while fits(model, device, high, quantize=quantize):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(model, device, middle, quantize=quantize) else (low, middle)
    return low


def free(model, device, quantize):
    return device - memory.weight_bytes(model, "bfloat16", quantize)


FEWER = {None: 1, "int8": 2, "int4": 4}


def usable(model, device, quantize):
    """What is free for a cache beside the weights and the reserve: 10/11 of a small device, all but 2 GB of a large one."""
    return int(max(device - 2e9, device * 10 / 11)) - memory.weight_bytes(model, "bfloat16", quantize)


WRONG_LENGTHS = {
    "One token too many": lambda m, d, q: most(m, d, q) + 1,
    "One token too few": lambda m, d, q: most(m, d, q) - 1,
    "Nothing is kept free": lambda m, d, q: free(m, d, q) // memory.kv_bytes_per_token(m),
    "stored in fewer bits": lambda m, d, q: most(m, d, None),
    "keys and values stay in 16 bits": lambda m, d, q: usable(m, d, q) // (memory.kv_bytes_per_token(m) // FEWER[q]),
    "not even the int4 weights fit": lambda m, d, q: most(m, d, q) or (-1 if d == 4e9 else 0),
    "has a window": lambda m, d, q: most(m, d, q) or 4096 if "v0.1" in m else most(m, d, q),
    "off by up to": lambda m, d, q: 4096,
    "raised ZeroDivisionError": lambda m, d, q: 1 / 0,
    "returned nothing": lambda m, d, q: None,
    "A function is asked for": 4096,
}


@pytest.mark.parametrize("words", WRONG_LENGTHS)
def test_a_wrong_length_is_told_why(words):
    result = check("12.2", WRONG_LENGTHS[words])
    assert not result.ok and words in result.message


def test_a_function_that_raises_where_there_is_no_limit_is_told_so():
    def f(model, device, quantize):
        if model == "mistral-7b-v0.1":
            raise ValueError("no limit")
        return most(model, device, quantize)

    result = check("12.2", f)
    assert not result.ok and "For mistral-7b-v0.1" in result.message


def test_the_notebook_s_own_solutions_and_other_right_answers_are_right():
    assert check("12.1", solution("12.1")) and check("12.1", four_bits())
    assert check("12.2", solution("12.2")) and check("12.2", most)
