"""One decoding step of attention over a long cache: how much of the grouped form's smaller cache turns into speed?

A new token's 32 query heads of 128 read 32,768 cached tokens, in float32 on the CPU, with 32, 8 and 1 key/value heads, in
three forms that give the same numbers:

    grouped      attnlab.scaled_dot_product_attention: a group's query heads read their K/V head in place
    repeat       K and V copied to as many heads as there are queries, then torch's kernel
    enable_gqa   torch's kernel with enable_gqa=True

Targets: with 8 K/V heads at least 3 times as fast as with 32, with 1 at least 8 times; memory taken during the call under
5 % of the cache. The ratios are taken round by round in one interleaved run.

    python benchmarks/decode_attention.py            about a minute and 3 GB; writes results/decode_attention-<machine>.json
    python benchmarks/decode_attention.py --quick    seconds; checks that the forms agree, writes nothing
"""

import torch
import torch.nn.functional as F
from common import interleave, keep, options, ratios, script, spread, timed

from attnlab import scaled_dot_product_attention
from attnlab.measure import peak_bytes

SPEED_TARGETS = {8: 3.0, 1: 8.0}
EXTRA_MEMORY_TARGET = 0.05


def forms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict:
    """The same attention, three ways, as calls without arguments."""
    group_size = q.shape[1] // k.shape[1]

    def repeat():
        if group_size == 1:
            return F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(
            q, k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
        )

    return {
        "grouped": lambda: scaled_dot_product_attention(q, k, v),
        "repeat": repeat,
        "enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }


def measure(cached: int, n_heads: int, head_dim: int, repetitions: int) -> dict:
    """Seconds and extra bytes for every number of K/V heads and every form."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, n_heads, 1, head_dim, generator=generator)
    calls, caches, extra = {}, {}, {}
    for n_kv_heads in (n_heads, n_heads // 4, 1):
        k, v = (torch.randn(1, n_kv_heads, cached, head_dim, generator=generator) for _ in range(2))
        caches[n_kv_heads] = k.nbytes + v.nbytes
        same = forms(q, k, v)
        outputs = {name: call() for name, call in same.items()}
        for name, call in same.items():
            torch.testing.assert_close(outputs[name], outputs["grouped"], atol=1e-5, rtol=1e-4)
            calls[f"{n_kv_heads} {name}"] = call
            extra[f"{n_kv_heads} {name}"] = peak_bytes(call)
    # The grouped form's three sizes first among themselves: the copies that "repeat" makes would leave them a cold machine.
    base = f"{n_heads} grouped"
    grouped = {name: timed(call) for name, call in calls.items() if name.endswith("grouped")}
    others = {name: timed(call) for name, call in calls.items() if name not in grouped}
    seconds = interleave(grouped, repetitions)
    beside = interleave(others | {base: grouped[base]}, repetitions)
    times_faster = {name: ratios(seconds[base], seconds[name]) for name in grouped}
    times_faster |= {name: ratios(beside[base], beside[name]) for name in others}
    seconds |= {name: beside[name] for name in others}
    rows = []
    for n_kv_heads, cache_bytes in caches.items():
        for form in ("grouped", "repeat", "enable_gqa"):
            key = f"{n_kv_heads} {form}"
            rows.append(
                {
                    "n_kv_heads": n_kv_heads,
                    "form": form,
                    "seconds": spread(seconds[key]),
                    "times_faster_than_multi_head": times_faster[key],
                    "cache_bytes": cache_bytes,
                    "extra_bytes": extra[key],
                }
            )
    setting = {"cached_tokens": cached, "n_heads": n_heads, "head_dim": head_dim, "dtype": "float32"}
    return {"setting": setting | {"threads": torch.get_num_threads()}, "rows": rows}


def verdicts(result: dict) -> list[dict]:
    """Each target, what was measured, and whether it was reached."""
    grouped = {row["n_kv_heads"]: row for row in result["rows"] if row["form"] == "grouped"}
    judged = []
    for n_kv_heads, target in SPEED_TARGETS.items():
        if n_kv_heads in grouped:
            measured = grouped[n_kv_heads]["times_faster_than_multi_head"]["median"]
            what = f"{n_kv_heads} K/V heads, times faster than {result['setting']['n_heads']}"
            judged.append({"what": what, "target": target, "measured": measured, "reached": measured >= target})
    for n_kv_heads, row in grouped.items():
        share = row["extra_bytes"] / row["cache_bytes"]
        what = f"{n_kv_heads} K/V heads, extra memory over the cache"
        reached = share < EXTRA_MEMORY_TARGET
        judged.append({"what": what, "target": EXTRA_MEMORY_TARGET, "measured": share, "reached": reached})
    return judged


def show(result: dict) -> None:
    print(f"{'K/V heads':>9}  {'form':<10}  {'ms':>9}  {'min–max':>17}  {'× multi-head':>12}  {'extra of cache':>14}")
    for row in result["rows"]:
        ms = {key: row["seconds"][key] * 1e3 for key in ("median", "min", "max")}
        print(
            f"{row['n_kv_heads']:>9}  {row['form']:<10}  {ms['median']:>9.2f}  {ms['min']:>8.2f}–{ms['max']:<8.2f}  "
            f"{row['times_faster_than_multi_head']['median']:>12.2f}  {row['extra_bytes'] / row['cache_bytes']:>14.2%}"
        )


def main() -> int:
    args = options(__doc__, "toy size: check the forms against each other", repetitions=15, threads=None)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        show(measure(cached=300, n_heads=8, head_dim=16, repetitions=2))
        print("all forms agree; toy size, so the times mean nothing and nothing was recorded")
        return 0
    result = measure(cached=32_768, n_heads=32, head_dim=128, repetitions=args.repetitions)
    result["verdicts"] = verdicts(result)
    show(result)
    for verdict in result["verdicts"]:
        state = "reached" if verdict["reached"] else "NOT reached"
        print(f"{verdict['what']}: {verdict['measured']:.3g} (target {verdict['target']:g}): {state}")
    keep("decode_attention", args, result)
    return 0


if __name__ == "__main__":
    script(main)
