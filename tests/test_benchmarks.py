"""The benchmarks: they run, their forms agree, and records are written whole or not at all. No test looks at a time."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnlab
from attnlab import causal_mask, memory
from attnlab.checkpoint import load_model
from attnlab.errors import CapacityError, CheckpointError, ConfigError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NOT_ON_A_GPU_MACHINE = ["typer", "matplotlib", "seaborn", "mistral_common", "ipywidgets", "anywidget"]
HERE = {"processor": "Made Up (R) 9000 @ 3.00GHz", "cores": 2, "system": "Linux"}


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in (
        "common",
        "decode_attention",
        "explorers",
        "live",
        "siblings",
        "window_prefill",
        "loading",
        "quantize",
        "gpu_tools",
    ):
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


def test_the_memory_of_a_notebook_is_seen_even_if_it_is_held_for_a_moment():
    before = records()
    done = run("notebook_memory.py", "--quick")
    assert done.returncode == 0, done.stderr
    held = int(done.stdout.split()[1].replace(",", ""))  # 300 MB, and the kernel itself
    assert 300e6 < held < 1e9
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
        ("latent_seeds.py", ["128 numbers a token in K/V heads", "128 numbers a token in latent"]),
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


@pytest.mark.compiler
def test_the_window_script_checks_its_forms_and_writes_nothing_when_quick():
    before = records()
    done = run("window_prefill.py", "--quick")
    assert done.returncode == 0 and "the forms agree" in done.stdout, done.stderr
    for form in ("masked", "blocks", "flex", "full", "full, flex"):
        assert f"  {form:<11}" in done.stdout
    assert records() == before


def test_the_window_script_counts_the_scores_that_a_mask_shows(script):
    pairs = script("window_prefill").pairs
    for tokens, window in ((10, 3), (10, 10), (5, 20)):
        assert pairs(tokens, window) == causal_mask(tokens, window=window).sum()
    assert round(pairs(16_384, 16_384) / pairs(16_384, 4096), 2) == 2.29


def test_the_loading_script_reads_and_loads_what_it_wrote_and_leaves_nothing(tmp_path, monkeypatch, script):
    before = records()
    done = run("loading.py", "--quick", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in ("of the reading speed", "beyond weights and page cache"))
    assert records() == before and not list(tmp_path.iterdir())

    loading = script("loading")
    files = loading.write_checkpoint(loading.TOY, tmp_path, 3_000_000)
    model = load_model(tmp_path)
    assert len(files) > 1 and model.config == loading.TOY.replace(name=tmp_path.name)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert nbytes == memory.weight_bytes(loading.TOY) and all(p.std() > 0.01 for p in model.parameters())
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(sys, "argv", ["loading.py", "--quick"])
    with pytest.raises(CapacityError, match=r"more memory.*--quick"):
        loading.main()


def test_the_quantize_script_runs_every_section_and_writes_nothing_when_quick():
    before = records()
    done = run("quantize.py", "--quick")
    assert done.returncode == 0, done.stderr
    parts = ("quality\n  float32", "half\n  transformers float32", "attnlab int4", "full\n  bfloat16", "\n  int4 ")
    for part in (*parts, "kernels\n  torch float32"):
        assert part in done.stdout
    assert records() == before


def test_a_kernel_that_computes_something_else_is_not_measured(script, monkeypatch):
    kernel_peers, config = script("kernel_peers"), script("quantize").toy().config
    rows, left_out = kernel_peers.kernel_rows(config, 1, nbytes=100_000)
    assert {row["what"] for row in rows} >= {"torch float32", "torch bfloat16", "torch int8", "torch int4"}
    assert all("not installed" in row["why"] or "without it" in row["why"] for row in left_out)
    monkeypatch.setattr(kernel_peers.F, "linear", lambda x, matrix: 2 * (x @ matrix.T))
    with pytest.raises(AssertionError, match="torch float32 computes something else"):
        kernel_peers.kernel_rows(config, 1, nbytes=100_000)


def test_the_quantize_script_says_what_quality_needs(tmp_path):
    for arguments, words in (([], "quality needs --run"), (["--run", str(tmp_path)], "holds no training run")):
        done = run("quantize.py", "--sections", "quality", "--redo", *arguments)
        assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_the_quantize_scripts_model_is_what_loading_gives_and_greedy_tokens_are_transformers(script):
    quantize = script("quantize")
    s = replace(quantize.toy(), config=quantize.toy().config.replace(window=None), contexts=(5,))
    for form in quantize.FORMS:
        made = quantize.made_in_place(s, form)
        held = sum(tensor.nbytes for tensor in (*made.parameters(), *made.buffers()))
        assert held == memory.weight_bytes(s.config, s.dtype, form)
    model = quantize.random_model(s.config, s)
    assert quantize.same_greedy(model, quantize.transformers_model(model, s), s) == "48 of 48"


def test_the_quantize_script_measures_nothing_where_a_model_meets_itself(script):
    quantize = script("quantize")
    lm = attnlab.load("companion", device="cpu", progress=False)
    (file,) = quantize.own_files(1)
    found = quantize.measured({"exact": lm.model, "itself": lm.model}, file)["itself"]
    assert found["tokens"] == found["same"] == len(file.ids) and found["divergence"] == 0 and found["nats"] > 0


def test_the_serving_script_measures_a_service_and_writes_nothing_when_quick():
    before = records()
    done = run("serving.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "companion        1 streams" in done.stdout and "companion        4 streams" in done.stdout
    assert records() == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("explorers.py", ("8 heads, 8 tokens", "first_paint_ms", "hover_a_token_ms")),
        ("live.py", ("companion: 5,", "tokens_per_second", "int8 keeps the first choice at")),
    ],
)
def test_a_script_that_drives_a_browser_runs_and_writes_nothing_when_quick(name, words):
    sys.path.insert(0, str(BENCHMARKS.parent / "tools"))
    from chromium import MISSING, find

    if find() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    before = records()
    done = run(name, "--quick")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words)
    assert records() == before


def test_the_live_targets_are_lower_bounds_for_speed_and_upper_bounds_for_the_rest(script):
    def row(nbytes, milliseconds, speed):
        return {"model": "it", "download_bytes": nbytes, "first_token_ms": {"median": milliseconds}, "tokens_per_second": {"median": speed}}  # fmt: skip

    live = script("live")
    reached = [verdict["reached"] for verdict in live.targets([row(9e6, 900, 50), row(7e6, 1100, 30)])]
    assert reached == [False, True, True, True, False, False]


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
