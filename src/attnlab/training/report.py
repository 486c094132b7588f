"""The report on a training run: how well it predicts, what its heads do and since when, and what it writes.

Everything is computed from the run's own files; run twice, it gives the same report. Text is held out by whole files.
"""

import ast
import errno
import json
import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer as BPE
from torch import Tensor
from tqdm.auto import tqdm

from attnlab import heads
from attnlab.checkpoint import parse_device, save_model
from attnlab.errors import CapacityError, CheckpointError, InputError
from attnlab.generate import generate
from attnlab.heads import HeadScores, Match
from attnlab.loading import LanguageModel
from attnlab.memory import ModelShape
from attnlab.mistral import Mistral, MistralConfig
from attnlab.tokenizer import load_tokenizer
from attnlab.training.baselines import KneserNey, xz_bits_per_byte
from attnlab.training.corpus import BOS, EOS, Corpus
from attnlab.training.run import Data, Recipe

COLD, CONTEXT, LONG = (
    256,
    128,
    512,
)  # tokens: a window that starts from nothing; what else a token may know; a long window
BATCH_TOKENS = 4096  # a forward pass
REPEAT_ROWS, REPEAT_TOKENS = 32, 60
SUBSET = 10  # held-out files that every checkpoint is measured on
DISCOUNTS = (0.75, 0.85)
NEW_TOKENS = 64
PROMPTS = (
    "\n\ndef", "\n\nclass", "import", "from", "for i in range(", "if __name__ ==", "    return", "self.",
    "x =", "while", "with open(", "if not isinstance(", "    if self.", "raise ValueError(", "print(", "assert",
    "        self.assertEqual(", "def __init__(self,", "    for name in", "lambda", "try:\n    import", "@property\ndef",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.",
    "def add(a, b):\n    return", "names = [", "    yield", "result = {", "_cache = None\n\ndef",
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """A held-out file: its text, its ids without ``<s>``, and its brackets and quotes in tokens."""

    name: str
    text: str
    ids: np.ndarray
    matches: list[Match]


def report(folder: Path, out: Path, device: str = "cpu", progress: bool = True) -> dict:
    """Evaluate the run in ``folder``; write ``out`` as a Hugging Face folder with ``report.json`` and a model card.

    The model is what the run ended with, or else its last checkpoint. A run that was cut off is reported as what it is. The baselines depend on the corpus
    alone and take as long as all else, so they are kept in ``folder`` (``baselines.json``).

    Raises CheckpointError for a folder that holds no run or no checkpoint yet.
    """
    device = parse_device(device)
    asked, log, checkpoints = _read_run(folder)
    config, recipe = MistralConfig(**asked["config"]), asked["recipe"]
    bar = tqdm(total=8 + len(checkpoints), disable=not progress, unit="step")

    def step(what: str) -> None:
        bar.set_description(what, refresh=False)
        bar.update(1)

    step("reading the corpus")
    corpus, bpe = Corpus.load(folder / "corpus.json.gz"), BPE.from_file(str(folder / "tokenizer.json"))
    data = Data(corpus, bpe, Recipe())
    files = held_out(corpus, bpe)
    seen, path = checkpoints[-1]
    finished = folder / "model.safetensors"
    model = read_weights(finished if finished.exists() else path, config, device)
    step("compressor and 5-gram")
    baselines = _baselines(folder, corpus, data, files)
    step(f"windows of {COLD}")
    by_file = {file.name: bits_per_byte(model, [file], COLD, COLD) for file in files}
    cold = float(np.average(list(by_file.values()), weights=[len(file.text.encode()) for file in files]))
    step(f"{CONTEXT} tokens of context or more")
    warm = bits_per_byte(model, files, COLD, COLD - CONTEXT)
    step(f"windows of {LONG}")
    long = bits_per_byte(model, files, LONG, LONG - COLD)
    step("heads")
    head_scores = score_heads(model, files, data)
    over_time = []
    for tokens, checkpoint in checkpoints:
        step(f"heads at {tokens:,} tokens")
        then = read_weights(checkpoint, config, device)
        over_time.append(
            _nearest(log, tokens) | measure_checkpoint(then, files[:: len(files) // SUBSET or 1][:SUBSET], data)
        )
    step("completions")
    lm = LanguageModel(model=model, tokenizer=load_tokenizer(folder), config=config, name=config.name)
    completions = complete(lm)
    step("writing")
    result = {
        "format": 1,
        "name": config.name,
        "finished": seen >= recipe["tokens"],
        "model": {"parameters": sum(p.numel() for p in model.parameters()), **config.to_dict()},
        "data": _describe_data(corpus, asked, data, files),
        "training": {
            "tokens": seen,
            "tokens_asked_for": recipe["tokens"],
            "seconds": over_time[-1]["seconds"],
            **asked["sittings"][-1],
            "threads": ", then ".join(str(sitting["threads"]) for sitting in asked["sittings"]),
            "sittings": asked["sittings"],
            "seed": recipe["seed"],
            "recipe": recipe,
            "loss": [[line["tokens"], line["loss"]] for line in log if line["tokens"] <= seen],
        },
        "bits_per_byte": {
            "cold_256": cold,
            "context_128": warm,
            "windows_512": long,
            **baselines,
            "what": (
                f"negative log2-likelihood of the held-out files over their UTF-8 bytes, in float32. cold_256: windows of "
                f"{COLD} tokens without overlap, each behind <s>. context_128: every token but a file's first {COLD} sees "
                f"{CONTEXT} or more before it. windows_512: {COLD} or more. The 5-gram is given its better discount on these "
                f"same files, in its favour, and its history runs on where the model's windows start anew."
            ),
        },
        "by_file": by_file,
        **head_scores,
        "over_time": over_time,
        "completions": completions,
    }
    result = _rounded(result) | {"model": result["model"]}  # a norm_eps of 1e-5 would round to nothing
    try:
        _write_folder(out, folder, model, bpe, result)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CapacityError(f"{out}: the disk is full; free some space or give another folder") from error
        raise InputError(f"{out} cannot be written: {error.strerror}; give another folder") from error
    bar.close()
    return result


def _write_folder(out: Path, folder: Path, model: Mistral, bpe: BPE, result: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    bos, eos = bpe.token_to_id(BOS), bpe.token_to_id(EOS)
    save_model(model.to("cpu", torch.bfloat16), out, layout="hf", bos_id=bos, eos_id=eos)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    _write(out / "tokenizer.json", (folder / "tokenizer.json").read_text(encoding="utf-8"))
    _write(out / "tokenizer_config.json", json.dumps(names | {"clean_up_tokenization_spaces": False}, indent=1))
    _write(out / "README.md", model_card(result))
    _write(out / "report.json", _dump(result))


# ---- the run's files ----


def _read_run(folder: Path) -> tuple[dict, list[dict], list[tuple[int, Path]]]:
    wanted = [folder / name for name in ("run.json", "log.jsonl", "corpus.json.gz", "tokenizer.json")]
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        raise CheckpointError(f"{folder} holds no training run: {', '.join(missing)} missing; make one with `run`")
    asked = json.loads(wanted[0].read_text())
    log = [json.loads(line) for line in wanted[1].read_text().splitlines()]
    checkpoints = sorted((int(path.stem.split("-")[1]), path) for path in folder.glob("tokens-*.safetensors"))
    if not checkpoints:
        raise CheckpointError(f"{folder} has no checkpoint yet; let the run go on until the first")
    return asked, log, checkpoints


def read_weights(path: Path, config: MistralConfig, device: torch.device | str = "cpu") -> Mistral:
    """A checkpoint of a run, in float32, ready to evaluate."""
    model = Mistral(config)
    weights = load_file(path)
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["embed.weight"]
    model.load_state_dict(weights)
    return model.to(device).eval()


def held_out(corpus: Corpus, bpe: BPE) -> list[File]:
    """A corpus's held-out files, by name."""
    return [read_file(name, text, bpe) for name, text in sorted(corpus.held_out.items())]


def read_file(name: str, text: str, bpe: BPE) -> File:
    encoding = bpe.encode(text)
    starts = [start for start, _ in encoding.offsets[1:]]  # without <s>
    return File(name, text, np.array(encoding.ids[1:]), heads.in_tokens(heads.matches_in_python(text), starts))


def _nearest(log: list[dict], tokens: int) -> dict:
    """Tokens and time of a checkpoint, with the training loss around it: the mean of the 50 steps nearest to it."""
    line = min(log, key=lambda line: abs(line["tokens"] - tokens), default={"seconds": None, "loss": None})
    return {"tokens": tokens, "seconds": line["seconds"], "training_loss": line["loss"]}


# ---- prediction ----


@torch.inference_mode()
def token_losses(model: Mistral, inputs: Tensor, targets: Tensor) -> Tensor:
    """Nats for every target (N, T); 0 where it is -100. Batches as many rows as make ``BATCH_TOKENS``."""
    rows = max(1, BATCH_TOKENS // inputs.shape[1])
    losses = []
    for i in range(0, len(inputs), rows):
        logits = model(inputs[i : i + rows].to(model.device)).float()
        wanted = targets[i : i + rows].to(model.device)
        nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none")
        losses.append(nats.view(wanted.shape).cpu())
    return torch.cat(losses)


def windows(ids: np.ndarray, length: int, stride: int, bos: int = 0) -> tuple[Tensor, Tensor]:
    """A file in windows of ``length`` targets that start every ``stride``, each behind ``bos``; every token scored once.

    After the first, only the last ``stride`` targets of a window count: they see ``length - stride`` tokens or more.

    >>> windows(np.array([5, 6, 7, 8, 9]), length=3, stride=2)[1].tolist()
    [[5, 6, 7], [-100, 8, 9]]
    """
    starts = range(0, max(1, len(ids) - (length - stride)), stride)
    inputs = np.full((len(starts), length), bos)
    targets = np.full((len(starts), length), -100)
    for row, start in enumerate(starts):
        text = ids[start : start + length]
        known = length - stride if start else 0
        inputs[row, 1 : len(text[: length - 1]) + 1] = text[: length - 1]
        targets[row, known : len(text)] = text[known:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def bits_per_byte(model: Mistral, files: list[File], length: int, stride: int) -> float:
    """Total negative log2-likelihood of the files over their UTF-8 bytes."""
    parts = [windows(file.ids, length, stride) for file in files]
    losses = token_losses(model, *(torch.cat(part) for part in zip(*parts, strict=True)))
    n_bytes = sum(len(file.text.encode()) for file in files)
    return losses.double().sum().item() / math.log(2) / n_bytes


def _baselines(folder: Path, corpus: Corpus, data: Data, files: list[File]) -> dict:
    kept = folder / "baselines.json"
    if kept.exists() and (before := json.loads(kept.read_text())).get("corpus") == corpus.sha256:
        return before["bits_per_byte"]
    held_out = "".join(file.text for file in files).encode()
    trained_on = "".join([*corpus.lib.values(), *corpus.tests.values()]).encode()
    kn = KneserNey(np.concatenate((data.lib, data.tests)), len(data.frequencies), data.bos)
    ids = np.concatenate([np.concatenate(([data.bos], file.ids)) for file in files])
    five_gram = {str(d): kn.bits_per_byte(ids, len(held_out), d) for d in DISCOUNTS}
    result = {
        "xz_alone": xz_bits_per_byte(held_out),
        "xz_after_training_text": xz_bits_per_byte(held_out, trained_on),
        "five_gram": min(five_gram.values()),
        "five_gram_by_discount": five_gram,
    }
    _write(kept, json.dumps({"corpus": corpus.sha256, "bits_per_byte": result}, indent=1))
    return result


# ---- heads ----


@torch.inference_mode()
def weights_of_rows(model: Mistral, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Attention weights (L, H, T, T) of each row of ids, float32. Rows may differ in length."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    stacked = heads.weights_of(model, ids.to(model.device))  # (B, L, H, T, T)
    return [stacked[i, :, :, : len(row), : len(row)] for i, row in enumerate(rows)]


MEASURES = {
    "previous_token": "weight on the token before the query; control: on the one before that",
    "sink": "weight on <s> from queries 64 and later; control: on the first token of text",
    "sink_by_novelty": "weight on <s> where the last two tokens are new in the window; control: where they stood before",
    "induction_in_code": "weight on what followed the last two tokens when they last stood together, 6 or more tokens ago, "
    "where it follows again; control: the same distance where nothing stood before",
    "brackets_before": "weight on the own opener from the token before a closing bracket; control: same distance, another closer",
    "brackets_before_others": "the same; control: another opener at about that distance",
    "brackets_before_nested": "the same where a nearer pair is already closed; control: that pair's opener",
    "brackets_at": "weight on the own opener from the closing bracket itself; control: same distance, another closer",
    "brackets_at_nested": "the same where a nearer pair is already closed; control: that pair's opener",
    "quotes_before": "weight on the opening quote from the token before the closing one; control: same distance, another quote",
    "quotes_before_others": "the same; control: another opening quote at about that distance",
    "quotes_at": "weight on the opening quote from the closing one; control: same distance, another quote",
}


def score_window(weights: np.ndarray, ids: np.ndarray, matches: list[Match]) -> dict[str, HeadScores]:
    """Every measure of ``MEASURES`` on one window."""
    brackets = [m for m in matches if m.kind == "bracket"]
    quotes = [m for m in matches if m.kind == "quote"]
    return {
        "previous_token": heads.previous_token(weights),
        "sink": heads.sink(weights),
        "sink_by_novelty": heads.sink_by_novelty(weights, ids),
        "induction_in_code": heads.induction_in_text(weights, ids),
        "brackets_before": heads.matching(weights, brackets),
        "brackets_before_others": heads.matching(weights, brackets, control="others"),
        "brackets_before_nested": heads.matching(weights, brackets, control="nested"),
        "brackets_at": heads.matching(weights, brackets, at_closer=True),
        "brackets_at_nested": heads.matching(weights, brackets, at_closer=True, control="nested"),
        "quotes_before": heads.matching(weights, quotes),
        "quotes_before_others": heads.matching(weights, quotes, control="others"),
        "quotes_at": heads.matching(weights, quotes, at_closer=True),
    }


def score_heads(model: Mistral, files: list[File], data: Data) -> dict:
    """All measures, chosen on half of the files (and random rows) and reported on the rest; losses on repeats."""
    halves: tuple[dict, dict] = ({}, {})
    half_of = halve(files)
    for file in files:
        half = halves[half_of[file.name]]
        cut = [(s, np.concatenate(([data.bos], file.ids[s : s + COLD - 1]))) for s in range(0, len(file.ids), COLD - 1)]
        batch = max(1, BATCH_TOKENS // COLD // 2)
        for j in range(0, len(cut), batch):
            some = cut[j : j + batch]
            for (start, ids), weights in zip(some, weights_of_rows(model, [ids for _, ids in some]), strict=True):
                matches = [
                    Match(m.kind, m.opener - start + 1, m.closer - start + 1)
                    for m in file.matches
                    if start <= m.opener and m.closer < start + len(ids) - 1
                ]
                for name, scores in score_window(weights, ids, matches).items():
                    half.setdefault(name, []).append(scores)
    rows = {kind: random_repeats(data, kind) for kind in ("frequent", "uniform")}
    for kind, repeated in rows.items():
        for i, scores in enumerate(_induction(model, repeated)):
            halves[i % 2].setdefault(f"induction_on_{kind}_repeats", []).append(scores)
    what = MEASURES | {
        f"induction_on_{kind}_repeats": f"weight on the token after the earlier copy, {REPEAT_TOKENS} random tokens drawn "
        f"{drawn}, twice; control: the other tokens of the first copy, on average"
        for kind, drawn in (("frequent", "as often as in the text"), ("uniform", "all alike"))
    }
    scored = {name: {"what": text} | choose_and_report(halves, name) for name, text in what.items()}
    if (chosen := scored["sink"].get("head")) is not None:
        layer, head = map(int, chosen.split("."))
        told = [file.ids for file in files if half_of[file.name] == 1]
        some = [ids[s : s + COLD] for ids in told for s in range(0, len(ids) - CONTEXT, 4 * COLD)]
        parts = [heads.sink(w) for ids in some for w in weights_of_rows(model, [ids])]
        if parts:
            scored["sink"]["without_bos"] = float(HeadScores.pool(parts).score[layer, head])
    return {
        "heads": scored,
        "repeats": {
            "what": "nats per token: on random tokens and on their second copy (but its first, which nothing foretells); "
            f"and on {REPEAT_TOKENS} tokens of held-out code before and after as many others of another place",
            **{kind: copy_losses(model, repeated) for kind, repeated in rows.items()},
            "code": code_copy_losses(model, files, data.bos),
        },
    }


def halve(files: list[File]) -> dict[str, int]:
    """0 or 1 for each file, about as many tokens in both halves: the longest first, each to the half that has less."""
    half_of, sizes = {}, [0, 0]
    for file in sorted(files, key=lambda file: (-len(file.ids), file.name)):
        half = int(sizes[1] < sizes[0])
        half_of[file.name] = half
        sizes[half] += len(file.ids)
    return half_of


def choose_and_report(halves: tuple[dict, dict], name: str) -> dict:
    """The head with the most above its control on the first half, its numbers on the second, and all heads there."""
    parts = [half.get(name, []) for half in halves]
    if any(not sum(p.n for p in part) or not sum(p.n_control for p in part) for part in parts):
        return {"head": None, "n": 0}
    choose, tell = (HeadScores.pool(part) for part in parts)
    return tell.at(choose.best()) | {"by_head": {"score": tell.score.tolist(), "control": tell.control.tolist()}}


def random_repeats(data: Data, kind: str = "frequent", seed: int = 0) -> np.ndarray:
    """Rows of ``<s>``, random tokens, and the same again: (REPEAT_ROWS, 1 + 2 × REPEAT_TOKENS)."""
    rng = np.random.default_rng(seed)
    V = len(data.frequencies)
    once = rng.choice(V, (REPEAT_ROWS, REPEAT_TOKENS), p=data.frequencies if kind == "frequent" else None)
    once[once == data.bos] = V - 1
    return np.concatenate((np.full((REPEAT_ROWS, 1), data.bos), once, once), axis=1)


def _induction(model: Mistral, rows: np.ndarray) -> list[HeadScores]:
    return [heads.induction_on_repeat(w, REPEAT_TOKENS) for w in weights_of_rows(model, list(rows))]


def copy_losses(model: Mistral, rows: np.ndarray) -> dict:
    ids = torch.from_numpy(rows)
    losses = token_losses(model, ids[:, :-1], ids[:, 1:]).double()
    n = REPEAT_TOKENS
    return {"first_copy": losses[:, :n].mean().item(), "second_copy": losses[:, n + 1 :].mean().item()}


def code_copy_losses(model: Mistral, files: list[File], bos: int, n_rows: int = 48, seed: int = 0) -> dict | None:
    """A B A of real code: nats per token on A the first time and the second, but its first token."""
    n = REPEAT_TOKENS
    long = [file.ids for file in files if len(file.ids) > n]
    if not long:
        return None
    rng = np.random.default_rng(seed)

    def snippet() -> np.ndarray:
        ids = long[rng.integers(len(long))]
        start = rng.integers(len(ids) - n)
        return ids[start : start + n]

    rows = []
    for _ in range(n_rows):
        a, b = snippet(), snippet()
        rows.append(np.concatenate(([bos], a, b, a)))
    ids = torch.from_numpy(np.array(rows))
    losses = token_losses(model, ids[:, :-1], ids[:, 1:]).double()
    return {"first_copy": losses[:, 1:n].mean().item(), "second_copy": losses[:, 2 * n + 1 :].mean().item()}


def measure_checkpoint(model: Mistral, files: list[File], data: Data) -> dict:
    """What is followed over the run: bits per byte, the best previous-token and induction heads, losses on repeats."""
    repeated = random_repeats(data)
    crops = [np.concatenate(([data.bos], f.ids[s : s + 199])) for f in files for s in (0, len(f.ids) // 2)]
    halves: tuple[dict, dict] = ({}, {})
    for i, weights in enumerate(weights_of_rows(model, [c for c in crops if len(c) > 3])):
        halves[i // 2 % 2].setdefault("previous_token", []).append(heads.previous_token(weights))
    for i, scores in enumerate(_induction(model, repeated)):
        halves[i % 2].setdefault("induction", []).append(scores)
    found = {name: choose_and_report(halves, name) for name in ("previous_token", "induction")}
    return {
        "bits_per_byte": bits_per_byte(model, files, COLD, COLD),
        **{name: {key: scores[key] for key in ("head", "score") if key in scores} for name, scores in found.items()},
        "by_head": {name: scores.get("by_head", {}).get("score") for name, scores in found.items()},
        **copy_losses(model, repeated),
    }


# ---- completions ----


def complete(lm: LanguageModel) -> dict:
    """What the model writes after ``PROMPTS``, and how often the first line of it is Python."""
    examples = []
    for i, prompt in enumerate(PROMPTS):
        example = {"prompt": prompt}
        for name, temperature in (("greedy", 0.0), ("sampled", 0.7)):
            text = generate(lm, prompt, max_new_tokens=NEW_TOKENS, temperature=temperature, seed=i, raw=True)
            example |= {name: text, f"{name}_parses": first_line_parses(prompt, text)}
        examples.append(example)
    return {
        "what": f"share of {len(PROMPTS)} prompts whose first line, once finished, parses as Python; greedy, and one sample "
        f"at temperature 0.7; {NEW_TOKENS} new tokens",
        "greedy": sum(e["greedy_parses"] for e in examples) / len(examples),
        "sampled": sum(e["sampled_parses"] for e in examples) / len(examples),
        "examples": examples,
    }


def first_line_parses(prompt: str, completion: str) -> bool:
    """Whether the first logical line that ``completion`` finishes is Python, by ``ast.parse``.

    Only finished lines count. Lines are added until the text parses: a bracket or a triple quote may run over several,
    but nothing that follows can mend a wrong line. A line that opens a block gets ``pass`` for a body, a ``try`` its
    ``except``, a decorator a function.
    """
    text = (prompt + completion).lstrip("\n")
    n_prompt = prompt.lstrip("\n").count("\n")  # lines of the prompt that are whole already
    lines = text.split("\n")[:-1]  # the last has no end yet
    return any(_parses(lines[:n]) for n in range(n_prompt + 1, len(lines) + 1))


def _parses(lines: list[str]) -> bool:
    if all(not line.strip() or line.lstrip().startswith("#") for line in lines):
        return False  # a comment is no line of code
    indent = lines[-1][: len(lines[-1]) - len(lines[-1].lstrip())]
    for ending in ([], [f"{indent} pass"], ["except Exception: pass"], [f"{indent}def f(): pass"]):
        try:
            ast.parse(textwrap.dedent("\n".join([*lines, *ending])) + "\n")
        except (SyntaxError, ValueError):
            continue
        return True
    return False


# ---- words and files ----


def share_of_known_lines(corpus: Corpus, min_length: int = 30) -> float:
    """Share of held-out lines of ``min_length`` characters or more (without indentation) that also stand in training."""
    known = {
        line.strip() for part in (corpus.lib, corpus.tests) for text in part.values() for line in text.splitlines()
    }
    lines = [line.strip() for text in corpus.held_out.values() for line in text.splitlines()]
    lines = [line for line in lines if len(line) >= min_length]
    return sum(line in known for line in lines) / max(1, len(lines))


def _describe_data(corpus: Corpus, asked: dict, data: Data, files: list[File]) -> dict:
    def size(part: dict[str, str], tokens: int) -> dict:
        return {"files": len(part), "bytes": sum(len(text.encode()) for text in part.values()), "tokens": tokens}

    recipe = asked["recipe"]
    mixed_in = "Nothing."
    if recipe["repeats_share"]:
        mixed_in = (
            f"{recipe['repeats_share']:.1%} of the training rows are not text: random tokens, drawn as often as they occur in "
            f"the text, repeated until the row is full, with no loss on the first copy. They are there so that "
            f"induction heads form early."
        )
    return {
        "what": (
            f"The standard library of Python {corpus.python} as installed: sources, tests and docstrings, without encodings/ "
            f"and site-packages. Exact duplicates are left out, and the tests of held-out modules. "
            f"{recipe['tests_share']:.0%} of the rows of text are cut from tests, the rest from the library. {len(files)} "
            f"library files are held out whole; their neighbours in the same packages are trained on."
        ),
        "sha256": asked["corpus"],
        "mixed_in": mixed_in,
        "library": size(corpus.lib, len(data.lib)),
        "tests": size(corpus.tests, len(data.tests)),
        "held_out": size(corpus.held_out, sum(len(file.ids) for file in files))
        | {"names": [file.name for file in files]},
        "held_out_lines_seen_in_training": share_of_known_lines(corpus),
    }


def model_card(result: dict) -> str:
    """The README of the model's folder; every number is taken from the report."""
    m, d, t, b, h = (result[key] for key in ("model", "data", "training", "bits_per_byte", "heads"))
    unfinished = ""
    style = ModelShape.from_config(MistralConfig(**{key: m[key] for key in m if key != "parameters"})).kind
    sees = f"a sliding window of {m['window']} tokens" if m["window"] else "attention to all that came before"
    if not result["finished"]:
        unfinished = f"\n**The run was not finished**: {t['tokens']:,} of {t['tokens_asked_for']:,} tokens.\n"
    rows = [
        (f"this model, windows of {COLD} from nothing", b["cold_256"]),
        (f"this model, {CONTEXT} tokens of context or more", b["context_128"]),
        (f"this model, windows of {LONG}", b["windows_512"]),
        ("5-gram, Kneser-Ney, same tokens and training text", b["five_gram"]),
        ("xz -9e after the training text", b["xz_after_training_text"]),
        ("xz -9e alone", b["xz_alone"]),
    ]
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in rows)
    found = "\n".join(
        f"| {name.replace('_', ' ')} | {s['head']} | {s['score']:.2f} | {s['control']:.2f} | {s['n']:,} |"
        for name, s in h.items()
        if s["head"] is not None
    )
    example = next(e for e in result["completions"]["examples"] if e["prompt"] == "\n\ndef")
    shown = textwrap.indent("\n".join((example["prompt"] + example["sampled"]).strip("\n").split("\n")[:6]), "    ")
    minutes = "an unknown time" if t["seconds"] is None else f"{t['seconds'] / 60:.0f} minutes"
    return f"""\
# {result["name"]}

A language model of {m["parameters"] / 1e6:.1f} million parameters with the architecture of Mistral 7B: {style} attention
({m["n_heads"]} query heads on {m["n_kv_heads"]} key/value heads), rotary positions, {sees}, SwiGLU;
{m["n_layers"]} layers, d_model {m["d_model"]}, vocabulary {m["vocab_size"]:,}. It is small enough for any machine and real enough
to look into. It knows the shape of Python, not the meaning: what it writes is not advice.
{unfinished}
## Data

{d["what"]}
Mixed in: {d["mixed_in"]}
Training text: {d["library"]["bytes"] + d["tests"]["bytes"]:,} bytes in {d["library"]["files"] + d["tests"]["files"]:,} files.
Hash of all of it: `{d["sha256"]}`. The text is under the Python Software Foundation License.

## Training

The weights are the mean of those at {" and ".join(f"{share:.1%}" for share in t["recipe"]["mean_of"])} of the run.
{t["tokens"]:,} tokens in {minutes} on {t["machine"]} ({t["device"]}, {t["threads"]} threads), seed {t["seed"]}, {t["date"]},
torch {t["torch"]}. Made by `python -m attnlab.training`; the recipe is in `report.json`.

## Bits per byte on {d["held_out"]["files"]} held-out files ({d["held_out"]["bytes"]:,} bytes)

| | bits per byte |
|---|---|
{table}

{d["held_out_lines_seen_in_training"]:.1%} of the held-out lines of 30 characters or more also stand somewhere in the training text.

## Heads

Layer.head, counted from 0; chosen on one half of the text, measured on the other. `report.json` says what each control is.

| | head | weight | control | n |
|---|---|---|---|---|
{found}

## Completions

The first line parses as Python for {result["completions"]["greedy"]:.0%} of {len(PROMPTS)} prompts (greedy) and
{result["completions"]["sampled"]:.0%} (temperature 0.7). After an empty line and `def`, at 0.7:

{shown}
"""


def _rounded(x):
    if isinstance(x, float):
        return round(x, 4)
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, list | tuple) else x


def _dump(result: dict) -> str:
    """JSON with one line for each entry two levels down: short, and a diff still shows what changed."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        elif isinstance(value, list):
            inner = ",\n".join(f"  {json.dumps(v)}" for v in value)
            lines.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
