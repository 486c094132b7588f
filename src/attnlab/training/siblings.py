"""Siblings: companions trained alike but for ``n_kv_heads``, so that their styles of attention can be compared.

The same corpus, tokenizer, width, steps and batches in the same order, and full attention, so that no window hides the
difference. One more is multi-query with its feed-forward widened until it has multi-head's parameters again, as in
Shazeer 2019 (arXiv 1911.02150), section 4.1.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from attnlab.memory import kv_bytes_per_token
from attnlab.mistral import MistralConfig
from attnlab.training.report import report
from attnlab.training.run import COMPANION, Recipe, prepare, share, train

SIBLINGS = {
    name: COMPANION.replace(window=None, n_kv_heads=n_kv_heads, d_ff=d_ff, name=name)
    for name, n_kv_heads, d_ff in (
        ("multi-head", 8, COMPANION.d_ff),
        ("grouped-query", 2, COMPANION.d_ff),
        ("multi-query", 1, COMPANION.d_ff),
        ("multi-query-wide", 1, 853),  # 256 parameters short of multi-head's in a layer, the nearest there is
    )
}
SHIPPED = ("multi-head", "grouped-query", "multi-query")  # of seed 0; of the others only the report
RECIPE = Recipe(
    tokens=12_000_000,
    phases=((0.3, 128, 16), (0.55, 128, 32), (1.0, 256, 16)),
    rates=((0.0, 1.0), (1.0, 0.01)),
    checkpoints=(1_000_000, 2_000_000, 4_000_000, 8_000_000),
    mean_of=(1.0,),
)


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Where in ``folder`` one sibling's run lives."""
    return folder / f"{name}-{seed}"


def train_siblings(
    folder: Path,
    seed: int = 0,
    names: Iterable[str] = tuple(SIBLINGS),
    configs: dict[str, MistralConfig] = SIBLINGS,
    recipe: Recipe = RECIPE,
    device: str = "cpu",
    progress: bool = True,
) -> None:
    """Train the named siblings with one seed, each in its own folder in ``folder``; what is done already stays.

    Corpus and tokenizer are made once, in ``folder``, and copied. Raises CheckpointError as ``train`` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, next(iter(configs.values())).vocab_size)
    for name in names:
        run = run_folder(folder, name, seed)
        share(folder, run)
        train(run, configs[name], replace(recipe, seed=seed), device, progress=progress)


def publish(folder: Path, out: Path, device: str = "cpu", progress: bool = True) -> list[dict]:
    """Report on every finished run in ``folder``; write ``out/NAME`` for those that ship, and ``out/siblings.json`` on all.

    A run's report is kept in its folder, and made again only when its weights are newer.
    """
    rows = []
    for run in sorted(path.parent for path in folder.glob("*/model.safetensors")):
        kept = run / "report" / "report.json"
        if not kept.exists() or kept.stat().st_mtime < (run / "model.safetensors").stat().st_mtime:
            baselines = folder / "baselines.json"
            if baselines.exists():
                shutil.copyfile(baselines, run / baselines.name)
            report(run, run / "report", device, progress)
            shutil.copyfile(run / baselines.name, baselines)
        rows.append(summary(json.loads(kept.read_text(encoding="utf-8"))))
        if rows[-1]["seed"] == 0 and rows[-1]["name"] in SHIPPED:
            shutil.copytree(run / "report", out / rows[-1]["name"], dirs_exist_ok=True)
    rows.sort(key=lambda row: (row["seed"], -row["n_kv_heads"], row["d_ff"]))
    out.mkdir(parents=True, exist_ok=True)
    beside = out / "siblings.json.tmp"
    beside.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    os.replace(beside, out / "siblings.json")
    return rows


def summary(result: dict) -> dict:
    """What of a run's report is compared; cache bytes per token are those of float16."""
    bits, model, training = result["bits_per_byte"], result["model"], result["training"]
    config = MistralConfig(**{key: value for key, value in model.items() if key != "parameters"})
    measures = ("previous_token", "induction_on_frequent_repeats", "induction_in_code", "brackets_before_nested")
    return {
        "name": result["name"],
        "seed": training["seed"],
        "n_kv_heads": config.n_kv_heads,
        "d_ff": config.d_ff,
        "parameters": model["parameters"],
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "tokens": training["tokens"],
        "seconds": training["seconds"],
        "machine": training["machine"],
        "bits_per_byte": {name: bits[name] for name in ("cold_256", "context_128", "windows_512")},
        "by_file": result["by_file"],
        "heads": {
            name: {key: result["heads"][name].get(key) for key in ("head", "score", "control", "n")}
            for name in measures
        },
        "second_copy": {kind: result["repeats"][kind]["second_copy"] for kind in ("frequent", "uniform")},
        "loss": training["loss"],
    }
