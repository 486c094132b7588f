"""The adapter to the evaluation harness: what it tells the harness is what the model says."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnlab import companion
from attnlab.errors import ConfigError
from attnlab.evaluation import answer, harness_model, loglikelihoods
from attnlab.generate import generate
from attnlab.loading import load
from attnlab.training.report import File, bits_per_byte

CODE = "import os\n\n\ndef main(path):\n    for name in os.listdir(path):\n        print(name)\n"
PROMPTS = (
    "\n\ndef",
    "import",
    "    return",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def",
)


@pytest.fixture(scope="module")
def lm():
    return load("companion", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def held_out() -> str:
    """A file that the companion never saw, or if this Python has none of them, another; the tests hold for any text."""
    names = companion.report()["data"]["held_out"]["names"]
    library = Path(os.__file__).parent
    return next((library / n for n in names if (library / n).is_file()), library / "this.py").read_text(
        encoding="utf-8"
    )


def pairs_of(lm, text: str) -> list[tuple[list[int], list[int]]]:
    ids = lm.tokenizer.encode(text)
    return [(ids[:n], ids[n : n + m]) for n, m in ((1, 4), (5, 1), (9, 7), (len(ids) - 3, 3))]


def directly(lm, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Token by token, each from a pass of its own over all that stands before it."""
    ids, nats, greedy = list(context), 0.0, True
    for id in continuation:
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids]))[0, -1]
        nats += logits.log_softmax(-1)[id].item()
        greedy = greedy and int(logits.argmax()) == id
        ids.append(id)
    return nats, greedy


# ---- likelihoods ------------------------------------------------------------------------------------------------------


def test_a_loglikelihood_is_the_sum_of_the_logits_own(lm):
    pairs = pairs_of(lm, CODE)
    for (nats, greedy), pair in zip(loglikelihoods(lm.model, pairs), pairs, strict=True):
        expected, expected_greedy = directly(lm, *pair)
        assert nats == pytest.approx(expected, abs=1e-3) and nats < 0
        assert greedy == expected_greedy


def test_what_greedy_decoding_gives_is_called_greedy_and_anything_else_is_not(lm):
    prompt = lm.tokenizer.encode("\n\ndef")
    chosen = generate(lm, prompt, max_new_tokens=6)
    other = [*chosen[:-1], (chosen[-1] + 1) % lm.config.vocab_size]
    (best, greedy), (worse, not_greedy) = loglikelihoods(lm.model, [(prompt, chosen), (prompt, other)], batch_size=2)
    assert greedy and not not_greedy and worse < best


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_a_batch_of_different_lengths_gives_what_each_row_gives_alone(lm, batch_size):
    pairs = [pair for text in (CODE, CODE[:40], CODE * 12) for pair in pairs_of(lm, text)]  # past the window, too
    assert max(len(a) + len(b) for a, b in pairs) > lm.config.window
    alone = loglikelihoods(lm.model, pairs)
    together = loglikelihoods(lm.model, pairs, batch_size=batch_size)
    assert [nats for nats, _ in together] == pytest.approx([nats for nats, _ in alone], abs=1e-3)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


def test_what_is_too_long_loses_its_beginning(lm):
    ids = lm.tokenizer.encode(CODE)
    (cut,) = loglikelihoods(lm.model, [(ids[:-4], ids[-4:])], max_length=8)
    assert cut[0] == pytest.approx(directly(lm, ids[-9:-4], ids[-4:])[0], abs=1e-3)
    assert cut[0] != pytest.approx(directly(lm, ids[:-4], ids[-4:])[0], abs=1e-2)


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [1] * 9)])
def test_nothing_before_nothing_after_and_too_much_are_refused(lm, context, continuation):
    with pytest.raises(ConfigError, match="max_length"):
        loglikelihoods(lm.model, [(context, continuation)], max_length=8)


# ---- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_is_what_generate_gives(lm, prompt):
    assert answer(lm, prompt, max_new_tokens=24) == generate(lm, prompt, max_new_tokens=24, raw=True)
    sampled = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
    expected = generate(lm, prompt, max_new_tokens=24, raw=True, **sampled)
    assert answer(lm, prompt, max_new_tokens=24, **sampled) == expected


def test_an_answer_ends_before_the_first_of_the_marks(lm):
    whole = answer(lm, "\n\ndef", max_new_tokens=24)
    assert "(" in whole and ":" in whole
    for until in (["("], [":", "("], ["", "("]):
        assert answer(lm, "\n\ndef", until, max_new_tokens=24) == whole.split("(")[0]
    assert answer(lm, "\n\ndef", ["no such text"], max_new_tokens=24) == whole


def test_a_long_prompt_makes_room_for_the_answer(lm):
    ids = lm.tokenizer.encode(CODE)
    expected = generate(lm, ids[-12:], max_new_tokens=8)
    assert lm.tokenizer.encode(answer(lm, CODE, max_new_tokens=8, max_length=20), bos=False)[:4] == expected[:4]
    with pytest.raises(ConfigError, match="no room"):
        answer(lm, CODE, max_new_tokens=8, max_length=8)


# ---- the harness ------------------------------------------------------------------------------------------------------


def requests(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_the_harness_gets_likelihoods_of_text_by_the_models_own_tokens(lm):
    model = harness_model()(lm, batch_size=2)
    asked = [("\n\ndef", " main():"), ("x = [1, 2", "]"), ("", "import os"), ("    return ", "self")]
    found = model.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    for (context, continuation), (nats, _) in zip(asked, found, strict=True):
        context, space = context.rstrip(" "), context[len(context.rstrip(" ")) :]
        before = lm.tokenizer.encode(context)
        after = lm.tokenizer.encode(context + space + continuation)[len(before) :]
        assert nats == pytest.approx(directly(lm, before, after)[0], abs=1e-3)


def test_rolling_gives_the_bits_per_byte_of_the_companions_report(lm, held_out):
    ids = lm.tokenizer.encode(held_out, bos=False)[:256]  # one window, as the report cuts them
    text = lm.tokenizer.decode(ids)
    assert lm.tokenizer.encode(text, bos=False) == ids
    model = harness_model()(lm, max_length=256, batch_size=4)
    (nats,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    file = File("text", text, torch.tensor(ids).numpy(), [])
    with torch.no_grad():
        reported = bits_per_byte(lm.model, [file], 256, 256)
    assert -nats / math.log(2) / len(text.encode()) == pytest.approx(reported, rel=1e-5)


def test_rolling_scores_every_token_once_behind_one_of_the_window_before(lm):
    ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode(CODE, bos=False)]
    n = 8
    assert len(ids) > 2 * n and (len(ids) - 1) % n  # a last window that is filled from before
    expected = 0.0
    for start in range(0, len(ids) - 1, n):
        new = ids[start + 1 : start + 1 + n]
        before = ids[max(0, start + 1 + len(new) - n - 1) : start + 1]
        expected += directly(lm, before, new)[0]
    model = harness_model()(lm, max_length=n, batch_size=3)
    found = model.loglikelihood_rolling(requests("loglikelihood_rolling", (CODE,), ("",)), disable_tqdm=True)
    assert found == [pytest.approx(expected, abs=1e-2), 0.0]


def test_the_harness_gets_answers_and_what_attnlab_cannot_do_is_said(lm):
    model = harness_model()(lm, max_length=256)
    asked = [(p, {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for p in PROMPTS]
    expected = [answer(lm, p, ["\n"], 12) for p in PROMPTS]
    assert model.generate_until(requests("generate_until", *asked), disable_tqdm=True) == expected
    with pytest.raises(ConfigError, match=r"num_beams.*--gen_kwargs"):
        model.generate_until(
            requests("generate_until", ("def", {"num_beams": 4, "max_gen_toks": 4})), disable_tqdm=True
        )
    with pytest.raises(ConfigError, match="--apply_chat_template"):
        model.apply_chat_template([{"role": "user", "content": "Hi"}])
    for options in ({"batch_size": "auto"}, {"batch_size": 0}, {"max_length": 1}):
        with pytest.raises(ConfigError, match="batch_size"):
            harness_model()(lm, **options)


TASKS = {
    "closing": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "continuing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{expected}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def test_tasks_of_local_files_run_through_the_harness_from_end_to_end(lm, tmp_path):
    texts = ["x = [1, 2, 3", "print(len(name)", 'd = {"a": 1', "for i in range(10)"]
    right = ["]", ")", "}", ":"]
    docs = [
        {"text": t, "choices": right, "right": right.index(r), "expected": answer(lm, t, ["\n"], 12)}
        for t, r in zip(texts, right, strict=True)
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        files = {"test": str(tmp_path / "docs.jsonl")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(common | task))
    command = [sys.executable, "-m", "attnlab.evaluation", "--model", "attnlab", "--tasks", ",".join(TASKS)]
    command += ["--model_args", "name=companion,max_length=256", "--batch_size", "3", "--device", "cpu"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]

    best = [max(range(4), key=lambda i: loglikelihoods_of(lm, doc["text"], doc["choices"][i])) for doc in docs]
    assert results["closing"]["acc,none"] == sum(b == doc["right"] for b, doc in zip(best, docs, strict=True)) / 4
    nats = [loglikelihoods(lm.model, [([lm.tokenizer.bos_id], lm.tokenizer.encode(t, bos=False))])[0][0] for t in texts]
    bits = -sum(nats) / math.log(2) / sum(len(t.encode()) for t in texts)
    assert results["perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert results["continuing"]["exact_match,none"] == 1


def loglikelihoods_of(lm, context: str, continuation: str) -> float:
    before = lm.tokenizer.encode(context)
    return directly(lm, before, lm.tokenizer.encode(context + continuation)[len(before) :])[0]


def test_without_the_harness_one_sentence_says_what_to_install():
    program = "import sys; sys.modules['lm_eval'] = None; from attnlab.evaluation import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install" in done.stderr and "lm-eval" in done.stderr and done.stderr.count("\n") == 1
