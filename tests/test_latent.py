"""latent.py: the same numbers with and without absorption, the cache in bytes, and the operations counted."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from attnlab import memory
from attnlab.attention import causal_mask, scaled_dot_product_attention
from attnlab.errors import CapacityError, ConfigError, ShapeError
from attnlab.latent import LatentAttention, LatentCache
from attnlab.layers import TransformerBlock
from attnlab.rotary import apply_rotary, rotary_angles

SIZES = {"d_model": 24, "n_heads": 4, "d_latent": 10, "d_rope": 4, "head_dim": 6}


def layer(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    made = LatentAttention(**SIZES | changes).to(dtype)
    torch.nn.init.normal_(made.norm.weight)  # as trained, no longer ones
    return made.requires_grad_(False)


def tokens(T, batch=2, dtype=torch.float32, seed=1):
    return torch.randn(batch, T, SIZES["d_model"], generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cache(made, batch=2, max_len=32, dtype=torch.float32):
    return LatentCache(1, batch, made.d_latent, made.d_rope, max_len, dtype=dtype)


def in_chunks(made, x, sizes, absorb):
    kept, out = cache(made, x.shape[0], dtype=x.dtype), []
    for chunk in x.split(sizes, dim=1):
        out.append(made(chunk, cache=kept, absorb=absorb))
        kept.advance(chunk.shape[1])
    return torch.cat(out, 1)


def by_definition(made, x):
    """Equations 9 to 19 of the paper, head by head and query by query, without its compression of queries."""
    B, T, _ = x.shape
    H, D, c, R = made.n_heads, made.head_dim, made.d_latent, made.d_rope
    latent, shared = made.down_proj(x).split([c, R], dim=-1)
    latent = made.norm(latent)
    q = made.q_proj(x).view(B, T, H, D + R)
    k, v = made.k_up(latent).view(B, T, H, D), made.v_up(latent).view(B, T, H, D)

    def turned(vector, at):  # (B, R)
        return apply_rotary(vector[:, None, None], *rotary_angles(torch.tensor([at]), R))[:, 0, 0]

    heads = []
    for h in range(H):
        out = []
        for t in range(T):
            scores = torch.stack(
                [
                    (q[:, t, h, :D] * k[:, j, h]).sum(-1)
                    + (turned(q[:, t, h, D:], t) * turned(shared[:, j], j)).sum(-1)
                    for j in range(t + 1)
                ],
                dim=-1,
            )
            weights = (scores / (D + R) ** 0.5).softmax(-1)  # (B, t + 1)
            out.append((weights[..., None] * v[:, : t + 1, h]).sum(1))
        heads.append(torch.stack(out, 1))  # (B, T, D)
    return made.o_proj(torch.cat(heads, -1))


@pytest.mark.parametrize("absorb", [False, True])
def test_both_ways_are_the_papers_equations(absorb):
    made, x = layer(torch.float64), tokens(7, dtype=torch.float64)
    torch.testing.assert_close(made(x, absorb=absorb), by_definition(made, x), atol=1e-12, rtol=1e-10)


@settings(deadline=None, max_examples=25)
@given(
    T=st.integers(1, 9),
    n_heads=st.sampled_from([1, 3, 4]),
    d_latent=st.sampled_from([1, 5, 40]),
    d_rope=st.sampled_from([0, 2, 8]),
)
def test_absorbed_or_not_the_numbers_are_the_same(T, n_heads, d_latent, d_rope):
    sizes = {"n_heads": n_heads, "d_latent": d_latent, "d_rope": d_rope}
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        made, x = layer(dtype, **sizes), tokens(T, dtype=dtype)
        torch.testing.assert_close(made(x), made(x, absorb=True), atol=atol, rtol=0)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [3, 1, 5], [8, 1]])
def test_prefill_chunks_and_single_tokens_agree(sizes, absorb):
    made, x = layer(), tokens(9)
    torch.testing.assert_close(in_chunks(made, x, sizes, absorb), made(x), atol=1e-5, rtol=0)


def test_a_prompt_restored_and_then_tokens_absorbed_are_one_text():
    made, x = layer(), tokens(12)
    kept = cache(made)
    out = [made(x[:, :8], cache=kept)]
    kept.advance(8)
    for t in range(8, 12):
        out.append(made(x[:, t : t + 1], cache=kept, absorb=True))
        kept.advance(1)
    torch.testing.assert_close(torch.cat(out, 1), made(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("absorb", [False, True])
def test_weights_are_the_same_both_ways_and_causal(absorb):
    made, x = layer(), tokens(6)
    out, weights = made(x, absorb=absorb, return_weights=True)
    assert weights.shape == (2, 4, 6, 6) and (weights[..., ~causal_mask(6)] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    torch.testing.assert_close(out, made(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, made(x, absorb=not absorb, return_weights=True)[1], atol=1e-5, rtol=0)


def test_the_cache_is_one_key_head_whose_values_lie_in_its_keys():
    made, x = layer(), tokens(5)
    kept = cache(made)
    made(x, cache=kept)
    assert kept.k.shape == (1, 2, 1, 32, 10 + 4) and kept.v.shape == (1, 2, 1, 32, 10)
    assert kept.v.data_ptr() == kept.k.data_ptr()
    latent, shared = made.down_proj(x).split([10, 4], dim=-1)
    torch.testing.assert_close(kept.v[0, :, 0, :5], made.norm(latent))
    turned = apply_rotary(shared[:, None], *rotary_angles(torch.arange(5), 4))[:, 0]
    torch.testing.assert_close(kept.k[0, :, 0, :5, 10:], turned)


def test_absorbed_attention_is_multi_query_attention_on_what_is_cached():
    made, x = layer(), tokens(1)
    kept = cache(made)
    made(tokens(6, seed=2), cache=kept)
    kept.advance(6)
    keys = kept.k[0].clone()
    q, new = made._queries_and_kept(x, None, kept)
    keys[:, :, 6:7] = new
    w_uk = made.k_up.weight.view(4, 6, 10)
    q = torch.cat((torch.einsum("bhtd,hdc->bhtc", q[..., :6], w_uk), q[..., 6:]), -1)
    average = scaled_dot_product_attention(q, keys[:, :, :7], keys[:, :, :7, :10], scale=10**-0.5)
    w_uv = made.v_up.weight.view(4, 6, 10)
    out = torch.einsum("bhtc,hdc->bthd", average, w_uv).flatten(2)
    torch.testing.assert_close(made(x, cache=kept, absorb=True), made.o_proj(out), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_has_the_bytes_of_the_account(dtype):
    shape = memory.ModelShape("toy", 3, 4, 4, 6, latent_dim=10 + 4)
    kept = LatentCache(3, 2, 10, 4, 50, dtype=getattr(torch, dtype))
    assert kept.nbytes == memory.kv_cache_bytes(shape, 50, 2, dtype)
    assert kept.nbytes == 2 * 50 * memory.kv_bytes_per_token(shape, dtype)
    v2 = memory.as_shape("deepseek-v2")
    its = LatentCache(v2.n_layers, 1, 512, 64, 1, dtype=torch.bfloat16)
    assert its.nbytes == memory.kv_bytes_per_token(v2, "bfloat16") == 69_120


def test_rows_of_the_cache_are_filled_and_moved_alone():
    made, x = layer(), tokens(9)
    kept = cache(made, 2)
    for row, length in ((0, 3), (1, 6)):
        made(x[row : row + 1, :length], cache=kept.row(row))
        kept.row(row).advance(length)
    assert kept.lengths.tolist() == [3, 6]
    step = torch.stack([x[0, 3:4], x[1, 6:7]])
    for absorb in (False, True):
        out = made(step, cache=kept, absorb=absorb)
        torch.testing.assert_close(out[0], made(x[:1, :4])[0, -1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(out[1], made(x[1:, :7])[0, -1:], atol=1e-5, rtol=0)
    kept.move_row(1, 0)
    out = made(x[1:, 6:7], cache=kept.front(1), absorb=True)
    torch.testing.assert_close(out[0], made(x[1:, :7])[0, -1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("T", "S"), [(2, 2), (1, 40), (7, 40), (40, 40)])
@pytest.mark.parametrize("absorb", [False, True])
def test_the_operations_counted_are_those_that_torch_counts(T, S, absorb):
    made = layer()
    kept = cache(made, 1, 64)
    if S > T:
        made(tokens(S - T, 1), cache=kept)
        kept.advance(S - T)
    with FlopCounterMode(display=False) as counted:
        made(tokens(T, 1), cache=kept, absorb=absorb, return_weights=True)
    others = 2 * T * sum(p.weight.numel() for p in (made.q_proj, made.down_proj, made.o_proj))
    assert counted.get_total_flops() == others + made.flops(T, S, absorb)


def test_absorbing_pays_for_one_token_and_not_for_a_prompt():
    v2 = LatentAttention(64, 128, 512, 64, head_dim=128)
    assert v2.flops(1, 4096, absorb=True) < 0.05 * v2.flops(1, 4096)
    assert v2.flops(4096, 4096, absorb=True) > 2 * v2.flops(4096, 4096)
    crossing = next(T for T in itertools.count(1) if v2.flops(T, 4096, absorb=True) > v2.flops(T, 4096))
    assert 1 < crossing < 4096


def test_without_rotary_numbers_and_without_a_mask_the_order_of_tokens_plays_no_part():
    made, x = layer(d_rope=0, causal=False), tokens(6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(x[:, order]), made(x)[:, order], atol=1e-5, rtol=0)
    assert not torch.allclose(layer(causal=False)(x[:, order]), layer(causal=False)(x)[:, order], atol=1e-3)


def test_it_stands_in_a_transformer_block():
    block = TransformerBlock(layer(), d_ff=32)
    x = tokens(5)
    seen = {}
    out = block(x, on_weights=lambda i, weights: seen.setdefault(i, weights))
    assert out.shape == x.shape and seen[0].shape == (2, 4, 5, 5)


def test_gradients_are_the_same_both_ways():
    made, x = layer().requires_grad_(True), tokens(5)
    grads = []
    for absorb in (False, True):
        made.zero_grad()
        made(x, absorb=absorb).square().sum().backward()
        grads.append([p.grad.clone() for p in made.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    for wrong, words in (
        ({"d_latent": 0}, "d_latent of 1 or more; got 0"),
        ({"n_heads": 5, "head_dim": None}, "does not divide into 5 heads"),
        ({"d_rope": 3}, "must be even; got 3"),
        ({"head_dim": 0}, "head_dim of 1 or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            LatentAttention(**SIZES | wrong)
    with pytest.raises(ShapeError, match=r"\(B, T, 24\); got \(2, 5, 23\)"):
        layer()(torch.zeros(2, 5, 23))
    made = layer()
    with pytest.raises(ShapeError, match=r"\(2, 1, 13\)"):
        made(tokens(2), cache=LatentCache(1, 2, 9, 4, 8))
    kept = cache(made, max_len=3)
    with pytest.raises(CapacityError, match="holds 3 tokens a row"):
        made(tokens(4), cache=kept)
