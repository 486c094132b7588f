"""One attention head learns to fetch: how sure is what chapter 2 shows of one seed?

For every seed, on the task ``attnlab.tasks.Wishes`` (guessing is right once in 16):

    ablation   which of the projections are learned, and where the answer is read
    sign       where the trained head looks: at the wanted token, or at all others
    head_dim   how narrow a head can be, looking at the wanted token and looking away from it
    shared     one matrix for queries and keys

"Answered" is the share of right answers on fresh sequences, "found" the share of tokens whose largest weight is on the token
they want; a head that never finds and always answers looks away.

    python benchmarks/lookup_seeds.py            about four minutes; writes results/lookup_seeds-<machine>.json
    python benchmarks/lookup_seeds.py --quick    seconds, a few steps of one seed; writes nothing
"""

import torch
from common import keep, options, script, spread
from tqdm import tqdm

from attnlab.tasks import Wishes

HEAD_DIMS = (1, 2, 4, 6, 8, 12, 16, 48)


def run(name: dict, task: Wishes, seeds: int, steps: int, head_dim: int = 16, **layer: object) -> dict:
    """One row: ``name``, and how the seeds came out. ``layer``: see ``Wishes.new_layer``."""
    found, answered = [], []
    for seed in range(seeds):
        head = task.new_layer(head_dim, seed, **layer)
        if layer.get("learned") != "":
            task.learn(head, seed, steps)
        scores = task.score(head)
        found.append(scores[0])
        answered.append(scores[1])
    away = sum(f < 1 / 32 < 1 / 8 < a for f, a in zip(found, answered, strict=True))
    return name | {"answered": spread(answered), "found": spread(found), "looks_away": away}


def measure(seeds: int, steps: int) -> dict:
    sections = {
        "ablation": [
            ({"learned": learned or "nothing", "answer_in": slot}, Wishes(slot=slot), {"learned": learned, "head_dim": 48})
            for slot in ("payload", "wish")
            for learned in ("", "qk", "vo", "qkvo")
        ],
        "sign": [
            ({"start": start, "payloads": "distinct" if distinct else "repeated"}, Wishes(distinct=distinct), {"sign": sign})
            for distinct in (True, False)
            for start, sign in (("as drawn", 0), ("positive", 1), ("negative", -1))
        ],
        "head_dim": [
            ({"head_dim": head_dim, "start": start}, Wishes(), {"head_dim": head_dim, "sign": sign})
            for start, sign in (("positive", 1), ("negative", -1))
            for head_dim in HEAD_DIMS
        ],
        "shared": [
            ({"w_q_is_w_k": shared, "sees_itself": not hide_self}, Wishes(hide_self=hide_self), {"shared": shared})
            for hide_self in (False, True)
            for shared in (True, False)
        ],
    }  # fmt: skip
    jobs = tqdm([(section, *job) for section, list_of in sections.items() for job in list_of], desc="settings")
    rows = {section: [] for section in sections}
    for section, name, task, layer in jobs:
        rows[section].append(run(name, task, seeds, steps, **layer))
    return rows


def show(rows: dict) -> None:
    for section, of_section in rows.items():
        print(section)
        for row in of_section:
            name = ", ".join(
                f"{key} {value}" for key, value in row.items() if key not in ("answered", "found", "looks_away")
            )
            numbers = "   ".join(
                f"{key} {row[key]['median']:.2f} ({row[key]['min']:.2f}–{row[key]['max']:.2f})"
                for key in ("answered", "found")
            )
            print(f"  {name:<44} {numbers}   looks away {row['looks_away']}")


def main() -> int:
    args = options(__doc__, "a few steps of one seed", seeds=12)
    if args.quick:
        show(measure(seeds=1, steps=2))
        print("every setting ran; too few steps to mean anything, and nothing was recorded")
        return 0
    torch.set_num_threads(1)  # matrices this small gain nothing from a second
    steps = 400
    rows = measure(args.seeds, steps)
    show(rows)
    setting = {"task": "attnlab.tasks.Wishes", "seeds": args.seeds, "steps": steps, "batch": 64, "learning_rate": 0.01}
    keep("lookup_seeds", args, {"setting": setting, **rows})
    return 0


if __name__ == "__main__":
    script(main)
