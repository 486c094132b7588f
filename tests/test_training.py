"""The recipe: corpus, run, baselines, report. Everything at toy size, on files written here."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from attnlab import companion
from attnlab.errors import CheckpointError, ConfigError, InputError
from attnlab.memory import n_params
from attnlab.mistral import Mistral, MistralConfig
from attnlab.record import record_attention
from attnlab.training.__main__ import app
from attnlab.training.baselines import KneserNey, xz_bits_per_byte
from attnlab.training.corpus import Corpus, encode_files, train_tokenizer
from attnlab.training.report import (
    PROMPTS,
    File,
    bits_per_byte,
    choose_and_report,
    first_line_parses,
    halve,
    read_file,
    read_weights,
    report,
    score_window,
    share_of_known_lines,
    weights_of_rows,
    windows,
)
from attnlab.training.run import Data, Recipe, prepare, schedule, train
from attnlab.training.siblings import SHIPPED, SIBLINGS, publish, run_folder, train_siblings

TINY = MistralConfig(
    vocab_size=300, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, window=24, tie_embeddings=True, name="toy"
)
RECIPE = Recipe(
    tokens=1400, repeats_share=0.2, phases=((0.6, 24, 4), (1.0, 32, 2)), warmup_steps=3, checkpoints=(300, 900)
)  # fmt: skip


def module(i: int) -> str:
    body = "\n\n".join(
        f'def f{i}_{j}(a, b={j}):\n    """Return ({i}, {j}."""\n    return g(a, [h(b, {j}), "x{i}"], max({j}, len(a)))'
        for j in range(3)
    )
    return f"import m{i}\n\n{body}\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A standard library of 12 modules, 4 tests, and files that must be left out."""
    root = tmp_path_factory.mktemp("lib")
    for i in range(12):
        (root / f"m{i:02}.py").write_text(module(i))
        if i % 3 == 0:
            (root / "test").mkdir(exist_ok=True)
            (root / "test" / f"test_m{i:02}.py").write_text(f"import unittest\n\nassert f{i}_0({i}, 2)\n" * 5)
    (root / "twin.py").write_text(module(0))
    (root / "latin.py").write_bytes(b"x = '\xe9'\n")
    (root / "empty.py").write_text("\n")
    for folder in ("site-packages", "encodings"):
        (root / folder).mkdir()
        (root / folder / "a.py").write_text("a = 1\n")
    return root


@pytest.fixture(scope="module")
def corpus(library) -> Corpus:
    return Corpus.from_standard_library(library, n_held_out=4)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus, TINY.vocab_size)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("run")
    corpus.save(folder / "corpus.json.gz")
    train(folder, TINY, RECIPE, progress=False)
    return folder


@pytest.fixture(scope="module", autouse=True)
def short_completions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnlab.training.report.NEW_TOKENS", 8)
        yield


# ---- corpus ----


def test_duplicates_tables_and_foreign_files_stay_out(corpus):
    names = {*corpus.lib, *corpus.tests, *corpus.held_out}
    assert not names & {"twin.py", "latin.py", "empty.py", "site-packages/a.py", "encodings/a.py"}
    assert len(corpus.held_out) == 4 and len(corpus.lib) == 8
    assert all(name.startswith("test/") for name in corpus.tests)


def test_held_out_files_and_their_tests_are_never_in_training(corpus, tokenizer):
    trained_on = {*corpus.lib, *corpus.tests}
    for name, text in corpus.held_out.items():
        assert name not in trained_on and f"test/test_{name}" not in trained_on
        assert text not in {*corpus.lib.values(), *corpus.tests.values()}
    data = Data(corpus, tokenizer, RECIPE)
    stream = np.concatenate((data.lib, data.tests)).tobytes()
    for text in corpus.held_out.values():
        assert np.array(tokenizer.encode(text).ids[1:], np.uint16).tobytes() not in stream
    assert np.array(tokenizer.encode(next(iter(corpus.lib.values()))).ids, np.uint16).tobytes() in stream


def test_corpus_hash_is_stable_over_readings_and_saving_and_moves_with_the_text(library, corpus, tmp_path):
    assert Corpus.from_standard_library(library, n_held_out=4).sha256 == corpus.sha256
    corpus.save(tmp_path / "c.json.gz")
    assert Corpus.load(tmp_path / "c.json.gz") == corpus
    assert Corpus.load(tmp_path / "c.json.gz").sha256 == corpus.sha256
    assert Corpus.from_standard_library(library, n_held_out=4, seed=1).sha256 != corpus.sha256
    other = Corpus(corpus.python, corpus.lib | {"m.py": "x"}, corpus.tests, corpus.held_out)
    assert other.sha256 != corpus.sha256
    assert Corpus("p", {"a": "b"}, {}, {}).sha256 == hashlib.sha256(b"a\0b\0").hexdigest()


def test_too_few_files_are_refused(library):
    with pytest.raises(InputError, match="more than 12"):
        Corpus.from_standard_library(library, n_held_out=12)


def test_every_bracket_and_quote_is_a_token_and_text_comes_back(corpus, tokenizer):
    text = next(iter(corpus.held_out.values()))
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == tokenizer.token_to_id("<s>") == 0
    assert tokenizer.decode(encoding.ids) == text
    for (start, end), piece in zip(encoding.offsets[1:], encoding.tokens[1:], strict=True):
        if any(c in "()[]{}\"'" for c in text[start:end]):
            assert piece in {*"()[]{}\"'", '"""', "'''"}


# ---- batches and run ----


def test_batches_are_a_function_of_the_step(corpus, tokenizer):
    a, b = Data(corpus, tokenizer, RECIPE), Data(corpus, tokenizer, RECIPE)
    later = [b.batch(step, 4, 24) for step in (5, 3, 5)]
    first = a.batch(5, 4, 24)
    assert all((x == y).all() for x, y in zip(first, later[0], strict=True))
    assert all((x == y).all() for x, y in zip(later[0], later[2], strict=True))
    assert not (first[0] == later[1][0]).all()
    assert not (first[0] == Data(corpus, tokenizer, Recipe(seed=1)).batch(5, 4, 24)[0]).all()


def test_rows_start_with_bos_and_targets_are_the_next_tokens(corpus, tokenizer):
    data = Data(corpus, tokenizer, RECIPE)
    repeats = 0
    for step in range(20):
        inputs, targets = data.batch(step, 4, 24)
        assert (inputs[:, 0] == data.bos).all() and (targets != data.bos).all()
        for row, wanted in zip(inputs[:, 1:].tolist(), targets[:, :-1].tolist(), strict=True):
            assert all(w == x or (w == -100) for x, w in zip(row, wanted, strict=True))
            n = next((i for i, w in enumerate(wanted) if w != -100), 0)
            if n >= 8:  # a repeat: its first copy is not scored, and what follows is that copy again
                repeats += 1
                assert all(w == row[i - n] for i, w in enumerate(wanted) if i >= n)
    assert repeats > 0


def test_schedule_reaches_the_tokens_in_the_phases_order():
    steps = schedule(RECIPE)
    assert [s[1:] for s in steps] == sorted((s[1:] for s in steps), key=lambda s: s[0])
    assert all(b[0] - a[0] == a[1] * a[2] for a, b in pairwise(steps))
    seen, context, rows = steps[-1]
    assert seen < RECIPE.tokens <= seen + context * rows


def test_a_run_learns_and_leaves_its_files(finished):
    names = {path.name for path in finished.iterdir()}
    checkpoints = sorted(name for name in names if name.startswith("tokens-"))
    assert checkpoints == [
        "tokens-0000000384.safetensors",
        "tokens-0000000928.safetensors",
        "tokens-0000001184.safetensors",
        "tokens-0000001312.safetensors",
        "tokens-0000001440.safetensors",
    ]
    assert {"corpus.json.gz", "tokenizer.json", "run.json", "log.jsonl", "state.pt", "model.safetensors"} <= names
    assert not any(name.endswith(".tmp") for name in names)
    asked = json.loads((finished / "run.json").read_text())
    assert asked["recipe"]["tokens"] == 1400 and asked["config"]["window"] == 24
    line = json.loads((finished / "log.jsonl").read_text().splitlines()[-1])
    assert line["tokens"] == 1440 and line["loss"] < math.log(TINY.vocab_size)


def test_the_model_is_the_mean_of_the_weights_where_the_rate_came_down(finished):
    ends = [load_file(finished / f"tokens-{seen:010d}.safetensors") for seen in (1184, 1312, 1440)]
    model = load_file(finished / "model.safetensors")
    for name, weight in model.items():
        mean = torch.stack([end[name].float() for end in ends]).mean(0)
        assert torch.equal(weight, mean.bfloat16())
    assert not torch.equal(model["embed.weight"], ends[-1]["embed.weight"])


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_training import RECIPE, TINY
from attnlab.training import run
saves, replace = 0, os.replace

def dying(source, target):
    global saves
    if Path(target).name == "state.pt":
        saves += 1
        if saves == 7:  # the state is written beside and not yet in its place
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = dying
run.train(Path(sys.argv[1]), TINY, RECIPE, save_every=0.0, progress=False)
"""


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(finished, corpus, tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    corpus.save(folder / "corpus.json.gz")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = tmp_path / "whole"
        whole.mkdir()
        corpus.save(whole / "corpus.json.gz")
        train(whole, TINY, RECIPE, progress=False)
        child = subprocess.run([sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent)], env=env)
        assert child.returncode == -signal.SIGKILL
        assert (folder / "state.tmp").exists() and not (folder / "tokens-0000001440.safetensors").exists()
        assert torch.load(folder / "state.pt", weights_only=True)["step"] == 6
        train(folder, TINY, RECIPE, progress=False)
    finally:
        torch.set_num_threads(before)
    for name in ("tokens-0000000384", "tokens-0000000928", "tokens-0000001440"):
        ours, theirs = (load_file(f / f"{name}.safetensors") for f in (folder, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    states = [torch.load(f / "state.pt", weights_only=True)["model"] for f in (folder, whole)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])  # in float32 too


def test_other_settings_or_another_corpus_are_refused(finished, corpus, tmp_path):
    files = {path.name: path.read_bytes() for path in finished.iterdir()}
    for config, recipe in ((TINY.replace(window=8), RECIPE), (TINY, Recipe(tokens=1400))):
        with pytest.raises(CheckpointError, match="other settings"):
            train(finished, config, recipe, progress=False)
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    Corpus(corpus.python, corpus.lib | {"new.py": "x = 1\n"}, corpus.tests, corpus.held_out).save(
        folder / "corpus.json.gz"
    )
    with pytest.raises(CheckpointError, match="another corpus"):
        train(folder, TINY, RECIPE, progress=False)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == files


def test_a_finished_run_called_again_changes_nothing(finished):
    before = (finished / "tokens-0000001440.safetensors").read_bytes()
    train(finished, TINY, RECIPE, progress=False)
    assert (finished / "tokens-0000001440.safetensors").read_bytes() == before


# ---- baselines ----


def brute_force(ids: list[int], vocab_size: int, bos: int, order: int, discount: float):
    """Interpolated Kneser-Ney from its definition, with a dict for everything."""
    grams = [set() for _ in range(order + 1)]
    counts = {}
    for end in range(len(ids)):
        for n in range(1, order + 1):
            gram = tuple(ids[end - n + 1 : end + 1]) if end + 1 >= n else ()
            if len(gram) == n and bos not in gram[1:]:
                grams[n].add(gram)
                counts[gram] = counts.get(gram, 0) + 1

    def c(gram):
        if len(gram) == order or gram[0] == bos:
            return counts.get(gram, 0)
        return sum(longer[1:] == gram for longer in grams[len(gram) + 1])

    def p(word, history):
        history = history[-(order - 1) :] if order > 1 else ()
        followers = [w for w in range(vocab_size) if w != bos and c((*history, w)) > 0]
        lower = p(word, history[1:]) if history else 1 / (vocab_size - 1)
        total = sum(c((*history, w)) for w in followers)
        if total == 0:
            return lower
        return (max(c((*history, word)) - discount, 0) + discount * len(followers) * lower) / total

    return p


TOY = [0, 1, 2, 3, 1, 2, 4, 1, 2, 3, 0, 2, 2, 2, 1, 0, 4, 1, 2, 3, 5, 5, 0, 1, 2, 3, 1]
SEEN_AND_UNSEEN = [0, 1, 2, 3, 1, 2, 0, 5, 4, 3, 2, 1, 0, 2, 2, 6, 6, 1, 0, 3]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("discount", [0.75, 0.85])
def test_vectorised_kneser_ney_equals_the_definition_and_sums_to_one(order, discount):
    kn = KneserNey(np.array(TOY), vocab_size=7, bos=0, order=order)
    p = brute_force(TOY, 7, 0, order, discount)
    got = kn.log2_probabilities(np.array(SEEN_AND_UNSEEN), discount)
    history = ()
    for word, bits in zip(SEEN_AND_UNSEEN, got, strict=True):
        if word == 0:
            assert bits == 0
            history = (0,)
            continue
        assert sum(p(w, history) for w in range(1, 7)) == pytest.approx(1)
        assert 2**bits == pytest.approx(p(word, history), rel=1e-12)
        history = (*history, word)
    all_next = [kn.log2_probabilities(np.array([0, 1, 2, w]), discount)[-1] for w in range(1, 7)]
    assert np.exp2(all_next).sum() == pytest.approx(1)
    assert kn.bits_per_byte(np.array(SEEN_AND_UNSEEN), 50, discount) == pytest.approx(-got.sum() / 50)


def test_kneser_ney_handles_files_shorter_than_its_order():
    kn = KneserNey(np.array([0, 1, 2, 0, 2]), vocab_size=4, bos=0)
    p = brute_force([0, 1, 2, 0, 2], 4, 0, 5, 0.75)
    assert 2 ** kn.log2_probabilities(np.array([0, 1, 2, 3, 1, 2]), 0.75)[-1] == pytest.approx(p(2, (0, 1, 2, 3, 1)))


def test_kneser_ney_packs_five_tokens_of_4096_and_refuses_more():
    ids = np.array([0, 4095, 4094, 4095, 4093, 4095, 4094])
    assert np.isfinite(KneserNey(ids, 4096, 0).log2_probabilities(ids, 0.75)).all()
    with pytest.raises(ConfigError, match="order of 4"):
        KneserNey(ids, 8192, 0)
    with pytest.raises(InputError, match="start with <s>"):
        KneserNey(ids[1:], 4096, 0)


def test_xz_after_the_text_itself_needs_next_to_nothing():
    text = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    assert xz_bits_per_byte(text) >= 8
    assert xz_bits_per_byte(text, before=text) < 0.5
    with pytest.raises(InputError):
        xz_bits_per_byte(b"")


# ---- report ----


def test_windows_score_every_token_once_with_the_context_they_promise():
    ids = np.arange(10, 33)
    for length, stride in ((8, 8), (8, 4), (8, 2), (64, 32)):
        inputs, targets = windows(ids, length, stride)
        assert (inputs[:, 0] == 0).all()
        assert sorted(targets[targets != -100].tolist()) == ids.tolist()
        for row, wanted in zip(inputs, targets, strict=True):
            for t in torch.nonzero(wanted != -100).flatten().tolist():
                assert t == 0 or row[t] == wanted[t] - 1
                assert t >= length - stride or wanted[t] < 10 + length


def test_bits_per_byte_is_the_likelihood_of_the_text(corpus, tokenizer):
    torch.manual_seed(0)
    model = Mistral(TINY).eval()
    files = [read_file(name, text, tokenizer) for name, text in corpus.held_out.items()]
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    n_tokens, n_bytes = sum(len(f.ids) for f in files), sum(len(f.text.encode()) for f in files)
    uniform = n_tokens * math.log2(TINY.vocab_size) / n_bytes  # a model of zeros finds all tokens alike
    for length, stride in ((256, 256), (16, 16), (32, 16)):
        assert bits_per_byte(model, files, length, stride) == pytest.approx(uniform)
    torch.manual_seed(0)
    model = Mistral(TINY).eval()
    ids = torch.tensor([[0, *files[0].ids.tolist()]])
    with torch.inference_mode():
        log_p = model(ids[:, :-1]).log_softmax(-1)
    bits = -log_p[0, torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum() / math.log(2) / len(files[0].text.encode())
    assert bits_per_byte(model, files[:1], 512, 512) == pytest.approx(bits.item(), rel=1e-5)


def test_weights_of_padded_rows_are_the_records_of_each(corpus):
    torch.manual_seed(0)
    model = Mistral(TINY).eval()
    rows = [np.array([0, 5, 6, 7, 8]), np.array([0, 9, 9])]
    for row, weights in zip(rows, weights_of_rows(model, rows), strict=True):
        assert np.abs(weights - record_attention(model, row).weights.astype(np.float32)).max() < 1e-3


def test_heads_are_chosen_on_one_half_and_told_from_the_other(corpus, tokenizer):
    file = read_file("m", next(iter(corpus.held_out.values())), tokenizer)
    T = min(len(file.ids), 100) + 1
    ids = np.concatenate(([0], file.ids[: T - 1]))
    matches = [m._replace(opener=m.opener + 1, closer=m.closer + 1) for m in file.matches if m.closer + 1 < T]
    for m in matches:
        opener, closer = tokenizer.decode([ids[m.opener]]), tokenizer.decode([ids[m.closer]])
        assert opener + closer in {"()", "[]", "{}", '""', "''", '""""""'}

    def weights(head: int) -> np.ndarray:
        w = np.zeros((1, 2, T, T), np.float32)
        w[0, head, np.arange(1, T), np.arange(T - 1)] = 1
        return w

    first, second = score_window(weights(0), ids, matches), score_window(weights(1), ids, matches)
    told = choose_and_report(
        ({"previous_token": [first["previous_token"]]}, {"previous_token": [second["previous_token"]]}),
        "previous_token",
    )
    assert (told["head"], told["score"]) == ("0.0", 0.0) and told["by_head"]["score"] == [[0.0, 1.0]]
    assert choose_and_report(({}, {}), "previous_token") == {"head": None, "n": 0}


def test_halves_have_about_as_many_tokens():
    files = [File(str(n), "", np.zeros(n, int), []) for n in (1, 2, 3, 4, 10)]
    half_of = halve(files)
    assert half_of == {"10": 0, "4": 1, "3": 1, "2": 1, "1": 1}
    assert halve(files[::-1]) == half_of


@pytest.mark.parametrize(
    "prompt, completion, parses",
    [
        ("\n\ndef", " f(a):\n    return", True),
        ("\n\ndef", " f(a:\n    return 1\n", False),
        ("\n\ndef", " f(a)", False),  # the line has no end
        ("\n\ndef", " f(a,\n      b):\n    x", True),
        ("for i in range(", "3):\n", True),
        ("for i in range(", "3)\n    x\n", False),
        ("    return", " x\nfoo(\n", True),
        ("        self.x(", "a,\n               b)\n", True),
        ("import", "\n", False),
        ("try:\n    import", " a\nexcept", True),
        ("@property\ndef", " x(self):\n        pass\n", True),
        ("class A:\n    def f(self):\n        self.", "x = 1\n  y", True),
        ("class A:\n    def f(self):\n        self.", " = 1\n", False),
        ("if __name__ ==", " '__main__':\n", True),
        ("x =", " 'a\ny = 2\n", False),
        ("#", " comment\n", False),
    ],
)
def test_first_lines_are_judged_by_python(prompt, completion, parses):
    assert first_line_parses(prompt, completion) is parses


def test_prompts_are_many_and_none_ends_in_a_space():
    assert len(PROMPTS) >= 20 and len(set(PROMPTS)) == len(PROMPTS)
    assert not any(prompt.endswith((" ", "\n")) for prompt in PROMPTS)


def test_share_of_known_lines():
    long = "x = " + "a" * 30
    corpus = Corpus("p", {"a": f"    {long}\n"}, {}, {"b": f"{long}\n{long}b\nshort\n"})
    assert share_of_known_lines(corpus) == 0.5


@pytest.fixture(scope="module")
def reported(finished, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("out") / "toy"
    return report(finished, out, progress=False), out


def test_report_is_complete_small_and_the_same_twice(reported, finished, tmp_path, corpus):
    result, out = reported
    text = (out / "report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result)) and len(text) < 200_000
    assert report(finished, tmp_path / "again", progress=False) == result
    assert (tmp_path / "again" / "report.json").read_text() == text
    assert (tmp_path / "again" / "README.md").read_text() == (out / "README.md").read_text()
    assert result["finished"] and result["data"]["sha256"] == corpus.sha256 and "20.0%" in result["data"]["mixed_in"]
    assert result["training"]["tokens"] == 1440 and result["training"]["seed"] == 0 and result["training"]["machine"]
    assert [then["tokens"] for then in result["over_time"]] == [384, 928, 1184, 1312, 1440]
    for then in result["over_time"]:
        assert then["induction"]["head"] and then["previous_token"]["head"] and then["second_copy"] > 0
    assert len(result["completions"]["examples"]) == len(PROMPTS)
    b = result["bits_per_byte"]
    assert b["five_gram"] == min(b["five_gram_by_discount"].values()) and b["xz_after_training_text"] < b["xz_alone"]
    _, bpe = prepare(finished, TINY.vocab_size)
    files = [read_file(name, text, bpe) for name, text in corpus.held_out.items()]
    model = read_weights(finished / "model.safetensors", TINY)
    assert b["cold_256"] == pytest.approx(bits_per_byte(model, files, 256, 256), abs=1e-3)
    for name, scores in result["heads"].items():
        assert scores["what"], name
        assert scores["head"] is None or np.shape(scores["by_head"]["score"]) == (2, 4)


def test_report_leaves_a_model_that_transformers_reads_alike(reported, finished):
    import transformers

    result, out = reported
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "report.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    text = "def f(a, b=[1, 2]):\n    return 'é'\n"
    _, bpe = prepare(finished, TINY.vocab_size)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(text)["input_ids"] == bpe.encode(text).ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.decode(bpe.encode(text).ids, skip_special_tokens=True) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = Mistral(TINY)
    weights = load_file(finished / "model.safetensors")
    ours.load_state_dict(weights | {"lm_head.weight": weights["embed.weight"]})
    ids = torch.tensor([bpe.encode(text).ids])
    with torch.inference_mode():
        assert (model(ids).logits - ours(ids)).abs().max() < 1e-4
    assert model.config.bos_token_id == 0


def test_model_card_says_what_the_report_says(reported):
    result, out = reported
    card = (out / "README.md").read_text()
    for fact in (f"{result['bits_per_byte']['cold_256']:.3f}", result["data"]["sha256"], result["data"]["mixed_in"],
                 result["training"]["machine"], "seed 0"):  # fmt: skip
        assert fact in card
    assert "not finished" not in card


def test_an_unfinished_run_is_reported_as_such_and_no_run_is_refused(finished, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"run\.json"):
        report(folder, tmp_path / "out", progress=False)
    for path in finished.iterdir():
        if not path.name.startswith("tokens-"):
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        report(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    name = "tokens-0000000384.safetensors"
    (folder / name).write_bytes((finished / name).read_bytes())
    result = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "unfinished" in result.output
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not written["finished"] and written["training"]["tokens"] == 384
    assert "384 of 1,400 tokens" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_cannot_be_written_is_one_line_on_stderr(finished, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    command = [sys.executable, "-m", "attnlab.training", "report", str(tmp_path), "--out", str(tmp_path / "file")]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert said.returncode == 1 and said.stderr.startswith("error: ") and said.stderr.count("\n") == 1
    with pytest.raises(InputError, match="cannot be written"):
        report(finished, tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_encode_files_puts_bos_before_each(tokenizer):
    ids = encode_files(tokenizer, {"a": "x = 1\n", "b": "y"})
    assert ids.dtype == np.uint16 and (ids == 0).sum() == 2 and ids[0] == 0


# ---- siblings ----


@pytest.fixture(scope="module")
def sibling_runs(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("siblings")
    corpus.save(folder / "corpus.json.gz")
    configs = {
        name: TINY.replace(name=name, window=None, n_kv_heads=n) for name, n in (("multi-head", 4), ("other", 1))
    }
    recipe = Recipe(tokens=400, phases=((1.0, 24, 4),), rates=((0, 1), (1, 0.1)), checkpoints=(), mean_of=(1.0,))
    train_siblings(folder, 0, configs, configs, recipe, progress=False)
    train_siblings(folder, 1, ["other"], configs, recipe, progress=False)
    return folder


def test_siblings_share_corpus_tokenizer_and_batches(sibling_runs):
    asked = [
        json.loads((run_folder(sibling_runs, name, 0) / "run.json").read_text()) for name in ("multi-head", "other")
    ]
    assert asked[0]["corpus"] == asked[1]["corpus"] and asked[0]["recipe"] == asked[1]["recipe"]
    differ = {key for key in asked[0]["config"] if asked[0]["config"][key] != asked[1]["config"][key]}
    assert differ == {"n_kv_heads", "name"}
    tokenizers = {path.read_bytes() for path in sibling_runs.glob("*/tokenizer.json")}
    assert len(tokenizers) == 1


def test_published_siblings_ship_what_has_a_name_and_report_on_all(sibling_runs, tmp_path):
    rows = publish(sibling_runs, tmp_path, progress=False)
    assert [(row["name"], row["seed"]) for row in rows] == [("multi-head", 0), ("other", 0), ("other", 1)]
    assert json.loads((tmp_path / "siblings.json").read_text()) == rows
    assert {path.name for path in tmp_path.iterdir()} == {"multi-head", "siblings.json"}
    card = (tmp_path / "multi-head" / "README.md").read_text()
    assert "multi-head attention" in card and "all that came before" in card
    report = run_folder(sibling_runs, "multi-head", 0) / "report" / "report.json"
    before = report.stat().st_mtime_ns
    assert publish(sibling_runs, tmp_path, progress=False) == rows and report.stat().st_mtime_ns == before
    for row in rows:
        weights = [len(text.encode()) for text in Corpus.load(sibling_runs / "corpus.json.gz").held_out.values()]
        names = list(Corpus.load(sibling_runs / "corpus.json.gz").held_out)
        mean = sum(row["by_file"][name] * n for name, n in zip(names, weights, strict=True)) / sum(weights)
        assert row["bits_per_byte"]["cold_256"] == pytest.approx(mean, abs=1e-3)


def test_siblings_differ_in_kv_heads_alone_and_the_wide_one_has_equal_parameters():
    of = {name: config.to_dict() for name, config in SIBLINGS.items()}
    for name in SHIPPED:
        assert {key for key in of[name] if of[name][key] != of["multi-head"][key]} <= {"n_kv_heads", "name"}
    widths = {d_ff: n_params(SIBLINGS["multi-query"].replace(d_ff=d_ff)) for d_ff in (852, 853, 854)}
    target = n_params(SIBLINGS["multi-head"])
    assert SIBLINGS["multi-query-wide"].d_ff == min(widths, key=lambda d_ff: abs(widths[d_ff] - target))
    assert SHIPPED == companion.SIBLINGS


def test_an_unknown_sibling_is_refused_and_a_run_may_start_from_weights_of_its_own_shape(corpus, tmp_path):
    result = CliRunner().invoke(app, ["siblings", str(tmp_path / "s"), "multihead"])
    assert isinstance(result.exception, InputError) and "multi-query-wide" in str(result.exception)
    corpus.save(tmp_path / "corpus.json.gz")
    given = {name: torch.full_like(tensor, 0.01) for name, tensor in Mistral(TINY).state_dict().items()}
    with pytest.raises(CheckpointError, match="another model"):
        train(tmp_path, TINY, RECIPE, progress=False, start=given | {"more": torch.ones(1)})
    del given["lm_head.weight"]
    none = Recipe(tokens=100, phases=((1.0, 24, 4),), muon_lr=0.0, adam_lr=0.0, checkpoints=(), mean_of=(1.0,))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    corpus.save(fresh / "corpus.json.gz")
    model = train(fresh, TINY, none, progress=False, start=given)
    assert all(torch.all((tensor - 0.01).abs() < 1e-4) for tensor in model.state_dict().values())
