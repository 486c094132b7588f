"""The benchmarks: they run, their forms agree, and records are written whole or not at all. No test looks at a time."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnlab import memory
from attnlab.errors import CheckpointError, ConfigError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NOT_ON_A_GPU_MACHINE = ["typer", "matplotlib", "seaborn", "mistral_common", "ipywidgets", "anywidget"]
HERE = {"processor": "Made Up (R) 9000 @ 3.00GHz", "cores": 2, "system": "Linux"}


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("common", "decode_attention", "explorers", "gpu", "siblings"):
        sys.modules.pop(name, None)


def run(*arguments: str, blocked: list[str] = ()) -> subprocess.CompletedProcess:
    """A script in a process of its own, with the ``blocked`` packages as if they weren't installed."""
    path, *rest = arguments
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({list(blocked)!r})); "
        f"sys.argv = {[path, *rest]!r}; sys.path.insert(0, {str(BENCHMARKS)!r}); "
        f"runpy.run_path({str(BENCHMARKS / path)!r}, run_name='__main__')"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def records() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")}


def test_the_gpu_script_runs_every_section_dry_with_few_packages_and_writes_nothing():
    before = records()
    done = run("gpu.py", "--dry-run", blocked=NOT_ON_A_GPU_MACHINE)
    assert done.returncode == 0, done.stderr
    for section in ("bandwidth", "decode", "transformers", "memory"):
        assert f"{section} (toy size)" in done.stdout
    assert records() == before


def test_the_waiting_script_measures_the_import_and_writes_nothing_when_quick():
    before = records()
    done = run("waiting.py", "--quick")
    assert done.returncode == 0 and "import attnlab, beyond torch" in done.stdout, done.stderr
    assert records() == before


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("lookup_seeds.py", ["learned nothing, answer_in wish", "payloads repeated", "head_dim 48", "w_q_is_w_k True"]),
        ("heads_seeds.py", ["32 heads of 16"]),
        ("induction_seeds.py", ["every branch ran"]),
        ("sharing_seeds.py", ["four tables", "one table", "8 heads of 64 on 1"]),
    ],
)
def test_a_script_for_many_seeds_runs_every_setting_and_writes_nothing_when_quick(script, settings):
    before = records()
    done = run(script, "--quick")
    assert done.returncode == 0, done.stderr
    assert [setting for setting in settings if setting not in done.stdout] == []
    assert records() == before


def test_the_siblings_script_runs_both_comparisons_and_writes_nothing_when_quick():
    before = records()
    done = run("siblings.py", "--quick")
    assert done.returncode == 0, done.stderr
    for shape in ("sibling", "wider"):
        assert f"{shape:8}  1 K/V heads,    2 ×    16" in done.stdout
    assert records() == before


def test_the_siblings_script_counts_what_a_step_reads_and_fills_the_same_memory(script):
    siblings = script("siblings")
    config = siblings.SIBLING.replace(vocab_size=64, d_model=32, n_layers=1, d_ff=48, head_dim=8)
    asked = {"toy": config}, {"toy": (8, 2, 1)}, {"toy": [(3, 16)]}, {"toy": (300_000, 16)}
    result = siblings.measure(*asked, bandwidth=1e9, repetitions=1)
    per_row = [2 * n * 16 * 8 * 4 for n in (8, 2, 1)]
    assert [row["cache_bytes"] for row in result["equal_batch"]] == [3 * nbytes for nbytes in per_row]
    for row, nbytes in zip(result["equal_memory"], per_row, strict=True):
        weights = memory.weight_bytes(config.replace(n_kv_heads=row["n_kv_heads"]), "float32")
        assert weights + row["cache_bytes"] <= 300_000 < weights + row["cache_bytes"] + nbytes
        assert row["cache_bytes"] == row["batch"] * nbytes
    by_bytes = [row["times_multi_head_by_bytes"] for row in result["equal_batch"]]
    assert by_bytes == sorted(by_bytes) and by_bytes[0] == 1
    assert all(row["times_multi_head"]["median"] == 1 for part in result.values() for row in part[::3])


def test_the_explorers_script_paints_and_hovers_and_writes_nothing_when_quick():
    sys.path.insert(0, str(BENCHMARKS.parent / "tools"))
    from chromium import MISSING, find

    if find() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    before = records()
    done = run("explorers.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("8 heads, 8 tokens", "first_paint_ms", "hover_a_token_ms"))
    assert records() == before


def test_the_explorers_targets_are_those_of_the_size_that_was_measured(script):
    explorers = script("explorers")

    def row(tokens, nbytes, milliseconds):
        times = {"median": milliseconds, "min": 1, "max": 999, "repetitions": 3}
        return {"form": "one file", "heads": 1024, "tokens": tokens, "bytes": nbytes, "first_paint_ms": times,
                "hover_a_token_ms": times, "hover_a_weight_ms": times}  # fmt: skip

    found = explorers.targets([row(24, 600_000, 10), row(64, 600_000, 200)])
    reached = {(verdict["tokens"], verdict["what"]): verdict["reached"] for verdict in found}
    assert reached == {
        (24, "bytes"): False, (24, "first_paint_ms"): True, (24, "hover_a_token_ms"): True, (24, "hover_a_weight_ms"): True,
        (64, "bytes"): True, (64, "first_paint_ms"): True, (64, "hover_a_token_ms"): False, (64, "hover_a_weight_ms"): False,
    }  # fmt: skip
    record = explorers.random_record(2, 4, 2, 8)
    assert explorers.json_bytes(record) > 3 * len(json.dumps(explorers.AttentionExplorer(record).data["layers"]))


def test_without_a_gpu_the_gpu_script_says_so_in_one_line(tmp_path):
    done = run("gpu.py", "--out", str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--dry-run" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_weights_transformers_is_timed_with_are_ours_and_give_the_same_logits(script):
    gpu = script("gpu")
    setting = gpu.toy()
    model = gpu.random_model(setting.config, setting)
    for parameter in model.parameters():
        parameter.mul_(10)  # small weights would make any two models agree
    theirs = gpu.transformers_model(model, setting)
    assert theirs.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    ids = gpu.random_ids(setting, 40)  # past the window
    ours, reference = model(ids)[0], theirs(ids).logits[0]
    assert (ours - reference).abs().max() < 1e-5 * reference.std()


def test_memory_predicts_what_the_gpu_script_measures_at_toy_size(script):
    gpu = script("gpu")
    setting = gpu.toy()
    rows = gpu.memory_taken(setting)["rows"]
    assert [(row["n_kv_heads"], row["window"]) for row in rows[::2]] == [(8, None), (2, None), (1, None), (2, 16)]
    for row in rows:
        assert row["weight_bytes"]["measured"] == row["weight_bytes"]["predicted"]
        assert row["cache_bytes"]["nbytes"] == row["cache_bytes"]["predicted"]
        assert 0 <= row["cache_bytes"]["measured"] - row["cache_bytes"]["nbytes"] < 64  # positions of the rows
        assert row["peak_beyond_bytes"] > 0


def test_the_full_setting_is_the_published_model(script):
    setting = script("gpu").full("cuda")
    assert memory.weight_bytes(setting.config, setting.dtype) == 14_483_464_192
    assert setting.modes == ("eager", "graph")


def test_a_gpu_record_resumes_and_keeps_what_other_sections_measured(script, tmp_path, monkeypatch, capsys):
    gpu = script("gpu")
    calls = []
    sections = {name: lambda s, name=name: calls.append(name) or {"rows": [], "name": name} for name in ("decode", "memory")}  # fmt: skip
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(gpu, "machine", lambda device: {"gpu": "Made Up 1", "gpu_bytes": 1})
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "provenance", lambda commit: {"commit": commit})
    monkeypatch.setattr(gpu, "free", lambda: None)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--commit", "abc", *arguments])
        return gpu.main()

    def stored():
        return json.loads((tmp_path / "gpu-made-up-1.json").read_text())

    assert main("--sections", "decode") == 0 and calls == ["decode"]
    assert stored()["sections"]["decode"]["commit"] == "abc" and "random" in stored()["weights"]
    assert main("--sections", "decode", "memory") == 0 and calls == ["decode", "memory"]
    assert set(stored()["sections"]) == {"decode", "memory"}
    assert main("--sections", "decode", "--redo") == 0 and calls == ["decode", "memory", "decode"]

    def broken(s):
        raise RuntimeError("out of memory")

    sections["decode"] = broken
    assert main("--sections", "decode", "memory", "--redo") == 1  # memory was measured all the same
    assert calls[-1] == "memory" and stored()["sections"]["decode"]["name"] == "decode"
    assert "out of memory" in capsys.readouterr().err


def test_the_quick_decode_benchmark_checks_its_forms_and_writes_nothing():
    before = records()
    done = run("decode_attention.py", "--quick", blocked=NOT_ON_A_GPU_MACHINE)
    assert done.returncode == 0, done.stderr
    assert "all forms agree" in done.stdout
    assert records() == before


def test_decode_attention_counts_caches_and_copies(script):
    measured = script("decode_attention").measure(cached=2000, n_heads=8, head_dim=16, repetitions=1)
    rows = {(row["n_kv_heads"], row["form"]): row for row in measured}
    assert len(rows) == 12
    base = rows[8, measured[0]["best_multi_head"]]
    assert base["times_faster_than_best_multi_head"]["median"] == 1 and base["form"] in ("grouped", "matmul")
    for n_kv_heads in (8, 2, 1):
        assert rows[n_kv_heads, "grouped"]["cache_bytes"] == 2 * n_kv_heads * 2000 * 16 * 4
    for n_kv_heads in (2, 1):  # repeating makes the multi-head cache again
        assert rows[n_kv_heads, "repeat"]["extra_bytes"] >= rows[8, "grouped"]["cache_bytes"]
        assert rows[n_kv_heads, "grouped"]["extra_bytes"] < rows[n_kv_heads, "grouped"]["cache_bytes"]


def test_the_conversion_script_converts_trains_on_and_writes_nothing_when_quick():
    before = records()
    done = run("conversion.py", "--quick")
    assert done.returncode == 0, done.stderr
    for pooling in ("mean", "first", "random", "aligned mean"):
        assert f" 1 K/V heads, {pooling:12}:" in done.stdout
    assert " 2 K/V heads, none" in done.stdout
    assert records() == before


def test_verdicts_compare_with_the_targets(script):
    decode = script("decode_attention")

    def row(n_kv_heads, faster, extra):
        return {"dtype": "float32", "n_kv_heads": n_kv_heads, "form": "grouped", "cache_bytes": 100,
                "times_faster_than_best_multi_head": {"median": faster}, "extra_bytes": extra}  # fmt: skip

    result = {"setting": {"n_heads": 32}, "rows": [row(32, 1.0, 1), row(8, 2.9, 5), row(1, 8.0, 4)]}
    assert [verdict["reached"] for verdict in decode.verdicts(result)] == [False, True, True, False, True]


def test_a_record_is_named_after_script_and_machine(script):
    common = script("common")
    assert common.record_path("decode", HERE).name == "decode-made-up-r-9000-3-00ghz-2-cores.json"
    assert common.record_path("gpu", {"gpu": "NVIDIA H100 80GB HBM3"}).name == "gpu-nvidia-h100-80gb-hbm3.json"


def test_the_machine_is_described_without_host_name_or_path(script):
    common = script("common")
    described = json.dumps([common.machine(), common.versions(), common.provenance("abc")])
    assert torch.__version__ in described and "abc" in described
    assert os.uname().nodename not in described and str(BENCHMARKS.parent) not in described


def test_records_are_written_whole_and_read_back(script, tmp_path):
    common = script("common")
    path = tmp_path / "new" / "x.json"
    record = {"machine": HERE, "rows": [1.5]}
    common.write_record(path, record)
    assert common.read_record(path, HERE) == record
    common.write_record(path, record | {"rows": [2.5]})
    assert common.read_record(path, HERE)["rows"] == [2.5]
    with pytest.raises(ValueError):
        common.write_record(path, {"machine": HERE, "rows": [float("nan")]})  # no number: not in a record
    assert common.read_record(path, HERE)["rows"] == [2.5]
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_another_machines_record_is_not_replaced_unasked(script, tmp_path):
    common = script("common")
    path = tmp_path / "x.json"
    common.write_record(path, {"machine": HERE})
    other = HERE | {"cores": 64}
    with pytest.raises(ConfigError, match="cores: 2 there, 64 here"):
        common.write_record(path, {"machine": other})
    assert common.read_record(path, HERE) == {"machine": HERE}
    common.write_record(path, {"machine": other}, overwrite=True)
    assert common.read_record(path, other) == {"machine": other}


def test_a_damaged_record_is_an_error_that_names_it(script, tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"machine": ')
    with pytest.raises(CheckpointError, match=r"x\.json is no record"):
        script("common").read_record(path, HERE)


def test_interleaved_calls_take_turns_and_the_first_round_is_not_counted(script):
    turns = []
    calls = {name: lambda name=name: turns.append(name) or float(len(turns)) for name in "ab"}
    assert script("common").interleave(calls, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert "".join(turns) == "ababab"
