"""Records: attnlab and transformers models give the same ones, whole, within their bytes, and back from disk."""

import numpy as np
import pytest
import torch
import transformers

from attnlab.errors import CapacityError, CheckpointError, ConfigError, InputError, ShapeError
from attnlab.mistral import Mistral, MistralConfig
from attnlab.record import AttentionRecord, record_attention, record_bytes

IDS = [1, 5, 9, 2, 7, 7, 3, 30, 11, 4, 6]
TINY = MistralConfig(
    vocab_size=40, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, head_dim=6, window=5, name="tiny"
)
COMMON = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
PROJECTIONS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "o_proj": "attention",
               "gate_proj": "feed_forward", "up_proj": "feed_forward", "down_proj": "feed_forward"}  # fmt: skip


class Letters:
    """A tokenizer of attnlab's protocol, as far as a record needs it."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [0] * bos + [ord(c) - 96 for c in text]

    def piece(self, id: int) -> str:
        return "<s>" if id == 0 else chr(id + 96)


def tiny_mistral() -> Mistral:
    torch.manual_seed(0)
    return Mistral(TINY)


def twin(model: Mistral, attention: str = "sdpa") -> transformers.MistralForCausalLM:
    """The transformers model with the same weights, set here by hand so that no loader is trusted."""
    c = model.config
    config = transformers.MistralConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, intermediate_size=c.d_ff, sliding_window=c.window,
        rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, attn_implementation=attention,
    )  # fmt: skip
    other = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(model.embed.weight)
        other.model.norm.weight.copy_(model.norm.weight)
        other.lm_head.weight.copy_(model.lm_head.weight)
        for ours, theirs in zip(model.blocks, other.model.layers, strict=True):
            theirs.input_layernorm.weight.copy_(ours.attention_norm.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.ffn_norm.weight)
            for name, part in PROJECTIONS.items():
                home = theirs.self_attn if part == "attention" else theirs.mlp
                getattr(home, name).weight.copy_(getattr(getattr(ours, part), name).weight)
    return other


def assert_rows_sum_to_one(record: AttentionRecord) -> None:
    sums = record.weights.astype(np.float64).sum(-1)
    assert np.abs(sums - 1).max() < 2e-3  # float16 rounds each weight by at most 2^-12 of it


def test_attnlab_record_has_every_layer_and_head_and_the_window():
    record = record_attention(tiny_mistral(), IDS)
    T = len(IDS)
    assert record.weights.shape == (3, 4, T, T) and record.weights.dtype == np.float16
    assert (record.n_kv_heads, record.group_size, record.window, record.causal) == (2, 2, 5, True)
    assert record.model_name == "tiny" and record.query_tokens == [str(i) for i in IDS] == record.key_tokens
    assert_rows_sum_to_one(record)
    q, k = np.indices((T, T))
    assert (record.weights[..., (k > q) | (k <= q - 5)] == 0).all()
    assert (record.weights[..., (k <= q) & (k > q - 5)] > 0).all()


def test_same_weights_give_the_same_record_in_transformers():
    model = tiny_mistral()
    ours, theirs = record_attention(model, IDS), record_attention(twin(model), IDS)
    assert np.abs(ours.weights.astype(float) - theirs.weights.astype(float)).max() < 1e-3
    for field in ("n_kv_heads", "window", "causal", "query_tokens"):
        assert getattr(ours, field) == getattr(theirs, field)


def architectures():
    yield "mistral", transformers.MistralForCausalLM, transformers.MistralConfig(
        **COMMON, num_key_value_heads=2, sliding_window=4
    ), (2, 4, True)  # fmt: skip
    yield "mistral without a window", transformers.MistralModel, transformers.MistralConfig(
        **COMMON, num_key_value_heads=1, sliding_window=None
    ), (1, None, True)  # fmt: skip
    yield (
        "llama",
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**COMMON, num_key_value_heads=2),
        (
            2,
            None,
            True,
        ),
    )
    yield "gpt2", transformers.GPT2LMHeadModel, transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ), (4, None, True)  # fmt: skip
    yield "bert", transformers.BertModel, transformers.BertConfig(**COMMON), (4, None, False)
    yield "qwen2, a window in some layers", transformers.Qwen2ForCausalLM, transformers.Qwen2Config(
        **COMMON, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ), (2, None, True)  # fmt: skip
    yield "gpt-bigcode", transformers.GPTBigCodeForCausalLM, transformers.GPTBigCodeConfig(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, multi_query=True
    ), (1, None, True)  # fmt: skip


@pytest.mark.parametrize("kind, config, want", [pytest.param(*rest, id=name) for name, *rest in architectures()])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_transformers_model_is_recorded_and_gets_its_attention_back(kind, config, want, attention):
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict())
    model = kind._from_config(config, attn_implementation=attention)
    model.train()  # dropout must not reach the record
    record = record_attention(model, torch.tensor([IDS]))
    assert record.weights.shape == (2, 4, len(IDS), len(IDS))
    assert (record.n_kv_heads, record.window, record.causal) == want
    assert_rows_sum_to_one(record)
    assert model.config._attn_implementation == attention and all(m.training for m in model.modules())
    if want[1] is not None:  # the window means what ours means
        q, k = np.indices(record.weights.shape[2:])
        assert (record.weights[..., k <= q - want[1]] == 0).all() and (record.weights[..., k == q] > 0).all()


def test_recording_leaves_modes_of_parts_alone():
    model = tiny_mistral().train()
    model.blocks[0].eval()
    record_attention(model, IDS)
    assert model.training and model.blocks[1].training and not model.blocks[0].training


def test_a_language_model_brings_its_tokenizer_and_labels():
    class LanguageModel:
        model, tokenizer = tiny_mistral(), Letters()

    record = record_attention(LanguageModel(), "abca")
    assert record.query_tokens == ["<s>", "a", "b", "c", "a"]
    assert (record.weights == record_attention(LanguageModel.model, [0, 1, 2, 3, 1]).weights).all()
    with pytest.raises(InputError, match="tokenizer"):
        record_attention(LanguageModel.model, "abca")
    with pytest.raises(InputError, match="no tokens"):
        record_attention(LanguageModel(), "")


def test_transformers_tokenizers_label_tokens():
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "to": 1, "be": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    assert record_attention(model, "to be or", tokenizer).query_tokens == ["to", "be", "[UNK]"]


def test_bytes_are_known_beforehand_and_refused_past_the_limit(capsys):
    model = tiny_mistral()
    nbytes = record_bytes(TINY.n_layers, TINY.n_heads, len(IDS))
    assert record_attention(model, IDS, max_bytes=nbytes).nbytes == nbytes
    for other in (model, twin(model)):
        with pytest.raises(CapacityError, match=f"{nbytes:,} bytes.*max_bytes"):
            record_attention(other, IDS, max_bytes=nbytes - 1)
    assert capsys.readouterr().err == ""


def test_large_records_are_announced(capsys, monkeypatch):
    monkeypatch.setattr("attnlab.record.LARGE", 1000)
    record_attention(tiny_mistral(), IDS)
    assert "2,904 bytes" in capsys.readouterr().err


def test_save_and_load_give_the_same_record_without_pickle(tmp_path):
    record = record_attention(tiny_mistral(), IDS)
    record.query_tokens = record.key_tokens = ["<s>", "⏎", "·x", "é\0", "", *map(str, range(6))]
    record.save(tmp_path / "maps.npz")
    again = AttentionRecord.load(tmp_path / "maps.npz")
    assert (again.weights == record.weights).all() and again.weights.dtype == np.float16
    for field in ("query_tokens", "key_tokens", "n_kv_heads", "window", "causal", "model_name"):
        assert getattr(again, field) == getattr(record, field)
    assert [p.name for p in tmp_path.iterdir()] == ["maps.npz"]
    with np.load(tmp_path / "maps.npz", allow_pickle=False) as file:
        assert sorted(file) == ["facts", "weights"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    record = record_attention(tiny_mistral(), IDS)
    path = tmp_path / "maps.npz"
    record.save(path)
    before = path.read_bytes()

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(CapacityError, match="no room"):
        record.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["maps.npz"]
    with pytest.raises(InputError, match="folder that exists"):
        record.save(tmp_path / "none" / "maps.npz")


def test_damaged_files_raise_one_error(tmp_path):
    path = tmp_path / "maps.npz"
    record_attention(tiny_mistral(), IDS).save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[500] ^= 0xFF
    for damaged in (whole[:100], whole[: len(whole) // 2], whole[:-10], b"", b"no record", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a whole record"):
            AttentionRecord.load(path)
    with pytest.raises(InputError, match="no record at"):
        AttentionRecord.load(tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(path, weights=np.zeros(3))
    for foreign in (tmp_path / "array.npy", path):
        with pytest.raises(CheckpointError):
            AttentionRecord.load(foreign)
    facts = np.frombuffer(b'{"format": 99}', dtype=np.uint8)
    np.savez(path, weights=np.zeros((1, 1, 1, 1), np.float16), facts=facts)
    with pytest.raises(CheckpointError, match="format 99"):
        AttentionRecord.load(path)


@pytest.mark.parametrize("ids", [[], [40], [-1, 3], [0.5, 1.0], [[1, 2], [3, 4]]])
def test_ids_that_cannot_be_used_are_refused(ids):
    model = tiny_mistral()
    for other in (model, twin(model)):
        with pytest.raises(InputError):
            record_attention(other, ids)


def test_models_without_weights_to_show_are_refused():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    )
    with pytest.raises(ConfigError, match="encoder-decoder"):
        record_attention(t5, IDS)
    assert record_attention(t5.get_encoder(), IDS).causal is False
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="heads of attention"):
        record_attention(mamba, IDS)
    with pytest.raises(InputError, match="transformers model"):
        record_attention(torch.nn.Linear(2, 2), IDS)


def test_a_model_that_cannot_go_eager_says_so(monkeypatch):
    model = twin(tiny_mistral())

    def refuse(implementation):
        raise ValueError("not this one")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    with pytest.raises(ConfigError, match='attn_implementation="eager"'):
        record_attention(model, IDS)


def test_a_model_that_silently_stays_as_it_is_is_refused_and_recorded_when_loaded_eager():
    config = transformers.FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ConfigError, match="kept its own"):
        record_attention(transformers.FalconForCausalLM._from_config(config, attn_implementation="sdpa"), IDS)
    record = record_attention(transformers.FalconForCausalLM._from_config(config, attn_implementation="eager"), IDS)
    assert (record.n_kv_heads, record.causal) == (1, True)


def test_text_longer_than_learned_positions_is_refused():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=8)
    )
    with pytest.raises(InputError, match="11 tokens came and the model has positions for 8"):
        record_attention(model, IDS)


def test_parts_that_do_not_fit_are_refused():
    weights = np.zeros((1, 4, 2, 2), np.float16)
    fits = {"query_tokens": ["a", "b"], "key_tokens": ["a", "b"], "n_kv_heads": 2, "window": None, "causal": True,
            "model_name": "m"}  # fmt: skip
    AttentionRecord(weights, **fits)
    for change in ({"query_tokens": ["a"]}, {"n_kv_heads": 3}, {"n_kv_heads": 0}):
        with pytest.raises(ShapeError):
            AttentionRecord(weights, **(fits | change))
    with pytest.raises(ShapeError, match="float16"):
        AttentionRecord(weights.astype(np.float32), **fits)


@pytest.mark.parametrize("causal", [True, False])
def test_an_8_bit_record_comes_back_within_its_bound_and_takes_a_fraction_of_the_bytes(tmp_path, causal):
    scores = np.random.default_rng(0).normal(size=(3, 4, 40, 40)) * 4
    scores[..., 0] += 6  # a sink
    if causal:
        scores[..., np.triu(np.ones((40, 40), dtype=bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float16)
    labels = [f"t{i}" for i in range(40)]
    record = AttentionRecord(weights, labels, labels, n_kv_heads=2, window=None, causal=causal, model_name="m")
    record.save(tmp_path / "whole.npz")
    record.save(tmp_path / "small.npz", bits=8)
    again = AttentionRecord.load(tmp_path / "small.npz")
    apart = np.abs(again.weights.astype(np.float64) - weights)
    assert again.weights.dtype == np.float16 and apart.max() < 0.02  # 1/510, and what brings rows to 1
    assert_rows_sum_to_one(again)
    assert (again.weights[weights == 0] == 0).all()
    for field in ("query_tokens", "key_tokens", "n_kv_heads", "window", "causal", "model_name"):
        assert getattr(again, field) == getattr(record, field)
    assert (tmp_path / "small.npz").stat().st_size < (tmp_path / "whole.npz").stat().st_size / (3.5 if causal else 1.9)
    with pytest.raises(ConfigError, match="16 or 8 bits; got 4"):
        record.save(tmp_path / "small.npz", bits=4)


def test_an_8_bit_record_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "maps.npz"
    record_attention(tiny_mistral(), IDS).save(path, bits=8)
    with np.load(path) as file:
        np.savez_compressed(tmp_path / "short.npz", facts=file["facts"], maps=file["maps"][:, :-1])
    with pytest.raises(CheckpointError, match="not a whole record"):
        AttentionRecord.load(tmp_path / "short.npz")
