"""The GPU record: the full Mistral-7B shape in bfloat16 with random weights, what it takes and how fast it decodes.

    bandwidth      bytes a second this GPU reads and copies
    decode         tokens a second at batch 1, eager and as a CUDA graph, as a fraction of the bandwidth of the same run
    transformers   the same weights in transformers, its eager and sdpa attention, side by side with ours
    memory         weights, cache and peak for 32, 8 and 1 key/value heads, predicted and measured

Random weights are good for memory and speed, and say nothing about text. Each section takes a few minutes and is written when
it is done; a section that is in the record already is skipped.

    python benchmarks/gpu.py                                writes results/gpu-<device>.json
    python benchmarks/gpu.py --sections decode --redo       one section again
    python benchmarks/gpu.py --dry-run                      every section at toy size on the CPU, writes nothing

It needs torch, transformers, safetensors, einops, jaxtyping and numpy.
"""

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import (
    RESULTS,
    interleave,
    machine,
    provenance,
    ratios,
    read_record,
    record_path,
    spread,
    timed,
    wait,
    write_record,
)

from attnlab import memory
from attnlab.checkpoint import stored_name
from attnlab.errors import AttnlabError
from attnlab.generate import Decoder
from attnlab.measure import peak_bytes, read_bandwidth
from attnlab.mistral import PRESETS, Mistral, MistralConfig


@dataclass(frozen=True)
class Setting:
    """What is measured, and at which size."""

    config: MistralConfig
    device: str
    dtype: str
    contexts: tuple[int, ...]  # tokens before the first that is timed
    steps: int  # tokens timed at a stretch
    memory_contexts: tuple[int, ...]
    bandwidth_bytes: int
    repetitions: int

    @property
    def modes(self) -> tuple[str, ...]:
        return ("eager", "graph") if torch.device(self.device).type == "cuda" else ("eager",)


def full(device: str) -> Setting:
    config = PRESETS["mistral-7b-v0.1"]
    return Setting(config, device, "bfloat16", (128, 8192), 128, (2048, 8192, 32_768), 4_000_000_000, 5)


def toy() -> Setting:
    config = MistralConfig(
        vocab_size=97, d_model=32, n_layers=2, n_heads=8, n_kv_heads=2, d_ff=48, window=16, name="toy"
    )
    return Setting(config, "cpu", "float32", (5, 24), 4, (8, 24), 1_000_000, 2)


def bandwidth(s: Setting) -> dict:
    """Bytes a second of three ways to move bytes; ``read`` is the faster of the two that only read."""
    halves = torch.ones(2, s.bandwidth_bytes // 4, dtype=torch.bfloat16, device=s.device)
    total, source, target = timed(halves.sum, s.device), *halves

    def copy() -> None:
        target.copy_(source)

    copied = timed(copy, s.device)
    rates = interleave(
        {
            "matrix_vector": lambda: read_bandwidth(s.device, s.bandwidth_bytes, 1),
            "sum": lambda: halves.nbytes / total(),
            "copy": lambda: halves.nbytes / copied(),  # half is read, half is written
        },
        s.repetitions,
    )
    found = {name: spread(values) for name, values in rates.items()}
    best = max(("matrix_vector", "sum"), key=lambda name: found[name]["median"])
    return {"read_bytes_per_second": found[best]["median"], "read_by": best, "bytes_per_second": found}


def decode(s: Setting) -> dict:
    """Tokens a second at batch 1 after a short and a longer prompt, by mode."""
    measured = bandwidth(s)
    model = random_model(s.config, s)
    rows = []
    for context in s.contexts:
        rates = interleave({mode: decode_rate(model, s, context, mode) for mode in s.modes}, s.repetitions)
        rows += [speed_row(s, context, mode, rates[mode], measured) for mode in s.modes]
    return {"bandwidth": measured, "rows": rows}


def beside_transformers(s: Setting) -> dict:
    """Our decoding and transformers' own ``generate`` on the same weights, interleaved in one run."""
    measured = bandwidth(s)
    model = random_model(s.config, s)
    theirs = transformers_model(model, s)
    ids = random_ids(s, max(s.contexts))
    with torch.inference_mode():
        ours, reference = model(ids)[0].float(), theirs(ids, use_cache=False).logits[0].float()
    agreement = float((ours - reference).abs().max() / reference.std())
    del ours, reference
    rows = []
    for context in s.contexts:
        calls = {f"attnlab {mode}": decode_rate(model, s, context, mode) for mode in s.modes}
        for attention in ("eager", "sdpa"):
            calls[f"transformers {attention}"] = transformers_rate(theirs, s, context, attention)
        rates = interleave(calls, s.repetitions)
        for name, values in rates.items():
            row = speed_row(s, context, name, values, measured)
            row["times_transformers_sdpa"] = ratios(values, rates["transformers sdpa"])
            rows.append(row)
    return {"bandwidth": measured, "largest_logit_difference_over_spread": agreement, "rows": rows}


def memory_taken(s: Setting) -> dict:
    """Weights, cache and the peak of prefill and decoding beyond both, for three numbers of K/V heads and with the window."""
    n_heads = s.config.n_heads
    variants = [s.config.replace(n_kv_heads=n, window=None) for n in (n_heads, n_heads // 4, 1)]
    rows = []
    for config in [*variants, s.config]:
        model, weights = measured_peak(partial(random_model, config, s), s)
        for context in s.memory_contexts:
            max_len = context + s.steps
            decoder, cache = measured_peak(partial(Decoder, model, max_len), s)
            ids = random_ids(s, context)
            _, work = measured_peak(partial(run_decoder, decoder, ids, steps=4), s)
            rows.append(
                {
                    "n_kv_heads": config.n_kv_heads,
                    "window": config.window,
                    "context": context,
                    "max_len": max_len,
                    "weight_bytes": {"predicted": memory.weight_bytes(config, s.dtype), "measured": weights},
                    "cache_bytes": {
                        "predicted": memory.kv_cache_bytes(config, max_len, 1, s.dtype),
                        "nbytes": decoder.cache.nbytes,
                        "measured": cache,
                    },
                    "peak_beyond_bytes": work,  # activations, logits, what a kernel asks for
                    "peak_bytes": weights + cache + work,
                }
            )
            del decoder
            free()
        del model
        free()
    return {"rows": rows}


SECTIONS: dict[str, Callable[[Setting], dict]] = {
    "bandwidth": bandwidth,
    "decode": decode,
    "transformers": beside_transformers,
    "memory": memory_taken,
}


def random_model(config: MistralConfig, s: Setting) -> Mistral:
    """A model whose weights are made where they stay: normal with standard deviation 0.02, norms 1."""
    with torch.device("meta"):
        model = Mistral(config).to(getattr(torch, s.dtype))
    model.to_empty(device=s.device).requires_grad_(False)
    generator = torch.Generator(s.device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()


def random_ids(s: Setting, T: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(s.config.vocab_size, (1, T), generator=generator).to(s.device)


def run_decoder(decoder: Decoder, ids: torch.Tensor, steps: int) -> None:
    token = decoder.prefill(ids).argmax(-1)  # (1, 1)
    for _ in range(steps):
        token = decoder.step(token).argmax(-1)


def decode_rate(model: Mistral, s: Setting, context: int, mode: str) -> Callable[[], float]:
    """A call that returns tokens a second of decoding ``s.steps`` tokens greedily; the prefill isn't timed."""
    decoder = Decoder(model, context + s.steps, mode=mode)
    ids = random_ids(s, context)

    def rate() -> float:
        decoder.reset()
        token = decoder.prefill(ids).argmax(-1)

        def steps(token: torch.Tensor = token) -> None:
            for _ in range(s.steps):
                token = decoder.step(token).argmax(-1)

        return s.steps / timed(steps, s.device)()

    return rate


def transformers_model(model: Mistral, s: Setting):
    """transformers' Mistral over the very same weights, so that a GPU need hold them once."""
    from transformers import MistralConfig as TheirConfig
    from transformers import MistralForCausalLM

    c = model.config
    config = TheirConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, sliding_window=c.window,
        rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, max_position_embeddings=32_768,
        tie_word_embeddings=c.tie_embeddings, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = MistralForCausalLM(config).to(getattr(torch, s.dtype))
    shared = {stored_name(name, "hf"): weight for name, weight in model.state_dict().items()}
    theirs.load_state_dict(shared, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(s.device)  # has no weights to load
    theirs.generation_config.eos_token_id = None  # so many tokens, whatever they are
    return theirs.eval().requires_grad_(False)


def transformers_rate(theirs, s: Setting, context: int, attention: str) -> Callable[[], float]:
    """The same of ``generate``, timed from its first new token (the prefill's) on."""
    from transformers import StoppingCriteriaList

    ids = random_ids(s, context)

    def rate() -> float:
        theirs.set_attn_implementation(attention)
        begun: list[float] = []
        never = torch.zeros(1, dtype=torch.bool, device=s.device)

        def on_token(ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
            if not begun:
                wait(s.device)
                begun.append(time.perf_counter())
            return never

        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1 + s.steps, do_sample=False,
                              stopping_criteria=StoppingCriteriaList([on_token]))  # fmt: skip
        wait(s.device)
        seconds = time.perf_counter() - begun[0]
        if out.shape[1] != context + 1 + s.steps:
            raise RuntimeError(f"transformers made {out.shape[1] - context} tokens of {1 + s.steps}")
        return s.steps / seconds

    return rate


def speed_row(s: Setting, context: int, name: str, rates: list[float], measured: dict) -> dict:
    """Tokens a second, and the bytes they had to read against what this run's memory gave."""
    cached = context + s.steps // 2  # half-way through
    ceiling = memory.decode_ceiling(s.config, measured["read_bytes_per_second"], cached, dtype=s.dtype)
    found = spread(rates)
    return {
        "what": name,
        "context": context,
        "steps": s.steps,
        "bytes_per_step": memory.bytes_per_step(s.config, cached, dtype=s.dtype),
        "tokens_per_second": found,
        "fraction_of_bandwidth": found["median"] / ceiling,
    }


def measured_peak(call: Callable[[], object], s: Setting) -> tuple[object, int]:
    """What ``call`` returns, and the most bytes it held at once beyond what was there before it."""
    if torch.device(s.device).type != "cuda":
        results: list[object] = []
        taken = peak_bytes(lambda: results.append(call()))
        return results[0], taken
    wait(s.device)
    before = torch.cuda.memory_allocated(s.device)
    torch.cuda.reset_peak_memory_stats(s.device)
    result = call()
    wait(s.device)
    return result, torch.cuda.max_memory_allocated(s.device) - before


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(name: str, result: dict) -> None:
    if name == "bandwidth":
        for way, rate in result["bytes_per_second"].items():
            print(
                f"  {way:<14} {rate['median'] / 1e9:>9,.1f} GB/s  ({rate['min'] / 1e9:,.1f}–{rate['max'] / 1e9:,.1f})"
            )
    elif name == "memory":
        for row in result["rows"]:
            sizes = [row["weight_bytes"], row["cache_bytes"]]
            told = "  ".join(f"{x['measured']:,} ({x['measured'] - x['predicted']:+,})" for x in sizes)
            print(f"  {row['n_kv_heads']:>2} K/V heads, window {row['window']}, {row['context']:,} tokens: weights and cache "
                  f"{told}, work {row['peak_beyond_bytes']:,} B")  # fmt: skip
    else:
        for row in result["rows"]:
            beside = row.get("times_transformers_sdpa")
            print(f"  {row['what']:<20} {row['context']:>6,} tokens  {row['tokens_per_second']['median']:>8,.1f} tokens/s  "
                  f"{row['fraction_of_bandwidth']:.1%} of the bandwidth" + (f"  {beside['median']:.2f}× sdpa" if beside else ""))  # fmt: skip
    if "largest_logit_difference_over_spread" in result:
        print(f"  logits agree within {result['largest_logit_difference_over_spread']:.1e} of their spread")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which (all)")
    parser.add_argument("--redo", action="store_true", help="measure sections again that are in the record")
    parser.add_argument("--dry-run", action="store_true", help="toy size on the CPU, no record")
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:1")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the record (results/)")
    parser.add_argument("--commit", help="the tree's commit, where git can't tell")
    parser.add_argument("--overwrite", action="store_true", help="replace a record that is another machine's")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.manual_seed(0)
    if args.dry_run:
        for name in args.sections:
            print(f"{name} (toy size)", flush=True)
            show(name, SECTIONS[name](toy()))
        print("dry run: every section ran; the times mean nothing and nothing was recorded")
        return 0
    if torch.device(args.device).type != "cuda" or not torch.cuda.is_available():
        sys.exit("error: this measures a CUDA GPU and there is none here; --dry-run runs it at toy size on the CPU")

    s = full(args.device)
    described = machine(args.device)
    path = record_path("gpu", described, args.out)
    record = read_record(path, described, args.overwrite) or {
        "script": "gpu",
        "machine": described,
        "shape": s.config.name,
        "dtype": s.dtype,
        "weights": "random: good for memory and speed, says nothing about text",
        "sections": {},
    }
    failed = []
    for name in args.sections:
        if name in record["sections"] and not args.redo:
            print(f"{name}: in the record already (--redo measures it again)", flush=True)
            continue
        print(name, flush=True)
        try:
            result = SECTIONS[name](s)
        except Exception:  # the other sections can still be had
            traceback.print_exc()
            failed.append(name)
        else:
            show(name, result)
            record["sections"][name] = {**provenance(args.commit), "host": machine("cpu"), **result}
            write_record(path, record, args.overwrite)
        free()
    print(f"record: {path.name}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AttnlabError as error:
        sys.exit(f"error: {error}")
