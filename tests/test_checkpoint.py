"""Checkpoints: both layouts, against transformers as reader and writer; every kind of damage; memory while loading."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attnlab.checkpoint as checkpoint
from attnlab.checkpoint import load_model, parse_device, parse_dtype, read_config, save_model, stored_dtype
from attnlab.errors import CapacityError, CheckpointError, ConfigError
from attnlab.mistral import Mistral, MistralConfig

SMALL = MistralConfig(
    vocab_size=97, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=80, head_dim=16, window=5, rope_theta=5e4
)  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 13, 2, 96, 4, 4, 31, 7, 60, 12]])  # longer than the window


def random_model(config: MistralConfig = SMALL, seed: int = 0) -> Mistral:
    torch.manual_seed(seed)
    model = Mistral(config).eval()
    for parameter in model.parameters():  # norms too, so that no tensor could be mistaken for another
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    out = model(IDS)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


def assert_equal_logits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of their spread."""
    assert (got - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def edit_json(file: Path, remove: tuple[str, ...] = (), **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def edit_weights(file: Path, change) -> None:
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, file)


# ---- the two layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"window": None, "rope_theta": 1e6}, {"n_kv_heads": 6}, {"n_kv_heads": 1}],
    ids=["grouped", "tied", "no window", "multi-head", "multi-query"],
)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, layout, changes):
    model = random_model(SMALL.replace(**changes))
    save_model(model, tmp_path / "saved", layout)
    loaded = load_model(tmp_path / "saved")
    assert loaded.config == model.config.replace(name="saved")
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.lm_head.weight is loaded.embed.weight) == model.config.tie_embeddings


def test_both_layouts_of_one_model_give_the_same_logits(tmp_path):
    model = random_model()
    save_model(model, tmp_path / "a", "hf")
    save_model(model, tmp_path / "b", "mistral")
    assert torch.equal(logits(load_model(tmp_path / "a")), logits(load_model(tmp_path / "b")))
    on_disk = load_file(tmp_path / "a/model.safetensors"), load_file(tmp_path / "b/consolidated.safetensors")
    q_hf, q_native = on_disk[0]["model.layers.0.self_attn.q_proj.weight"], on_disk[1]["layers.0.attention.wq.weight"]
    first_head = q_native[:16].view(8, 2, 48)  # eight points of two adjacent rows each
    assert torch.equal(q_hf[:8], first_head[:, 0]) and torch.equal(q_hf[8:16], first_head[:, 1])


def test_the_rows_order_matters(tmp_path):
    """A native checkpoint under Hugging Face's names, rows as they were, runs and is wrong."""
    model = random_model()
    save_model(model, tmp_path / "native", "mistral")
    save_model(model, tmp_path / "mixed", "hf")
    native = load_file(tmp_path / "native/consolidated.safetensors")

    def as_they_were(tensors):
        for layer in range(SMALL.n_layers):
            for ours, theirs in (("q_proj", "wq"), ("k_proj", "wk")):
                rows = native[f"layers.{layer}.attention.{theirs}.weight"]
                tensors[f"model.layers.{layer}.self_attn.{ours}.weight"] = rows

    edit_weights(tmp_path / "mixed/model.safetensors", as_they_were)
    right, wrong = logits(load_model(tmp_path / "native")), logits(load_model(tmp_path / "mixed"))
    assert torch.allclose(right[:, 0], wrong[:, 0], atol=1e-4)  # one token alone: nothing to turn against
    assert (right - wrong).abs().max() > 0.01 * (right.max() - right.min())


@pytest.mark.parametrize("old_zip", [True, False], ids=["zip .pth", "legacy .pth"])
def test_native_pth_is_read_without_running_code_in_it(tmp_path, old_zip):
    model = random_model()
    save_model(model, tmp_path / "m", "mistral")
    file = tmp_path / "m/consolidated.safetensors"
    torch.save(load_file(file), tmp_path / "m/consolidated.00.pth", _use_new_zipfile_serialization=old_zip)
    file.unlink()
    if old_zip:
        assert torch.equal(logits(load_model(tmp_path / "m")), logits(model))
    else:  # cannot be mapped: said, not loaded whole
        with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
            load_model(tmp_path / "m")


def test_several_pth_parts_are_joined_if_whole_and_refused_if_cut(tmp_path):
    model = random_model()
    save_model(model, tmp_path / "m", "mistral")
    file = tmp_path / "m/consolidated.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    names = list(tensors)
    for part, some in enumerate((names[:10], names[10:])):
        torch.save({name: tensors[name] for name in some}, tmp_path / f"m/consolidated.0{part}.pth")
    assert torch.equal(logits(load_model(tmp_path / "m")), logits(model))
    torch.save({name: tensors[name] for name in names[9:]}, tmp_path / "m/consolidated.01.pth")
    with pytest.raises(CheckpointError, match="several GPUs"):
        load_model(tmp_path / "m")


def test_a_folder_with_both_layouts_is_read_as_hugging_face(tmp_path):
    save_model(random_model(seed=1), tmp_path / "a", "hf")
    save_model(random_model(seed=2), tmp_path / "b", "mistral")
    for file in (tmp_path / "b").iterdir():
        file.rename(tmp_path / "a" / file.name)
    assert torch.equal(logits(load_model(tmp_path / "a")), logits(random_model(seed=1)))
    (tmp_path / "a/model.safetensors").unlink()  # config.json alone is no checkpoint
    assert torch.equal(logits(load_model(tmp_path / "a")), logits(random_model(seed=2)))


# ---- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000], ids=["one file", "shards"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "window": None}], ids=["window", "tied, no window"])
def test_transformers_reads_what_we_write(tmp_path, max_shard_bytes, changes):
    from transformers import MistralForCausalLM

    model = random_model(SMALL.replace(**changes))
    save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) == 1 if max_shard_bytes == 10**9 else len(shards) > 3
    theirs, problems = MistralForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager", output_loading_info=True
    )
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    assert theirs.config.rope_parameters["rope_theta"] == SMALL.rope_theta
    assert_equal_logits(logits(model), logits(theirs.eval()))


@pytest.mark.parametrize("max_shard_size", ["1GB", "30KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_we_read_what_transformers_writes(tmp_path, max_shard_size, tied, window):
    from transformers import MistralConfig as TheirConfig
    from transformers import MistralForCausalLM

    torch.manual_seed(0)
    theirs = MistralForCausalLM(
        TheirConfig(
            vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, head_dim=16, sliding_window=window, tie_word_embeddings=tied, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4}, initializer_range=0.2,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "30KB")
    ours = load_model(tmp_path)
    assert ours.config == SMALL.replace(window=window, tie_embeddings=tied, name=tmp_path.name)
    assert_equal_logits(logits(ours), logits(theirs))


# ---- configs ----------------------------------------------------------------------------------------------------------

HF_V01 = {  # what mistralai/Mistral-7B-v0.1 says of itself
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "hidden_act": "silu",
    "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
NATIVE_V01 = {
    "n_layers": 32, "dim": 4096, "hidden_dim": 14336, "n_heads": 32, "head_dim": 128, "n_kv_heads": 8,
    "norm_eps": 1e-05, "vocab_size": 32000, "sliding_window": 4096,
}  # fmt: skip


def config_of(folder: Path, file: str, content, remove: tuple[str, ...] = (), **changes) -> MistralConfig:
    (folder / file).write_text(json.dumps({k: v for k, v in (content | changes).items() if k not in remove}))
    return read_config(folder)


def test_the_released_configs_are_the_preset(tmp_path):
    preset = MistralConfig.preset("mistral-7b-v0.1").replace(name=tmp_path.name)
    assert config_of(tmp_path, "config.json", HF_V01) == preset
    (tmp_path / "config.json").unlink()
    assert config_of(tmp_path, "params.json", NATIVE_V01) == preset


def test_rope_theta_absent_from_params_follows_the_window(tmp_path):
    assert config_of(tmp_path, "params.json", NATIVE_V01).rope_theta == 1e4
    assert config_of(tmp_path, "params.json", NATIVE_V01, sliding_window=None).rope_theta == 1e6
    without = config_of(tmp_path, "params.json", NATIVE_V01, remove=("sliding_window",))
    assert (without.window, without.rope_theta) == (None, 1e6)
    assert config_of(tmp_path, "params.json", NATIVE_V01, rope_theta=777.0).rope_theta == 777.0


def test_absent_keys_of_config_json_mean_what_transformers_takes_them_for(tmp_path):
    from transformers import MistralConfig as TheirConfig

    absent = ("sliding_window", "rope_theta", "rms_norm_eps", "num_key_value_heads")
    ours = config_of(tmp_path, "config.json", HF_V01, remove=absent)
    theirs = TheirConfig.from_pretrained(tmp_path)
    assert (ours.window, ours.norm_eps) == (theirs.sliding_window, theirs.rms_norm_eps) == (4096, 1e-6)
    assert (ours.n_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (8, 128)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 1e4
    assert config_of(tmp_path, "config.json", HF_V01, sliding_window=None).window is None


def test_rope_theta_is_found_where_each_generation_of_transformers_puts_it(tmp_path):
    def new(**rope):
        return config_of(tmp_path, "config.json", HF_V01, remove=("rope_theta",), rope_parameters=rope).rope_theta

    assert new(rope_theta=1e6, rope_type="default") == 1e6
    assert new(rope_theta=1e6) == 1e6
    assert config_of(tmp_path, "config.json", HF_V01, rope_theta=1e6, rope_scaling=None).rope_theta == 1e6
    assert (
        config_of(tmp_path, "config.json", HF_V01, rope_theta=1e6, rope_scaling={"type": "default"}).rope_theta == 1e6
    )


def test_a_window_as_long_as_the_context_or_one_that_nobody_set_is_taken(tmp_path):
    assert config_of(tmp_path, "config.json", HF_V01, max_position_embeddings=4096).window == 4096
    absent = config_of(tmp_path, "config.json", HF_V01, remove=("sliding_window",), max_position_embeddings=2048)
    assert absent.window == 4096  # transformers' default, beyond which these texts never come


def test_head_dim_is_derived_where_it_is_missing_or_null(tmp_path):
    assert config_of(tmp_path, "config.json", HF_V01, head_dim=None).head_dim == 128
    assert config_of(tmp_path, "config.json", HF_V01, head_dim=64).head_dim == 64
    (tmp_path / "config.json").unlink()
    assert config_of(tmp_path, "params.json", NATIVE_V01, remove=("head_dim",)).head_dim == 128


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": None}, "mistral"),
        ({"architectures": ["MistralForSequenceClassification"]}, "MistralForSequenceClassification"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "0.5"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 4096.5}, "hidden_size"),
        ({"num_hidden_layers": -1}, "n_layers"),
        ({"num_key_value_heads": 5}, "multiple"),
        ({"head_dim": 10**12}, "head_dim"),
        ({"sliding_window": 0}, "window"),
        ({"sliding_window": 4097, "max_position_embeddings": 4096}, "4,096 tokens; got 4,097"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"architectures": 5}, "kind"),
        ({"layer_types": [["full_attention"]]}, "kind"),
        ({"rope_theta": 10**400}, "kind"),
        ({"rope_scaling": "linear"}, "rotary"),
    ],
)
def test_a_config_this_decoder_has_not_is_refused(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        config_of(tmp_path, "config.json", HF_V01, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("changes", [{"moe": {"num_experts": 8}}, {"dim": None}, {"sliding_window": [4096, None]}])
def test_a_native_config_this_decoder_has_not_is_refused(tmp_path, changes):
    with pytest.raises(CheckpointError, match=r"params\.json"):
        config_of(tmp_path, "params.json", NATIVE_V01, **changes)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '"config"', "null", "\xff\xfe", "[" * 100_000], ids=lambda text: repr(text[:8])
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_huge_json_file_is_refused_unread(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**12)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match="1,000,000,000,000 bytes"):
        read_config(tmp_path)


def test_no_folder_an_empty_folder_and_a_file_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="not there"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json .* or params\.json"):
        load_model(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file"):
        load_model(tmp_path / "file")


# ---- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    save_model(random_model(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_model(random_model(), tmp_path / "s", max_shard_bytes=70_000)
    return tmp_path / "s"


def test_missing_extra_and_misshapen_tensors_are_named(saved):
    weights, name = saved / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    kept = weights.read_bytes()
    edit_weights(weights, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        load_model(saved)
    weights.write_bytes(kept)
    edit_weights(weights, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.mlp\.up_proj\.weight is too many"):
        load_model(saved)
    weights.write_bytes(kept)
    edit_weights(weights, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(CheckpointError, match=r"\(80, 48\); got \(48, 80\)"):
        load_model(saved)


def test_integer_weights_are_refused(saved):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(saved / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{name} is I8"):
        load_model(saved)


def test_leftovers_that_change_nothing_are_ignored(saved, tmp_path):
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_weights(saved / "model.safetensors", lambda tensors: tensors.update(inv_freq))
    assert torch.equal(logits(load_model(saved)), logits(random_model()))
    tied = random_model(SMALL.replace(tie_embeddings=True))
    save_model(tied, tmp_path / "tied")
    again = {"lm_head.weight": tied.embed.weight.detach().clone()}
    edit_weights(tmp_path / "tied/model.safetensors", lambda tensors: tensors.update(again))
    assert torch.equal(logits(load_model(tmp_path / "tied")), logits(tied))


def test_a_missing_output_matrix_is_explained(saved):
    edit_weights(saved / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_model(saved)
    edit_json(saved / "config.json", tie_word_embeddings=True)
    assert load_model(saved).config.tie_embeddings


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_file_is_refused(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*download it again"):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_pth_is_refused(tmp_path, keep):
    save_model(random_model(), tmp_path / "m", "mistral")
    tensors = load_file(tmp_path / "m/consolidated.safetensors")
    (tmp_path / "m/consolidated.safetensors").unlink()
    file = tmp_path / "m/consolidated.00.pth"
    torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        load_model(tmp_path / "m")


class _Trap:
    def __reduce__(self):
        return (os.mkdir, (os.environ["TRAP"],))


def test_code_in_a_pth_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    save_model(random_model(), tmp_path / "m", "mistral")
    (tmp_path / "m/consolidated.safetensors").unlink()
    torch.save({"output.weight": _Trap()}, tmp_path / "m/consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "sprung").exists()


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00005\.safetensors: this shard is missing"):
        load_model(sharded)


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "C:x", "", "nul\0"])
def test_an_index_that_points_outside_its_folder_is_refused(sharded, name):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = name
    edit_json(sharded / "model.safetensors.index.json", **index)
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_model(sharded)


def test_links_to_a_store_beside_are_followed(sharded, tmp_path):
    """The hub's cache keeps files in ``blobs`` and links to them under their names."""
    (tmp_path / "blobs").mkdir()
    for file in list(sharded.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert torch.equal(logits(load_model(sharded)), logits(random_model()))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["metadata"].update(total_size=index["metadata"]["total_size"] + 4),
        lambda index: index["weight_map"].update({"model.norm.weight": "model-00001-of-00005.safetensors"}),
        lambda index: index["weight_map"].update({"model.nothing.weight": "model-00001-of-00005.safetensors"}),
        lambda index: index["weight_map"].pop("model.norm.weight"),
        lambda index: index.update(weight_map={}),
        lambda index: index.update(weight_map=["model-00001-of-00005.safetensors"]),
        lambda index: index.update(weight_map={"model.norm.weight": 3}),
    ],
    ids=["total_size", "wrong shard", "unknown tensor", "unlisted tensor", "empty", "list", "not a name"],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(sharded, change):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(sharded)


def test_a_config_of_other_sizes_is_refused_before_anything_is_built(saved):
    edit_json(saved / "config.json", num_hidden_layers=9_000_000)
    with pytest.raises(CheckpointError, match="9000000 layers"):
        load_model(saved)
    edit_json(saved / "config.json", num_hidden_layers=3, hidden_size=9_999_999, intermediate_size=9_999_999)
    with pytest.raises(CheckpointError, match="9999999"):
        load_model(saved)


def test_weights_in_another_format_are_named(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_model(saved)


# ---- dtypes, devices, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16"])
def test_dtype_is_as_stored_unless_another_is_asked_for(tmp_path, stored, wanted):
    model = random_model().to(parse_dtype(stored))
    save_model(model, tmp_path / "m")
    assert stored_dtype(tmp_path / "m") == parse_dtype(stored)
    loaded = load_model(tmp_path / "m", dtype=wanted)
    assert {p.dtype for p in loaded.parameters()} == {parse_dtype(wanted or stored)}
    assert torch.equal(loaded.norm.weight, model.norm.weight.to(loaded.dtype))


def test_unknown_dtypes_and_devices_are_refused(monkeypatch):
    assert parse_dtype("bfloat16") == parse_dtype(torch.bfloat16) == torch.bfloat16
    for dtype in ("int8", "fp16", "", None, 16, torch.int8, torch.float64):
        with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
            parse_dtype(dtype)
    assert parse_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda:1") == torch.device("cuda:1")
    for device in ("gpu", "", None, "meta", "cuda:2", "cuda:-1"):
        with pytest.raises(ConfigError, match="device"):
            parse_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="not here"):
        parse_device("cuda")


# Run in a process of its own, where the peak of its resident set is the kernel's count (not ru_maxrss on Linux, which a
# child takes over from its parent). Mapped file pages are in it, so this is the strict measure: beyond the weights, only
# what is mapped at one time may be resident.
_MEASURE = """
import resource, sys
from pathlib import Path
from attnlab.checkpoint import load_model

def peak():
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes

load_model(sys.argv[1])  # a small one first: code and libraries are in memory, and not counted
before = peak()
model = load_model(sys.argv[2], dtype=sys.argv[3], progress=False)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """350 MB in float32, no tensor over 25 MB: loaded all at once, or converted in one go, it would show."""
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = Mistral(
            MistralConfig(
                vocab_size=4096, d_model=1536, n_layers=3, n_heads=12, n_kv_heads=4, d_ff=4096, head_dim=128
            )
        )  # fmt: skip
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    save_model(model, folder / "hf", max_shard_bytes=200_000_000)
    save_model(model, folder / "mistral", "mistral")
    torch.save(load_file(folder / "mistral/consolidated.safetensors"), folder / "mistral/consolidated.00.pth")
    (folder / "mistral/consolidated.safetensors").unlink()
    save_model(random_model(), folder / "small")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_memory_beyond_the_weights_is_that_of_a_few_tensors(large, layout, dtype):
    command = [sys.executable, "-c", _MEASURE, str(large / "small"), str(large / layout), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, weights = map(int, run.stdout.split())
    largest_tensor = 4 * 4096 * 1536  # float32
    assert weights * 0.9 < grown < weights + 5 * largest_tensor
    assert 5 * largest_tensor < 500e6


# ---- writing safely ---------------------------------------------------------------------------------------------------


def test_shards_hold_no_more_than_asked_and_files_have_the_usual_permissions(tmp_path):
    save_model(random_model(), tmp_path / "m", max_shard_bytes=40_000)
    for file in (tmp_path / "m").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 40_000
        assert file.stat().st_mode == (tmp_path / "m/config.json").stat().st_mode


def test_saving_over_a_checkpoint_replaces_it_and_keeps_other_files(sharded):
    (sharded / "tokenizer.json").write_text("kept")
    save_model(random_model(seed=5), sharded)
    assert {p.name for p in sharded.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert torch.equal(logits(load_model(sharded)), logits(random_model(seed=5)))
    with pytest.raises(CheckpointError, match="other layout"):
        save_model(random_model(), sharded, "mistral")


def test_a_save_cut_off_while_files_move_leaves_no_mixture(sharded, monkeypatch):
    moves = []

    def killed_at_the_second(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        Path(source).rename(target)

    monkeypatch.setattr(checkpoint.os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save_model(random_model(seed=5), sharded, max_shard_bytes=70_000)
    with pytest.raises(CheckpointError, match="neither"):
        load_model(sharded)
    assert [p.name for p in sharded.parent.iterdir()] == [sharded.name]


def test_a_killed_save_is_cleared_up_by_the_next(tmp_path):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial/model-00001-of-00009.safetensors").touch()
    save_model(random_model(), tmp_path / "m")
    assert {p.name for p in tmp_path.iterdir()} == {"m"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}


@contextmanager
def full_disk(folder: Path, monkeypatch):
    """A disk of one megabyte where we may mount one; elsewhere the write fails as on a full disk, half done."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", _fails_half_way)
            yield


def _fails_half_way(tensors, file, metadata=None):
    Path(file).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_a_full_disk_leaves_nothing_and_the_old_model_whole(tmp_path, monkeypatch, layout):
    (tmp_path / "disk").mkdir()
    with full_disk(tmp_path / "disk", monkeypatch):
        too_large = random_model(SMALL.replace(vocab_size=9000))  # 3.5 MB
        with pytest.raises(CapacityError, match="disk is full"):
            save_model(too_large, tmp_path / "disk/m", layout)
        assert list((tmp_path / "disk").iterdir()) == []
    save_model(random_model(), tmp_path / "m", layout)
    monkeypatch.setattr(checkpoint, "save_file", _fails_half_way)
    with pytest.raises(CapacityError, match=r"0\.00 GB"):
        save_model(random_model(seed=5), tmp_path / "m", layout)
    assert torch.equal(logits(load_model(tmp_path / "m")), logits(random_model()))
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "m"}


def test_a_folder_that_cannot_be_made_and_an_unknown_layout_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_model(random_model(), tmp_path / "file/m")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_model(random_model(), tmp_path / "file")
    with pytest.raises(ConfigError, match="layout"):
        save_model(random_model(), tmp_path / "m", "gguf")
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        save_model(random_model(), tmp_path / "m", max_shard_bytes=0)


def test_loading_does_not_import_torchs_compiler(tmp_path):
    """It would cost every command seconds."""
    save_model(random_model(), tmp_path / "m")
    code = "import sys; from attnlab.checkpoint import load_model; load_model(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_device_without_room_is_said(saved, monkeypatch):
    empty = torch.empty

    def no_room(*args, device=None, **kwargs):
        if device != torch.device("cpu"):  # the modules, which have no device yet
            return empty(*args, device=device, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory.\nmuch more text")

    monkeypatch.setattr(torch, "empty", no_room)
    with pytest.raises(
        CapacityError, match=r"0\.0 GB in float32, and cpu has no room for them \(CUDA out of memory\.\)"
    ):
        load_model(saved)


def test_no_tensor_is_left_without_memory(tmp_path):
    save_model(random_model(), tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
