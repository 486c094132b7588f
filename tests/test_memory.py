"""The accounts: against the figures the sources give, against real models and caches, and against themselves."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnlab import Mistral, MistralConfig, memory
from attnlab.errors import AttnlabError, ConfigError
from attnlab.mistral import PRESETS

V01, V02 = "mistral-7b-v0.1", "mistral-7b-v0.2"
GIB = 2**30
UNCOUNTED = memory.ModelShape("uncounted", 32, 71, 1, 64)

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


def as_transformers(name: str):
    """The model of that name as transformers makes it from the numbers of its published configuration."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    s = memory.SHAPES[name]
    llama = {
        "hidden_size": s.d_model, "num_hidden_layers": s.n_layers, "num_attention_heads": s.n_heads,
        "num_key_value_heads": s.n_kv_heads, "head_dim": s.head_dim,
    }  # fmt: skip
    llama_2, gemma = llama | {"vocab_size": 32_000}, llama | {"vocab_size": 256_000}
    falcon = {"hidden_size": s.d_model, "num_hidden_layers": s.n_layers, "num_attention_heads": s.n_heads}
    latent = {
        "hidden_size": s.d_model, "num_hidden_layers": s.n_layers, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip
    kind, config = {
        "gpt-2": ("gpt2", {}),
        "llama-2-7b": ("llama", llama_2 | {"intermediate_size": 11_008}),
        "llama-2-13b": ("llama", llama_2 | {"intermediate_size": 13_824}),
        "llama-2-70b": ("llama", llama_2 | {"intermediate_size": 28_672}),
        "llama-3-8b": ("llama", llama | {"vocab_size": 128_256, "intermediate_size": 14_336}),
        "mixtral-8x7b": ("mixtral", llama_2 | {"intermediate_size": 14_336}),
        "falcon-7b": ("falcon", falcon | {"vocab_size": 65_024}),
        "falcon-40b": ("falcon", falcon | {"vocab_size": 65_024, "num_kv_heads": 8, "new_decoder_architecture": True}),
        "gemma-2b": ("gemma", gemma | {"intermediate_size": 16_384}),
        "gemma-7b": ("gemma", gemma | {"intermediate_size": 24_576}),
        "gemma-2-2b": ("gemma2", gemma | {"intermediate_size": 9216}),
        "gemma-2-9b": ("gemma2", gemma | {"intermediate_size": 14_336}),
        "gemma-2-27b": ("gemma2", gemma | {"intermediate_size": 36_864}),
        "qwen2.5-7b": ("qwen2", llama | {"vocab_size": 152_064, "intermediate_size": 18_944}),
        "phi-3-mini-4k": ("phi3", llama | {"vocab_size": 32_064, "intermediate_size": 8192}),
        "starcoder-15b": ("gpt_bigcode", {
            "vocab_size": 49_152, "n_positions": 8192, "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24_576,
            "bos_token_id": 0, "eos_token_id": 0,
        }),
        "deepseek-v2": ("deepseek_v2", latent | {
            "vocab_size": 102_400, "intermediate_size": 12_288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
            "n_shared_experts": 2, "first_k_dense_replace": 1,
        }),
        "deepseek-v3": ("deepseek_v3", latent | {
            "vocab_size": 129_280, "intermediate_size": 18_432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
            "n_shared_experts": 1, "first_k_dense_replace": 3,
        }),
    }[name]  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config))


@pytest.mark.parametrize("name", sorted(set(memory.SHAPES) - set(PRESETS) - {"palm-540b"}))
def test_parameters_of_other_families_equal_the_models_of_transformers(name):
    model, weights = as_transformers(name), memory.SHAPES[name].weights
    sizes = {parameter: p.shape for parameter, p in model.named_parameters()}
    assert weights.n_params == sum(size.numel() for size in sizes.values())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert weights.linear == sum(
        size.numel() for parameter, size in sizes.items()
        if len(size) > 1 and not any(part in parameter for part in ("embed", "wte", "wpe"))
    )  # fmt: skip
    vocabulary = model.get_input_embeddings().weight.numel()
    assert (weights.embedding >= vocabulary) == (not tied) and (weights.other > vocabulary) == tied


def test_an_int8_scale_goes_with_every_row_of_a_matrix():
    for name in ("llama-2-7b", "gemma-2-2b", "qwen2.5-7b", "mixtral-8x7b", "deepseek-v3"):
        rows = 0
        for parameter, p in as_transformers(name).named_parameters():
            if p.dim() > 1 and "embed" not in parameter:
                rows += p.shape[:-1].numel()  # experts lie in one tensor, each with rows of its own
        assert memory.SHAPES[name].weights.linear_rows == rows


def test_palm_has_the_parameters_of_its_paper():
    assert memory.n_params("palm-540b") == pytest.approx(540.35e9, rel=1e-4)


@pytest.mark.parametrize("name, active, routed", [("mixtral-8x7b", 12.9e9, 8), ("deepseek-v2", 21e9, 160), ("deepseek-v3", 37e9, 256)])  # fmt: skip
def test_a_mixture_of_experts_stores_all_and_a_token_reads_its_own(name, active, routed):
    weights = memory.SHAPES[name].weights
    assert weights.n_params - weights.idle == pytest.approx(active, rel=0.03)  # as the model's makers say
    assert memory.bytes_per_step(name, 0) == 2 * (weights.linear - weights.idle + weights.other)
    assert memory.weight_bytes(name) == 2 * weights.n_params
    int8 = memory.bytes_per_step(name, 0, quantize="int8")
    assert int8 == weights.linear - weights.idle + 2 * (weights.linear_rows - weights.idle_rows + weights.other)


def test_every_card_has_a_memory_a_bandwidth_and_a_source():
    for name, card in memory.CARDS.items():
        assert card.name == name and card.source
        assert f"{card.nbytes / 1e9:.0f} GB" in name
        assert 3e11 <= card.bandwidth < 1e13
    assert memory.CARDS["H200, 141 GB"].bandwidth / memory.CARDS["H100 SXM, 80 GB"].bandwidth == pytest.approx(1.43, abs=0.01)  # fmt: skip


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
    rounded = memory.fits(V02, 24e9, 32_768, 3, quantize_cache="int8")
    assert 'quantize_cache="int8"' in text and rounded and rounded.advice == ()
    assert rounded.setting == "3 × 32,768 tokens in bfloat16 with an int8 cache"
    assert "quantize_cache" not in " ".join(memory.fits(V02, 24e9, 32_768, 30, quantize_cache="int8").advice)
    (only,) = memory.fits(V01, 1e9, 8192).advice
    assert only.startswith("a device of")


def test_compare_gives_a_row_a_model_and_none_for_weights_that_are_not_known():
    config = small(name="mine")
    rows = memory.compare(["llama-2-7b", UNCOUNTED, config, memory.SHAPES["deepseek-v2"]], context=8192, batch=2)
    assert [row["model"] for row in rows] == ["llama-2-7b", "uncounted", "mine", "deepseek-v2"]
    assert [row["kind"] for row in rows] == ["multi-head", "multi-query", "grouped-query", "latent"]
    assert [row["weight_bytes"] is None for row in rows] == [False, True, False, False]
    assert [row["beyond_max_context"] for row in rows] == [True, False, False, False]
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
        (lambda: memory.weight_bytes(UNCOUNTED), "only its cache"),
        (lambda: memory.fits(UNCOUNTED, 16e9), "only its cache"),
        (lambda: memory.fits(V01, 0), "device_bytes"),
        (lambda: memory.fits(V01, float("inf")), "device_bytes"),
        (lambda: memory.largest_batch(V01, "L4, 24 GB", 100), "device_bytes"),
        (lambda: memory.fits(V01, 16e9, reserve=float("nan")), "reserve"),
        (lambda: memory.largest_batch(V01, 16e9, 100, reserve=-1), "reserve"),
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


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_other_kv_heads_are_accounted_as_the_model_that_has_them(n_kv_heads):
    changed = memory.with_kv_heads(small(name="mine"), n_kv_heads)
    made = small(n_kv_heads=n_kv_heads)
    assert changed.weights == memory.as_shape(made).weights and changed.n_kv_heads == n_kv_heads
    assert memory.n_params(changed) == sum(p.numel() for p in on_meta(made).parameters())
    assert memory.kv_cache_bytes(changed, 9, 3) == memory.kv_cache_bytes(made, 9, 3)
    assert memory.bytes_per_step(changed, 9, 3, quantize="int8") == memory.bytes_per_step(made, 9, 3, quantize="int8")


@pytest.mark.parametrize("name, family", [("qwen2.5-7b", "qwen2"), ("gemma-2-2b", "gemma2"), ("llama-2-70b", "llama")])
def test_other_kv_heads_of_other_families_are_those_of_transformers(name, family):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    s = memory.SHAPES[name]

    def published(n_kv_heads):
        config = CONFIG_MAPPING[family](
            hidden_size=s.d_model, num_hidden_layers=s.n_layers, num_attention_heads=s.n_heads, head_dim=s.head_dim,
            num_key_value_heads=n_kv_heads, intermediate_size=64, vocab_size=64,
        )  # fmt: skip
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())

    for n_kv_heads in (1, s.n_heads):
        more = memory.n_params(memory.with_kv_heads(name, n_kv_heads)) - memory.n_params(name)
        assert more == published(n_kv_heads) - published(s.n_kv_heads)


def test_the_same_number_of_kv_heads_is_the_same_shape():
    for name, shape in memory.SHAPES.items():
        if shape.latent_dim is None:
            assert memory.with_kv_heads(name, shape.n_kv_heads) is shape
    assert memory.with_kv_heads(UNCOUNTED, 71).kind == "multi-head"


def test_the_speed_up_goes_from_the_weights_ratio_to_the_caches_ratio_and_never_beyond():
    multi_head = memory.with_kv_heads(V02, 32)
    at = [memory.speed_up(V02, multi_head, 4096, batch) for batch in (1, 8, 64, 512, 10**6)]
    assert at == sorted(at) and at[-1] < 4 and at[-1] == pytest.approx(4, rel=1e-3)
    assert at[0] == memory.bytes_per_step(multi_head, 4096) / memory.bytes_per_step(V02, 4096)
    assert memory.speed_up(V02, "llama-2-7b", 2560) == 1 == memory.speed_up(V02, V02, 77, 3)


def test_filled_devices_are_compared_at_each_ones_own_largest_batch():
    for context, device in ((512, 24e9), (4096, 80e9)):
        rates = []
        for name in (V02, "llama-2-7b"):
            batch = memory.largest_batch(name, device, context)
            rates.append(memory.decode_ceiling(name, 123.0, context, batch))
        assert memory.speed_up_filled(V02, "llama-2-7b", device, context) == pytest.approx(rates[0] / rates[1])
    assert memory.speed_up_filled(V02, V02, 24e9, 100) == 1


def test_a_card_goes_by_the_words_its_name_begins_with():
    assert memory.as_card("l4") is memory.CARDS["L4, 24 GB"] and memory.as_card("L40S").nbytes == 48 * 10**9
    assert memory.as_card("rtx 4090").bandwidth == 1008e9
    mine = memory.Card("mine", 10**9, 1e9)
    assert memory.as_card(mine) is mine
    for name, card in memory.CARDS.items():
        assert memory.as_card(name) is card


@pytest.mark.parametrize(
    "card, batch, n_kv_heads, why",
    [
        ("a100", 1, 32, "the weights bind"),
        ("a100", 16, 8, "the cache binds"),
        ("a100", 64, 4, "the cache binds"),
        ("t4", 1, 4, "memory binds: 32 K/V heads need 18.69 GiB of 14.90 GiB"),
        ("rtx 4090", 8, 8, "memory binds"),
        ("t4", 32, None, "even 1 K/V head needs"),
    ],
)
def test_the_choice_gives_up_no_more_heads_than_it_must_and_says_what_binds(card, batch, n_kv_heads, why):
    choice = memory.choose(V02, card, 4096, batch)
    assert why in choice.reason and choice.reason in " ".join(str(choice).split())
    assert [style.shape.n_kv_heads for style in choice.styles] == [32, 16, 8, 4, 2, 1]
    fitting = [style for style in choice.styles if style.fit]
    if n_kv_heads is None:
        assert choice.chosen is None and not fitting
        return
    assert choice.chosen.shape.n_kv_heads == n_kv_heads and choice.chosen.fit
    assert choice.chosen.ceiling >= 0.5 * max(style.ceiling for style in fitting)
    for style in fitting[: fitting.index(choice.chosen)]:
        assert style.ceiling < 0.5 * fitting[-1].ceiling


def test_a_choice_holds_the_accounts_of_every_style():
    choice = memory.choose("falcon-7b", "l4", 2048, 8, quantize="int8")
    assert [style.shape.n_kv_heads for style in choice.styles] == [71, 1]
    for style in choice.styles:
        read = memory.bytes_per_step(style.shape, 2048, 8, quantize="int8")
        assert style.cache_share * read == pytest.approx(memory.kv_cache_bytes(style.shape, 2048, 8))
        assert style.ceiling == pytest.approx(8 * 300e9 / read)
        assert bool(style.fit) == (style.largest_batch >= 8)
    assert memory.choose(V02, "a100", 4096, 16, at_least=1).chosen.shape.n_kv_heads == 1
    assert memory.choose(V02, "a100", 4096, 16, at_least=0).chosen.shape.n_kv_heads == 32


@pytest.mark.parametrize(
    ("device", "context", "dtype", "chosen", "why"),
    [
        (24e9, 4096, "bfloat16", "bfloat16", "it fits as it is"),
        (16e9, 4096, "float16", "int8", "with float16 weights 511.37 MiB are missing"),
        (8e9, 4096, "bfloat16", "int4", "with int8 weights"),
        (8e9, 32_768, "bfloat16", None, "even with int4 weights it needs"),
    ],
)
def test_a_plan_takes_the_most_exact_form_that_fits_and_says_why(device, context, dtype, chosen, why):
    plan = memory.plan("mistral-7b-v0.3", device, context, dtype=dtype)
    assert [way.name for way in plan.ways] == [dtype, "int8", "int4"]
    for way in plan.ways:
        assert way.fit == memory.fits("mistral-7b-v0.3", device, context, 1, dtype, way.quantize)
    assert (plan.chosen and plan.chosen.name) == chosen
    assert why in plan.reason and plan.reason in " ".join(str(plan).split())
    before = plan.ways if plan.chosen is None else plan.ways[: plan.ways.index(plan.chosen)]
    assert not any(way.fit for way in before) and (plan.chosen is None or plan.chosen.fit)
    assert max(len(line) for line in str(plan).splitlines()) <= 80


def test_a_plan_asks_for_what_can_be_answered():
    for ask in (
        lambda: memory.plan(V02, 0),
        lambda: memory.plan(V02, 8e9, dtype="int8"),
        lambda: memory.plan("v9", 8e9),
    ):
        with pytest.raises(AttnlabError):
            ask()


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda: memory.with_kv_heads(V02, 5), "multiple"),
        (lambda: memory.with_kv_heads("deepseek-v2", 8), "latent"),
        (
            lambda: memory.with_kv_heads(memory.ModelShape("odd", 2, 4, 4, 8, weights=memory.Weights(1, 1)), 2),
            "d_model",
        ),
        (lambda: memory.speed_up_filled(V02, "llama-2-7b", 16e9, 4096), "not one row of 4,096 tokens fits beside"),
        (lambda: memory.speed_up(V02, UNCOUNTED, 10), "only its cache"),
        (lambda: memory.choose(V02, "h1"), "no one card"),
        (lambda: memory.choose(V02, 80e9), "expected a memory.Card"),
        (lambda: memory.choose(V02, "h100", at_least=2), "share of the fastest"),
        (lambda: memory.choose("deepseek-v3", "h100"), "latent"),
    ],
)
def test_bad_questions_about_styles_raise_one_error_that_says_what_to_do(call, expected):
    with pytest.raises(AttnlabError, match=expected):
        call()


def counted(call) -> int:
    """What torch counts of the readable path; of its fused kernel on a CPU it counts nothing."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("last_only", [False, True])
def test_operations_equal_what_torch_counts_of_a_real_model(n_kv_heads, tie, last_only):
    config = small(n_kv_heads=n_kv_heads, tie_embeddings=tie, window=None)
    model, ids = Mistral(config).requires_grad_(False), torch.randint(37, (2, 7))
    how = {"last_only": last_only, "on_weights": lambda layer, weights: None}

    prefill = counted(lambda: model(ids, **how))
    masked = 2 * 4 * config.n_heads * config.head_dim * config.n_layers * (7 * 7 - 7 * 8 // 2)  # the hidden pairs
    assert memory.flops(config, 7, batch=2, last_only=last_only) + masked == prefill

    cache = model.new_cache(2, 16)
    model(ids, cache=cache)
    step = counted(lambda: model(ids[:, :1], cache=cache, **how))
    assert memory.flops(config, 1, cached=7, batch=2, last_only=last_only) == step


@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_taking_in_token_by_token_or_at_once_is_as_many_operations(window):
    config = small(window=window)
    for cached, T in ((0, 12), (2, 6), (7, 3), (11, 1)):
        one_by_one = sum(memory.flops(config, 1, cached=cached + i) for i in range(T))
        assert memory.flops(config, T, cached, last_only=False) == one_by_one
    assert memory.flops(config, 5, 3, batch=3) == 3 * memory.flops(config, 5, 3)


def test_attention_to_a_long_cache_has_the_group_size_as_its_intensity():
    for n_kv_heads in (1, 8, 32):
        shape = memory.with_kv_heads(V02, n_kv_heads)
        work = memory.flops(shape, 1, 100_000) - memory.flops(shape, 1, 0)
        read = memory.bytes_per_step(shape, 100_000) - memory.bytes_per_step(shape, 0)
        assert work / read == shape.group_size


def test_the_roof_is_flat_above_the_ridge_and_bandwidth_below():
    assert memory.attainable(0.5, 100.0, 10.0) == 5.0
    assert memory.attainable(10.0, 100.0, 10.0) == memory.attainable(1e9, 100.0, 10.0) == 100.0
    with pytest.raises(ConfigError, match="positive"):
        memory.attainable(0, 1, 1)


def test_intensity_is_operations_over_bytes_and_grows_with_the_tokens_of_a_pass():
    values = [memory.intensity(V02, T) for T in (1, 8, 64, 512)]
    assert values == sorted(values) and values[0] == pytest.approx(1, rel=0.01)
    assert memory.intensity(V02, 1, 100, 4) == memory.flops(V02, 1, 100, 4) / memory.bytes_per_step(V02, 100, 4)


def test_operations_that_cannot_be_counted_are_refused():
    with pytest.raises(ConfigError, match="latent"):
        memory.flops("deepseek-v2", 1)
    with pytest.raises(ConfigError, match="cached counts"):
        memory.flops(V02, 1, cached=-1)
    with pytest.raises(ConfigError, match="new_tokens"):
        memory.flops(V02, 0)


def test_a_cards_operations_have_a_source_and_a_ridge_far_above_one():
    for card in memory.CARDS.values():
        assert card.flops is None or (card.flops_source and 100 < card.flops / card.bandwidth < 1000)


@pytest.mark.parametrize("window", [None, 5])
def test_int8_caches_have_the_bytes_of_the_account(window):
    config = MistralConfig(
        vocab_size=11, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=8, head_dim=6, window=window
    )
    cache = Mistral(config).new_cache(2, 20, quantize="int8")
    assert cache.nbytes == memory.kv_cache_bytes(config, 20, 2, quantize_cache="int8")
    assert memory.kv_bytes_per_token(config, quantize_cache="int8") == 3 * 2 * 2 * (6 + 2)
    assert memory.kv_bytes_per_token(V02, quantize_cache="int8") == 130 / 256 * memory.kv_bytes_per_token(V02)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_the_accounts_take_an_int8_cache_into_every_sum(quantize):
    stored = {"quantize": quantize, "quantize_cache": "int8"}
    cache = memory.kv_cache_bytes(V02, 8192, 3, quantize_cache="int8")
    weights = memory.bytes_per_step(V02, 0, 3, quantize=quantize)
    assert memory.bytes_per_step(V02, 8192, 3, **stored) == weights + cache
    assert memory.bytes_per_step(V02, 0, 3, **stored) == weights
    assert memory.decode_ceiling(V02, 1e12, 8192, 3, **stored) == 3e12 / (weights + cache)
    assert memory.fits(V02, 24e9, 8192, 3, **stored).cache == cache
    rows = memory.largest_batch(V02, 24e9, 8192, **stored)
    assert memory.fits(V02, 24e9, 8192, rows, **stored) and not memory.fits(V02, 24e9, 8192, rows + 1, **stored)
    (row,) = memory.compare([V02], 8192, 3, **stored)
    assert row["cache_bytes"] == cache and row["bytes_per_step"] == weights + cache
    assert row["weight_bytes"] == memory.weight_bytes(V02, quantize=quantize)
    assert row["kv_bytes_per_token"] * 3 * 8192 == cache and row["vs_multi_head"] == 4


def test_a_cache_is_quantized_to_int8_or_not_at_all():
    with pytest.raises(ConfigError, match="'int8' or not at all; got 'int4' for mistral"):
        memory.kv_bytes_per_token(V02, quantize_cache="int4")
    with pytest.raises(ConfigError, match="caches a latent"):
        memory.kv_cache_bytes("deepseek-v2", 10, quantize_cache="int8")
    assert "quantize_cache" not in " ".join(memory.fits("deepseek-v2", 5e11, 100_000, 30).advice)  # nor advised
