"""Attention over a whole prompt with a window, on a CPU: what does it bring to leave out the blocks that nobody sees?

Three forms that give the same numbers (``attnlab.measure.window_forms``): a mask, block by block, and torch's compiled
``flex_attention``; beside them causal attention without a window, by torch's kernel and by flex_attention. One layer of 8
query heads on 2 key/value heads of 64, float32. The last setting is the one of the Mistral paper: 16,384 tokens, W 4,096.

    python benchmarks/window_prefill.py            some minutes and 4 GB; writes results/window_prefill-<machine>.json
    python benchmarks/window_prefill.py --quick    seconds, toy sizes; writes nothing
"""

import time

import torch
from common import interleave, keep, options, ratios, script, spread, timed

from attnlab import scaled_dot_product_attention
from attnlab.measure import peak_bytes, window_forms

N_HEADS, N_KV_HEADS, HEAD_DIM = 8, 2, 64
SETTINGS = ((2048, 1024), (4096, 1024), (8192, 1024), (16_384, 1024), (16_384, 4096))  # tokens, window


def pairs(tokens: int, window: int) -> int:
    """Scores that are seen: the query at position p sees p + 1 keys, or ``window`` of them."""
    return sum(min(p + 1, window) for p in range(tokens))


def measure(tokens: int, window: int, repetitions: int) -> list[dict]:
    """A row for each form. The forms with a window are checked against each other first."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, N_HEADS, tokens, HEAD_DIM, generator=g)
    k, v = torch.randn(2, 1, N_KV_HEADS, tokens, HEAD_DIM, generator=g)
    forms = window_forms(q, k, v, window)
    start = time.perf_counter()
    expected = forms["flex"]()
    first_call = time.perf_counter() - start
    for form in ("masked", "blocks"):
        torch.testing.assert_close(forms[form](), expected, atol=1e-5, rtol=1e-4)
    forms |= {
        "full": lambda: scaled_dot_product_attention(q, k, v, causal=True),
        "full, flex": window_forms(q, k, v, tokens)["flex"],
    }
    torch.testing.assert_close(forms["full, flex"](), forms["full"](), atol=1e-5, rtol=1e-4)
    seconds = interleave({form: timed(call) for form, call in forms.items()}, repetitions)
    rows = []
    for form, call in forms.items():
        unwindowed = {"flex": "full, flex", "masked": "full"}.get(form)
        rows.append(
            {
                "tokens": tokens,
                "window": window,
                "form": form,
                "seconds": spread(seconds[form]),
                "times_faster_than_masked": ratios(seconds["masked"], seconds[form]),
                "times_faster_than_full": ratios(seconds["full"], seconds[form]),
                "times_faster_than_same_kernel_in_full": ratios(seconds[unwindowed], seconds[form])
                if unwindowed
                else None,
                "times_fewer_scores": pairs(tokens, tokens)
                / pairs(tokens, tokens if form.startswith("full") else window),
                "peak_bytes": peak_bytes(call),
                "first_call_seconds": round(first_call, 2) if form == "flex" else None,
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    print(f"{rows[0]['tokens']:,} tokens, window {rows[0]['window']:,}")
    for row in rows:
        same = row["times_faster_than_same_kernel_in_full"]
        print(
            f"  {row['form']:<11} {row['seconds']['median'] * 1e3:9.1f} ms  "
            f"{row['times_faster_than_masked']['median']:6.2f} × masked  {row['times_faster_than_full']['median']:6.2f} × full "
            f"{format(same['median'], '.2f') if same else '–':>6} × its own full ({row['times_fewer_scores']:.2f} by scores)  {row['peak_bytes'] / 2**20:8.1f} MiB",
            flush=True,
        )


def main() -> int:
    args = options(__doc__, "toy size: check the forms against each other", repetitions=5)
    torch.set_grad_enabled(False)
    if args.quick:
        show(measure(tokens=300, window=100, repetitions=1))
        print("the forms agree; toy size, so the times mean nothing and nothing was recorded")
        return 0
    rows = []
    for tokens, window in SETTINGS:
        torch.compiler.reset()  # every setting is compiled for its own length
        rows += measure(tokens, window, args.repetitions)
        show(rows[-5:])
    setting = {"n_heads": N_HEADS, "n_kv_heads": N_KV_HEADS, "head_dim": HEAD_DIM, "threads": torch.get_num_threads()}
    keep("window_prefill", args, {"setting": setting, "rows": rows})
    return 0


if __name__ == "__main__":
    script(main)
