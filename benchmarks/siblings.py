"""Three styles of attention decode side by side: what do fewer key/value heads bring in tokens a second, on a CPU?

The siblings' shapes (``attnlab.training.siblings``: 8, 2 and 1 key/value heads), and a wider one whose attention can outweigh
its weights (32, 8 and 1), over batch and context, float32. A step's ratio to multi-head stands beside the ratio of bytes read.
Twice: at equal batch; and at equal memory, where each style decodes as many rows as fit beside its weights.

Weights and caches are random: a step's speed doesn't depend on them. The siblings were trained on 256 tokens; longer contexts
are measured for speed alone. Ratios are taken round by round in one interleaved run.

    python benchmarks/siblings.py            some minutes and 4 GB; writes results/siblings-<machine>.json
    python benchmarks/siblings.py --quick    seconds, toy sizes; writes nothing
"""

import torch
from common import interleave, keep, options, ratios, script, spread, timed

from attnlab import Mistral, MistralConfig, memory
from attnlab.measure import read_bandwidth
from attnlab.training.siblings import SIBLINGS

SIBLING = SIBLINGS["multi-head"]
WIDER = MistralConfig(
    vocab_size=4096, d_model=1024, n_layers=2, n_heads=32, n_kv_heads=32, d_ff=2816, head_dim=32,
    tie_embeddings=True, name="wider",
)  # fmt: skip
STYLES = {"sibling": (8, 2, 1), "wider": (32, 8, 1)}
EQUAL_BATCH = {
    "sibling": [(batch, context) for batch in (1, 8, 32) for context in (128, 1024, 4096)],
    "wider": [(batch, context) for batch in (1, 4, 16) for context in (1024, 8192)],
}
EQUAL_MEMORY = {"sibling": (2**30, 1024), "wider": (2**30, 4096)}  # bytes for weights and cache together; context
STEPS = 5  # timed together


def styles(config: MistralConfig, kv_heads: tuple[int, ...]) -> dict[int, Mistral]:
    """The same shape with several numbers of K/V heads; multi-head first."""
    torch.manual_seed(0)
    return {n: Mistral(config.replace(n_kv_heads=n)).eval() for n in kv_heads}


def decoding(model: Mistral, batch: int, context: int):
    """A call that decodes STEPS tokens for each row, every one as the last of ``context`` tokens; and the cache's bytes."""
    cache = model.new_cache(batch, context)
    assert cache.nbytes == memory.kv_cache_bytes(model.config, context, batch, "float32")
    cache.k.normal_()
    cache.v.normal_()
    ids = torch.zeros(batch, 1, dtype=torch.long)

    @torch.inference_mode()
    def steps() -> None:
        for _ in range(STEPS):
            cache.lengths.fill_(context - 1)
            model(ids, cache=cache, last_only=True)

    return steps, cache.nbytes


def side_by_side(models: dict[int, Mistral], batches: dict[int, int], context: int, bandwidth: float, repetitions: int):
    """One row a style: its tokens a second and their ratio to multi-head's, measured and by the bytes of a step."""
    calls, caches = {}, {}
    for n, model in models.items():
        steps, caches[n] = decoding(model, batches[n], context)
        calls[n] = timed(steps)
    seconds = interleave(calls, repetitions)
    rates = {n: [batches[n] * STEPS / s for s in seconds[n]] for n in models}
    ceilings = {
        n: memory.decode_ceiling(model.config, bandwidth, context, batches[n], "float32") for n, model in models.items()
    }
    base = next(iter(models))
    return [
        {
            "n_heads": model.config.n_heads,
            "n_kv_heads": n,
            "batch": batches[n],
            "context": context,
            "cache_bytes": caches[n],
            "cache_share_of_a_step": caches[n] / memory.bytes_per_step(model.config, context, batches[n], "float32"),
            "tokens_per_second": spread(rates[n]),
            "times_multi_head": ratios(rates[n], rates[base]),
            "times_multi_head_by_bytes": ceilings[n] / ceilings[base],
            "fraction_of_bandwidth": spread(rates[n])["median"] / ceilings[n],
        }
        for n, model in models.items()
    ]


def measure(configs: dict, kv_heads: dict, equal_batch: dict, equal_memory: dict, bandwidth: float, repetitions: int):
    """Both comparisons for every shape, as they come."""
    result: dict[str, list] = {"equal_batch": [], "equal_memory": []}
    for name, config in configs.items():
        models = styles(config, kv_heads[name])
        for batch, context in equal_batch[name]:
            rows = side_by_side(models, dict.fromkeys(models, batch), context, bandwidth, repetitions)
            result["equal_batch"] += [{"shape": name} | row for row in rows]
            show(result["equal_batch"][-len(rows) :])
        nbytes, context = equal_memory[name]
        batches = {n: memory.largest_batch(m.config, nbytes, context, "float32", reserve=0) for n, m in models.items()}
        rows = side_by_side(models, batches, context, bandwidth, repetitions)
        result["equal_memory"] += [{"shape": name, "together_bytes": nbytes} | row for row in rows]
        show(result["equal_memory"][-len(rows) :])
    return result


def show(rows: list[dict]) -> None:
    for row in rows:
        times = row["times_multi_head"]
        print(
            f"{row['shape']:8} {row['n_kv_heads']:>2} K/V heads, {row['batch']:>4} × {row['context']:>5,}: "
            f"{row['tokens_per_second']['median']:>9,.0f} tokens/s, {times['median']:.2f} × multi-head "
            f"({times['min']:.2f} to {times['max']:.2f}), by bytes {row['times_multi_head_by_bytes']:.2f}; "
            f"{row['fraction_of_bandwidth']:.0%} of the bandwidth",
            flush=True,
        )


def main() -> int:
    args = options(__doc__, "toy sizes", repetitions=7, threads=None)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        toy = {name: MistralConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=n[0], n_kv_heads=n[0], d_ff=48,
                                   head_dim=8, tie_embeddings=True, name=name) for name, n in STYLES.items()}  # fmt: skip
        few = {name: [(1, 8), (2, 16)] for name in toy}
        measure(toy, STYLES, few, dict.fromkeys(toy, (300_000, 16)), bandwidth=1e10, repetitions=1)
        print("toy sizes: the times mean nothing, and nothing was recorded")
        return 0
    bandwidth = read_bandwidth()
    setting = {
        "dtype": "float32", "threads": torch.get_num_threads(), "bytes_read_a_second": bandwidth, "weights": "random",
        "parameters": {name: memory.n_params(config) for name, config in (("sibling", SIBLING), ("wider", WIDER))},
    }  # fmt: skip
    configs = {"sibling": SIBLING, "wider": WIDER}
    result = measure(configs, STYLES, EQUAL_BATCH, EQUAL_MEMORY, bandwidth, args.repetitions)
    keep("siblings", args, {"setting": setting} | result)
    return 0


if __name__ == "__main__":
    script(main)
