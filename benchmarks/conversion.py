"""The multi-head sibling converted to fewer K/V heads: what it loses at once, and what a short uptraining brings back.

Every pooling of ``attnlab.convert`` to 4, 2 and 1 K/V heads, means also of aligned heads; each trained on for 5 % of the
sibling's tokens with its own recipe, at a rate that starts lower, on batches it hasn't seen in that order. Beside them the
control: the model as it was, trained on alike. Held-out bits per byte, as in the siblings' reports.

    python benchmarks/conversion.py            about half an hour; writes results/conversion-<machine>.json
    python benchmarks/conversion.py --quick    seconds, tiny models on a tiny corpus; writes nothing

What is done stays in _build/conversion, so a run that was cut off goes on.
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from common import HERE, keep, options, script
from tokenizers import Tokenizer

import attnlab
from attnlab import companion
from attnlab.convert import align_heads, to_grouped
from attnlab.errors import CheckpointError
from attnlab.mistral import Mistral
from attnlab.training.corpus import Corpus
from attnlab.training.report import COLD, bits_per_byte, held_out, read_weights
from attnlab.training.run import Recipe, initialise, prepare, share, train
from attnlab.training.siblings import RECIPE, SIBLINGS

MODEL = "multi-head"
SHARE, EARLY = 0.05, 0.01  # of the sibling's tokens: at the end, and once on the way
RATE = 0.3  # of the first training's first rate
UPTRAINING = replace(
    RECIPE, tokens=round(SHARE * RECIPE.tokens), seed=1, phases=((1.0, 256, 16),), rates=((0.0, RATE), (1.0, 0.01)),
    warmup_steps=20, checkpoints=(round(EARLY * RECIPE.tokens),),
)  # fmt: skip
POOLINGS = ("mean", "first", "random", "aligned mean")


def runs(n_kv_heads: int) -> list[tuple[int, str]]:
    """(K/V heads, pooling) of every run; the last one is the control."""
    fewer = [n for n in range(n_kv_heads - 1, 0, -1) if n_kv_heads % n == 0]
    return [(n, pooling) for n in fewer for pooling in POOLINGS] + [(n_kv_heads, "none")]


def converted(model: Mistral, n_kv_heads: int, pooling: str) -> Mistral:
    if pooling == "none":
        return model
    if pooling == "aligned mean":
        return to_grouped(align_heads(model, n_kv_heads), n_kv_heads, "mean")
    return to_grouped(model, n_kv_heads, pooling)


def measure(model: Mistral, n_kv_heads: int, pooling: str, files: list, base: Path, recipe: Recipe) -> dict:
    """One run: bits per byte before, early and after. ``base`` has corpus and tokenizer; the run gets a folder in it."""
    folder = base / f"{n_kv_heads}-{pooling.replace(' ', '-')}"
    done = folder / "row.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    share(base, folder)
    start = converted(model, n_kv_heads, pooling)
    before = bits_per_byte(start, files, COLD, COLD)
    trained = train(folder, start.config, recipe, progress=False, start=start.state_dict()).eval()
    early = read_weights(min(folder.glob("tokens-*.safetensors")), start.config)
    row = {
        "n_kv_heads": n_kv_heads,
        "pooling": pooling,
        "before": round(before, 4),
        "early": round(bits_per_byte(early, files, COLD, COLD), 4),
        "after": round(bits_per_byte(trained, files, COLD, COLD), 4),
    }
    for file in folder.iterdir():
        file.unlink()  # the run is over, and takes 50 MB
    done.write_text(json.dumps(row), encoding="utf-8")
    return row


def held_out_files(base: Path) -> list:
    return held_out(Corpus.load(base / "corpus.json.gz"), Tokenizer.from_file(str(base / "tokenizer.json")))


def prepared(base: Path) -> None:
    """The corpus that the sibling was trained on, and its tokenizer. Raises CheckpointError where Python's library differs."""
    corpus = base / "corpus.json.gz"
    base.mkdir(parents=True, exist_ok=True)
    if not corpus.exists():
        Corpus.from_standard_library().save(corpus)
    if Corpus.load(corpus).sha256 != companion.report(MODEL)["data"]["sha256"]:
        raise CheckpointError(
            f"the standard library of this Python is not what {MODEL} was trained on, so that its held-out files may have "
            f"been seen; run with Python {companion.report(MODEL)['training']['python']}, or put that run's {corpus.name} "
            f"into {base}"
        )
    shutil.copyfile(companion.folder(MODEL) / "tokenizer.json", base / "tokenizer.json")


def show(row: dict) -> None:
    print(
        f"{row['n_kv_heads']:2} K/V heads, {row['pooling']:12}: {row['before']:.3f} bits per byte at once, "
        f"{row['early']:.3f} early, {row['after']:.3f} after",
        flush=True,
    )


def quick() -> None:
    """Every step at toy size."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        text = "def add(a, b):\n    return a + b\n" * 40
        Corpus(lib={"a.py": text}, tests={"b.py": text}, held_out={"c.py": text[:300]}, python="3").save(
            base / "corpus.json.gz"
        )
        prepare(base, 300)
        config = SIBLINGS[MODEL].replace(
            vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16
        )
        model = Mistral(config)
        initialise(model, 0)
        recipe = replace(UPTRAINING, tokens=128, phases=((1.0, 32, 2),), checkpoints=(64,))
        for asked in runs(config.n_kv_heads):
            show(measure(model, *asked, held_out_files(base), base, recipe))


def main() -> int:
    args = options(__doc__, "tiny models on a tiny corpus")
    if args.quick:
        quick()
        print("toy size, so the numbers mean nothing; nothing was recorded")
        return 0
    base = HERE.parent / "_build" / "conversion"
    prepared(base)
    model = attnlab.load(MODEL, device="cpu", dtype="float32").model
    files, rows = held_out_files(base), []
    for asked in runs(model.config.n_kv_heads):
        rows.append(measure(model, *asked, files, base, UPTRAINING))
        show(rows[-1])
    setting = {
        "model": MODEL, "tokens_first": RECIPE.tokens, "tokens": UPTRAINING.tokens, "early_tokens": UPTRAINING.checkpoints[0],
        "first_rate": RATE, "seed": UPTRAINING.seed, "held_out_files": len(files),
        "held_out_bytes": sum(len(file.text.encode()) for file in files),
    }  # fmt: skip
    keep("conversion", args, {"setting": setting, "rows": rows})
    return 0


if __name__ == "__main__":
    script(main)
