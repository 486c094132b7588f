"""What sharing keys and values costs, and where it costs nothing: chapter 6's small experiment, seed by seed.

Every token needs four values from four places at once (``tasks.learn_to_fetch``), read by 8 query heads of 8 numbers. Swept:
n_kv_heads, where all four are looked up in one table and where each has a table of its own; the learning rate and the number
of steps, in case sharing is only slower; parameters made equal again by more query heads or by wider heads (the task has no
feed-forward layer to widen); and the width of a single shared K/V head.

    python benchmarks/sharing_seeds.py            about ten minutes; writes results/sharing_seeds-<machine>.json
    python benchmarks/sharing_seeds.py --quick    seconds, a few steps of one seed; writes nothing
"""

import torch
from common import keep, options, script, seed_by_seed, spread

from attnlab.tasks import learn_to_fetch

SETTING = {"n_wanted": 4, "n_keys": 16, "n_values": 8, "d_model": 64}
SHARED = (8, 4, 2, 1)
USUAL = {"n_tables": 4, "n_heads": 8, "head_dim": 8, "lr": 0.01, "steps": 1000}
LONG = 3000
RATES = (0.005, 0.02)
GENTLE = {"lr": 0.003, "steps": 2000}  # what one wide K/V head turned out to need
MORE_HEADS = {8: 8, 4: 12, 2: 14, 1: 15}  # n_kv_heads: n_heads, so that n_heads + n_kv_heads and with it W_Q … W_O stay
WIDER_HEADS = {
    8: 8,
    4: 11,
    2: 13,
    1: 14,
}  # n_kv_heads: head_dim, so that (n_heads + n_kv_heads) · head_dim nearly stays
WIDTHS = (16, 32, 64)  # of one K/V head; 64 is as much as 8 heads of 8


def runs() -> list[dict]:
    """What is trained, for every seed: by ``about``, what is asked of it."""

    def shared(about: str, **how) -> list[dict]:
        return [USUAL | {"about": about, "n_kv_heads": n} | how for n in SHARED]

    asked = shared("four tables") + shared("one table", n_tables=1)
    asked += [one | {"n_heads": MORE_HEADS[one["n_kv_heads"]]} for one in shared("more query heads")]
    asked += [one | {"head_dim": WIDER_HEADS[one["n_kv_heads"]]} for one in shared("wider heads")]
    asked += [USUAL | {"about": "width", "n_kv_heads": 1, "head_dim": D} for D in WIDTHS]
    for lr in RATES:
        asked += shared("rate", lr=lr)
    asked += shared("longer", steps=LONG)
    asked += shared("gentle", **GENTLE)
    return asked + [USUAL | GENTLE | {"about": "width, gentle", "n_kv_heads": 1, "head_dim": D} for D in WIDTHS]


def train(job: tuple[dict, int]) -> tuple[list[float], int, int]:
    """Accuracy for each of the wanted things, and parameters, all and those of the attention layer."""
    asked, seed = job
    torch.set_num_threads(1)
    fetched = learn_to_fetch(**SETTING, **{k: v for k, v in asked.items() if k != "about"}, seed=seed)
    attention = sum(p.numel() for p in fetched.layer.parameters())
    return [round(float(a), 3) for a in fetched.accuracy], fetched.n_parameters, attention


def measure(asked: list[dict], seeds: int) -> list[dict]:
    """A row for each of ``asked``: the accuracy over all wanted things, its spread over the seeds, and by wanted thing."""
    rows = []
    for one, results in seed_by_seed(train, asked, seeds):
        by_wanted, parameters, attention = zip(*results, strict=True)
        accuracies = [sum(each) / len(each) for each in by_wanted]
        rows.append(
            one
            | {"parameters": parameters[0], "attention_parameters": attention[0]}
            | {"by_wanted": list(by_wanted), "accuracy": spread(accuracies)}
        )
        show(rows[-1])
    return rows


def show(row: dict) -> None:
    a = row["accuracy"]
    print(
        f"{row['about']}: {row['n_heads']:2} heads of {row['head_dim']:2} on {row['n_kv_heads']}, rate {row['lr']}, "
        f"{row['steps']} steps, {row['parameters']:,} parameters: accuracy {a['median']:.2f} ({a['min']:.2f} to {a['max']:.2f})",
        flush=True,
    )


def main() -> int:
    args = options(__doc__, "a few steps of one seed", seeds=5)
    if args.quick:
        measure([one | {"steps": 3} for one in (runs()[0], runs()[7], runs()[-1])], seeds=1)
        print("too few steps to mean anything; nothing was recorded")
        return 0
    setting = SETTING | {"batch": 16, "optimizer": "Adam"}
    keep("sharing_seeds", args, {"setting": setting, "rows": measure(runs(), args.seeds)})
    return 0


if __name__ == "__main__":
    script(main)
