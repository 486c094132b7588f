"""cache.py: what is kept, where, and what a query may see of it; at and around the window."""

import inspect

import pytest
import torch
from cached_models import KINDS, QUANTIZED_KINDS, W, in_chunks, small_model, three_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlab
from attnlab import KVCache, Mistral, MistralConfig, RollingKVCache
from attnlab.attention import causal_mask
from attnlab.cache import (
    QuantizedKVCache,
    QuantizedRollingKVCache,
    packed_bytes,
    quantize_heads,
    restore_heads,
)
from attnlab.errors import CapacityError, ConfigError, ShapeError


@torch.no_grad()
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    window=st.sampled_from([None, 1, 3, 4, 5, 30]),
    kind=st.sampled_from(KINDS),
)
def test_chunks_of_any_size_equal_one_pass(sizes, window, kind):
    m = small_model(window)
    ids = torch.randint(0, 31, (2, sum(sizes)), generator=torch.Generator().manual_seed(sum(sizes)))
    got, cache = in_chunks(m, ids, sizes, **kind)
    torch.testing.assert_close(got, m(ids), atol=1e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [sum(sizes)] * 2


@pytest.mark.parametrize("length", [W - 1, W, W + 1, 3 * W])
@pytest.mark.parametrize("chunk", [1, W - 1, W, W + 1, 2 * W + 1])
@torch.no_grad()
def test_mask_rolling_cache_and_prefill_agree_around_the_window(length, chunk):
    m = small_model()
    ids = torch.randint(0, 31, (1, length + 2), generator=torch.Generator().manual_seed(1))
    sizes = [chunk] * (length // chunk) + ([length % chunk] if length % chunk else []) + [1, 1]
    rolling, _ = in_chunks(m, ids, sizes)
    masked, _ = in_chunks(m, ids, sizes, rolling=False)
    torch.testing.assert_close(rolling, m(ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked, m(ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_token_beyond_the_window_changes_nothing_in_one_layer():
    """The last logits of a one-layer model depend on exactly the last W tokens: W + 1 back plays no part, W back does."""
    torch.manual_seed(0)
    m = Mistral(MistralConfig(vocab_size=31, d_model=16, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=24, window=W))
    ids = torch.randint(0, 31, (1, 10))
    for sizes in ([10], [1] * 10, [7, 3]):
        last = in_chunks(m, ids, sizes)[0][:, -1]
        for back, matters in ((W + 1, False), (W, True)):
            changed = ids.clone()
            changed[0, 10 - back] = (changed[0, 10 - back] + 1) % 31
            same = torch.allclose(in_chunks(m, changed, sizes)[0][:, -1], last, atol=1e-6)
            assert same is not matters


def test_slot_is_position_mod_window():
    cache = RollingKVCache(1, 1, 1, 2, window=3)
    assert cache.slots == 3
    for position in range(8):
        cache.update(0, torch.full((1, 1, 1, 2), float(position)), torch.zeros(1, 1, 1, 2))
        cache.advance(1)
        assert cache.k[0, 0, 0, position % 3, 0] == position
        held = [p for p in cache.held_positions(cache.lengths)[0].tolist() if p >= 0]
        assert sorted(held) == list(range(max(0, position - 2), position + 1))
        assert cache.k[0, 0, 0, : len(held), 0].tolist() == held


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_decode_together(kind):
    m = small_model()
    g = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 31, (1, n), generator=g) for n in (3, 9, 4)]
    cache = m.new_cache(3, 64, **kind)
    for i, ids in enumerate(rows):
        m(ids[:, :-1], cache.row(i))
    assert cache.lengths.tolist() == [2, 8, 3]
    got = m(torch.cat([ids[:, -1:] for ids in rows]), cache)
    for i, ids in enumerate(rows):
        torch.testing.assert_close(got[i], m(ids)[0, -1:], atol=1e-5, rtol=1e-4)
    more = torch.randint(0, 31, (3, 6), generator=g)  # and a chunk, across the window
    got = m(more, cache)
    for i, ids in enumerate(rows):
        torch.testing.assert_close(got[i], m(torch.cat((ids, more[i : i + 1]), 1))[0, -6:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets(kind):
    m = small_model()
    first, second = torch.randint(0, 31, (2, 1, 11), generator=torch.Generator().manual_seed(3))
    cache = m.new_cache(1, 64, **kind)
    m(first, cache)
    cache.reset()
    torch.testing.assert_close(m(second, cache), m(second), atol=1e-5, rtol=1e-4)


def test_overflow_is_refused_and_leaves_the_cache_usable():
    m = small_model(window=None)
    cache = m.new_cache(1, 5)
    m(torch.zeros(1, 4, dtype=torch.long), cache)
    with pytest.raises(CapacityError, match="holds 5 tokens a row, 4 are in it and 2 more came"):
        m(torch.zeros(1, 2, dtype=torch.long), cache)
    m(torch.zeros(1, 1, dtype=torch.long), cache)
    assert cache.lengths.tolist() == [5]


def test_a_rolling_cache_takes_any_number_in_a_fixed_space():
    m = small_model()
    cache = m.new_cache(1)
    before = cache.nbytes
    for _ in range(5):
        m(torch.zeros(1, 7, dtype=torch.long), cache)
    assert isinstance(cache, RollingKVCache) and cache.slots == W and cache.nbytes == before
    assert cache.nbytes == 2 * 2 * 1 * 2 * W * 4 * 4  # k and v, layers, batch, K/V heads, slots, head_dim, bytes


def test_new_cache_chooses():
    assert type(small_model().new_cache(1, 64)) is RollingKVCache
    assert type(small_model().new_cache(1, 64, rolling=False)) is KVCache
    assert type(small_model().new_cache(1, W)) is KVCache  # nothing would ever be dropped
    with pytest.raises(CapacityError, match="max_len"):
        small_model(window=None).new_cache(1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="max_len"):
        KVCache(1, 1, 1, 8, 0)
    with pytest.raises(ConfigError, match="window"):
        RollingKVCache(1, 1, 1, 8, window=0)
    cache = KVCache(1, 2, 4, 8, 16)
    with pytest.raises(ShapeError, match=r"\(2, 4, 8\)"):
        cache.update(0, torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 1, 8))
    with pytest.raises(ShapeError, match="rows are 0 to 1"):
        cache.row(2)
    with pytest.raises(ShapeError, match="2 rows and 1 came"):
        m = small_model()
        m(torch.zeros(1, 3, dtype=torch.long), m.new_cache(2, 8))
    with pytest.raises(CapacityError, match="no room"):
        KVCache(10_000, 10_000, 1_000, 1_000, 1_000)


def test_the_mask_of_a_full_cache_is_causal_mask():
    cache = KVCache(1, 1, 1, 2, 16, window=3)
    cache.lengths += 5
    other = cache.row(0)
    other.static = True  # the same question, answered with a mask
    _, _, sees = other.update(0, torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    assert torch.equal(sees["mask"][0, 0, :, :9], causal_mask(4, 9, window=3))
    assert not sees["mask"][..., 9:].any()


@pytest.mark.parametrize("kind", KINDS[:2])
@torch.no_grad()
def test_rows_at_the_front_step_alone_and_a_moved_row_goes_on_where_it_was(kind):
    m = small_model()
    ids, cache = three_rows(m, 2, **kind)
    stepped = m(torch.stack([ids[0, 5:6], ids[1, 9:10]]), cache.front(2))
    torch.testing.assert_close(stepped[0], m(ids[:1, :6])[0, -1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stepped[1], m(ids[1:2, :10])[0, -1:], atol=1e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [6, 10, 2]  # the third rested
    cache.move_row(2, 0)
    stepped = m(torch.stack([ids[2, 2:3], ids[1, 10:11]]), cache.front(2))
    torch.testing.assert_close(stepped[0], m(ids[2:, :3])[0, -1:], atol=1e-5, rtol=1e-4)
    for wrong in (0, 4):
        with pytest.raises(ShapeError):
            cache.front(wrong)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
@settings(deadline=None, max_examples=60)
def test_no_number_is_further_off_than_half_the_scale_of_its_head(head_dim, seed, size):
    x = torch.randn(3, 2, 5, head_dim, generator=torch.Generator().manual_seed(seed)) * size
    packed = quantize_heads(x)
    assert packed.dtype == torch.int8 and packed.shape[-1] == packed_bytes(head_dim) == head_dim + 2
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert ((restore_heads(packed) - x).abs() <= 0.51 * scale).all()  # the scale itself is rounded by up to 2^-9


def test_zeros_and_the_largest_numbers_survive_packing():
    assert torch.equal(restore_heads(quantize_heads(torch.zeros(2, 8))), torch.zeros(2, 8))
    x = torch.tensor([[3e38, -1e38, 0.0], [0.0, 0.0, -127.0]])
    restored = restore_heads(quantize_heads(x))
    assert restored.isfinite().all() and (restored / x.abs().amax(-1, keepdim=True))[:, [0, 2]].abs().max() <= 1.01
    assert restored[1].tolist() == [0.0, 0.0, -127.0]
    assert restore_heads(quantize_heads(torch.ones(4, dtype=torch.bfloat16)), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
@torch.no_grad()
def test_in_int8_chunks_and_one_pass_see_the_same_numbers(kind):
    m = small_model()
    ids = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(4))
    whole, _ = in_chunks(m, ids, [13], **kind)
    for sizes in ([1] * 13, [3, 4, 6], [W, W + 1, 4]):
        got, cache = in_chunks(m, ids, sizes, **kind)
        torch.testing.assert_close(got, whole, atol=1e-3, rtol=0)  # a number may round the other way
        assert cache.k.dtype == torch.int8
    exact = m(ids)
    assert 2e-3 < (whole - exact).abs().max() < 0.05 * exact.abs().max()  # rounded, and not by much


@pytest.mark.parametrize("kind", QUANTIZED_KINDS)
@torch.no_grad()
def test_rows_in_int8_are_filled_moved_and_decoded_as_any_others(kind):
    m = small_model()
    ids, cache = three_rows(m, 5, **kind)

    def alone(i, length):
        return in_chunks(m, ids[i : i + 1, :length], [length - 1, 1], **kind)[0][0, -1:]

    stepped = m(torch.stack([ids[0, 5:6], ids[1, 9:10]]), cache.front(2))
    torch.testing.assert_close(stepped[0], alone(0, 6), atol=1e-3, rtol=0)
    torch.testing.assert_close(stepped[1], alone(1, 10), atol=1e-3, rtol=0)
    cache.move_row(2, 0)
    stepped = m(ids[2:, 2:3], cache.front(1))
    torch.testing.assert_close(stepped[0], alone(2, 3), atol=1e-3, rtol=0)


def test_an_int8_cache_has_a_byte_for_each_number_and_two_for_each_scale():
    m = small_model()
    rolling, whole = m.new_cache(2, 64, quantize="int8"), m.new_cache(2, 64, rolling=False, quantize="int8")
    assert type(rolling) is QuantizedRollingKVCache and type(whole) is QuantizedKVCache
    assert rolling.nbytes == 2 * 2 * 2 * 2 * W * (4 + 2)  # k and v, layers, batch, K/V heads, slots, head_dim and scale
    assert whole.nbytes == 2 * 2 * 2 * 2 * 64 * (4 + 2)
    assert rolling.max_len is None and rolling.slots == W and whole.max_len == 64
    assert "int8" in repr(rolling) and f"{rolling.nbytes:,} bytes" in repr(rolling)


def test_a_quantized_cache_refuses_what_it_cannot_be():
    m = small_model()
    for wrong in ({"quantize": "int3"}, {"quantize": "int8", "dtype": torch.float16}):
        with pytest.raises(ConfigError, match="quantized to 'int8'"):
            m.new_cache(1, 8, **wrong)
    with pytest.raises(ConfigError, match="head_dim of 1 or more"):
        QuantizedKVCache(1, 1, 1, 0, 8)
    with pytest.raises(ShapeError, match="keys of 4 numbers"):
        cache = QuantizedKVCache(1, 1, 1, 4, 8)
        cache.update(0, torch.zeros(1, 1, 1, 6), torch.zeros(1, 1, 1, 6))


@torch.no_grad()
def test_the_companion_reads_a_text_from_int8_as_from_its_own_numbers():
    lm = attnlab.load("companion")
    ids = torch.tensor(
        [lm.tokenizer.encode(inspect.getsource(attnlab.causal_mask) * 2)[:300]]
    )  # longer than its window
    exact, rounded = (lm.model(ids, cache=lm.model.new_cache(quantize=kind))[0] for kind in (None, "int8"))
    loss, its = (torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]) for logits in (exact, rounded))
    assert abs(its - loss) < 0.02 * loss
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.95
    assert not torch.equal(exact, rounded)
