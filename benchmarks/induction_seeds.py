"""Two attention layers learn to repeat, one doesn't: how sure is that? Chapter 4's small experiment, seed by seed.

For every seed: one layer and two layers of four heads, and two layers of one head, trained on periods that vary; what is
left of the ability when heads are ablated one after another, best score first, and when the second layer's keys, queries or
values read the embedding alone. And the same two depths trained on a single period, then tested on others.

    python benchmarks/induction_seeds.py            about four minutes; writes results/induction_seeds-<machine>.json
    python benchmarks/induction_seeds.py --quick    seconds, a few steps of one seed; writes nothing
"""

import numpy as np
import torch
from common import keep, options, script

from attnlab import heads
from attnlab.tasks import Repeating, learn_to_repeat, reading_the_embedding, repeats, second_copy

VARIED, FIXED = (8, 24), (16, 16)
OTHER_PERIODS = (12, 20)


def trained(run: Repeating) -> dict:
    """Accuracy at the end and the best heads' scores, by layer; and the steps at which half of each was there."""

    def half(curve: np.ndarray) -> int:
        return run.steps[int(np.argmax(curve >= curve[-1] / 2))]

    scores = {"previous_token": run.previous_token, "induction": run.induction}  # (E, L, H)
    return {
        "accuracy": float(run.accuracy[-1]),
        "step_of_half": half(run.accuracy),
        **{name: score[-1].max(-1).tolist() for name, score in scores.items()},
        "step_of_half_previous_token": half(run.previous_token[:, 0, run.previous_token[-1, 0].argmax()]),
        "step_of_half_induction": half(run.induction[:, -1, run.induction[-1, -1].argmax()]),
    }


def ladders(run: Repeating) -> dict:
    """Accuracy with 0, 1, 2 … heads of a layer ablated, in order of the score that layer is there for."""

    def left(layer: int, scores: np.ndarray) -> list[float]:
        order = [(layer, int(head)) for head in np.argsort(-scores)]
        accuracies = []
        for k in range(len(order) + 1):
            with heads.ablated(run.model, *order[:k]):
                accuracies.append(second_copy(run.model, run.test, run.n)[0])
        return accuracies

    first, second = run.previous_token[-1, 0], run.induction[-1, 1]
    return {
        "previous_token_best_first": left(0, first),
        "previous_token_best_last": left(0, -first),
        "induction_best_first": left(1, second),
    }


def composition(run: Repeating) -> dict:
    """Accuracy where one projection of the second layer doesn't see what the first layer wrote."""
    accuracies = {}
    for projection in ("q_proj", "k_proj", "v_proj"):
        with reading_the_embedding(run.model, projection):
            accuracies[projection] = second_copy(run.model, run.test, run.n)[0]
    return accuracies


def one_period(run: Repeating, seed: int) -> dict:
    """Accuracy on the period that was trained, and on others."""
    g = torch.Generator().manual_seed(2000 + seed)
    others = [second_copy(run.model, repeats(torch.full((64,), n), 1 + 2 * n, g), n)[0] for n in OTHER_PERIODS]
    return trained(run) | {"accuracy_on_other_periods": others}


def measure_seed(seed: int, steps: int) -> dict:
    one = learn_to_repeat(1, VARIED, steps, seed)
    two = learn_to_repeat(2, VARIED, steps, seed)
    single = learn_to_repeat(2, VARIED, steps, seed, n_heads=1)
    return {
        "seed": seed,
        "one_layer": trained(one),
        "two_layers": trained(two) | {"ablated": ladders(two), "reading_the_embedding": composition(two)},
        "two_layers_of_one_head": trained(single) | {"ablated": ladders(single)},
        "one_period": {
            str(n_layers): one_period(learn_to_repeat(n_layers, FIXED, steps // 2, seed), seed) for n_layers in (1, 2)
        },
    }


def show(row: dict) -> None:
    left = row["two_layers"]["ablated"]["induction_best_first"]
    print(
        f"seed {row['seed']}: accuracy {row['one_layer']['accuracy']:.2f} with one layer, "
        f"{row['two_layers']['accuracy']:.2f} with two (half of it at step {row['two_layers']['step_of_half']}); "
        f"induction heads ablated: {' '.join(f'{a:.2f}' for a in left)}",
        flush=True,
    )


def main() -> int:
    args = options(__doc__, "a few steps of one seed", seeds=8)
    if args.quick:
        show(measure_seed(0, steps=4))
        print("every branch ran; too few steps to mean anything, and nothing was recorded")
        return 0
    rows = []
    for seed in range(args.seeds):
        rows.append(measure_seed(seed, steps=240))
        show(rows[-1])
    setting = {
        "d_model": 64, "vocab_size": 64, "n_heads": 4, "steps": 240, "steps_of_one_period": 120, "batch": 64,
        "periods": VARIED, "one_period": FIXED[0], "other_periods": OTHER_PERIODS, "test_period": sum(VARIED) // 2,
    }  # fmt: skip
    keep("induction_seeds", args, {"setting": setting, "seeds": rows})
    return 0


if __name__ == "__main__":
    script(main)
