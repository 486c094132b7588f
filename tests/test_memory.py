"""The accounts: against the figures the sources give, against real models and caches, and against themselves."""

import itertools

import pytest
import torch

from attnlab import Mistral, MistralConfig, memory
from attnlab.errors import AttnlabError, ConfigError
from attnlab.mistral import PRESETS

V01, V02 = "mistral-7b-v0.1", "mistral-7b-v0.2"
GIB = 2**30

# Model, KV bytes a token in float16, times smaller than multi-head attention of the same shape.
PUBLISHED = [
    ("gpt-2", 36_864, 1), ("llama-2-7b", 524_288, 1), ("llama-2-13b", 819_200, 1), ("llama-2-70b", 327_680, 8),
    ("llama-3-8b", 131_072, 4), (V01, 131_072, 4), (V02, 131_072, 4), ("mistral-7b-v0.3", 131_072, 4),
    ("mixtral-8x7b", 131_072, 4), ("falcon-7b", 8_192, 71), ("falcon-40b", 122_880, 16), ("gemma-2b", 18_432, 8),
    ("gemma-7b", 458_752, 1), ("gemma-2-2b", 106_496, 2), ("gemma-2-9b", 344_064, 2), ("gemma-2-27b", 376_832, 2),
    ("qwen2.5-7b", 57_344, 7), ("phi-3-mini-4k", 393_216, 1), ("starcoder-15b", 20_480, 48), ("palm-540b", 120_832, 48),
    ("deepseek-v2", 69_120, 56.9), ("deepseek-v3", 70_272, 56.9),
]  # fmt: skip


def small(**changes) -> MistralConfig:
    numbers = {"vocab_size": 37, "d_model": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40, "head_dim": 6}
    return MistralConfig(**(numbers | changes))


def on_meta(config: MistralConfig) -> Mistral:
    with torch.device("meta"):
        return Mistral(config)


@pytest.mark.parametrize("name, per_token, times_smaller", PUBLISHED)
def test_kv_bytes_per_token_are_the_published_ones(name, per_token, times_smaller):
    assert memory.kv_bytes_per_token(name, "float16") == per_token
    assert memory.kv_bytes_per_token(name, "float32") == 2 * per_token
    (row,) = memory.compare([name], context=1, dtype="float16")
    assert row["kv_bytes_per_token"] == row["cache_bytes"] == per_token
    assert round(row["vs_multi_head"], 1) == times_smaller


def test_every_shape_is_checked_has_a_source_and_goes_by_its_own_name():
    assert {name for name, _, _ in PUBLISHED} == set(memory.SHAPES)
    for name, shape in memory.SHAPES.items():
        assert shape.name == name and shape.source
        assert memory.as_shape(name.upper()) is shape


def test_whole_caches_are_the_published_ones():
    assert memory.kv_cache_bytes(V02, 32_768) == 4 * GIB
    assert memory.kv_cache_bytes(V01, 32_768) == GIB // 2
    assert memory.kv_cache_bytes(V01, 32_768, rolling=False) == 4 * GIB
    assert memory.kv_cache_bytes(V02, 8192) == GIB
    assert memory.kv_cache_bytes(V01, 8192) == GIB // 2
    assert memory.kv_cache_bytes("llama-2-7b", 4096) == 2 * GIB


def test_a_layer_with_a_window_stops_growing_and_the_others_go_on():
    at = [memory.kv_cache_bytes("gemma-2-9b", context) for context in (4095, 4096, 4097, 4098)]
    full, half = 344_064, 344_064 // 2
    assert [b - a for a, b in itertools.pairwise(at)] == [full, half, half]


def test_mistral_7b_has_its_published_parameters_and_bytes():
    assert memory.n_params(V01) == 7_241_732_096
    assert memory.weight_bytes(V01, "bfloat16") == 14_483_464_192
    assert memory.bytes_per_step(V01, 0) == 14_221_320_192
    assert memory.bytes_per_step("llama-2-7b", 0) == 13_214_687_232


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_equal_the_full_size_models(name):
    model = on_meta(PRESETS[name])
    assert memory.n_params(name) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [6, 10])
def test_weight_accounts_equal_a_real_models(tie, n_kv_heads, head_dim):
    config = small(tie_embeddings=tie, n_kv_heads=n_kv_heads, head_dim=head_dim)
    model = on_meta(config)
    weights = memory.as_shape(config).weights
    linear = [
        m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not model.embed.weight
    ]
    assert weights.linear == sum(w.numel() for w in linear)
    assert weights.linear_rows == sum(w.shape[0] for w in linear)
    assert weights.n_params == sum(p.numel() for p in model.parameters())
    for dtype in ("float32", "bfloat16"):
        real = sum(p.nbytes for p in model.to(getattr(torch, dtype)).parameters())
        assert memory.weight_bytes(config, dtype) == real
    lookup_only = 0 if tie else model.embed.weight.nbytes
    assert memory.bytes_per_step(config, 0, dtype="bfloat16") == real - lookup_only


@pytest.mark.parametrize("window", [None, 1, 5, 8, 64])
@pytest.mark.parametrize("n_kv_heads, head_dim", [(1, 6), (2, 10), (4, 2)])
def test_cache_bytes_equal_the_real_caches_byte_for_byte(window, n_kv_heads, head_dim):
    config = small(window=window, n_kv_heads=n_kv_heads, head_dim=head_dim)
    model = on_meta(config)
    cases = itertools.product((1, 3), (1, 4, 5, 8, 9, 70), (True, False), ("float32", "float16"))
    for batch, max_len, rolling, dtype in cases:
        cache = model.new_cache(batch, max_len, rolling=rolling, dtype=getattr(torch, dtype))
        assert memory.kv_cache_bytes(config, max_len, batch, dtype, rolling=rolling) == cache.nbytes


def test_map_bytes_equal_the_maps_that_a_model_makes():
    config = small()
    kept = []
    Mistral(config)(torch.randint(37, (2, 7)), on_weights=lambda layer, weights: kept.append(weights))
    made = sum(weights.nbytes for weights in kept)
    assert memory.eager_map_bytes(config, 7, batch=2, dtype="float32") == made
    assert memory.eager_map_bytes(config, 7, batch=2, dtype="float16", softmax=False) == made // 2
    one = memory.eager_map_bytes(config, 7, batch=2, dtype="float16", layers=1)
    assert one == made // 3 // 2 + made // 3  # the float16 copy, and the float32 softmax it comes from


def test_a_step_reads_the_weights_once_and_every_rows_cache():
    for context, batch in ((1, 1), (4096, 3), (32_768, 8)):
        assert memory.bytes_per_step(V02, context, batch) == 14_221_320_192 + 131_072 * context * batch
        assert memory.bytes_per_step(V01, context, batch) == 14_221_320_192 + 131_072 * min(context, 4096) * batch


def test_mistral_reads_less_than_llama_from_2560_cached_tokens_on():
    def difference(context):
        return memory.bytes_per_step(V02, context) - memory.bytes_per_step("llama-2-7b", context)

    assert difference(2559) > 0 and difference(2560) == 0 and difference(2561) < 0


@pytest.mark.parametrize(
    "bandwidth, context, full, windowed, llama",
    [(2.039e12, 2048, 141, 141, 143), (3.35e12, 8192, 219, 227, 191), (4.8e12, 32_768, 259, 325, 158)],
)
def test_decode_ceilings_are_bandwidth_over_bytes(bandwidth, context, full, windowed, llama):
    ceilings = [memory.decode_ceiling(name, bandwidth, context) for name in (V02, V01, "llama-2-7b")]
    assert [round(ceiling) for ceiling in ceilings] == [full, windowed, llama]
    assert memory.decode_ceiling(V02, bandwidth, context, batch=4) < 4 * ceilings[0]


@pytest.mark.parametrize("device_bytes", [15.9e9, 24e9, 80e9, 141e9])
@pytest.mark.parametrize("reserve", [None, 0, 3_000_000_000])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("context", [1000, 8192])
def test_the_largest_batch_fits_and_one_row_more_does_not(device_bytes, reserve, quantize, context):
    batch = memory.largest_batch(V02, device_bytes, context, quantize=quantize, reserve=reserve)
    assert not memory.fits(V02, device_bytes, context, batch + 1, quantize=quantize, reserve=reserve)
    if batch:
        assert memory.fits(V02, device_bytes, context, batch, quantize=quantize, reserve=reserve)


def test_filling_a_card_with_caches_brings_almost_the_ratio_of_the_caches():
    def throughput(name, device):
        batch = memory.largest_batch(name, device, 512)
        return memory.decode_ceiling(name, 1e12, 512, batch)

    ratios = [throughput(V02, device) / throughput("llama-2-7b", device) for device in (24e9, 80e9, 141e9)]
    assert ratios == sorted(ratios) and ratios[0] > 3.3 and 3.9 < ratios[-1] < 4


def test_quantized_weights_take_what_the_docstring_says():
    w, size = memory.as_shape(V01).weights, 2
    dense = (w.embedding + w.other) * size
    assert memory.weight_bytes(V01, quantize="int8") == dense + w.linear + w.linear_rows * size
    assert memory.weight_bytes(V01, quantize="int4") == dense + w.linear // 2 + w.linear // 32 * 2 * size
    assert memory.kv_cache_bytes(V01, 100) == memory.fits(V01, 80e9, 100, quantize="int4").cache


def test_the_printed_sum_adds_up_and_says_what_would_help():
    fit = memory.fits(V02, 16e9, context=32_768, batch=2)
    assert not fit and fit.spare < 0
    assert fit.weights + fit.cache + fit.reserve == fit.total == fit.device - fit.spare
    text = str(fit)
    assert "does not fit" in text and "missing" in text and "what would help" in text
    assert memory.human_bytes(fit.weights) in text and memory.human_bytes(fit.cache) in text
    good = memory.fits(V02, 80e9, context=32_768, batch=2)
    assert good and not good.advice and "what would help" not in str(good)


def test_advice_is_enough_when_followed():
    fit = memory.fits(V02, 24e9, context=32_768, batch=3)
    text = " ".join(fit.advice)
    batch, context = (int(part.split()[0].replace(",", "")) for part in (text.split("batch of ")[1], text.split("context of ")[1]))  # fmt: skip
    assert memory.fits(V02, 24e9, 32_768, batch) and memory.fits(V02, 24e9, context, 3)
    assert not memory.fits(V02, 24e9, context + 1, 3)
    assert memory.fits(V02, fit.total, 32_768, 3) and not memory.fits(V02, fit.total - 1, 32_768, 3)
    assert any("int8" in line for line in memory.fits(V01, 16e9, 8192).advice)
    assert memory.fits(V01, 16e9, 8192, quantize="int8")
    (only,) = memory.fits(V01, 1e9, 8192).advice
    assert only.startswith("a device of")


def test_compare_gives_a_row_a_model_and_none_for_weights_that_are_not_known():
    config = small(name="mine")
    rows = memory.compare(["llama-2-7b", "falcon-7b", config, memory.SHAPES["deepseek-v2"]], context=8192, batch=2)
    assert [row["model"] for row in rows] == ["llama-2-7b", "falcon-7b", "mine", "deepseek-v2"]
    assert [row["kind"] for row in rows] == ["multi-head", "multi-query", "grouped-query", "latent"]
    assert [row["weight_bytes"] is None for row in rows] == [False, True, False, True]
    assert [row["beyond_max_context"] for row in rows] == [True, True, False, False]
    assert rows[0]["cache_bytes"] == 2 * 8192 * 524_288


def test_an_unknown_name_brings_the_near_ones():
    with pytest.raises(ConfigError, match=r"mistral-7b-v0\.1"):
        memory.kv_bytes_per_token("mistral-7b")
    with pytest.raises(ConfigError, match=r"there are .*gpt-2"):
        memory.kv_bytes_per_token("zzzz")


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda: memory.kv_cache_bytes(V01, 0), "context must be"),
        (lambda: memory.kv_cache_bytes(V01, 10, batch=0), "batch must be"),
        (lambda: memory.kv_cache_bytes(V01, 2.5), "context must be"),
        (lambda: memory.bytes_per_step(V01, -1), "context must be"),
        (lambda: memory.eager_map_bytes(V01, 8, layers=33), "layers 1 to 32"),
        (lambda: memory.kv_bytes_per_token(V01, "float8"), "unknown dtype"),
        (lambda: memory.weight_bytes(V01, quantize="int3"), "quantize is None"),
        (lambda: memory.weight_bytes("falcon-7b"), "only its cache"),
        (lambda: memory.fits("falcon-7b", 16e9), "only its cache"),
        (lambda: memory.fits(V01, 0), "device_bytes"),
        (lambda: memory.decode_ceiling(V01, 0, 10), "bandwidth"),
        (lambda: memory.as_shape(7), "expected a MistralConfig"),
        (lambda: memory.ModelShape("odd", 2, 4, 3, 8), "multiple"),
        (lambda: memory.ModelShape("odd", 2, 4, 2, 0), "head_dim"),
        (lambda: memory.ModelShape("odd", 2, 4, 2, 8, windows=(4,)), "as many windows"),
        (lambda: memory.ModelShape("odd", 2, 4, 2, 8, windows=0), "window"),
    ],
)
def test_bad_input_raises_one_error_that_says_what_to_do(call, expected):
    with pytest.raises(AttnlabError, match=expected):
        call()


def test_every_account_is_a_whole_number():
    for number in (
        memory.weight_bytes(V01, quantize="int4"),
        memory.kv_cache_bytes(V01, 10),
        memory.eager_map_bytes(V01, 10),
        memory.bytes_per_step(V01, 10),
        memory.largest_batch(V01, 24e9, 100),
        memory.fits(V01, 24e9).total,
    ):
        assert type(number) is int
