"""The GPU record, at toy size on a CPU: every section runs, is recorded whole, and the book can read it. No test looks at a time."""

import importlib
import itertools
import json
import shutil
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from docutils import nodes
from test_benchmarks import BENCHMARKS, NOT_ON_A_GPU_MACHINE, records, run

import attnlab
from attnlab import companion, memory
from attnlab.checkpoint import save_model
from attnlab.explorer import AttentionExplorer

ROOT = BENCHMARKS.parent
MODULES = ("common", "gpu", "gpu_peers", "gpu_tools", "trained")
SECTIONS = {"bandwidth", "decode", "batch", "attention", "kernel", "transformers", "quantized", "prefill", "loading", "memory",
            "compiled", "transformers_compiled", "gpt_fast"}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """What a dry run of everything says, and the folder with its record."""
    out = tmp_path_factory.mktemp("record")
    done = run("gpu.py", "--dry-run", "--out", str(out), "--commit", "abc", blocked=NOT_ON_A_GPU_MACHINE)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


@pytest.fixture
def record(dry_run):
    (path,) = dry_run[1].iterdir()
    assert path.name == "gpu-a-dry-run-at-toy-size-on-a-cpu.json"
    return json.loads(path.read_text())


@pytest.mark.compiler
def test_every_section_runs_dry_with_few_packages_and_leaves_out_only_what_is_not_here(dry_run, record):
    said, _ = dry_run
    assert set(record["sections"]) == SECTIONS and all(f"{name} (toy size)" in said for name in SECTIONS)
    left_out = {name: part["left_out"] for name, part in record["sections"].items() if "left_out" in part}
    assert set(left_out) == {"gpt_fast"} and "--gpt-fast" in left_out["gpt_fast"][0]["why"]
    assert all(part["rows"] for name, part in record["sections"].items() if name != "gpt_fast")
    assert all(part["commit"] == "abc" and part["versions"] for part in record["sections"].values())


def test_the_full_setting_is_the_published_model(gpu):
    setting = gpu.full("cuda")
    assert memory.weight_bytes(setting.config, setting.dtype) == 14_483_464_192
    assert setting.modes == ("eager", "graph") and setting.kv_heads == (32, 8, 1)
    assert setting.contexts[0] == 128 and setting.contexts[-1] == 32_768
    assert all(0 < section.minutes < 8 for section in gpu.SECTIONS.values()) and set(gpu.SECTIONS) == SECTIONS


def test_a_dry_run_writes_nothing_unless_told_where_and_never_among_the_results():
    before = records()
    done = run("gpu.py", "--dry-run", "--sections", "bandwidth")
    assert done.returncode == 0 and "nothing was recorded" in done.stdout, done.stderr
    refused = run("gpu.py", "--dry-run", "--sections", "bandwidth", "--out", str(BENCHMARKS / "results"))
    assert refused.returncode == 1 and "means nothing" in refused.stderr and refused.stderr.count("\n") == 1
    assert records() == before


def test_without_a_gpu_the_script_says_so_in_one_line(tmp_path):
    done = run("gpu.py", "--out", str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--dry-run" in done.stderr
    assert not list(tmp_path.iterdir())


# ---- what the sections measure ---------------------------------------------------------------------------------------


def test_decoding_is_measured_with_every_key_and_beyond_the_window_with_a_window_too(record):
    rows = record["sections"]["decode"]["rows"]
    assert [(row["what"], row["context"], row["window"]) for row in rows] == [
        ("eager, every key", 5, None), ("eager, every key", 24, None), ("eager, windowed", 24, 16)
    ]  # fmt: skip
    for row in rows:
        config = attnlab.MistralConfig(128, 64, 2, 8, 2, 96, window=row["window"])
        assert row["bytes_per_step"] == memory.bytes_per_step(config, row["context"] + 2, dtype="float32")
        assert row["tokens_per_second"]["repetitions"] == 2 and row["fraction_of_bandwidth"] > 0


def test_batches_go_up_to_the_most_that_fit_and_stand_beside_what_memory_predicts(gpu, record):
    section, setting = record["sections"]["batch"], gpu.toy()
    for row in section["equal_memory"]:
        config = setting.every_key.replace(n_kv_heads=row["n_kv_heads"])
        assert row["batch"] == memory.largest_batch(config, setting.limit, row["context"], "float32", reserve=0)
        assert row["predicted_batch"] == memory.largest_batch(config, setting.limit, row["context"], "float32")
        assert 0 <= row["left_beside_bytes"] < row["cache_bytes"] // row["batch"]
    by_bytes = {
        (row["context"], row["n_kv_heads"]): row["times_multi_head_by_bytes"] for row in section["equal_memory"]
    }
    for context in setting.batch_contexts:
        assert 1 == by_bytes[context, 8] < by_bytes[context, 2] < by_bytes[context, 1]
    most = {row["context"]: row["batch"] for row in section["equal_memory"] if row["n_kv_heads"] == 8}
    beside = [row for row in section["rows"] if row["batch"] == most[row["context"]]]
    assert {row["n_kv_heads"] for row in beside} == {8, 2, 1}  # all styles decode multi-head's largest batch
    for row in section["rows"]:
        alike = [
            r
            for r in section["rows"]
            if (r["context"], r["batch"], r["n_kv_heads"]) == (row["context"], row["batch"], 8)
        ]
        assert (row["times_multi_head"] is None) == (not alike)
        if alike:
            medians = [r["tokens_per_second"]["median"] for r in (row, alike[0])]
            assert row["times_multi_head"] == pytest.approx(medians[0] / medians[1])


def test_ratios_by_bytes_are_those_of_the_ceilings(gpu):
    read = {"read_bytes_per_second": 1e9}
    rows = []
    for n in (8, 1):
        config = gpu.toy().every_key.replace(n_kv_heads=n)
        ceiling = memory.decode_ceiling(config, read["read_bytes_per_second"], 32, 4, "float32")
        rows.append({"n_kv_heads": n, "context": 32, "tokens_per_second": {"median": 7.0 * n},
                     "fraction_of_bandwidth": 7.0 * n / ceiling})  # fmt: skip
    gpu.against_multi_head(gpu.toy(), rows, ("context",))
    expected = memory.speed_up(config, config.replace(n_kv_heads=8), 32, 4, "float32")
    assert rows[1]["times_multi_head"] == 1 / 8 and rows[1]["times_multi_head_by_bytes"] == pytest.approx(expected)


def test_the_largest_batch_is_found_wherever_it_lies(gpu, monkeypatch):
    setting, model = gpu.toy(), types.SimpleNamespace(config=gpu.toy().every_key)
    monkeypatch.setattr(gpu, "free", lambda: None)
    highest = memory.largest_batch(model.config, setting.limit, 32, "float32", reserve=0)
    for most in (0, 1, highest // 3, highest - 1, highest):

        def rate(model, s, context, mode, batch, most=most):
            if batch > most:
                raise torch.OutOfMemoryError("no room")
            return lambda: 1.0

        monkeypatch.setattr(gpu, "decode_rate", rate)
        assert gpu.largest_batch(model, setting, 32) == most


def test_attention_alone_is_measured_in_every_form_and_names_its_kernel(record):
    rows = {(row["what"], row["n_kv_heads"]): row for row in record["sections"]["attention"]["rows"]}
    forms = ("repeat", "enable_gqa", "grouped", "matmul", "grouped, masked")
    assert set(rows) == {(form, n) for form in forms for n in (8, 2, 1)}
    assert all(row["cache_bytes"] == 2 * n * 64 * 8 * 4 for (_, n), row in rows.items())
    assert "_scaled_dot_product" in rows["grouped", 2]["kernel"] and rows["matmul", 2]["kernel"] == "matrix products"
    best = max(row["times_faster_than_best_multi_head"]["median"] for (_, n), row in rows.items() if n == 8)
    assert best == 1


def test_the_triton_kernel_takes_turns_with_torchs_at_every_length(record):
    rows = record["sections"]["kernel"]["rows"]
    forms = ("triton", "enable_gqa", "flash")
    assert [(row["context"], row["what"]) for row in rows] == [(S, form) for S in (128, 512) for form in forms]
    assert all(row["cache_bytes"] == 2 * 2 * row["context"] * 8 * 4 and row["n_kv_heads"] == 2 for row in rows)
    assert all(row["fraction_of_bandwidth"] > 0 for row in rows)
    assert [row["times_faster_than_enable_gqa"]["median"] for row in rows[1::3]] == [1, 1]
    verdict = next(v for v in record["verdicts"] if "Triton" in v["what"])
    assert verdict["what"].endswith("at 512 tokens") and verdict["target"] == 0.8


def test_another_forms_numbers_are_never_timed_for_attentions(gpu):
    def wrong(q, k, v):
        return {"wrong": lambda: 2 * gpu.scaled_dot_product_attention(q, k, v)}

    with pytest.raises(RuntimeError, match="wrong gives other numbers"):
        gpu.attention_forms(gpu.toy(), 8, 2, wrong)


def test_quantized_weights_take_the_bytes_that_memory_counts(record):
    rows = record["sections"]["quantized"]["rows"]
    assert {row["what"].split()[0] for row in rows} == {"float32", "int8", "int4"}
    for row in rows:
        assert row["weight_bytes"]["measured"] == row["weight_bytes"]["predicted"]
        assert row["times_unquantized"]["median"] > 0


def test_memory_predicts_what_is_measured_at_toy_size(record):
    rows = record["sections"]["memory"]["rows"]
    assert [(row["n_kv_heads"], row["window"]) for row in rows[::2]] == [(8, None), (2, None), (1, None), (2, 16)]
    for row in rows:
        assert row["weight_bytes"]["measured"] == row["weight_bytes"]["predicted"]
        assert row["cache_bytes"]["nbytes"] == row["cache_bytes"]["predicted"]
        assert 0 <= row["cache_bytes"]["measured"] - row["cache_bytes"]["nbytes"] < 64  # positions of the rows
        assert row["peak_beyond_bytes"] > 0


def test_loading_reads_back_a_checkpoint_of_several_files(record):
    section = record["sections"]["loading"]
    assert section["came_back_whole"] and section["files"] == 2 and section["page_cache"].startswith("dropped")
    assert section["bytes"] > memory.weight_bytes(attnlab.MistralConfig(128, 64, 2, 8, 2, 96), "float32")
    assert [row["what"] for row in section["rows"]] == [
        "write", "read, cold", "load, cold", "read, from the page cache", "load, from the page cache"
    ]  # fmt: skip


def test_a_prompt_is_taken_in_whole_and_windowed(record):
    rows = record["sections"]["prefill"]["rows"]
    assert {(row["what"], row["tokens"]) for row in rows} == {
        (k, T) for k in ("every key", "windowed") for T in (8, 40)
    }
    assert all(row["fraction_of_flops"] > 0 and row["peak_beyond_bytes"] > 0 for row in rows)


def test_the_host_memory_that_is_watched_is_that_which_is_taken(gpu):
    with gpu.host_bytes_taken() as host:
        block = bytearray(b"x" * 50_000_000)
    assert len(block) <= host["most"] + 1_000_000 < 110_000_000  # there were two of them for a moment


# ---- what a GPU has and a CPU has not --------------------------------------------------------------------------------


def test_on_a_gpu_graphs_are_measured_beside_eager_steps(gpu, monkeypatch):
    class Replays:
        """A CUDA graph as far as a decoder sees it."""

        def __init__(self, decoder):
            self.decoder, self.forward = decoder, decoder._forward

        def replay(self):
            self.decoder._logits = self.forward(self.decoder._ids)

    class OnGpu(gpu.Decoder):
        def __init__(self, model, max_len, batch=1, mode="eager"):
            super().__init__(model, max_len, batch)
            self.mode, self.static = mode, mode != "eager"
            self.cache = model.new_cache(batch, max_len, static=self.static)
            self._ids = torch.zeros(batch, 1, dtype=torch.long)
            if mode == "compiled":
                self._compiled = self._forward
            elif mode == "graph":
                self._record()

        def _record(self):
            self._graph = Replays(self)

    tools = sys.modules["gpu_tools"]
    monkeypatch.setattr(tools, "Decoder", OnGpu)
    monkeypatch.setattr(gpu.Setting, "cuda", property(lambda s: True))
    monkeypatch.setattr(gpu, "measured_bandwidth", lambda s: ({"read_bytes_per_second": 1e9}, {}))
    setting = gpu.toy()
    for name, whats in {
        "decode": {"eager, every key", "graph, every key", "eager, windowed", "graph, windowed"},
        "compiled": {"graph", "compiled", "compiled graph"},
        "quantized": {f"{stored} {mode}" for stored in ("float32", "int8", "int4") for mode in ("eager", "graph")},
    }.items():
        result = gpu.measure(name, setting)
        assert "left_out" not in result and {row["what"] for row in result["rows"]} == whats
    assert {"times_graph"} < set(gpu.measure("compiled", setting)["rows"][0])


def test_what_runs_out_of_memory_is_recorded_without_paths_and_the_rest_goes_on(gpu, capsys):
    got, setting = gpu.Gathered(), gpu.toy()

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def no_room():
        raise gpu.CapacityError("no room for a cache") from torch.OutOfMemoryError("CUDA out of memory")

    def no_kernel():
        raise NotImplementedError("no such kernel; see /lib/python3/site-packages/torch/_ops.py:12")

    late = iter([1.0])  # fails when it is called again
    makers = {"full": full, "no room": no_room, "no kernel": no_kernel, "fine": lambda: lambda: 3.0,
              "fails when called": lambda: full}  # fmt: skip
    assert got.race(setting, "here", makers) == {"fine": [3.0, 3.0]}
    assert got.race(setting, "there", {"late": lambda: lambda: next(late)}) == {}
    assert got.left_out == [
        {"what": "full, here", "why": "out of memory"},
        {"what": "no room, here", "why": "out of memory"},
        {"what": "no kernel, here", "why": "NotImplementedError: no such kernel; see …/_ops.py:12"},
        {"what": "fails when called, here", "why": "out of memory"},
        {"what": "there", "why": "StopIteration: "},
    ]
    assert "left out: full, here: out of memory" in capsys.readouterr().out


def test_no_row_is_begun_when_a_sections_time_is_up(gpu):
    got = gpu.Gathered(until=0.0)
    assert got.attempt("a row", lambda: pytest.fail("begun")) is None
    assert got.left_out == [{"what": "a row", "why": "no time left in this section"}]


def test_the_verdicts_are_of_the_best_that_was_measured_and_of_nothing_else(gpu):
    def row(what, context, fraction, **more):
        return {"what": what, "context": context, "window": None, "fraction_of_bandwidth": fraction} | more

    sections = {
        "decode": {"rows": [row("eager", 128, 0.3), row("graph", 128, 0.9), row("graph", 9000, 0.5),
                            row("windowed", 9000, 0.99) | {"window": 4096}]},
        "compiled": {"rows": [row("compiled graph", 9000, 0.7)]},
        "quantized": {"rows": [row("int8 graph", 128, 0.5, times_unquantized={"median": 1.5}),
                               row("int8 graph", 9000, 0.5, times_unquantized={"median": 9.0}),
                               row("bfloat16 graph", 128, 0.5, times_unquantized={"median": 1.0})]},
        "batch": {"rows": [], "equal_memory": [{"n_kv_heads": n, "times_multi_head": t} for n, t in ((32, 1.0), (8, 3.4), (8, None), (1, 20.0))]},
    }  # fmt: skip
    assert [(v["measured"], v["reached"]) for v in gpu.verdicts(sections)] == [
        (0.9, True), (0.7, False), (1.5, True), (3.4, False)
    ]  # fmt: skip
    assert gpu.verdicts({}) == []


# ---- the record ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder(gpu, tmp_path, monkeypatch):
    """Two made-up sections; ``main(*arguments)`` runs the script, ``calls`` has the sections that were measured."""
    calls: list[str] = []

    def section(name):
        def measure(s, got):
            calls.append(name)
            got.rows.append({"what": name})
            return {"fact": len(calls)}

        return gpu.Section(measure, 3)

    monkeypatch.setattr(gpu, "SECTIONS", {name: section(name) for name in ("prefill", "memory")})
    monkeypatch.setattr(gpu, "machine", lambda device: {"gpu": "Made Up 1", "gpu_bytes": 1})
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "provenance", lambda commit: {"commit": commit})
    monkeypatch.setattr(gpu, "forget_compiled", lambda: None)
    monkeypatch.setattr(sys.modules["gpu_tools"], "free", lambda: None)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--commit", "abc", *arguments])
        return gpu.main()

    def stored():
        return json.loads((tmp_path / "gpu-made-up-1.json").read_text())

    return types.SimpleNamespace(main=main, stored=stored, calls=calls, gpu=gpu)


def test_a_record_resumes_and_keeps_what_other_sections_measured(recorder, capsys):
    main, stored, calls = recorder.main, recorder.stored, recorder.calls
    assert main("--sections", "prefill") == 0 and calls == ["prefill"]
    assert stored()["sections"]["prefill"]["commit"] == "abc" and "random" in stored()["weights"]
    assert main("--sections", "prefill", "memory") == 0 and calls == ["prefill", "memory"]
    assert set(stored()["sections"]) == {"prefill", "memory"}
    assert main("--sections", "prefill", "--redo") == 0 and calls == ["prefill", "memory", "prefill"]
    assert stored()["sections"]["prefill"]["fact"] == 3

    def broken(s, got):
        raise RuntimeError("no such thing")

    recorder.gpu.SECTIONS["prefill"] = recorder.gpu.Section(broken, 3)
    assert main("--sections", "prefill", "memory", "--redo") == 1  # memory was measured all the same
    assert calls[-1] == "memory" and stored()["sections"]["prefill"]["fact"] == 3
    assert "no such thing" in capsys.readouterr().out


def test_a_section_without_a_row_is_recorded_with_its_reason_and_tried_again(recorder):
    works = recorder.gpu.SECTIONS["prefill"]

    def broken(s, got):
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorder.gpu.SECTIONS["prefill"] = recorder.gpu.Section(broken, 3)
    assert recorder.main("--sections", "prefill") == 1
    assert recorder.stored()["sections"]["prefill"]["left_out"] == [
        {"what": "the rest of the section", "why": "out of memory"}
    ]
    recorder.gpu.SECTIONS["prefill"] = works
    assert recorder.main("--sections", "prefill") == 0 and recorder.stored()["sections"]["prefill"]["rows"]


def test_no_section_is_begun_that_could_outrun_the_minutes(recorder, capsys):
    assert recorder.main("--minutes", "2") == 0 and recorder.calls == []
    assert "no time was left for: prefill, memory" in capsys.readouterr().out
    recorder.gpu.SECTIONS["memory"] = recorder.gpu.Section(recorder.gpu.SECTIONS["memory"].measure, 1)
    assert recorder.main("--minutes", "2") == 0 and recorder.calls == ["memory"]
    assert recorder.main("--minutes", "4") == 0 and recorder.calls == ["memory", "prefill"]


@pytest.mark.compiler
def test_the_page_of_measured_results_shows_every_section(record):
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from measured import render

    page = nodes.container("", *render(record))
    headings = [node.astext() for node in page.findall(nodes.rubric)]
    wanted = {name.replace("_", " ") for name in SECTIONS} | {"rows", "equal memory", "left out", "verdicts"}
    assert set(headings) == wanted
    text = page.astext()
    assert "GB/s" in text and "--gpt-fast" in text and "times multi head by bytes" in text
    assert len(list(page.findall(nodes.table))) == len(SECTIONS) + 2


def reading_cells(pattern: str) -> list:
    """The chapters' cells that read such records: each chapter's imports, the cell, and the one after it."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        for cell, after in itertools.pairwise(cells):
            found += [pytest.param((cells[0], cell, after), id=path.stem[:2])] if f'"{pattern}"' in cell else []
    assert found
    return found


@pytest.fixture
def read_by(tmp_path, monkeypatch, capsys):
    """``read_by(cells, records)``: what the cells print where ``records`` are the results."""

    def said(cells: tuple[str, ...], records: Path) -> str:
        (tmp_path / "notebooks").mkdir()
        shutil.copytree(records, tmp_path / "benchmarks" / "results")
        monkeypatch.chdir(tmp_path / "notebooks")
        namespace: dict = {}
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            for cell in cells:
                exec(cell, namespace)
        return capsys.readouterr().out

    return said


@pytest.mark.parametrize("cells", reading_cells("gpu-*.json"))
def test_chapters_that_read_a_gpu_record_read_this_one(cells, dry_run, read_by):
    said = read_by(cells[:2], dry_run[1])
    assert "a dry run at toy size" in said.replace("-", " ") and "not yet measured" not in said


# ---- peers -----------------------------------------------------------------------------------------------------------


def test_the_weights_transformers_is_timed_with_are_ours_and_give_the_same_logits(gpu):
    setting = gpu.toy()
    model = gpu.random_model(setting.config, setting)
    for parameter in model.parameters():
        parameter.mul_(10)  # small weights would make any two models agree
    theirs = gpu.transformers_model(model, setting)
    assert theirs.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    ids = gpu.random_ids(setting, 40)  # past the window
    ours, reference = model(ids)[0], theirs(ids).logits[0]
    assert (ours - reference).abs().max() < 1e-5 * reference.std()


def test_transformers_static_cache_is_compiled_and_only_then(gpu):
    setting = gpu.toy()
    theirs = gpu.transformers_model(gpu.random_model(setting.every_key, setting), setting)
    gpu.transformers_rate(theirs, setting, 5, "sdpa")()
    assert not hasattr(theirs, "_compiled_call")
    gpu.transformers_rate(theirs, setting, 5, "sdpa", static=True)()
    assert theirs._compiled_call is not None
    gpu.forget_compiled()


def test_transformers_takes_turns_with_ours_dynamic_and_compiled(record):
    ours, peers = {"attnlab eager"}, {"transformers": {"eager", "sdpa"}, "transformers_compiled": {"static compiled"}}
    for name, kinds in peers.items():
        rows = record["sections"][name]["rows"]
        assert {row["what"] for row in rows} == ours | {f"transformers {kind}" for kind in kinds}
    assert record["sections"]["transformers"]["largest_logit_difference_over_spread"] < 1e-4


GPT_FAST = '''
import json, tempfile
from pathlib import Path
from types import SimpleNamespace
import torch
from safetensors.torch import save_file
from attnlab.checkpoint import load_model

ModelArgs = SimpleNamespace

class Transformer:
    """Reads its weights as Mistral's own layout, as gpt-fast does, and computes with attnlab."""
    def __init__(self, args): self.args = args
    def to(self, dtype): return self
    def requires_grad_(self, _): return self
    def eval(self): return self
    def setup_caches(self, batch, longest): self.max_seq_length = longest
    def load_state_dict(self, weights, assign):
        a = self.args
        with tempfile.TemporaryDirectory() as folder:
            save_file({k: v.contiguous() for k, v in weights.items()}, Path(folder) / "consolidated.safetensors")
            (Path(folder) / "params.json").write_text(json.dumps(dict(
                dim=a.dim, n_layers=a.n_layer, head_dim=a.dim // a.n_head, hidden_dim=a.intermediate_size, n_heads=a.n_head,
                n_kv_heads=a.n_local_heads, norm_eps=a.norm_eps, vocab_size=a.vocab_size, rope_theta=a.rope_base)))
            self.model = load_model(folder, progress=False)
    def __call__(self, mask, ids, positions): return self.model(ids)

def create_block_mask(mask, B, H, T, S, device): return (T, S)
def causal_mask(b, h, q, kv): return q >= kv
def decode_one_token(model, token, position, mask):
    assert token.shape == (1, 1) and position.shape == (1,) and int(position) < model.max_seq_length == mask[1]
    return model(mask, token, position).argmax(-1).int(), None
'''


def test_gpt_fast_is_given_the_weights_in_its_own_order_and_takes_turns_with_ours(gpu, tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(GPT_FAST)
    (tmp_path / "generate.py").write_text("from model import *")
    random_model = gpu.random_model

    def strong(config, s):  # small weights would make any two models agree
        model = random_model(config, s)
        for parameter in model.parameters():
            parameter.mul_(10)
        return model

    monkeypatch.setattr(gpu, "random_model", strong)
    result = gpu.measure("gpt_fast", gpu.replace(gpu.toy(), gpt_fast=tmp_path))
    for name in ("model", "generate"):
        monkeypatch.delitem(sys.modules, name)
    assert "left_out" not in result and result["largest_logit_difference_over_spread"] < 1e-4
    assert {row["what"] for row in result["rows"]} == {"attnlab eager", "gpt-fast"}
    assert all(row["times_gpt_fast"]["median"] == 1 for row in result["rows"] if row["what"] == "gpt-fast")


# ---- trained weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random Mistral in several files, with a real tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "mistral-small"
    shipped = companion.folder("companion")
    config = attnlab.load("companion").config.replace(d_model=64, n_layers=17, n_heads=8, n_kv_heads=2, head_dim=8, d_ff=96, tie_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    save_model(attnlab.Mistral(config), folder, max_shard_bytes=500_000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, folder / name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """The folder with what ``--model`` wrote, and its record."""
    out = tmp_path_factory.mktemp("trained")
    done = run("gpu.py", "--model", str(checkpoint), "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    return out, json.loads(path.read_text())


def test_trained_weights_are_recorded_with_their_greedy_continuation_and_speed(checkpoint, trained):
    _, content = trained
    lm = attnlab.load(checkpoint, device="cpu")
    said = content["continuation"]
    assert said["prompt"] == "This is a test" and said["prompt_ids"] == lm.tokenizer.encode(said["prompt"])
    assert said["ids"] == attnlab.generate(lm, said["prompt_ids"], max_new_tokens=64)
    assert content["model"]["name"] == "mistral-small" and content["model"]["n_kv_heads"] == 2
    assert {row["context"] for row in content["speed"]} == {128, 2048} and "left_out" not in content
    assert all(row["fraction_of_bandwidth"] > 0 for row in content["speed"])
    assert str(checkpoint.parent) not in json.dumps(content)


def test_maps_of_trained_weights_are_8_bit_records_that_open_and_can_be_explored(checkpoint, trained):
    folder, content = trained
    lm = attnlab.load(checkpoint, device="cpu")
    assert len(content["maps"]) == 4
    for row in content["maps"]:
        small, whole = attnlab.AttentionRecord.load(folder / row["file"]), attnlab.record_attention(lm, row["text"])
        apart = np.abs(small.weights.astype(np.float32) - whole.weights.astype(np.float32))
        assert apart.max() < 0.02 and small.query_tokens == whole.query_tokens and small.n_kv_heads == 2
        assert row["tokens"] == len(whole.key_tokens) and row["bytes"] < whole.nbytes + 2000
        assert AttentionExplorer(small).data["n_layers"] == 17


@pytest.mark.parametrize("cells", reading_cells("trained-*.json"))
def test_chapters_that_read_a_record_of_trained_weights_read_this_one_and_open_its_maps(cells, trained, read_by):
    said = read_by(cells, trained[0])
    assert "mistral-small" in said and "This is a test" in said and "not yet measured" not in said


def test_the_record_of_trained_weights_is_shown_with_its_maps(trained):
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from measured import render

    text = nodes.container("", *render(trained[1])).astext()
    assert "This is a test" in text and "-maps-1.npz" in text and "mistral-small" in text


def test_a_folder_that_is_no_model_is_an_error_in_one_line(tmp_path):
    done = run("gpu.py", "--model", str(tmp_path / "none"), "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
