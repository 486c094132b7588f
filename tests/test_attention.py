"""attention.py against its definition in float64, against torch, and against itself by other ways."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab.attention import causal_mask, online_softmax_attention, scaled_dot_product_attention, visible
from attnlab.errors import ConfigError, ShapeError


def make(B=2, H=8, Hkv=2, T=5, S=7, D=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, n, D, generator=g).to(dtype) for h, n in ((H, T), (Hkv, S), (Hkv, S)))
    return q, k, v


def by_loops(q, k, v, mask, scale):
    """One query, one head, one key at a time, in float64: as slow and as plain as the formula."""
    (B, H, T, _), (Hkv, S) = q.shape, k.shape[1:3]
    out, weights = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64), torch.zeros(B, H, T, S, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(S) if mask is None or mask[t, s]]
                if not seen:
                    continue
                head = h // (H // Hkv)
                scores = [math.fsum((q[b, h, t].double() * k[b, head, s].double()).tolist()) * scale for s in seen]
                top = max(scores)
                powers = [math.exp(score - top) for score in scores]
                for s, power in zip(seen, powers, strict=True):
                    weights[b, h, t, s] = power / math.fsum(powers)
                    out[b, h, t] += weights[b, h, t, s] * v[b, head, s].double()
    return out, weights


shapes = st.tuples(
    st.integers(1, 2), st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 3), (4, 1)]), st.integers(1, 6), st.integers(1, 6)
)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, causal=st.booleans(), window=st.sampled_from([None, 1, 2, 3, 50]), seed=st.integers(0, 99))
def test_both_paths_equal_the_definition(shape, causal, window, seed):
    B, (H, Hkv), T, S = shape
    q, k, v = make(B, H, Hkv, T, S, D=4, seed=seed)
    window = window if causal else None
    out, weights = by_loops(q, k, v, causal_mask(T, S, window) if causal else None, 1 / math.sqrt(4))
    slow, slow_weights = scaled_dot_product_attention(q, k, v, causal=causal, window=window, return_weights=True)
    fast = scaled_dot_product_attention(q, k, v, causal=causal, window=window)
    blocks = online_softmax_attention(q, k, v, causal=causal, window=window, block_size=2)
    for got in (slow, fast, blocks):
        torch.testing.assert_close(got.double(), out, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(slow_weights.double(), weights, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("n_kv_heads", [8, 4, 2, 1])
def test_equals_torch_with_repeated_heads(n_kv_heads):
    q, k, v = make(Hkv=n_kv_heads)
    want = F.scaled_dot_product_attention(q, *(x.repeat_interleave(8 // n_kv_heads, 1) for x in (k, v)))
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), want)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, return_weights=True)[0], want)


@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 7), (1, 5, 7), (2, 1, 5, 7), (2, 8, 5, 7), (8, 1, 7), (5, 1), (1, 1, 1, 7)]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("n_kv_heads", [8, 2, 1])
def test_masks_of_every_shape_on_both_paths(shape, kind, n_kv_heads):
    q, k, v = make(Hkv=n_kv_heads)
    g = torch.Generator().manual_seed(1)
    mask = torch.randn(shape, generator=g)
    mask = mask > -0.5 if kind == "bool" else mask
    scores = q @ k.repeat_interleave(8 // n_kv_heads, 1).mT / 4
    scores = scores.masked_fill(~mask, -math.inf) if kind == "bool" else scores + mask
    want = scores.softmax(-1).nan_to_num(0) @ v.repeat_interleave(8 // n_kv_heads, 1)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), want)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask, return_weights=True)[0], want)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("T", [1, 3])
def test_a_row_with_every_key_masked_gives_zeros(n_kv_heads, kind, T):
    q, k, v = make(H=4, Hkv=n_kv_heads, T=T, S=6)
    mask = torch.ones(T, 6, dtype=torch.bool)
    mask[0] = False
    mask = mask if kind == "bool" else torch.zeros(T, 6).masked_fill(~mask, -math.inf)
    for out in (
        scaled_dot_product_attention(q, k, v, mask),
        *scaled_dot_product_attention(q, k, v, mask, return_weights=True),
    ):
        assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
        assert torch.isfinite(out).all()
        if T > 1:
            assert out[:, :, 1:].abs().sum() > 0


def test_more_queries_than_keys_leaves_the_first_with_nothing():
    q, k, v = make(T=5, S=3)
    for got in (
        scaled_dot_product_attention(q, k, v, causal=True),
        online_softmax_attention(q, k, v, causal=True),
        scaled_dot_product_attention(q, k, v, causal=True, return_weights=True)[0],
    ):
        assert torch.equal(got[:, :, :2], torch.zeros_like(got[:, :, :2]))
        assert (got[:, :, 2:].abs().sum(-1) > 0).all()


def test_gradients_agree_between_the_paths():
    q, k, v = (x.double().requires_grad_() for x in make(T=6, S=6, D=4))
    torch.autograd.gradcheck(lambda *x: scaled_dot_product_attention(*x, causal=True, window=3), (q, k, v))
    slow = torch.autograd.grad(
        scaled_dot_product_attention(q, k, v, causal=True, return_weights=True)[0].sum(), (q, k, v)
    )
    fast = torch.autograd.grad(scaled_dot_product_attention(q, k, v, causal=True).sum(), (q, k, v))
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_where_scores_are_large(dtype):
    q, k, v = make(D=64, dtype=dtype)
    q, k = q * 50, k * 50  # scores of thousands, past float16's 65,504 before the scale
    out, weights = scaled_dot_product_attention(q, k, v, return_weights=True)
    assert torch.isfinite(out).all() and torch.isfinite(weights).all()
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 8, 5), atol=1e-2, rtol=0)


def test_mask_aligns_the_last_query_with_the_last_key():
    assert causal_mask(3).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(1, 4).all()
    assert causal_mask(2, 4, window=2).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("window", [1, 2, 5])
def test_window_counts_keys_the_querys_own_included(window):
    counts = causal_mask(20, window=window).sum(-1)
    assert counts.tolist() == [min(i + 1, window) for i in range(20)]
    positions = torch.arange(20)
    assert torch.equal(visible(positions, positions, window), causal_mask(20, window=window))
    assert not visible(positions, torch.tensor([-1])).any()  # an empty slot


def test_the_fused_path_copies_no_keys():
    q, k, v = make(B=1, H=32, Hkv=1, T=1, S=4096, D=64)
    with torch.profiler.profile(profile_memory=True) as profile:
        scaled_dot_product_attention(q, k, v)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert taken < 0.25 * (k.nbytes + v.nbytes)  # repeating for 32 heads would take 32 times


def test_zero_queries_or_keys():
    q, k, v = make(T=0)
    assert scaled_dot_product_attention(q, k, v).shape == (2, 8, 0, 16)
    q, k, v = make(S=0)
    for got in (scaled_dot_product_attention(q, k, v), online_softmax_attention(q, k, v)):
        assert torch.equal(got, torch.zeros(2, 8, 5, 16))
    assert torch.equal(
        scaled_dot_product_attention(q, k, v, causal=True, return_weights=True)[0], torch.zeros(2, 8, 5, 16)
    )


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (((2, 8, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), "multiple"),
        (((2, 8, 5, 16), (2, 2, 7, 8), (2, 2, 7, 8)), "one size"),
        (((2, 8, 5, 16), (2, 2, 7, 16), (2, 2, 6, 16)), "same heads and length"),
        (((2, 8, 5, 16), (1, 2, 7, 16), (1, 2, 7, 16)), "one batch size"),
        (((8, 5, 16), (2, 7, 16), (2, 7, 16)), "expected q"),
    ],
)
def test_shapes_that_do_not_fit_say_what_came(shapes, says):
    with pytest.raises(ShapeError, match=says) as error:
        scaled_dot_product_attention(*(torch.zeros(s) for s in shapes))
    assert str(shapes[1]) in str(error.value) or "multiple" in says
    assert isinstance(error.value, attnlab.AttnlabError)


def test_settings_that_cannot_work():
    q, k, v = make()
    for window in (0, -1, True, 2.5):
        with pytest.raises(ConfigError, match="window"):
            scaled_dot_product_attention(q, k, v, causal=True, window=window)
    with pytest.raises(ConfigError, match="causal=True"):
        scaled_dot_product_attention(q, k, v, window=3)
    with pytest.raises(ConfigError, match="either a mask or causal"):
        scaled_dot_product_attention(q, k, v, causal_mask(5, 7), causal=True)
    with pytest.raises(ShapeError, match="mask must broadcast"):
        scaled_dot_product_attention(q, k, v, torch.ones(7, 5, dtype=torch.bool))
    with pytest.raises(ShapeError, match="boolean"):
        scaled_dot_product_attention(q, k, v, torch.ones(5, 7, dtype=torch.int))
    with pytest.raises(ConfigError, match="block_size"):
        online_softmax_attention(q, k, v, block_size=0)
