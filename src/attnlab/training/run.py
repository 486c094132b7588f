"""The training run: a small Mistral, Muon for its matrices, AdamW for the rest; resumable to the step."""

import json
import math
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm

from attnlab.errors import CheckpointError
from attnlab.measure import processor_name
from attnlab.mistral import Mistral, MistralConfig
from attnlab.training.corpus import Corpus, encode_files, train_tokenizer

COMPANION = MistralConfig(
    vocab_size=4096, d_model=256, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=32, d_ff=704,
    window=256, rope_theta=1e4, tie_embeddings=True, name="companion",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run besides the corpus and the model. Shares are of rows, ``until`` of all tokens."""

    tokens: int = 41_000_000
    seed: int = 0
    tests_share: float = 0.45  # rows cut from the tests; the others from the library
    repeats_share: float = 0.02  # rows of random tokens repeated: what induction needs and code has little of
    # (until, context, rows): short contexts first, which learn more a second; for a while longer than the window
    phases: tuple[tuple[float, int, int], ...] = (
        (5.72 / 41, 128, 16), (10.4 / 41, 128, 32), (31.02 / 41, 256, 16), (33 / 41, 512, 8), (1.0, 256, 16)
    )  # fmt: skip
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup_steps: int = 50
    # (share of all tokens, share of the first rate): straight lines between these points; down, and twice up and down again
    rates: tuple[tuple[float, float], ...] = (
        (0.0, 1.0), (17 / 41, 0.3527), (33 / 41, 0.01), (33.4 / 41, 0.15), (38 / 41, 0.005), (38.3 / 41, 0.15), (1.0, 0.005)
    )  # fmt: skip
    clip: float = 1.0
    checkpoints: tuple[int, ...] = (  # tokens seen, close together where induction appears
        250_000, 500_000, 1_000_000, 1_500_000, 2_000_000, 3_000_000, 4_000_000, 6_000_000, 10_000_000, 16_000_000,
    )  # fmt: skip
    # The model is the mean of the weights at these shares of the tokens, where the rate has come down (arXiv 1803.05407)
    mean_of: tuple[float, ...] = (33 / 41, 38 / 41, 1.0)

    @property
    def marks(self) -> tuple[int, ...]:
        """Tokens seen at which weights are kept."""
        return (*self.checkpoints, *(round(share * self.tokens) for share in self.mean_of))


class Data:
    """Batches as a function of the step alone, so that a resumed run sees what it would have seen."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.recipe = recipe
        self.bos = tokenizer.token_to_id("<s>")
        self.lib = encode_files(tokenizer, corpus.lib)
        self.tests = encode_files(tokenizer, corpus.tests)
        counts = np.bincount(np.concatenate((self.lib, self.tests)), minlength=tokenizer.get_vocab_size())
        counts[self.bos] = 0
        self.frequencies = counts / counts.sum()

    def batch(self, step: int, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (rows, context); every row starts with ``<s>``. A target of -100 is not scored."""
        rng = np.random.default_rng((self.recipe.seed, step))
        inputs = np.empty((rows, context), dtype=np.int64)
        targets = np.empty((rows, context), dtype=np.int64)
        for row in range(rows):
            if rng.random() < self.recipe.repeats_share:
                n = int(rng.integers(8, context // 3 + 1))
                once = rng.choice(len(self.frequencies), n, p=self.frequencies)
                text = np.resize(once, context)
                targets[row], targets[row, :n] = text, -100  # the first copy cannot be known
            else:
                stream = self.tests if rng.random() < self.recipe.tests_share else self.lib
                start = int(rng.integers(0, len(stream) - context))
                text = stream[start : start + context].astype(np.int64)
                targets[row] = np.where(text == self.bos, -100, text)
            inputs[row, 0], inputs[row, 1:] = self.bos, text[:-1]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def initialise(model: Mistral, seed: int) -> None:
    """Embedding N(0, 0.02); matrices N(0, 0.5/√d); those that write to the residual stream smaller by √(2L)."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue
        std = 0.02 if "embed" in name else 0.5 / math.sqrt(config.d_model)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.n_layers)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def optimizers(model: Mistral, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (matrices of the blocks) and AdamW (embedding and norms)."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.") or p.dim() == 1]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.muon_lr, momentum=0.95, nesterov=True, weight_decay=0.01, adjust_lr_fn="original"
        ),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(recipe: Recipe) -> list[tuple[int, int, int]]:
    """(tokens before the step, context, rows) for every step of the run."""
    steps, seen = [], 0
    for until, context, rows in recipe.phases:
        while seen < until * recipe.tokens:
            steps.append((seen, context, rows))
            seen += context * rows
    return steps


def train(
    folder: Path,
    config: MistralConfig = COMPANION,
    recipe: Recipe | None = None,
    device: str = "cpu",
    save_every: float = 60.0,
    progress: bool = True,
    start: dict[str, Tensor] | None = None,
) -> Mistral:
    """Train in ``folder``, or go on where an earlier call was cut off.

    Leaves there ``corpus.json.gz`` (made from the standard library unless it is there), ``tokenizer.json``, ``run.json``
    (what was asked for; machine and versions of every sitting), ``log.jsonl`` (loss over time),
    ``tokens-N.safetensors`` (bfloat16 weights along the way and at the end), ``model.safetensors`` (the mean of some, which
    is the model) and ``state.pt`` (to resume from). Every file is written beside its place and renamed. ``start``: weights to
    begin from, instead of random ones.

    Raises CheckpointError if the folder holds a run with other settings, or ``start`` is of another model.
    """
    recipe = recipe or Recipe()
    folder.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer = prepare(folder, config.vocab_size)
    asked = {"config": config.to_dict(), "recipe": asdict(recipe), "corpus": corpus.sha256}
    asked = json.loads(json.dumps(asked))
    run_file, sittings = folder / "run.json", []
    if run_file.exists():
        before = json.loads(run_file.read_text())
        if any(before[key] != asked[key] for key in asked):
            raise CheckpointError(f"{folder} holds a run with other settings or another corpus; give a new folder")
        sittings = before["sittings"]
    sitting = {
        "machine": machine_name(device), "threads": torch.get_num_threads(), "device": device,
        "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if sitting not in sittings[-1:]:
        _write(run_file, json.dumps(asked | {"sittings": [*sittings, sitting]}, indent=1))

    data = Data(corpus, tokenizer, recipe)
    torch.manual_seed(recipe.seed)
    model = Mistral(config)
    initialise(model, recipe.seed)
    if start is not None:
        missing, unknown = model.load_state_dict(start, strict=False)
        if unknown or set(missing) - {"lm_head.weight"}:  # tied, it is the embedding
            raise CheckpointError(
                f"the weights to start from are of another model: {[*missing, *unknown][:3]} don't match"
            )
    model.to(device)
    both = optimizers(model, recipe)
    first_lrs = [optimizer.param_groups[0]["lr"] for optimizer in both]
    steps = schedule(recipe)
    step, seconds, losses = 0, 0.0, []
    state_file, log_file = folder / "state.pt", folder / "log.jsonl"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        lines = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] <= step]
        _write(log_file, "".join(f"{line}\n" for line in lines))
    else:
        log_file.unlink(missing_ok=True)  # of a run that was cut off before it saved anything

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in both]}
        torch.save(state | {"step": step, "seconds": seconds}, folder / "state.tmp")
        os.replace(folder / "state.tmp", state_file)

    bar = tqdm(total=recipe.tokens, initial=steps[step][0] if step < len(steps) else recipe.tokens, unit="tok",
               unit_scale=True, disable=not progress)  # fmt: skip
    last_save = time.monotonic()
    with log_file.open("a") as log:
        while step < len(steps):
            start = time.monotonic()
            seen, context, rows = steps[step]
            factor = min(1.0, (step + 1) / recipe.warmup_steps)
            factor *= float(np.interp(seen / recipe.tokens, *zip(*recipe.rates, strict=True)))
            for optimizer, lr in zip(both, first_lrs, strict=True):
                optimizer.param_groups[0]["lr"] = lr * factor
            inputs, targets = (t.to(device) for t in data.batch(step, rows, context))
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                logits = model(inputs)  # (rows, context, vocab)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seen, step = seen + rows * context, step + 1
            seconds += time.monotonic() - start
            bar.update(rows * context)
            if step % 50 == 0 or step == len(steps):
                mean = sum(losses) / len(losses)
                line = {
                    "step": step,
                    "tokens": seen,
                    "seconds": round(seconds, 1),
                    "loss": round(mean, 4),
                    "context": context,
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{mean:.3f}")
                losses.clear()
            passed = [mark for mark in recipe.marks if seen - rows * context < mark <= seen]
            if passed or step == len(steps):
                save_weights(model, folder / f"tokens-{seen:010d}.safetensors")
            if step == len(steps) or time.monotonic() - last_save > save_every:
                save()
                last_save = time.monotonic()
    bar.close()
    take_mean(model, folder, recipe)
    save_weights(model, folder / "model.safetensors")
    return model


def take_mean(model: Mistral, folder: Path, recipe: Recipe) -> None:
    """Give ``model`` the mean of the weights kept at ``recipe.mean_of``."""
    kept = {int(path.stem.removeprefix("tokens-")): path for path in folder.glob("tokens-*.safetensors")}
    ends = [min(seen for seen in kept if seen >= round(share * recipe.tokens)) for share in recipe.mean_of]
    states = [load_file(kept[seen]) for seen in ends]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    model.load_state_dict(mean, strict=False)  # a tied output matrix is not in the files


def prepare(folder: Path, vocab_size: int) -> tuple[Corpus, Tokenizer]:
    """The run's corpus and tokenizer, made on first use."""
    corpus_file, tokenizer_file = folder / "corpus.json.gz", folder / "tokenizer.json"
    if not corpus_file.exists():
        temporary = folder / "corpus.tmp"
        Corpus.from_standard_library().save(temporary)
        os.replace(temporary, corpus_file)
    corpus = Corpus.load(corpus_file)
    if not tokenizer_file.exists():
        _write(tokenizer_file, train_tokenizer(corpus, vocab_size).to_str(pretty=False))
    return corpus, Tokenizer.from_file(str(tokenizer_file))


def share(source: Path, folder: Path) -> None:
    """Give the run in ``folder`` the corpus and tokenizer of ``source``, unless it has its own."""
    folder.mkdir(exist_ok=True)
    for name in ("corpus.json.gz", "tokenizer.json"):
        if not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def save_weights(model: Mistral, path: Path) -> None:
    """bfloat16, under the model's own names; a tied output matrix is not written twice."""
    tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def machine_name(device: str = "cpu") -> str:
    """What ran it: the GPU's name, or the processor's and how many cores torch was given."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {os.cpu_count()} cores"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
