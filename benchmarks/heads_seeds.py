"""One wide head against many narrow ones at equal parameters and steps: chapter 3's small experiment, seed by seed.

A token needs several things from as many places at once (``tasks.learn_to_fetch``), and a layer with d_model 64 has 1, 2, 4 …
64 heads. Swept: how many things are wanted; the learning rate, in case one of them favours a number of heads; three times
the steps; and head_dim apart from n_heads, where parameters are no longer equal, to see which of the two it is.

    python benchmarks/heads_seeds.py            about half an hour; writes results/heads_seeds-<machine>.json
    python benchmarks/heads_seeds.py --quick    seconds, a few steps of one seed; writes nothing
"""

from common import keep, options, script, spread

from attnlab.tasks import learn_to_fetch

HEADS = (1, 2, 4, 8, 16, 32, 64)
WANTED = (1, 2, 4)
RATES = (0.005, 0.01, 0.02)  # the middle one wherever the rate isn't swept
STEPS = 600
GRID = {"n_heads": (1, 4, 8, 32), "head_dim": (1, 2, 4, 8, 16)}


def runs() -> list[dict]:
    """What is trained, for every seed."""
    plain = {"n_wanted": 4, "lr": RATES[1], "steps": STEPS, "head_dim": None}
    asked = [plain | {"n_heads": h, "n_wanted": m} for m in WANTED for h in HEADS]
    asked += [plain | {"n_heads": h, "lr": lr} for lr in RATES if lr != RATES[1] for h in HEADS]
    asked += [plain | {"n_heads": h, "steps": 3 * STEPS} for h in HEADS]
    return asked + [plain | {"n_heads": h, "head_dim": D} for h in GRID["n_heads"] for D in GRID["head_dim"]]


def measure(asked: dict, seeds: int, steps: int | None = None) -> dict:
    """Accuracy of every seed, over all wanted things, and its spread, and by wanted thing."""
    results = [learn_to_fetch(**asked | {"steps": steps or asked["steps"]}, seed=seed) for seed in range(seeds)]
    accuracies = [float(result.accuracy.mean()) for result in results]
    return asked | {
        "head_dim": results[0].layer.head_dim,
        "equal_parameters": asked["head_dim"] is None,
        "parameters": results[0].n_parameters,
        "by_wanted": [[round(float(a), 3) for a in result.accuracy] for result in results],
        "accuracy": spread(accuracies),
    }


def show(row: dict) -> None:
    a = row["accuracy"]
    print(
        f"{row['n_wanted']} wanted, {row['n_heads']:2} heads of {row['head_dim']:2}, rate {row['lr']}, {row['steps']} steps, "
        f"{row['parameters']:,} parameters: accuracy {a['median']:.2f} ({a['min']:.2f} to {a['max']:.2f})",
        flush=True,
    )


def main() -> int:
    args = options(__doc__, "a few steps of one seed", seeds=5)
    if args.quick:
        for asked in (runs()[0], runs()[-1]):
            show(measure(asked, seeds=1, steps=3))
        print("too few steps to mean anything; nothing was recorded")
        return 0
    rows = []
    for asked in runs():
        rows.append(measure(asked, args.seeds))
        show(rows[-1])
    setting = {"d_model": 64, "n_keys": 32, "n_values": 16, "batch": 16, "optimizer": "Adam"}
    keep("heads_seeds", args, {"setting": setting, "rows": rows})
    return 0


if __name__ == "__main__":
    script(main)
