"""Tensor parallelism: what a rank holds, reads and sends is what was derived, and the ranks together are the model."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import attnlab
from attnlab import checkpoint, companion, memory, parallel
from attnlab.checkpoint import save_model
from attnlab.errors import CapacityError, CheckpointError, ConfigError, InputError, RankError
from attnlab.generate import Decoder

PROMPT, NEW = "import os\n\ndef", 12
TOY = attnlab.MistralConfig(
    vocab_size=64, d_model=48, n_layers=2, n_heads=16, n_kv_heads=8, d_ff=96, head_dim=6, name="toy"
)


# ---- what a rank holds: arithmetic, in one process --------------------------------------------------------------------


def test_possible_ranks_keep_whole_groups_together():
    assert parallel.possible_ranks("mistral-7b-v0.3") == [1, 2, 4, 8, 16, 32]
    assert parallel.possible_ranks("falcon-7b") == [1, 71]  # 71 heads: a prime number
    assert parallel.possible_ranks("qwen2.5-7b") == [1, 2, 4, 28]  # 7 and 14 divide the 28 query heads, and tear groups
    assert parallel.possible_ranks(TOY) == [1, 2, 4, 8, 16]
    assert parallel.possible_ranks(TOY.replace(d_ff=98)) == [1, 2]  # a rank has an equal part of the feed-forward layer
    assert parallel.possible_ranks(TOY.replace(vocab_size=63)) == [1]


@pytest.mark.parametrize("ranks", [0, 3, 32])
def test_other_ranks_are_refused_with_the_possible_numbers(ranks):
    for ask in (parallel.check_ranks, parallel.local_config, parallel.share):
        with pytest.raises(
            ConfigError, match=rf"one of 1, 2, 4, 8, 16 ranks for toy.*16 query heads on 8.*got {ranks}"
        ):
            ask(TOY, ranks)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(32, 8), (8, 2), (16, 16), (16, 1), (12, 3), (28, 4)])
def test_a_rank_has_the_kv_heads_that_its_query_heads_read_and_no_others(n_heads, n_kv_heads):
    shape = memory.ModelShape("heads", 1, n_heads, n_kv_heads, 4)
    for ranks in parallel.possible_ranks(shape):
        local = n_heads // ranks
        for rank in range(ranks):
            queries = range(rank * local, (rank + 1) * local)
            read = sorted({h // (n_heads // n_kv_heads) for h in queries})
            held = parallel.kv_heads(n_heads, n_kv_heads, ranks, rank)
            assert list(held) == read
            # counted on the rank, query head h still reads K/V head h // group_size
            group = local // len(held)
            assert [held[i // group] for i in range(local)] == [h // (n_heads // n_kv_heads) for h in queries]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_the_parts_of_all_ranks_make_up_each_matrix(ranks):
    replicas = max(1, ranks // TOY.n_kv_heads)
    for name, whole in attnlab.Mistral(TOY).state_dict().items():
        parts = [whole[parallel.part(name, TOY, ranks, rank)] for rank in range(ranks)]
        if "norm" in name:
            assert all(torch.equal(p, whole) for p in parts)
            continue
        if "k_proj" in name or "v_proj" in name:  # neighbours hold the same one where there are too few
            for i in range(0, ranks, replicas):
                assert all(torch.equal(p, parts[i]) for p in parts[i : i + replicas])
            parts = parts[::replicas]
        dim = 1 if "o_proj" in name or "down_proj" in name else 0
        assert torch.equal(torch.cat(parts, dim), whole)


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads", [16, 8, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_what_the_ranks_compute_by_themselves_adds_up_to_the_layer(ranks, n_kv_heads):
    torch.manual_seed(0)
    config = TOY.replace(n_kv_heads=n_kv_heads, rope_theta=100.0)
    block = attnlab.Mistral(config).blocks[0]
    x = torch.randn(2, 7, config.d_model)  # (B, T, d)
    here = parallel.local_config(config, ranks)
    attended, fed = 0, 0
    for rank in range(ranks):
        one = attnlab.TransformerBlock(
            attnlab.GroupedQueryAttention(
                config.d_model, here.n_heads, here.n_kv_heads, here.head_dim, rope_theta=config.rope_theta
            ),
            here.d_ff,
        )
        one.load_state_dict(
            {n: w[parallel.part(f"blocks.0.{n}", config, ranks, rank)] for n, w in block.state_dict().items()}
        )
        attended, fed = attended + one.attention(x), fed + one.feed_forward(x)
    torch.testing.assert_close(attended, block.attention(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fed, block.feed_forward(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_the_account_of_a_rank_is_the_sum_of_its_parts(ranks, tied):
    config = TOY.replace(tie_embeddings=tied)
    with torch.device("meta"):
        named = dict(attnlab.Mistral(config).named_parameters())  # a tied matrix once
    held = sum(w[parallel.part(n, config, ranks, ranks - 1)].numel() for n, w in named.items())
    share = parallel.share(config, ranks, "float16")
    assert share.weight_bytes == 2 * held
    assert share.kv_bytes_per_token == memory.kv_bytes_per_token(parallel.local_config(config, ranks))
    assert (share.n_heads, share.n_kv_heads) == (16 // ranks, max(1, 8 // ranks))
    if ranks == 1:
        assert share.weight_bytes == memory.weight_bytes(config, "float16")
        assert share.sent_bytes == share.payload_bytes == share.all_reduces == 0
    else:
        reduced, gathered = 5 * 48 * 2, 64 // ranks * 2  # two layers and the embedding; the rank's logits
        assert share.all_reduces == 5 and share.payload_bytes == reduced + gathered
        assert share.sent_bytes == 2 * (ranks - 1) * reduced // ranks + (ranks - 1) * gathered


def test_the_cache_of_a_rank_stops_shrinking_at_the_number_of_kv_heads():
    def of(model):
        whole = memory.kv_bytes_per_token(model, "bfloat16")
        return [whole / parallel.share(model, ranks).kv_bytes_per_token for ranks in (1, 2, 4, 8, 16, 32)]

    assert of("mistral-7b-v0.3") == of("llama-2-70b") == [1, 2, 4, 8, 8, 8]
    assert of("llama-2-7b") == [1, 2, 4, 8, 16, 32]
    assert of(memory.with_kv_heads("mistral-7b-v0.3", 1)) == [1] * 6


@pytest.mark.parametrize("model", ["deepseek-v3", "mixtral-8x7b", "gpt-2"])
def test_models_that_are_not_cut_this_way_are_refused(model):
    with pytest.raises(ConfigError, match="plain attention"):
        parallel.share(model, 2)


# ---- processes --------------------------------------------------------------------------------------------------------


class OnlySlices:
    """A weight file that gives slices and no whole tensors, and counts the elements that were asked for."""

    asked = 0

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        self.opened = self.file.__enter__()
        return self

    def __exit__(self, *reason):
        return self.file.__exit__(*reason)

    def keys(self):
        return self.opened.keys()

    def get_slice(self, name):
        return OneSlice(self.opened.get_slice(name))


class OneSlice:
    def __init__(self, whole):
        self.whole, self.get_shape, self.get_dtype = whole, whole.get_shape, whole.get_dtype

    def __getitem__(self, where):
        sizes = [len(range(*cut.indices(size))) for cut, size in zip(where, self.get_shape(), strict=True)]
        OnlySlices.asked += math.prod(sizes)
        return self.whole[where]


def of_several(mesh, *names):
    """Runs on every rank: a measurement for each model, with the elements that were read for it."""
    sound, checkpoint._open = checkpoint._open, lambda file: OnlySlices(sound(file))
    found = []
    for name in names:
        OnlySlices.asked = 0
        found.append((parallel.measure(mesh, str(name), PROMPT, NEW, "float32"), OnlySlices.asked))
    return found


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """The companion as Mistral stores models: other names, and the rows of W_Q and W_K in another order."""
    folder = tmp_path_factory.mktemp("native") / "companion"
    save_model(attnlab.load("companion", device="cpu", dtype="float32").model, folder, "mistral")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(companion.folder() / file, folder)
    return folder


@pytest.fixture(scope="module")
def alone():
    """The companion in one process: logits after the prompt, and what follows."""
    lm = attnlab.load("companion", device="cpu", dtype="float32")
    ids = lm.tokenizer.encode(PROMPT)
    logits = Decoder(lm.model, 64).prefill(torch.tensor([ids]))[0, -1]
    return lm, logits, attnlab.generate(lm, ids, NEW), attnlab.generate(lm, PROMPT, NEW)


@pytest.fixture(scope="module")
def two(native):
    return parallel.run(2, of_several, "companion", native)


@pytest.fixture(scope="module")
def four():
    """Four ranks for two K/V heads."""
    return parallel.run(4, of_several, "companion")


def check_against(alone, ranks):
    lm, logits, ids, text = alone
    for rank, measured in enumerate(ranks):
        assert measured.rank == rank and measured.ranks == len(ranks)
        torch.testing.assert_close(measured.logits, logits, atol=1e-4, rtol=1e-4)
        assert measured.ids == ids and measured.text == text
        share = parallel.share(lm.config, len(ranks), "float32")
        assert (measured.n_heads, measured.n_kv_heads) == (share.n_heads, share.n_kv_heads)
        assert measured.weight_bytes == share.weight_bytes
        assert measured.cache_bytes == share.kv_bytes_per_token * measured.cache_tokens
        assert [name for name, _ in measured.calls] == ["all_reduce"] * share.all_reduces + ["all_gather_into_tensor"]
        assert measured.payload_bytes == share.payload_bytes


def test_two_ranks_are_one_model(alone, two):
    (first, _), _ = two[0]
    check_against(alone, [measured for (measured, _), _ in two])
    assert first.n_kv_heads == 1


def test_more_ranks_than_kv_heads_are_one_model_too_and_keep_the_same_cache(alone, two, four):
    check_against(alone, [measured for ((measured, _),) in four])
    (first, _), _ = two[0]
    assert {measured.cache_bytes for ((measured, _),) in four} == {first.cache_bytes}


def test_a_rank_reads_its_part_of_the_files_and_no_more(alone, two, four):
    config = alone[0].config
    for ranks in (two, four):
        wanted = parallel.share(config, len(ranks), "bfloat16").weight_bytes  # as stored
        for (measured, elements), *_ in ranks:
            assert measured.bytes_read == 2 * elements == wanted
    stored = memory.weight_bytes(config, "bfloat16")
    norms = (2 * config.n_layers + 1) * config.d_model * 2
    assert sum(measured.bytes_read for (measured, _), _ in two) == stored + norms  # both have the norms


def test_a_mistral_native_folder_is_cut_alike(alone, two):
    check_against(alone, [measured for _, (measured, _) in two])


@pytest.fixture
def mesh(tmp_path, monkeypatch):
    """One rank: this process."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with parallel.process_group(f"file://{tmp_path / 'meet'}", 0, 1) as mesh:
        yield mesh


@pytest.mark.parametrize("tied", [False, True])
def test_torchs_plan_cuts_where_we_read(mesh, tied):
    for name, tensor in parallel.shard(TOY.replace(tie_embeddings=tied), mesh).named_parameters():
        module = name.removesuffix(".weight").rpartition(".")[2]
        assert isinstance(tensor, DTensor) == (module in parallel._CUT), name
        if isinstance(tensor, DTensor):
            assert [placement.dim for placement in tensor.placements] == [parallel._CUT[module]], name


def test_a_sharded_model_runs_in_inference_mode_and_out_of_it(mesh, alone):
    lm = parallel.load_part("companion", mesh, "float32")
    ids = torch.tensor([alone[2]])
    whole = alone[0].model(ids)
    with torch.inference_mode():
        cache = lm.model.new_cache(1, 32)
        inside = torch.cat([lm.model(ids[:, :5], cache=cache), lm.model(ids[:, 5:], cache=cache)], dim=1)
    outside = lm.model(ids)
    torch.testing.assert_close(inside, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outside, whole, atol=1e-4, rtol=1e-4)
    assert not outside.requires_grad and type(outside) is torch.Tensor


def test_a_part_that_does_not_fit_is_refused(mesh, monkeypatch):
    monkeypatch.setattr("attnlab.loading.free_bytes", lambda device: 1000)
    with pytest.raises(CapacityError, match=r"companion over 1 ranks needs .* more ranks \(1, 2, 4, 8 are possible\)"):
        parallel.load_part("companion", mesh, "float32")


def test_a_folder_whose_config_is_another_models_is_refused(mesh, tmp_path):
    for file in ("model.safetensors", "tokenizer.json"):
        shutil.copy(companion.folder() / file, tmp_path)
    config = json.loads((companion.folder() / "config.json").read_text())
    for changed in ({"num_hidden_layers": 5}, {"num_hidden_layers": 5000}, {"intermediate_size": 352}):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(CheckpointError, match="expected"):
            parallel.load_part(tmp_path, mesh, "float32")


def test_the_group_is_taken_down_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(ZeroDivisionError), parallel.process_group(f"file://{tmp_path / 'meet'}", 0, 1):
        raise ZeroDivisionError
    assert not dist.is_initialized()


# ---- when something goes wrong ----------------------------------------------------------------------------------------


def dies(mesh, how, when):
    """Rank 1 dies while rank 0 waits for it."""
    if dist.get_rank() == 1:
        Path(when).write_text(str(time.time()))
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("boom")
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize(
    ("how", "words"),
    [("raised", "rank 1 of 2 died of ValueError: boom"), ("killed", "rank 1 of 2 was killed by SIGKILL")],
)
def test_a_rank_that_dies_ends_the_run_with_its_reason(tmp_path, how, words):
    when = tmp_path / "when"
    with pytest.raises(RankError, match=words):
        parallel.run(2, dies, how, str(when))
    assert time.time() - float(when.read_text()) < 30  # the promise: nobody waits for the dead


def refuses(mesh):
    raise CapacityError("no room for it")


def test_an_error_of_ours_comes_back_as_it_was():
    with pytest.raises(CapacityError, match=r"^no room for it$"):
        parallel.run(1, refuses)


def waits(mesh):
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))


def test_a_rank_that_does_not_come_ends_the_run():
    with pytest.raises(RankError, match=r"rank 1 of 2 died of .*[Tt]imed out"):
        parallel.run(2, waits, timeout=2)


def test_what_cannot_be_run_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="1 or more; got 0"):
        parallel.run(0, of_several)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)

    def mine(mesh): ...

    mine.__module__ = "__main__"
    with pytest.raises(InputError, match=r"cannot import mine.*%%writefile"):
        parallel.run(2, mine)


def torchrun(ranks: int, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(ranks), *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "HOME"} | {"OMP_NUM_THREADS": "1"},
    )


def test_torchrun_prints_what_one_process_would(alone):
    done = torchrun(2, "-m", "attnlab.parallel", "companion", "--prompt", PROMPT, "--max-new-tokens", str(NEW))
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone[3] + "\n"
    assert "rank 0 of 2: 4 query heads on 1 K/V heads" in done.stderr and "rank 1 of 2" in done.stderr


@pytest.mark.parametrize(
    ("ranks", "model", "words"),
    [
        (3, "companion", "expected one of 1, 2, 4, 8 ranks for companion"),
        (2, "nobody", "there is no folder of that name"),
    ],
)
def test_torchrun_says_what_was_wrong_in_a_line(ranks, model, words):
    done = torchrun(ranks, "-m", "attnlab.parallel", model)
    assert done.returncode != 0 and words in done.stderr
    assert "parallel.py" not in done.stderr  # no traceback of ours; what follows is torchrun's own summary


def test_torchrun_ends_when_a_rank_is_killed(tmp_path):
    script, when = tmp_path / "mine.py", tmp_path / "when"
    script.write_text(
        "import os, signal, sys, time, torch\n"
        "import torch.distributed as dist\n"
        "from attnlab.parallel import process_group\n"
        "with process_group():\n"
        "    dist.barrier()\n"
        "    if dist.get_rank() == 1:\n"
        "        open(sys.argv[1], 'w').write(str(time.time()))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    dist.all_reduce(torch.zeros(1))\n"
    )
    done = torchrun(2, str(script), str(when))
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert time.time() - float(when.read_text()) < 30  # the promise: nobody waits for the dead


def test_without_torchrun_it_says_how_to_start(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert parallel.main(["companion"]) == 2
    assert "torchrun --nproc-per-node 2 -m attnlab.parallel" in capsys.readouterr().err
