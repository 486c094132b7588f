"""layers.py: one attention layer for three styles, and the parts around it."""

import pytest
import torch
from torch import nn

from attnlab import GroupedQueryAttention, RMSNorm, SwiGLU, TransformerBlock, causal_mask
from attnlab.errors import ConfigError, ShapeError


def repeated(layer):
    """A multi-head layer whose K/V heads are the given layer's, each repeated for its group of query heads."""
    wide = GroupedQueryAttention(
        layer.d_model, layer.n_heads, layer.n_heads, layer.head_dim, window=layer.window, rope_theta=layer.rope_theta
    )
    weights = dict(layer.state_dict())
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = weights[name].view(layer.n_kv_heads, layer.head_dim, -1)
        weights[name] = heads.repeat_interleave(layer.group_size, 0).flatten(0, 1)
    wide.load_state_dict(weights)
    return wide


@pytest.mark.parametrize("n_kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("window", [None, 3])
def test_grouped_and_multi_query_are_multi_head_with_tied_heads(n_kv_heads, window):
    torch.manual_seed(0)
    layer = GroupedQueryAttention(32, 8, n_kv_heads, window=window, rope_theta=1e4)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(layer(x), repeated(layer)(x))
    out, weights = layer(x, return_weights=True)
    torch.testing.assert_close(out, layer(x))
    assert weights.shape == (2, 8, 9, 9)


def test_multi_head_equals_torch_own_layer():
    torch.manual_seed(0)
    layer = GroupedQueryAttention(32, 4, causal=False)
    theirs = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)]))
        theirs.out_proj.weight.copy_(layer.o_proj.weight)
    x = torch.randn(2, 7, 32)
    want, weights = theirs(x, x, x, average_attn_weights=False)
    got, ours = layer(x, return_weights=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours, weights)


def test_window_at_least_the_length_equals_none():
    torch.manual_seed(0)
    layer, x = GroupedQueryAttention(16, 4, 2), torch.randn(1, 6, 16)
    want = layer(x)
    for window, same in ((6, True), (100, True), (5, False)):
        layer.window = window
        assert torch.allclose(layer(x), want, atol=1e-6) is same


def test_an_own_mask_replaces_the_layers():
    torch.manual_seed(0)
    layer, x = GroupedQueryAttention(16, 4, 2, window=2), torch.randn(1, 6, 16)
    torch.testing.assert_close(layer(x, mask=causal_mask(6, window=2)), layer(x))
    assert not torch.allclose(layer(x, mask=causal_mask(6)), layer(x))


def test_rmsnorm_and_swiglu_equal_torch():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    norm, theirs = RMSNorm(16), nn.RMSNorm(16, eps=1e-5)
    torch.testing.assert_close(norm(x), theirs(x))
    ffn = SwiGLU(16, 40)
    want = (nn.functional.silu(x @ ffn.gate_proj.weight.T) * (x @ ffn.up_proj.weight.T)) @ ffn.down_proj.weight.T
    torch.testing.assert_close(ffn(x), want)
    assert torch.isfinite(RMSNorm(16)(torch.full((1, 16), 1e3, dtype=torch.float16))).all()  # 1e6 squared is no float16


def test_block_adds_to_the_residual_stream():
    torch.manual_seed(0)
    block = TransformerBlock(GroupedQueryAttention(16, 4, 2), 24)
    x, seen = torch.randn(1, 5, 16), []
    out = block(x, layer=3, on_weights=lambda layer, weights: seen.append((layer, tuple(weights.shape))))
    assert seen == [(3, (1, 4, 5, 5))]
    middle = x + block.attention(block.attention_norm(x))
    torch.testing.assert_close(out, middle + block.feed_forward(block.ffn_norm(middle)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"d_model": 32, "n_heads": 8, "n_kv_heads": 3}, r"could be \[1, 2, 4, 8\]"),
        ({"d_model": 32, "n_heads": 8, "n_kv_heads": 0}, "multiple"),
        ({"d_model": 30, "n_heads": 8}, "does not divide into 8 heads"),
        ({"d_model": 32, "n_heads": 8, "window": 0}, "window"),
        ({"d_model": 24, "n_heads": 8, "rope_theta": 1e4}, "even"),
    ],
)
def test_settings_that_cannot_work(arguments, says):
    with pytest.raises(ConfigError, match=says):
        GroupedQueryAttention(**arguments)


def test_input_of_another_width_is_refused():
    with pytest.raises(ShapeError, match=r"\(B, T, 32\); got \(1, 5, 16\)"):
        GroupedQueryAttention(32, 4)(torch.zeros(1, 5, 16))
