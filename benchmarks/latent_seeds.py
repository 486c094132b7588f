"""A latent against shared keys and values, at as many cached numbers: chapter 15's small experiment, seed by seed.

Chapter 6's task (``tasks.learn_to_fetch``): every token needs four values from four tables at once, read by 8 query heads of 8
numbers. A token's cache holds 2 · n_kv_heads · 8 numbers, or a latent of as many from which every head makes keys and values
of its own. In the middle of the range also at a gentler learning rate with more steps, in case one of them only trains worse.

    python benchmarks/latent_seeds.py            about ten minutes; writes results/latent_seeds-<machine>.json
    python benchmarks/latent_seeds.py --quick    seconds, a few steps of one seed; writes nothing
"""

import torch
from common import keep, options, script, seed_by_seed, spread

from attnlab.tasks import learn_to_fetch

SETTING = {"n_wanted": 4, "n_keys": 16, "n_values": 8, "d_model": 64, "n_tables": 4, "n_heads": 8, "head_dim": 8}
CACHED = (128, 64, 32, 16)  # numbers a token: 8, 4, 2 and 1 K/V heads of 8, or one latent
RATES = {"usual": ({"lr": 0.01, "steps": 1000}, CACHED), "gentle": ({"lr": 0.003, "steps": 2000}, (64, 32))}


def runs() -> list[dict]:
    """What is trained, for every seed."""
    return [
        {"rate": rate, "cached": cached, "kept": kept} | how
        for rate, (how, sizes) in RATES.items()
        for kept in ("K/V heads", "latent")
        for cached in sizes
    ]


def train(job: tuple[dict, int]) -> tuple[float, int]:
    """Accuracy over all wanted things, and parameters of the attention layer."""
    asked, seed = job
    torch.set_num_threads(1)
    kept = {"d_latent": asked["cached"]} if asked["kept"] == "latent" else {"n_kv_heads": asked["cached"] // 16}
    fetched = learn_to_fetch(**SETTING, **kept, lr=asked["lr"], steps=asked["steps"], seed=seed)
    return float(fetched.accuracy.mean()), sum(p.numel() for p in fetched.layer.parameters())


def measure(asked: list[dict], seeds: int) -> list[dict]:
    """A row for each of ``asked``: accuracy and its spread over the seeds."""
    rows = []
    for one, results in seed_by_seed(train, asked, seeds):
        accuracies, parameters = zip(*results, strict=True)
        rows.append(one | {"attention_parameters": parameters[0], "accuracy": spread(list(accuracies))})
        show(rows[-1])
    return rows


def show(row: dict) -> None:
    a = row["accuracy"]
    print(
        f"{row['rate']}: {row['cached']:3} numbers a token in {row['kept']}, {row['attention_parameters']:,} parameters: "
        f"accuracy {a['median']:.2f} ({a['min']:.2f} to {a['max']:.2f})",
        flush=True,
    )


def main() -> int:
    args = options(__doc__, "a few steps of one seed", seeds=5)
    if args.quick:
        measure([one | {"steps": 3} for one in (runs()[0], runs()[4])], seeds=1)
        print("too few steps to mean anything; nothing was recorded")
        return 0
    keep("latent_seeds", args, {"setting": SETTING | {"batch": 16}, "rows": measure(runs(), args.seeds)})
    return 0


if __name__ == "__main__":
    script(main)
