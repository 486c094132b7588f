"""One decoding step of attention over a long cache: how much of the grouped form's smaller cache turns into speed?

A new token's 32 query heads of 128 read 32,768 cached tokens on the CPU, in float32 and in bfloat16, with 32, 8 and 1 key/value
heads, in the four forms of `attnlab.measure.grouped_query_forms`, which give the same numbers.

Speeds are over the best multi-head form: in bfloat16 torch's own kernel can be slower than two matrix products, and would
flatter whatever stands beside it. Targets, in float32: with 8 K/V heads the grouped form at least 3 times as fast as 32, with 1
at least 8 times; memory taken during the call under 5 % of the cache. The ratios are taken round by round in one interleaved run.

    python benchmarks/decode_attention.py            some minutes and 3 GB; writes results/decode_attention-<machine>.json
    python benchmarks/decode_attention.py --quick    seconds; checks that the forms agree, writes nothing
"""

import torch
from common import interleave, keep, options, ratios, script, spread, timed

from attnlab.checkpoint import DTYPES
from attnlab.measure import grouped_query_forms, peak_bytes

SPEED_TARGETS = {8: 3.0, 1: 8.0}
EXTRA_MEMORY_TARGET = 0.05
IN_PLACE = ("grouped", "matmul")  # forms that read each K/V head once


def measure(cached: int, n_heads: int, head_dim: int, repetitions: int, dtype: str = "float32") -> list[dict]:
    """Seconds and extra bytes for every number of K/V heads and every form."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, n_heads, 1, head_dim, generator=generator).to(DTYPES[dtype])
    calls, caches, extra = {}, {}, {}
    for n_kv_heads in (n_heads, n_heads // 4, 1):
        k, v = (torch.randn(1, n_kv_heads, cached, head_dim, generator=generator).to(q) for _ in range(2))
        caches[n_kv_heads] = k.nbytes + v.nbytes
        forms = grouped_query_forms(q, k, v)
        outputs = {form: call() for form, call in forms.items()}
        close = {"atol": 1e-5, "rtol": 1e-4} if dtype == "float32" else {"atol": 2e-2, "rtol": 2e-2}
        for form, call in forms.items():
            torch.testing.assert_close(outputs[form], outputs["grouped"], **close)
            calls[n_kv_heads, form] = timed(call)
            extra[n_kv_heads, form] = peak_bytes(call)
    # Those that read in place first, among themselves: the copies that "repeat" makes would leave them a cold machine.
    lean = {key: call for key, call in calls.items() if key[1] in IN_PLACE}
    seconds = interleave(lean, repetitions)
    base = min(((n_heads, form) for form in IN_PLACE), key=lambda key: spread(seconds[key])["median"])
    beside = interleave({key: call for key, call in calls.items() if key not in lean or key == base}, repetitions)
    rows = []
    for n_kv_heads, form in calls:
        run = seconds if (n_kv_heads, form) in lean else beside
        rows.append(
            {
                "dtype": dtype,
                "n_kv_heads": n_kv_heads,
                "form": form,
                "seconds": spread(run[n_kv_heads, form]),
                "times_faster_than_best_multi_head": ratios(run[base], run[n_kv_heads, form]),
                "best_multi_head": base[1],
                "cache_bytes": caches[n_kv_heads],
                "extra_bytes": extra[n_kv_heads, form],
            }
        )
    return rows


def verdicts(result: dict) -> list[dict]:
    """Each target, what was measured, and whether it was reached."""
    grouped = {
        row["n_kv_heads"]: row for row in result["rows"] if row["form"] == "grouped" and row["dtype"] == "float32"
    }
    judged = []
    for n_kv_heads, target in SPEED_TARGETS.items():
        if n_kv_heads in grouped:
            measured = grouped[n_kv_heads]["times_faster_than_best_multi_head"]["median"]
            what = f"{n_kv_heads} K/V heads, times faster than {result['setting']['n_heads']}"
            judged.append({"what": what, "target": target, "measured": measured, "reached": measured >= target})
    for n_kv_heads, row in grouped.items():
        share = row["extra_bytes"] / row["cache_bytes"]
        what = f"{n_kv_heads} K/V heads, extra memory over the cache"
        reached = share < EXTRA_MEMORY_TARGET
        judged.append({"what": what, "target": EXTRA_MEMORY_TARGET, "measured": share, "reached": reached})
    return judged


def show(rows: list[dict]) -> None:
    best = rows[0]["best_multi_head"]
    print(f"{rows[0]['dtype']}, against the best multi-head form ({best})")
    print(f"{'K/V heads':>9}  {'form':<10}  {'ms':>9}  {'min–max':>17}  {'times faster':>12}  {'extra of cache':>14}")
    for row in rows:
        ms = {key: row["seconds"][key] * 1e3 for key in ("median", "min", "max")}
        print(
            f"{row['n_kv_heads']:>9}  {row['form']:<10}  {ms['median']:>9.2f}  {ms['min']:>8.2f}–{ms['max']:<8.2f}  "
            f"{row['times_faster_than_best_multi_head']['median']:>12.2f}  {row['extra_bytes'] / row['cache_bytes']:>14.2%}"
        )


def main() -> int:
    args = options(__doc__, "toy size: check the forms against each other", repetitions=15, threads=None)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        for dtype in ("float32", "bfloat16"):
            show(measure(cached=300, n_heads=8, head_dim=16, repetitions=2, dtype=dtype))
        print("all forms agree; toy size, so the times mean nothing and nothing was recorded")
        return 0
    setting = {"cached_tokens": 32_768, "n_heads": 32, "head_dim": 128, "threads": torch.get_num_threads()}
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows += measure(32_768, 32, 128, args.repetitions, dtype)
        show(rows[-12:])
    result = {"setting": setting, "rows": rows}
    result["verdicts"] = verdicts(result)
    for verdict in result["verdicts"]:
        state = "reached" if verdict["reached"] else "NOT reached"
        print(f"{verdict['what']}: {verdict['measured']:.3g} (target {verdict['target']:g}): {state}")
    keep("decode_attention", args, result)
    return 0


if __name__ == "__main__":
    script(main)
