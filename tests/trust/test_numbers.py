"""Attention, caches and rotary positions against a few lines in float64, where numbers, dtypes, strides and sizes are unkind."""

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from cached_models import KINDS, QUANTIZED_KINDS, W, in_chunks, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import (
    AttnlabError,
    GroupedQueryAttention,
    KVCache,
    Mistral,
    MistralConfig,
    RollingKVCache,
    causal_mask,
    online_softmax_attention,
    scaled_dot_product_attention,
)
from attnlab.cache import QuantizedKVCache, QuantizedRollingKVCache, quantize_heads, restore_heads
from attnlab.errors import CapacityError, ConfigError, ShapeError
from attnlab.latent import LatentAttention, LatentCache
from attnlab.rotary import apply_rotary, rotary_angles

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEADS = ((1, 1), (4, 4), (4, 2), (6, 3), (6, 2), (4, 1))
thorough = settings(derandomize=True, deadline=None, max_examples=150)
brief = settings(derandomize=True, deadline=None, max_examples=40)


def reference(q, k, v, mask=None, scale=None):
    """softmax(q kᵀ · scale + mask) v in float64, keys and values repeated; a query that may see nothing gets zeros."""
    group_size = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group_size, 1), v.double().repeat_interleave(group_size, 1)
    scores = q @ k.mT * (1 / math.sqrt(q.shape[3]) if scale is None else scale)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
        scores, nothing = scores.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0), scores
        weights = scores.softmax(-1).masked_fill((nothing == -math.inf).all(-1, keepdim=True), 0.0)
    else:
        weights = scores.softmax(-1)
    return weights @ v, weights


def forms(q, k, v, mask=None, scale=None, block_sizes=(1, 3, 256), **causal):
    """The output by every way the package has: the fused one, the readable one, and the one that goes block by block."""
    found = {
        "fused": scaled_dot_product_attention(q, k, v, mask, scale, **causal),
        "readable": scaled_dot_product_attention(q, k, v, mask, scale, **causal, return_weights=True)[0],
    }
    if mask is None:
        for block_size in block_sizes:
            found[f"blocks of {block_size}"] = online_softmax_attention(q, k, v, scale, **causal, block_size=block_size)
    return found


def laid_out(x, layout):
    """The same numbers, elsewhere in memory."""
    if layout == "transposed":  # as a projection leaves them: (B, T, H, D) seen as (B, H, T, D)
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "last dim strided":
        return x.mT.contiguous().mT
    if layout == "every other":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), math.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "part of a buffer":
        wide = torch.full((x.shape[0], x.shape[1], x.shape[2] + 5, x.shape[3]), math.nan, dtype=x.dtype)
        wide[:, :, 2 : 2 + x.shape[2]] = x
        return wide[:, :, 2 : 2 + x.shape[2]]
    return x


def step_of_two_rows(model, x, cache):
    """Row 0 of a cache takes in 2 of its tokens and row 1 takes in 7; what both together give for one more."""
    for row, length in enumerate((2, 7)):
        model(x[row : row + 1, :length], cache.row(row))
    return model(torch.stack([x[0, 2:3], x[1, 7:8]]), cache)


layouts = st.sampled_from(["contiguous", "transposed", "last dim strided", "every other", "part of a buffer"])


@st.composite
def problems(draw, dtypes=DTYPES, sizes=(0, 1, 2, 5, 9)):
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    B, (H, Hkv), T, S = (draw(st.sampled_from(c)) for c in ((0, 1, 2), HEADS, sizes, sizes))
    D, Dv = draw(st.sampled_from([(1, 1), (2, 2), (8, 8), (3, 3), (8, 5)]))
    dtype = draw(st.sampled_from(dtypes))
    x = [torch.randn(s, generator=g).to(dtype) for s in ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv))]
    q, k, v = (laid_out(t, draw(layouts)) for t in x)
    kind = draw(st.sampled_from(["none", "causal", "window", "bool", "float", "bool and causal"]))
    shape = draw(st.sampled_from([(T, S), (1, S), (T, 1), (B, 1, T, S), (1, H, T, S), (B, H, T, S)]))
    noise = torch.randn(shape, generator=g)
    mask, causal = None, {}
    if kind in ("causal", "window"):
        causal = {"causal": True, "window": draw(st.sampled_from([1, 2, 4, 50])) if kind == "window" else None}
    elif kind == "float":
        mask = noise.masked_fill(noise > 0.8, -math.inf).to(draw(st.sampled_from([dtype, torch.float32])))
    elif kind != "none":
        mask = (noise > -0.3) & (causal_mask(T, S) if kind == "bool and causal" else True)
    scale = draw(st.sampled_from([None, 0.0, 1.0, -0.7]))
    return q, k, v, mask, scale, causal


@thorough
@given(problems())
def test_every_form_is_the_definition_whatever_dtype_stride_mask_and_size(problem):
    q, k, v, mask, scale, causal = problem
    seen = causal_mask(q.shape[2], k.shape[2], causal["window"]) if causal else mask
    want, weights = reference(q, k, v, seen, scale)
    eps = torch.finfo(q.dtype).eps
    for form, got in forms(q, k, v, mask, scale, **causal).items():
        assert got.dtype == q.dtype and got.shape == want.shape, form
        torch.testing.assert_close(got.double(), want, atol=16 * eps, rtol=16 * eps, msg=lambda m, f=form: f"{f}: {m}")
    got = scaled_dot_product_attention(q, k, v, mask, scale, **causal, return_weights=True)[1]
    assert got.dtype == q.dtype and got.shape == weights.shape
    torch.testing.assert_close(got.double(), weights, atol=8 * eps, rtol=8 * eps)


def test_keys_and_values_that_are_one_row_seen_many_times_are_read_in_place():
    q, row = torch.randn(2, 4, 3, 8), torch.randn(1, 1, 5, 8)
    k, v = row.expand(2, 2, 5, 8), row.flip(2).expand(2, 2, 5, 8)
    want, _ = reference(q, k, v)
    for form, got in forms(q, k, v).items():
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-5, msg=lambda m, f=form: f"{f}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("Dv", [16, 8])
@pytest.mark.parametrize("causal", [{}, {"causal": True}, {"causal": True, "window": 3}])
def test_ten_thousandfold_inputs_in_half_precision_pick_the_largest_score(dtype, heads, Dv, causal):
    """Scores are of the order of 1e8, a thousand times what float16 can hold. A softmax over them picks one key."""
    g = torch.Generator().manual_seed(0)
    q, k = (1e4 * torch.randn(2, h, 9, 16, generator=g).clamp(-6, 6) for h in heads)
    q, k, v = q.to(dtype), k.to(dtype), (1e4 * torch.rand(2, heads[1], 9, Dv, generator=g)).to(dtype)
    want, weights = reference(q, k, v, causal_mask(9, 9, causal.get("window")) if causal else None)
    assert weights.max(-1).values.min() == 1  # no two scores are near: rounding in float32 decides nothing
    for form, got in forms(q, k, v, **causal).items():
        assert torch.equal(got.double(), want), form


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_numbers_give_their_average_or_zero_and_nothing_else(dtype):
    least = torch.finfo(dtype).smallest_normal / 8
    g = torch.Generator().manual_seed(0)
    q, k, v = (least * torch.rand(1, 2, 4, 8, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    assert (v > 0).any() and v.max() < torch.finfo(dtype).smallest_normal
    want, _ = reference(q, k, v)  # scores are zero: the plain average
    for form, got in forms(q, k, v).items():
        assert ((got.double() - want).abs() <= torch.finfo(dtype).smallest_normal).all(), form


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("causal", [{}, {"causal": True}, {"causal": True, "window": 3}])
def test_what_is_not_finite_in_one_query_stays_in_its_row(bad, heads, causal):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 6, 8, generator=g) for h in (heads[0], heads[1], heads[1]))
    clean = forms(q, k, v, **causal)
    q[1, 2, 4, 3] = bad
    for form, got in forms(q, k, v, **causal).items():
        others = torch.ones(2, heads[0], 6, dtype=torch.bool)
        others[1, 2, 4] = False
        torch.testing.assert_close(got[others], clean[form][others], msg=lambda m, f=form: f"{f}: {m}")
        if math.isnan(bad):  # torch's kernel for CPUs takes a row of nothing but NaN for one with nothing to see
            assert got[1, 2, 4].isnan().all() or (form == "fused" and not got[1, 2, 4].any()), form


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("causal", [{}, {"causal": True}, {"causal": True, "window": 3}])
def test_nan_in_a_key_or_value_reaches_all_who_see_it_and_no_other_group(where, heads, causal):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 6, 8, generator=g) for h in (heads[0], heads[1], heads[1]))
    clean = forms(q, k, v, **causal)
    (k if where == "key" else v)[1, 0, 2, 5] = math.nan
    group_size = heads[0] // heads[1]
    sees = causal_mask(6, window=causal.get("window"))[:, 2] if causal else torch.ones(6, dtype=torch.bool)
    for form, got in forms(q, k, v, **causal).items():
        assert got[1, :group_size][:, sees][..., 5].isnan().all(), form
        torch.testing.assert_close(got[0], clean[form][0])
        torch.testing.assert_close(got[1, group_size:], clean[form][1, group_size:])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_mask_with_infinity_or_nan_spoils_its_row_alone(bad):
    q, k, v = (torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.zeros(5, 5)
    clean = forms(q, k, v, mask)
    mask[2, 3] = bad
    for form, got in forms(q, k, v, mask).items():
        assert got[:, :, 2].isnan().all(), form
        torch.testing.assert_close(got[:, :, [0, 1, 3, 4]], clean[form][:, :, [0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("never", [-1e9, torch.finfo(torch.float32).min, -math.inf])
def test_a_large_negative_float_mask_hides_in_every_dtype(dtype, never):
    """The way of other libraries. In float16 -1e9 is past the range; a row of nothing else must still be numbers."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 4, 6, 8, generator=g).to(dtype) for _ in range(3))
    mask = torch.zeros(6, 6).masked_fill(~causal_mask(6), never)
    want, _ = reference(q, k, v, causal_mask(6))
    mask[5] = never
    for form, got in forms(q, k, v, mask).items():
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got[:, :, :5].double(), want[:, :, :5], atol=16 * eps, rtol=16 * eps)
        assert got.isfinite().all(), form
        assert (got[:, :, 5] == 0).all() == (never == -math.inf), form


# ---- gradients --------------------------------------------------------------------------------------------------------


@brief
@given(problems(dtypes=(torch.float64,), sizes=(1, 3)))
def test_gradients_are_those_of_finite_differences_also_where_a_query_sees_nothing(problem):
    q, k, v, mask, scale, causal = problem
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    ways = [
        lambda *x: scaled_dot_product_attention(*x, mask, scale, **causal),
        lambda *x: scaled_dot_product_attention(*x, mask, scale, **causal, return_weights=True),
    ]
    if mask is None:
        ways.append(lambda *x: online_softmax_attention(*x, scale, **causal, block_size=2))
    for way in ways:
        assert torch.autograd.gradcheck(way, (q, k, v))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (2, 1)])
def test_a_float_mask_that_is_learned_gets_its_gradient(heads):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 3, 4, generator=g, dtype=torch.float64).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    )
    mask = torch.randn(1, heads[0], 3, 3, generator=g, dtype=torch.float64).requires_grad_()
    for weights in (False, True):
        assert torch.autograd.gradcheck(
            lambda *x, w=weights: scaled_dot_product_attention(*x, return_weights=w), (q, k, v, mask)
        )


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_the_gradient_of_a_rotation_is_the_rotation_back(layout):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    angles = rotary_angles(torch.tensor([[0, 1, 2, 3], [9, 5, 7, 70]]), 6)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, *angles, layout), (x,))


# ---- sizes and dtypes that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [scaled_dot_product_attention, online_softmax_attention])
@pytest.mark.parametrize(
    ("dtypes", "said"),
    [
        ((torch.float32, torch.bfloat16, torch.bfloat16), "float32, torch.bfloat16 and torch.bfloat16"),
        ((torch.float16, torch.float16, torch.float32), "float16, torch.float16 and torch.float32"),
        ((torch.int64, torch.int64, torch.int64), "int64"),
        ((torch.complex64, torch.complex64, torch.complex64), "complex64"),
    ],
)
def test_dtypes_that_differ_or_are_no_floats_are_refused_by_every_form(attend, dtypes, said):
    q, k, v = (torch.ones(1, 2, 3, 4).to(dtype) for dtype in dtypes)
    with pytest.raises(ShapeError, match=said):
        attend(q, k, v)
    if attend is scaled_dot_product_attention:
        with pytest.raises(ShapeError, match=said):
            attend(q, k, v, return_weights=True)


def test_heads_of_no_size_are_refused_and_values_of_none_give_none():
    nothing = torch.zeros(1, 2, 3, 0)
    for attend in (scaled_dot_product_attention, online_softmax_attention):
        with pytest.raises(ShapeError, match="1 or more"):
            attend(nothing, nothing, nothing)
    q = torch.randn(1, 2, 3, 4)
    assert all(got.shape == (1, 2, 3, 0) for got in forms(q, q, nothing).values())
    none = torch.randn(1, 0, 3, 4)
    assert all(got.shape == (1, 0, 3, 4) for got in forms(none, q, q).values())


# ---- rotary positions -------------------------------------------------------------------------------------------------


def turned(x, positions, theta, layout):
    """Pairs as complex numbers, times e^(i · position · θ^(-2i/D)), in float64."""
    half = x.shape[-1] // 2
    angles = positions.double()[..., None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = (x[..., :half], x[..., half:]) if layout == "halves" else (x[..., ::2], x[..., 1::2])
    points = torch.complex(first.double(), second.double()) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-3)
    parts = (points.real, points.imag)
    return torch.cat(parts, -1) if layout == "halves" else torch.stack(parts, -1).flatten(-2)


@thorough
@given(
    sizes=st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([0, 1, 3]), st.sampled_from([0, 1, 5]), st.integers(1, 8)),
    dtype=st.sampled_from(DTYPES), memory=layouts, pairs=st.sampled_from(["halves", "interleaved"]),
    per_row=st.booleans(), theta=st.sampled_from([1.0, 1e4, 1e6]), far=st.sampled_from([3, 4096, 1_000_000]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_rotation_is_a_product_of_complex_numbers_whatever_dtype_stride_and_size(
    sizes, dtype, memory, pairs, per_row, theta, far, seed
):
    (B, H, T, half), g = sizes, torch.Generator().manual_seed(seed)
    x = laid_out(torch.randn(B, H, T, 2 * half, generator=g).to(dtype), memory)
    positions = torch.randint(0, far, (B, T) if per_row else (T,), generator=g)
    got = apply_rotary(x, *rotary_angles(positions, 2 * half, theta), pairs)
    assert got.shape == x.shape and got.dtype == dtype
    off = 4 * torch.finfo(dtype).eps + 2e-7 * (
        1 + far
    )  # angles are float32, as in every implementation we compare with
    torch.testing.assert_close(got.double(), turned(x, positions, theta, pairs), atol=4 * off, rtol=0)


@pytest.mark.parametrize(
    ("cos", "sin"),
    [
        ((3, 5, 4), (3, 5, 4)),
        ((5, 4), (5, 3)),
        ((5, 4), (1, 4)),
        ((2, 5, 4), (5, 4)),
        ((4,), (4,)),
        ((2, 1, 5, 4),) * 2,
    ],
)
def test_angles_of_another_shape_never_broadcast_in_silence(cos, sin):
    with pytest.raises(ShapeError, match="expected cos and sin"):
        apply_rotary(torch.zeros(2, 3, 5, 8), torch.ones(cos), torch.zeros(sin))
    with pytest.raises(ShapeError, match="expected cos and sin"):  # one row of x would have become three
        apply_rotary(torch.zeros(1, 3, 5, 8), torch.ones(3, 5, 4), torch.zeros(3, 5, 4))


# ---- latent attention -------------------------------------------------------------------------------------------------


def latent_layer(H=4, c=6, R=4, D=5, causal=True, seed=0):
    torch.manual_seed(seed)
    layer = LatentAttention(12, H, c, R, D, causal=causal).double()
    torch.nn.init.normal_(layer.norm.weight)  # as trained, no longer ones
    return layer


def latent_reference(layer, x):
    """Equations 9 to 19 of arXiv 2405.04434 in float64, for all heads at once; the rotation as a complex factor."""
    w = {name: weight.double() for name, weight in layer.state_dict().items()}
    B, T, _ = x.shape
    H, D, c, R = layer.n_heads, layer.head_dim, layer.d_latent, layer.d_rope
    q = (x @ w["q_proj.weight"].T).view(B, T, H, D + R).transpose(1, 2)
    latent, shared = (x @ w["down_proj.weight"].T).split([c, R], -1)
    latent = latent / (latent.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt() * w["norm.weight"]
    k, v = ((latent @ w[f"{name}.weight"].T).view(B, T, H, D).transpose(1, 2) for name in ("k_up", "v_up"))
    turns = torch.arange(T)[:, None] * layer.rope_theta ** (-torch.arange(0, R, 2).double() / max(R, 1))

    def turned(y):  # halves: number i and number i + R / 2 are one complex number
        z = torch.complex(y[..., : R // 2], y[..., R // 2 :]) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((z.real, z.imag), -1)

    q = torch.cat((q[..., :D], turned(q[..., D:])), -1)
    k = torch.cat((k, turned(shared)[:, None].expand(B, H, T, R)), -1)
    out, weights = reference(q, k, v, causal_mask(T, T) if layer.causal else None)
    return out.transpose(1, 2).reshape(B, T, H * D) @ w["o_proj.weight"].T, weights


@brief
@given(st.data())
@torch.no_grad()
def test_latent_attention_is_its_definition_both_ways_whatever_dtype_stride_and_size(data):
    B, T, H = (data.draw(st.sampled_from(choices)) for choices in ((0, 1, 2), (0, 1, 2, 7), (1, 3, 4)))
    c, R, D = (data.draw(st.sampled_from(choices)) for choices in ((1, 6, 20), (0, 2, 8), (1, 5)))
    dtype = data.draw(st.sampled_from(DTYPES))
    layer = latent_layer(H, c, R, D, data.draw(st.booleans()), data.draw(st.integers(0, 99))).to(dtype)
    x = torch.randn(B, T, 12, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).to(dtype)
    if data.draw(st.booleans()):
        x = x.mT.contiguous().mT
    want, weights = latent_reference(layer, x.double())
    largest = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    off = 64 * torch.finfo(dtype).eps  # six roundings one after another
    if dtype == torch.float64:  # the angles are in float32
        off = 1e-6
    for absorb in (False, True):
        got, seen = layer(x, absorb=absorb, return_weights=True)
        assert got.dtype == seen.dtype == dtype and got.shape == x.shape and seen.shape == (B, H, T, T)
        for one in (got, layer(x, absorb=absorb)):
            torch.testing.assert_close(one.double(), want, atol=off * largest, rtol=0)
        torch.testing.assert_close(seen.double(), weights, atol=off, rtol=0)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("R", [0, 4])
def test_gradients_of_latent_attention_are_those_of_finite_differences(absorb, R):
    layer = latent_layer(H=2, c=3, R=R, D=2)
    x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    names, weights = zip(*layer.named_parameters(), strict=True)

    def call(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,), {"absorb": absorb})

    assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_latent_attention_takes_ten_thousandfold_inputs_in_half_precision(dtype, absorb):
    """The norm takes the factor out of keys and values; queries and rotary keys keep it, and a softmax picks one key."""
    layer = latent_layer().to(dtype)
    x = (1e4 * torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(2))).to(dtype)
    got, weights = layer(x, absorb=absorb, return_weights=True)
    assert got.isfinite().all() and weights.isfinite().all()
    torch.testing.assert_close(weights.double().sum(-1), torch.ones(2, 4, 7).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@torch.no_grad()
def test_what_is_not_finite_in_one_token_of_a_latent_layer_reaches_all_who_see_it_and_no_other_row(bad, absorb):
    layer = latent_layer().float()
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(3))
    whole = layer(x, absorb=absorb)
    x[0, 4, 2] = bad
    got = layer(x, absorb=absorb)
    torch.testing.assert_close(got[1], whole[1], atol=1e-5, rtol=0)
    assert got[0, 4:].isnan().all()


def taken_in(layer, x, cache, absorb=False):
    """What a latent layer gives for ``x``, which its cache then counts, as a model does by itself."""
    out = layer(x, cache=cache, absorb=absorb)
    cache.advance(x.shape[1])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absorb", [False, True])
@torch.no_grad()
def test_a_latent_cache_gives_prefill_decode_and_chunks_the_same_numbers_in_every_dtype(dtype, absorb):
    layer = latent_layer().to(dtype)
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(4)).to(dtype)
    whole = layer(x)
    for chunk in (1, 2, 4, 8):
        cache, out = LatentCache(1, 2, layer.d_latent, layer.d_rope, 9, dtype=dtype), []
        for part in (x[:, :0], *x.split(chunk, 1), x[:, :0]):  # no tokens change nothing
            out.append(taken_in(layer, part, cache, absorb))
        off = 64 * torch.finfo(dtype).eps * float(whole.abs().max())
        torch.testing.assert_close(torch.cat(out, 1), whole, atol=off, rtol=0)


@torch.no_grad()
def test_a_latent_conversation_that_went_to_nan_leaves_nothing_to_the_next():
    layer = latent_layer().float()
    x = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(5))
    cache = LatentCache(1, 2, layer.d_latent, layer.d_rope, 9)
    cache.k.fill_(math.nan)
    cache.advance(3)
    cache.row(0).clear()
    assert cache.lengths.tolist() == [0, 3] and not cache.v[:, 0].any() and cache.v[:, 1].isnan().all()
    cache.clear()
    got = step_of_two_rows(partial(taken_in, layer), x, cache)
    torch.testing.assert_close(got[0, 0], layer(x[:1, :3])[0, -1], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1, 0], layer(x[1:, :8])[0, -1], atol=1e-5, rtol=0)


# ---- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefill_decode_and_chunks_around_the_window_agree_in_every_dtype(dtype, kind):
    model = small_model(dtype=dtype)
    ids = torch.randint(0, 31, (2, 2 * W + 1), generator=torch.Generator().manual_seed(4))
    whole = model(ids)
    for chunk in (1, W - 1, W, W + 1, 2 * W):
        off = 32 * torch.finfo(dtype).eps * float(whole.abs().max())
        if dtype == torch.float64:  # the angles are in float32
            off = 1e-6
        torch.testing.assert_close(in_chunks(model, ids, chunk, **kind)[0], whole, atol=off, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_may_keep_another_dtype_than_the_model_computes_in(kind):
    model = small_model()
    ids = torch.randint(0, 31, (2, 2 * W + 1), generator=torch.Generator().manual_seed(5))
    whole = model(ids)
    by_chunk = [in_chunks(model, ids, chunk, dtype=torch.bfloat16, **kind)[0] for chunk in (1, 3, W, W + 1, 2 * W)]
    for got in by_chunk:
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got, by_chunk[0], atol=2e-6, rtol=1e-5
        )  # a prompt sees what its tokens one by one see
        assert 0 < (got - whole).abs().max() < 0.05 * whole.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_conversation_that_went_to_nan_leaves_nothing_to_the_next(kind):
    """Rows beside each other read masked slots with a weight of 0, and 0 · NaN is NaN: a row is cleared for the next."""
    model = small_model()
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(6))
    cache = model.new_cache(2, 64, **kind)
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    cache.advance(3)
    cache.row(0).clear()
    assert cache.lengths.tolist() == [0, 3] and not cache.k[:, 0].any() and cache.k[:, 1].isnan().all()
    cache.clear()
    got = step_of_two_rows(model, ids, cache)
    torch.testing.assert_close(got[0], model(ids[:1, :3])[0, -1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], model(ids[1:, :8])[0, -1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [0, -1, 2.5, 2.0, "8", None, math.nan])
def test_sizes_of_a_cache_are_whole_numbers(size):
    for place in range(5):
        sizes = [1, 1, 1, 4, 8]
        sizes[place] = size
        with pytest.raises(ConfigError, match="of 1 or more"):
            KVCache(*sizes)


def test_a_full_cache_refuses_in_a_layer_without_rotary_positions_too():
    layer = GroupedQueryAttention(8, 2, 1)
    cache = KVCache(1, 1, 1, 4, max_len=3)
    x = torch.randn(1, 5, 8)
    for t in range(3):
        layer(x[:, t : t + 1], cache=cache)
        cache.advance(1)
    kept = cache.k.clone()
    with pytest.raises(CapacityError, match="holds 3 tokens a row, 3 are in it and 1 more came"):
        layer(x[:, 3:4], cache=cache)
    assert torch.equal(cache.k, kept)


@pytest.mark.parametrize("cache", [KVCache(1, 2, 2, 4, max_len=8), RollingKVCache(1, 2, 2, 4, window=8)], ids=repr)
@pytest.mark.parametrize(
    ("k", "v"),
    [((2, 2, 3, 4), (2, 2, 1, 4)), ((2, 2, 3, 4), (2, 1, 3, 4)), ((2, 2, 3, 4), (1, 2, 3, 4)), ((2, 2, 3, 4), (2, 2, 3, 1)), ((2, 3, 4),) * 2],
)  # fmt: skip
def test_keys_and_values_of_different_sizes_never_broadcast_in_silence(cache, k, v):
    with pytest.raises(ShapeError, match="this cache takes"):
        cache.update(0, torch.zeros(k), torch.zeros(v))
    assert not cache.v.any() and cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("kind", [KVCache, RollingKVCache, QuantizedKVCache, QuantizedRollingKVCache])
@pytest.mark.parametrize("seen", [0, 3, 9])
def test_no_new_tokens_change_nothing(kind, seen):
    cache = kind(1, 2, 1, 4, W if issubclass(kind, RollingKVCache) else 16)
    for t in range(seen):
        x = torch.full((2, 1, 1, 4), float(t))
        cache.update(0, x, x)
        cache.advance(1)
    before = cache.k.clone()
    empty = torch.zeros(2, 1, 0, 4)
    k, v, sees = cache.update(0, empty, empty)
    cache.advance(0)
    assert scaled_dot_product_attention(empty, k, v, **sees).shape == (2, 1, 0, 4)
    assert torch.equal(cache.k, before) and cache.lengths.tolist() == [seen, seen]


# ---- caches in int8 ---------------------------------------------------------------------------------------------------


@thorough
@given(st.data())
def test_a_packed_vector_is_within_half_its_scale_whatever_dtype_layout_and_magnitude(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = [data.draw(st.sampled_from(choices)) for choices in ((0, 1, 2), (1, 3), (0, 1, 4), (1, 2, 7, 32))]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    size = data.draw(st.sampled_from([0.0, 1e-40, 1e-7, 1.0, 1e4]))
    x = laid_out((x * size).to(dtype), data.draw(layouts))
    packed = quantize_heads(x)
    assert packed.dtype == torch.int8 and packed.shape == (*shape[:3], shape[3] + 2)
    restored = restore_heads(packed, torch.float64)
    scale = (x.double().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.bfloat16).tiny)
    assert ((restored - x.double()).abs() <= 0.51 * scale).all()  # the scale itself is rounded by up to 2^-9
    assert restore_heads(packed, dtype).isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_in_one_packed_head_is_nan_there_and_nowhere_else(bad):
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    whole = restore_heads(quantize_heads(x))
    x[1, 2, 3, 5] = bad
    got = restore_heads(quantize_heads(x))
    assert got[1, 2, 3].isnan().any()  # it is not lost in the rounding
    got[1, 2, 3] = whole[1, 2, 3]
    assert torch.equal(got, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
@torch.no_grad()
def test_in_int8_prefill_decode_and_chunks_around_the_window_agree_in_every_dtype(dtype, kind):
    model = small_model(dtype=dtype)
    ids = torch.randint(0, 31, (2, 2 * W + 1), generator=torch.Generator().manual_seed(4))
    by_chunk = [in_chunks(model, ids, chunk, **kind)[0] for chunk in (2 * W + 1, 1, W - 1, W, W + 1, 2 * W)]
    largest = float(by_chunk[0].abs().max())
    off = max(1e-3, 64 * torch.finfo(dtype).eps) * largest  # a number may round to the other side
    for got in by_chunk:
        assert got.dtype == dtype
        torch.testing.assert_close(got, by_chunk[0], atol=off, rtol=0)
    assert (by_chunk[0] - model(ids)).abs().max() < max(0.05, 64 * torch.finfo(dtype).eps) * largest


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
@torch.no_grad()
def test_a_conversation_in_int8_that_went_to_nan_leaves_nothing_to_the_next(kind):
    model = small_model()
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(6))
    cache = model.new_cache(2, 64, **kind)
    nan = quantize_heads(torch.full((4,), math.nan))
    assert restore_heads(nan).isnan().all()
    cache.k[:], cache.v[:] = nan, nan
    cache.clear()
    got = step_of_two_rows(model, ids, cache)
    for i, length in enumerate((2, 7)):
        alone = in_chunks(model, ids[i : i + 1, : length + 1], [length, 1], **kind)[0][0, -1:]
        torch.testing.assert_close(got[i], alone, atol=1e-3, rtol=0)


# ---- threads ----------------------------------------------------------------------------------------------------------


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
def test_two_threads_change_the_numbers_by_rounding_alone(dtype, heads):
    """Sums are cut otherwise. Stated tolerance: 8 steps of the dtype at 1, as values here are of that order."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 200, 32, generator=g).to(dtype) for h in (heads[0], heads[1], heads[1]))
    with threads(1):
        one = forms(q, k, v, causal=True, block_sizes=(64,))
    with threads(2):
        two = forms(q, k, v, causal=True, block_sizes=(64,))
    for form in one:
        torch.testing.assert_close(one[form], two[form], atol=8 * torch.finfo(dtype).eps, rtol=0)


@torch.no_grad()
def test_a_model_gives_the_same_logits_on_one_thread_and_on_two():
    torch.manual_seed(0)
    model = Mistral(
        MistralConfig(vocab_size=200, d_model=128, n_layers=3, n_heads=8, n_kv_heads=2, d_ff=256, window=40)
    )
    ids = torch.randint(0, 200, (2, 100))
    with threads(1):
        one = model(ids)
    with threads(2):
        two = model(ids)
    torch.testing.assert_close(one, two, atol=1e-5 * float(one.abs().max()), rtol=0)


# ---- one exception, whatever is handed over ---------------------------------------------------------------------------


@thorough
@given(st.data())
def test_any_three_tensors_give_an_output_of_the_promised_shape_or_one_of_our_errors(data):
    def size():
        return data.draw(st.sampled_from([0, 1, 2, 3, 4]))

    def tensor():
        shape = [size() for _ in range(data.draw(st.sampled_from([3, 4, 4, 4, 4])))]
        return torch.zeros(shape, dtype=data.draw(st.sampled_from([torch.float32] * 6 + [torch.float16, torch.int32])))

    if data.draw(st.booleans()):  # three that nearly fit
        q = torch.zeros(size(), size(), size(), size())
        k = torch.zeros(q.shape[0], data.draw(st.sampled_from([1, 2])), size(), q.shape[3])
        v = torch.zeros(*k.shape[:3], size())
    else:
        q, k, v = tensor(), tensor(), tensor()
    mask = data.draw(st.sampled_from([None, None, torch.bool, torch.float32, torch.int32]))
    if mask is not None:
        mask = torch.zeros([size() for _ in range(data.draw(st.integers(0, 5)))], dtype=mask)
    causal = data.draw(st.booleans())
    window = data.draw(st.sampled_from([None, None, 0, 1, 3]))
    for attend in (scaled_dot_product_attention, online_softmax_attention):
        options = {"causal": causal, "window": window}
        if attend is scaled_dot_product_attention:
            options |= {"mask": mask, "return_weights": data.draw(st.booleans())}
        try:
            got = attend(q, k, v, **options)
        except AttnlabError:
            continue
        got = got[0] if isinstance(got, tuple) else got
        assert got.shape == (*q.shape[:3], v.shape[3]) and got.isfinite().all()
