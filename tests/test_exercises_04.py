"""What the checks of chapter 4 catch, and what they say."""

import pytest
import torch

from attnlab.exercises import check


def right_norm(x, weight, eps):
    return (x.float() / (x.float().square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype) * weight


WRONG_NORMS = {
    "LayerNorm": lambda x, w, e: torch.nn.functional.layer_norm(x, x.shape[-1:], w, eps=e),
    "standard deviation": lambda x, w, e: x / (x.var(-1, keepdim=True, unbiased=False) + e).sqrt() * w,
    "summed": lambda x, w, e: x / (x.square().sum(-1, keepdim=True) + e).sqrt() * w,
    "root is missing": lambda x, w, e: x / (x.square().mean(-1, keepdim=True) + e) * w,
    "divide": lambda x, w, e: x * (x.square().mean(-1, keepdim=True) + e).sqrt() * w,
    "outside the root": lambda x, w, e: x / (x.square().mean(-1, keepdim=True).sqrt() + e) * w,
    "left out: a vector": lambda x, w, e: x / x.square().mean(-1, keepdim=True).sqrt() * w,
    "weight is left out": lambda x, w, e: right_norm(x, 1.0, e),
    "over everything": lambda x, w, e: x / (x.square().mean() + e).sqrt() * w,
    "positions": lambda x, w, e: x / (x.square().mean(1, keepdim=True) + e).sqrt() * w,
    "float16": lambda x, w, e: x / (x.square().mean(-1, keepdim=True) + e).sqrt() * w,
    "changes its input": lambda x, w, e: x.div_((x.square().mean(-1, keepdim=True) + e).sqrt()) * w,
    "not right": lambda x, w, e: right_norm(x, w, e) + 1,
}


@pytest.mark.parametrize("words", WRONG_NORMS)
def test_a_wrong_norm_is_told_why(words):
    result = check("4.1", WRONG_NORMS[words])
    assert not result.ok and words in result.message


def test_another_right_norm_is_right():
    assert check("4.1", right_norm)


def zeroing(name, axis, where):
    """An answer that sets rows (axis 0) or columns (1) of one matrix to 0 for the call: ``where`` picks them."""

    def f(layer, x, head):
        weight = getattr(layer, name).weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight[where(layer, head) if axis == 0 else (slice(None), where(layer, head))] = 0
            out = layer(x)
            weight.copy_(before)
        return out

    return f


def span(i, width):
    return slice(i * width, (i + 1) * width)


def left_so(layer, x, head):
    with torch.no_grad():
        layer.o_proj.weight[:, span(head, layer.head_dim)] = 0
    return layer(x)


def with_a_hook_left(layer, x, head):
    def hook(module, args):
        outputs = args[0].clone()
        outputs[..., span(head, layer.head_dim)] = 0
        return (outputs,)

    layer.o_proj.register_forward_pre_hook(hook)
    return layer(x)


columns = zeroing("o_proj", 1, lambda layer, head: span(head, layer.head_dim))
WRONG_ABLATIONS = {
    "Nothing is taken away": lambda layer, x, head: layer(x),
    "whole group": zeroing("v_proj", 0, lambda layer, head: span(head // layer.group_size, layer.head_dim)),
    "without the others": lambda layer, x, head: layer(x) - columns(layer, x, head),
    "query of zeros": zeroing("q_proj", 0, lambda layer, head: span(head, layer.head_dim)),
    "rows of o_proj": zeroing("o_proj", 0, lambda layer, head: span(head, layer.head_dim)),
    "side by side": zeroing("o_proj", 1, lambda layer, head: slice(head, None, layer.n_heads)),
    "Only one column": zeroing("o_proj", 1, lambda layer, head: slice(head, head + 1)),
    "d_model / n_heads": zeroing("o_proj", 1, lambda layer, head: span(head, layer.d_model // layer.n_heads)),
    "heads count from 0": zeroing("o_proj", 1, lambda layer, head: span(head + 1, layer.head_dim)),
    "leaves them so": left_so,
    "hook is left": with_a_hook_left,
    "not right": lambda layer, x, head: 2 * layer(x),
    "raised": lambda layer, x, head: layer(x[0]),
}


@pytest.mark.parametrize("words", WRONG_ABLATIONS)
def test_a_wrong_ablation_is_told_why(words):
    result = check("4.2", WRONG_ABLATIONS[words])
    assert not result.ok and words in result.message


def test_another_right_ablation_is_right():
    assert check("4.2", columns)
