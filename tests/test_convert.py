"""convert.py: pooling K/V heads, turning them without a loss, and the command that writes a folder."""

import pytest
import torch
from einops import repeat
from test_generate import SMALL, make_model
from test_tokenizer import make_bpe
from torch import nn

import attnlab
from attnlab import cli
from attnlab.checkpoint import save_model
from attnlab.convert import align_heads, convert_folder, pool_heads, to_grouped
from attnlab.errors import ConfigError, InputError

CONFIG = SMALL.replace(n_heads=8, n_kv_heads=8, head_dim=4)
IDS = torch.arange(12)[None] % CONFIG.vocab_size


@pytest.fixture
def model():
    return make_model(CONFIG)


def with_equal_heads(model, n_kv_heads):
    """The same model, with the K/V heads of every group made equal to the group's first."""
    for block in model.blocks:
        for projection in (block.attention.k_proj, block.attention.v_proj):
            pooled = pool_heads(projection.weight.detach(), n_kv_heads, CONFIG.head_dim, "first")
            n = CONFIG.n_kv_heads // n_kv_heads
            weight = repeat(pooled, "(Hkv D) d -> (Hkv n D) d", Hkv=n_kv_heads, n=n)
            projection.weight = nn.Parameter(weight.clone())
    return model


def close(a, b):
    torch.testing.assert_close(a(IDS), b(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "first", "random"])
def test_converting_to_the_same_number_changes_nothing(model, pooling):
    assert torch.equal(to_grouped(model, 8, pooling)(IDS), model(IDS))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_model_whose_heads_of_a_group_are_equal_loses_nothing(model, n_kv_heads, pooling):
    model = with_equal_heads(model, n_kv_heads)
    converted = to_grouped(model, n_kv_heads, pooling)
    assert converted.config == model.config.replace(n_kv_heads=n_kv_heads)
    assert converted.blocks[0].attention.k_proj.weight.shape == (n_kv_heads * 4, CONFIG.d_model)
    close(converted, model)


def test_the_original_is_left_alone(model):
    before = model(IDS)
    converted = to_grouped(model, 2)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert torch.equal(model(IDS), before) and model.config.n_kv_heads == 8


def test_means_pool_in_steps_as_at_once(model):
    close(to_grouped(to_grouped(model, 4), 2), to_grouped(model, 2))


def test_a_converted_model_has_a_smaller_cache_and_decodes_as_it_predicts(model):
    converted = to_grouped(model, 2)
    cache = converted.new_cache(max_len=12)
    assert cache.nbytes * 4 == model.new_cache(max_len=12).nbytes
    stepwise = torch.cat([converted(IDS[:, i : i + 1], cache=cache) for i in range(12)], dim=1)
    torch.testing.assert_close(stepwise, converted(IDS), atol=1e-4, rtol=1e-4)


def test_random_heads_follow_the_seed_and_have_the_old_heads_scale(model):
    weights = [to_grouped(model, 1, "random", seed).blocks[0].attention.k_proj.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    wide = torch.randn(64, 500) * 3
    assert 2.5 < pool_heads(wide, 2, 16, "random").std() < 3.5


def test_half_precision_stays_and_is_averaged_in_single():
    weight = torch.tensor([[256.0]] + [[1.0]] * 31, dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    pooled = pool_heads(weight, 1, 1)
    assert pooled.dtype == torch.bfloat16 and pooled.item() == 9.0  # 287 / 32, to the nearest bfloat16


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_turned_heads_compute_the_same(model, n_kv_heads):
    close(align_heads(model, n_kv_heads), model)


def test_turned_heads_of_a_grouped_model_compute_the_same():
    model = make_model(CONFIG.replace(n_kv_heads=4))
    close(align_heads(model, 2), model)


def test_heads_that_differ_by_a_turn_alone_are_pooled_without_a_loss(model):
    model = with_equal_heads(model, 2)
    turned = make_model(CONFIG)
    turned.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in turned.blocks:
            v = block.attention.v_proj.weight.view(8, 4, -1)
            o = block.attention.o_proj.weight.view(-1, 8, 4)
            for head in range(8):
                turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
                v[head], o[:, head] = turn @ v[head], o[:, head] @ turn.T
    close(turned, model)
    assert (to_grouped(turned, 2)(IDS) - turned(IDS)).abs().max() > 1e-2
    close(to_grouped(align_heads(turned, 2), 2), turned)


@pytest.mark.parametrize("n_kv_heads", [3, 0, -1, 16])
def test_numbers_that_do_not_divide_are_refused_with_those_that_do(model, n_kv_heads):
    for function in (to_grouped, align_heads):
        with pytest.raises(ConfigError, match=r"could be one of \[1, 2, 4, 8\]"):
            function(model, n_kv_heads)


def test_an_unknown_pooling_and_a_wrong_head_dim_are_refused(model):
    with pytest.raises(ConfigError, match="mean, first, random; got 'max'"):
        to_grouped(model, 2, "max")
    with pytest.raises(ConfigError, match="whole number of heads"):
        pool_heads(torch.ones(10, 3), 2, 4)


# --- the command


@pytest.fixture
def folder(tmp_path, model):
    save_model(model.to(torch.bfloat16), tmp_path / "wide", bos_id=1, eos_id=2)
    make_bpe(tmp_path / "wide", CONFIG.vocab_size)
    return tmp_path / "wide"


def test_the_command_writes_a_folder_that_loads_and_computes_what_to_grouped_gives(folder, capsys):
    out = folder.parent / "narrow"
    assert cli.run(["convert", str(folder), "--n-kv-heads", "2", "--out", str(out)]) == 0
    assert "8 query heads on 2 K/V heads" in capsys.readouterr().out
    lm, original = attnlab.load(out, dtype="float32"), attnlab.load(folder, dtype="float32")
    assert lm.config.n_kv_heads == 2 and lm.tokenizer.encode("ab") == original.tokenizer.encode("ab")
    expected = to_grouped(attnlab.load(folder, dtype="bfloat16").model, 2).float()
    assert torch.equal(lm.model(IDS), expected(IDS))


def test_the_command_can_align_and_choose(folder):
    for i, options in enumerate((["--align"], ["--pooling", "first"], ["--pooling", "random", "--seed", "3"])):
        out = folder.parent / str(i)
        assert cli.run(["convert", str(folder), "--n-kv-heads", "1", "--out", str(out), *options]) == 0
    weights = [attnlab.load(folder.parent / str(i)).model.blocks[0].attention.v_proj.weight for i in range(3)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_folder_that_is_there_is_not_touched(folder):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match="give a new folder"):
        convert_folder(folder, folder, 2)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-kv-heads", "3"], "the number must divide 8"),
        (["--n-kv-heads", "2", "--pooling", "max"], "mean, first, random"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(folder, capsys, options, message):
    out = folder.parent / "narrow"
    assert cli.run(["convert", str(folder), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()
