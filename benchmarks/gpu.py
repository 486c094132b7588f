"""The GPU record: the full Mistral-7B shape in bfloat16 with random weights, what it takes and how fast it runs.

    bandwidth              bytes a second this GPU reads and copies
    decode                 tokens a second at batch 1 after 128 … 32,768 tokens: eager, as a CUDA graph; every key, windowed
    batch                  32, 8 and 1 K/V heads over batch and context, up to the largest batch that fits
    attention              one new token's attention alone: K/V repeated, enable_gqa, grouped; and which kernel ran
    kernel                 the same by this package's Triton kernel, beside enable_gqa and torch's flash kernel
    transformers           the same weights in transformers, its eager and sdpa attention, side by side with ours
    quantized              decoding with int8 and int4 weights beside bfloat16
    prefill                512 … 16,384 tokens taken in, every key and windowed
    loading                a sharded checkpoint is written, then read cold: seconds, host and GPU memory
    memory                 weights, cache and peak for 32, 8 and 1 K/V heads, predicted and measured
    compiled               torch.compile, alone and as a CUDA graph, beside the graph of the plain steps
    transformers_compiled  transformers' static cache, compiled, side by side with ours
    gpt_fast               the same weights in gpt-fast, side by side with ours (--gpt-fast PATH)

Random weights are good for memory and speed, and say nothing about text. The sections stand in the order of their worth to the
book. Each takes some minutes, 8 at most, and is written when it is done; one that is in the record already is skipped, so that
a run can be cut off and taken up again. What runs out of memory or time, or has no kernel here, is left out and the record says
why.

    python benchmarks/gpu.py                                writes results/gpu-<device>.json
    python benchmarks/gpu.py --minutes 9                    stops before a section that could take longer
    python benchmarks/gpu.py --sections decode --redo       one section again
    python benchmarks/gpu.py --dry-run                      every section at toy size on the CPU, writes nothing
    python benchmarks/gpu.py --dry-run --out FOLDER         the same, and its record, which means nothing
    python benchmarks/gpu.py --model FOLDER                 trained weights instead: see trained.py

It needs torch, transformers, safetensors, einops, jaxtyping and numpy, and triton, which torch's CUDA build brings.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, machine, provenance, ratios, read_record, record_path, spread, timed, wait, write_record
from gpu_peers import GptFast, logit_difference, transformers_model, transformers_rate
from gpu_tools import (
    Gathered,
    Setting,
    decode_rate,
    drop_from_page_cache,
    file_system,
    forget_compiled,
    free,
    full,
    host_bytes_taken,
    measured_bandwidth,
    measured_peak,
    random_ids,
    random_model,
    read_all,
    speed_row,
    toy,
    with_config,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnlab import memory
from attnlab.attention import scaled_dot_product_attention
from attnlab.checkpoint import load_model, save_model
from attnlab.errors import AttnlabError, CapacityError, ConfigError
from attnlab.generate import Decoder
from attnlab.measure import attention_kernels, grouped_query_forms, peak_flops
from attnlab.mistral import Mistral, MistralConfig


def bandwidth(s: Setting, got: Gathered) -> dict:
    """Bytes a second of three ways to move bytes."""
    read, rates = measured_bandwidth(s)
    got.rows += [{"what": name, "bytes_per_second": spread(values)} for name, values in rates.items()]
    return read


def decode(s: Setting, got: Gathered) -> dict:
    """Tokens a second at batch 1, by context, mode and whether a query sees every key or a window of them."""
    read, _ = measured_bandwidth(s)
    model = random_model(s.every_key, s)
    windowed = with_config(model, s.config)
    for context in s.contexts:
        kinds = {"every key": model} | ({"windowed": windowed} if context + s.steps > s.config.window else {})
        entrants = {
            f"{mode}, {kind}": partial(decode_rate, m, s, context, mode)
            for kind, m in kinds.items()
            for mode in s.modes
        }
        for name, values in got.race(s, f"{context:,} tokens", entrants).items():
            config = windowed.config if name.endswith("windowed") else model.config
            got.rows.append(speed_row(s, config, context, name, values, read))
    return {"bandwidth": read}


def batch(s: Setting, got: Gathered) -> dict:
    """Multi-head, grouped-query and multi-query: tokens a second of all rows together, up to the largest batch.

    Each number is that of the faster mode. Ratios to multi-head are of medians: each model has the whole GPU to fill.
    """
    read, _ = measured_bandwidth(s)
    s = replace(s, steps=s.batch_steps, repetitions=min(s.repetitions, 3))
    filled_rows, most = [], {}  # most: the largest batch of multi-head by context, which the others decode as well
    for n in s.kv_heads:
        model = got.attempt(f"{n} K/V heads", random_model, s.every_key.replace(n_kv_heads=n), s)
        for context in s.batch_contexts if model else ():
            where = f"{n} K/V heads, rows of {context:,} tokens"
            largest = got.attempt(f"{where}, largest batch", largest_batch, model, s, context)
            most.setdefault(context, largest)
            for rows in sorted({b for b in (*s.batches, most[context], largest) if b and b <= (largest or 0)}):
                row = batch_row(s, got, model, context, rows, read, where)
                got.rows += [row] if row else []
                if row and rows == largest:
                    filled_rows.append(filled_row(s, model.config, row))
        del model
        free()
    against_multi_head(s, got.rows, ("context", "batch"))
    against_multi_head(s, filled_rows, ("context",))
    return {"bandwidth": read, "device_bytes": s.device_bytes, "equal_memory": filled_rows}


def batch_row(
    s: Setting, got: Gathered, model: Mistral, context: int, batch: int, read: dict, where: str
) -> dict | None:
    """The faster mode's tokens a second; every step is one of the last of ``context`` tokens."""
    rates = {}
    for mode in s.modes:  # one after the other: two such caches may not fit
        entrant = partial(decode_rate, model, s, context - s.steps, mode, batch)
        rates |= got.race(s, f"{where}, batch of {batch}", {mode: entrant})
        free()
    if not rates:
        return None
    best = max(rates, key=lambda mode: spread(rates[mode])["median"])
    found = spread(rates[best])
    ceiling = memory.decode_ceiling(model.config, read["read_bytes_per_second"], context, batch, s.dtype)
    return {
        "n_kv_heads": model.config.n_kv_heads,
        "context": context,
        "batch": batch,
        "what": best,
        "cache_bytes": memory.kv_cache_bytes(model.config, context, batch, s.dtype),
        "tokens_per_second": found,
        "fraction_of_bandwidth": found["median"] / ceiling,
    }


def filled_row(s: Setting, config: MistralConfig, row: dict) -> dict:
    """A batch that fills the device, beside what ``memory`` says would fit."""
    weights = memory.weight_bytes(config, s.dtype)
    return {
        "n_kv_heads": row["n_kv_heads"],
        "context": row["context"],
        "predicted_batch": memory.largest_batch(config, s.device_bytes, row["context"], s.dtype),
        "batch": row["batch"],
        "left_beside_bytes": s.device_bytes - weights - row["cache_bytes"],  # of weights and cache
        **{key: row[key] for key in ("what", "cache_bytes", "tokens_per_second", "fraction_of_bandwidth")},
    }


def against_multi_head(s: Setting, rows: list[dict], alike: tuple[str, ...]) -> None:
    """Each row's ratio to the multi-head row that is like it, measured and by the bytes of a step; None without one."""

    def place(row: dict) -> tuple:
        return tuple(row[key] for key in alike)

    base = {place(row): row for row in rows if row["n_kv_heads"] == s.config.n_heads}
    for row in rows:
        other = base.get(place(row))
        measured = other and row["tokens_per_second"]["median"] / other["tokens_per_second"]["median"]
        row["times_multi_head"] = measured
        row["times_multi_head_by_bytes"] = (
            other and measured * other["fraction_of_bandwidth"] / row["fraction_of_bandwidth"]
        )


def largest_batch(model: Mistral, s: Setting, context: int) -> int:
    """The most rows of ``context`` tokens that really decode on this device: by trying, from what ``memory`` predicts."""

    def runs(batch: int) -> bool:
        try:
            decode_rate(model, s, context - s.steps, "eager", batch)()
            return True
        except (torch.OutOfMemoryError, CapacityError):
            return False

    account = partial(memory.largest_batch, model.config, s.device_bytes, context, s.dtype)
    fits, too_many = 0, account(reserve=0) + 1  # weights and cache alone are more than there is
    batch = max(1, account())
    while fits + 1 < too_many:
        if runs(batch):
            fits = batch
        else:
            too_many = batch
        free()
        batch = (fits + too_many) // 2
    return fits


def attention(s: Setting, got: Gathered) -> dict:
    """Attention of one new token alone, in the forms of ``attnlab.measure``; "masked" is what a CUDA graph's step runs."""
    read, _ = measured_bandwidth(s)
    for context in s.attention_contexts:
        entrants, forms = {}, {}
        for n in s.kv_heads:
            made = got.attempt(f"{n} K/V heads, {context:,} tokens", attention_forms, s, context, n)
            for form, calls in (made or {}).items():
                forms[form, n] = calls
                entrants[f"{form}, {n} K/V heads"] = partial(looped, s, calls)
        seconds = got.race(s, f"{context:,} tokens", entrants)
        multi_head = [name for name in seconds if name.endswith(f", {s.config.n_heads} K/V heads")]
        best = min(multi_head, key=lambda name: spread(seconds[name])["median"], default=None)
        for (form, n), calls in forms.items():
            name = f"{form}, {n} K/V heads"
            if name not in seconds:
                continue
            nbytes = 2 * n * context * s.config.head_dim * memory.element_bytes(s.dtype)
            taken = spread(seconds[name])
            got.rows.append(
                {
                    "what": form,
                    "n_kv_heads": n,
                    "context": context,
                    "microseconds": spread([t * 1e6 for t in seconds[name]]),
                    "cache_bytes": nbytes,
                    "fraction_of_bandwidth": nbytes / taken["median"] / read["read_bytes_per_second"],
                    "times_faster_than_best_multi_head": best and ratios(seconds[best], seconds[name]),
                    "kernel": ", ".join(attention_kernels(calls[0])) or "matrix products",
                }
            )
        del entrants, forms, seconds
        free()
    return {"bandwidth": read}


def kernel(s: Setting, got: Gathered) -> dict:
    """The Triton kernel that the book explains, and what torch has for the same: its own choice, and its flash kernel."""
    read, _ = measured_bandwidth(s)
    n = s.config.n_kv_heads
    for context in s.kernel_contexts:
        where, calls = f"{context:,} tokens", {}
        for form in KERNEL_FORMS:  # by itself: a GPU without a flash kernel still times the others
            made = got.attempt(f"{form}, {where}", attention_forms, s, context, n, partial(kernel_form, form))
            calls |= made or {}
        seconds = got.race(s, where, {form: partial(looped, s, made) for form, made in calls.items()})
        for form, taken in seconds.items():
            nbytes = 2 * n * context * s.config.head_dim * memory.element_bytes(s.dtype)
            got.rows.append(
                {
                    "what": form,
                    "n_kv_heads": n,
                    "context": context,
                    "microseconds": spread([t * 1e6 for t in taken]),
                    "cache_bytes": nbytes,
                    "fraction_of_bandwidth": nbytes / spread(taken)["median"] / read["read_bytes_per_second"],
                }
            )
            if "enable_gqa" in seconds:
                got.rows[-1]["times_faster_than_enable_gqa"] = ratios(seconds["enable_gqa"], taken)
        del calls, seconds
        free()
    return {"bandwidth": read}


KERNEL_FORMS = ("triton", "enable_gqa", "flash")


def kernel_form(form: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    from attnlab.triton_decode import decode_attention

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    calls = {
        "triton": lambda: decode_attention(q[:, :, 0], k, v)[:, :, None],
        "enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "flash": flash,
    }
    return {form: calls[form]}


def plain_forms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    mask = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
    return grouped_query_forms(q, k, v) | {"grouped, masked": partial(scaled_dot_product_attention, q, k, v, mask)}


def attention_forms(
    s: Setting, context: int, n_kv_heads: int, forms_of: Callable = plain_forms
) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """Each form as calls over so many caches that none is left in the chip's own memory from the last time."""
    c, dtype = s.config, getattr(torch, s.dtype)
    q = torch.randn(1, c.n_heads, 1, c.head_dim, dtype=dtype, device=s.device)
    cache_bytes = 2 * n_kv_heads * context * c.head_dim * dtype.itemsize
    forms: dict[str, list] = {}
    for _ in range(max(1, s.bandwidth_bytes // 4 // cache_bytes)):
        k, v = torch.randn(2, 1, n_kv_heads, context, c.head_dim, dtype=dtype, device=s.device)
        if not forms:
            expected = scaled_dot_product_attention(q, k, v).float()
        for form, call in forms_of(q, k, v).items():
            forms.setdefault(form, []).append(call)
    for form, calls in forms.items():
        apart = (calls[0]().float() - expected).norm() / expected.norm()
        if not apart < 0.05:
            raise RuntimeError(f"{form} gives other numbers than grouped: {apart:.2g} of their length apart")
    return forms


def looped(s: Setting, calls: list[Callable[[], object]]) -> Callable[[], float]:
    """Seconds a call, of all one after another; on a GPU as one CUDA graph, so that launching them isn't what is timed."""

    @torch.inference_mode()
    def every() -> None:
        for call in calls:
            call()

    every()
    seconds = timed(every, s.device)
    if s.cuda:
        wait(s.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
        seconds = timed(graph.replay, s.device)
    return lambda: seconds() / len(calls)


def beside_transformers(s: Setting, got: Gathered) -> dict:
    """Our decoding and transformers' own ``generate`` on the same weights, interleaved in one run."""
    read, _ = measured_bandwidth(s)
    model = random_model(s.config, s)
    theirs = transformers_model(model, s)
    agreement = logit_difference(model, lambda ids: theirs(ids, use_cache=False).logits, s)
    for context in s.few_contexts:
        entrants = {f"attnlab {mode}": partial(decode_rate, model, s, context, mode) for mode in s.modes}
        for name in ("eager", "sdpa"):
            entrants[f"transformers {name}"] = partial(transformers_rate, theirs, s, context, name)
        peers_rows(s, got, model.config, context, entrants, "transformers sdpa", read)
    return {"bandwidth": read, "largest_logit_difference_over_spread": agreement}


def quantized(s: Setting, got: Gathered) -> dict:
    """The same weights in bfloat16, int8 and int4, all three on the device, interleaved in one run."""
    read, _ = measured_bandwidth(s)
    models = {kind: got.attempt(kind or s.dtype, quantized_model, s, kind) for kind in (None, *memory.QUANTIZED)}
    for context in s.few_contexts:
        entrants = {}
        for kind, model in models.items():
            for mode in s.modes if model else ():
                entrants[f"{kind or s.dtype} {mode}"] = partial(decode_rate, model, s, context, mode)
        rates = got.race(s, f"{context:,} tokens", entrants)
        for name, values in rates.items():
            stored, mode = name.split()
            kind = stored if stored in memory.QUANTIZED else None
            row = speed_row(s, s.every_key, context, name, values, read, quantize=kind)
            row["weight_bytes"] = {
                "predicted": memory.weight_bytes(s.config, s.dtype, kind),
                "measured": stored_bytes(models[kind]),
            }
            if (unquantized := f"{s.dtype} {mode}") in rates:
                row["times_unquantized"] = ratios(values, rates[unquantized])
            got.rows.append(row)
    return {"bandwidth": read}


def quantized_model(s: Setting, kind: str | None) -> Mistral:
    model = random_model(s.every_key, s)
    if kind:
        from attnlab.quantize import quantize_

        quantize_(model, kind)
        free()
    return model


def stored_bytes(model: Mistral) -> int:
    """Of parameters and whatever else a quantized layer keeps; a tensor that two share counts once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def prefill(s: Setting, got: Gathered) -> dict:
    """Taking in a prompt, in chunks of 1,024: limited by arithmetic, so beside the most of it this device does."""
    peak = peak_flops(s.device, s.flops_size)
    model = random_model(s.every_key, s)
    kinds = {"every key": model, "windowed": with_config(model, s.config)}
    for T in s.prefills:
        ids, works = random_ids(s, T), {}

        def entrant(kind: str, T: int = T, ids: torch.Tensor = ids, works: dict = works) -> Callable[[], float]:
            decoder = Decoder(kinds[kind], T)
            _, works[kind] = measured_peak(partial(decoder.prefill, ids), s)

            def once() -> None:
                decoder.reset()
                decoder.prefill(ids)

            return timed(once, s.device)

        taken = got.race(s, f"{T:,} tokens", {kind: partial(entrant, kind) for kind in kinds})
        for kind, seconds in taken.items():
            found = spread(seconds)
            got.rows.append(
                {
                    "what": kind,
                    "tokens": T,
                    "seconds": found,
                    "tokens_per_second": spread([T / t for t in seconds]),
                    "fraction_of_flops": memory.flops(kinds[kind].config, T) / found["median"] / peak,
                    "peak_beyond_bytes": works[kind],
                }
            )
    return {"flops_per_second": peak}


def loading(s: Setting, got: Gathered) -> dict:
    """A sharded checkpoint, written first: read as bytes and loaded, with its files out of the page cache and then in it."""
    with tempfile.TemporaryDirectory(dir=s.folder) as parent:
        folder = Path(parent) / "checkpoint"
        model = random_model(s.config, s)
        written = timed(partial(save_model, model, folder, max_shard_bytes=s.shard_bytes))()
        kept = {name: tensor.cpu() for name, tensor in list(model.state_dict().items())[-2:]}
        del model
        free()
        files = sorted(folder.glob("*.safetensors"))
        nbytes = sum(file.stat().st_size for file in files)
        load = partial(load_model, folder, s.device, progress=False)
        facts = {"bytes": nbytes, "files": len(files), "file_system": file_system(folder)}

        def took(what: str, seconds: float, reading: float | None = None) -> float:
            row = {"what": what, "seconds": seconds, "bytes_per_second": nbytes / seconds}
            got.rows.append(row | {"fraction_of_reading": reading and reading / seconds})
            return seconds

        took("write", written)
        facts["page_cache"] = drop_from_page_cache(files)
        reading = took("read, cold", timed(partial(read_all, files))())
        drop_from_page_cache(files)
        with host_bytes_taken() as host:
            start = time.perf_counter()
            model, facts["device_peak_bytes"] = measured_peak(load, s)
            took("load, cold", time.perf_counter() - start, reading)
        facts["host_bytes_beyond_page_cache"] = host.get("most")
        facts["came_back_whole"] = all(torch.equal(model.state_dict()[n].cpu(), t) for n, t in kept.items())
        del model
        free()
        reading = took("read, from the page cache", timed(partial(read_all, files))())
        took("load, from the page cache", timed(load, s.device)(), reading)
        return facts


def memory_taken(s: Setting, got: Gathered) -> dict:
    """Weights, cache and the peak of prefill and decoding beyond both, for three numbers of K/V heads and with the window."""
    for config in [*(s.every_key.replace(n_kv_heads=n) for n in s.kv_heads), s.config]:
        made = got.attempt(f"{config.n_kv_heads} K/V heads", measured_peak, partial(random_model, config, s), s)
        for context in s.memory_contexts if made else ():
            where = f"{config.n_kv_heads} K/V heads, window {config.window}, {context:,} tokens"
            row = got.attempt(where, memory_row, s, *made, context)
            got.rows += [row] if row else []
            free()
        del made
        free()
    return {}


def memory_row(s: Setting, model: Mistral, weights: int, context: int) -> dict:
    config, max_len = model.config, context + s.steps
    decoder, cache = measured_peak(partial(Decoder, model, max_len), s)
    ids = random_ids(s, context)

    def run() -> None:
        token = decoder.prefill(ids).argmax(-1)  # (1, 1)
        for _ in range(4):
            token = decoder.step(token).argmax(-1)

    _, work = measured_peak(run, s)
    return {
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


def compiled(s: Setting, got: Gathered) -> dict:
    """What torch.compile adds, alone and where its kernels are replayed as one CUDA graph."""
    read, _ = measured_bandwidth(s)
    model = random_model(s.every_key, s)
    modes = ("graph", "compiled", "compiled graph") if s.cuda else ("eager", "compiled")
    for context in (s.contexts[0], s.contexts[-1]) if s.cuda else s.contexts[:1]:
        entrants = {mode: partial(decode_rate, model, s, context, mode) for mode in modes}
        peers_rows(s, got, model.config, context, entrants, modes[0], read)
    return {"bandwidth": read}


def beside_transformers_compiled(s: Setting, got: Gathered) -> dict:
    """The same with transformers' static cache and its own compilation (CUDA graphs on a GPU)."""
    read, _ = measured_bandwidth(s)
    model = random_model(s.every_key, s)
    theirs = transformers_model(model, s)
    for context in s.few_contexts:
        entrants = {f"attnlab {mode}": partial(decode_rate, model, s, context, mode) for mode in fastest_modes(s)}
        name = "transformers static compiled"
        entrants[name] = partial(transformers_rate, theirs, s, context, "sdpa", static=True)
        peers_rows(s, got, model.config, context, entrants, name, read)
    return {"bandwidth": read}


def beside_gpt_fast(s: Setting, got: Gathered) -> dict:
    """The same weights in gpt-fast, its step compiled as its own script does."""
    if s.gpt_fast is None:
        got.leave_out("gpt-fast", "not here: --gpt-fast PATH names a checkout of github.com/meta-pytorch/gpt-fast")
        return {}
    read, _ = measured_bandwidth(s)
    model = random_model(s.every_key, s)
    theirs = GptFast(s, model)
    agreement = logit_difference(model, theirs.logits, s)
    for context in s.few_contexts:
        entrants = {f"attnlab {mode}": partial(decode_rate, model, s, context, mode) for mode in fastest_modes(s)}
        entrants["gpt-fast"] = partial(theirs.rate, context)
        peers_rows(s, got, model.config, context, entrants, "gpt-fast", read)
    return {"bandwidth": read, "gpt_fast_commit": theirs.commit, "largest_logit_difference_over_spread": agreement}


def peers_rows(
    s: Setting, got: Gathered, config: MistralConfig, context: int, entrants: dict, peer: str, read: dict
) -> None:
    """A race at one context, each beside ``peer``."""
    rates = got.race(s, f"{context:,} tokens", entrants)
    for name, values in rates.items():
        row = speed_row(s, config, context, name, values, read)
        if peer in rates:
            row["times_" + re.sub(r"\W+", "_", peer)] = ratios(values, rates[peer])
        got.rows.append(row)


def fastest_modes(s: Setting) -> tuple[str, ...]:
    return ("graph", "compiled graph") if s.cuda else ("eager",)


# ---- the record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    measure: Callable[[Setting, Gathered], dict]
    minutes: float  # after which no further row is begun


SECTIONS: dict[str, Section] = {
    "bandwidth": Section(bandwidth, 1),
    "decode": Section(decode, 5),
    "batch": Section(batch, 6),
    "attention": Section(attention, 3),
    "kernel": Section(kernel, 3),
    "transformers": Section(beside_transformers, 4),
    "quantized": Section(quantized, 4),
    "prefill": Section(prefill, 3),
    "loading": Section(loading, 6),
    "memory": Section(memory_taken, 4),
    "compiled": Section(compiled, 6),
    "transformers_compiled": Section(beside_transformers_compiled, 6),
    "gpt_fast": Section(beside_gpt_fast, 6),
}


def measure(name: str, s: Setting) -> dict:
    """One section: its facts, its rows, and what was left out of them."""
    section = SECTIONS[name]
    got = Gathered(time.monotonic() + 60 * section.minutes)
    facts = got.attempt("the rest of the section", section.measure, s, got) or {}
    forget_compiled()
    return facts | {"rows": got.rows} | ({"left_out": got.left_out} if got.left_out else {})


def verdicts(sections: dict) -> list[dict]:
    """The targets for a GPU, what was measured of each, and whether it was reached; of those that were measured.

    gpt-fast's own ratios of int8 and int4 to bfloat16, 1.48 and 1.88, are its README's for Llama 2 7B on an A100 (6ecad9b).
    """

    def rows(*names: str, **like: object) -> list[dict]:
        every = [row for name in names for row in sections.get(name, {}).get("rows", [])]
        return [row for row in every if all(row.get(key) == value for key, value in like.items())]

    def ratio(found: list[dict], key: str, what: str) -> list[float]:
        return [row[key]["median"] for row in found if row["what"].startswith(what) and key in row]

    decoded = rows("decode", "compiled", window=None)
    contexts = sorted({row["context"] for row in decoded}) or [0]
    longest = max((row["context"] for row in rows("kernel")), default=0)
    static = "times_transformers_static_compiled"
    filled = sections.get("batch", {}).get("equal_memory", [])
    grouped = sorted({row["n_kv_heads"] for row in filled})[1:2]
    few = min((row["context"] for row in rows("quantized")), default=0)
    targets = [
        (f"fraction of the bandwidth at {contexts[0]:,} tokens", 0.88, [row["fraction_of_bandwidth"] for row in decoded if row["context"] == contexts[0]]),
        (f"fraction of the bandwidth at {contexts[-1]:,} tokens", 0.80, [row["fraction_of_bandwidth"] for row in decoded if contexts[0] < row["context"] == contexts[-1]]),
        (f"the Triton kernel, fraction of the bandwidth at {longest:,} tokens", 0.80, [row["fraction_of_bandwidth"] for row in rows("kernel", what="triton", context=longest)]),
        ("times transformers, static and compiled", 1.0, ratio(rows("transformers_compiled"), static, "attnlab")),
        ("int8, times unquantized", 1.48, ratio(rows("quantized", context=few), "times_unquantized", "int8")),
        ("int4, times unquantized", 1.88, ratio(rows("quantized", context=few), "times_unquantized", "int4")),
        ("equal memory, grouped-query times multi-head", 3.5, [row["times_multi_head"] for row in filled if row["n_kv_heads"] in grouped and row["times_multi_head"]]),
    ]  # fmt: skip
    best = [(what, target, max(found)) for what, target, found in targets if found]
    return [{"what": what, "target": target, "measured": m, "reached": m >= target} for what, target, m in best]


def show(result: dict) -> None:
    def told(key: str, value: object) -> str:
        if isinstance(value, dict) and "median" in value:
            value = value["median"]
        if isinstance(value, dict):
            return " / ".join(told(name, item) for name, item in value.items())
        if isinstance(value, float) and key.endswith("bytes_per_second"):
            return f"{value / 1e9:,.1f} GB/s"
        if isinstance(value, int) and not isinstance(value, bool) and "bytes" in key:
            return memory.human_bytes(value)
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    for row in [row for part in result.values() if isinstance(part, list) for row in part if "why" not in row]:
        print("  " + "  ".join(f"{key} {told(key, value)}" for key, value in row.items()))
    for key, value in result.items():
        if not isinstance(value, list):
            print(f"  {key}: {told(key, value)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which (all)")
    parser.add_argument("--redo", action="store_true", help="measure sections again that are in the record")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop before what could take longer")
    parser.add_argument("--dry-run", action="store_true", help="toy size on the CPU; a record only if --out is given")
    parser.add_argument("--model", type=Path, help="a folder with trained weights: text, maps and speed of those")
    parser.add_argument("--device", help="cuda, or cuda:1 (with --model also cpu)")
    parser.add_argument("--out", type=Path, help="folder for the record (results/)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint of 14.5 GB is written (a temporary folder)")
    parser.add_argument("--gpt-fast", type=Path, help="a checkout of github.com/meta-pytorch/gpt-fast")
    parser.add_argument("--commit", help="the tree's commit, where git can't tell")
    parser.add_argument("--overwrite", action="store_true", help="replace a record that is another machine's")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.manual_seed(0)
    if args.model:
        import trained

        return trained.record(args)
    device = args.device or "cuda"
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: there is no GPU to compile for
        s = toy()
        described = {"gpu": "a dry run at toy size on a CPU", "gpu_bytes": s.limit}
        if args.out and args.out.resolve() == RESULTS:
            raise ConfigError("a dry run's record means nothing and does not belong into results/: give another --out")
    elif torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise ConfigError("this measures a CUDA GPU and there is none here; --dry-run runs it at toy size on the CPU")
    else:
        s, described = full(device), machine(device)
    return run(args, replace(s, folder=args.folder, gpt_fast=args.gpt_fast), described)


def run(args: argparse.Namespace, s: Setting, described: dict) -> int:
    """Section by section into the record, as long as there is time."""
    writes = not args.dry_run or args.out is not None
    path = record_path("gpu", described, args.out or RESULTS)
    record = (read_record(path, described, args.overwrite) if writes else None) or {
        "script": "gpu",
        "machine": described,
        "shape": s.config.name,
        "dtype": s.dtype,
        "weights": "random: good for memory and speed, says nothing about text",
        "sections": {},
    }
    started, failed, waiting = time.monotonic(), [], []
    for name in args.sections:
        minutes = SECTIONS[name].minutes
        if record["sections"].get(name, {}).get("rows") and not args.redo:
            print(f"{name}: in the record already (--redo measures it again)", flush=True)
            continue
        if (time.monotonic() - started) / 60 + minutes > args.minutes:
            waiting.append(name)
            continue
        print(name + (" (toy size)" if args.dry_run else ""), flush=True)
        result = measure(name, s)
        show(result)
        if not result["rows"]:
            failed.append(name)
        if result["rows"] or not record["sections"].get(name, {}).get("rows"):  # what was measured before stays
            record["sections"][name] = {**provenance(args.commit), "host": machine("cpu"), **result}
            record["verdicts"] = verdicts(record["sections"])
        if writes:
            write_record(path, record, args.overwrite)
    print(f"record: {path.name}" if writes else "dry run: the times mean nothing and nothing was recorded")
    for verdict in record.get("verdicts", []):
        state = "reached" if verdict["reached"] else "NOT reached"
        print(f"{verdict['what']}: {verdict['measured']:.3g} (target {verdict['target']:g}): {state}")
    if failed:
        print(f"nothing was measured in: {', '.join(failed)}")
    if waiting:
        print(f"no time was left for: {', '.join(waiting)} (run it again)")
    return 1 if set(failed) - {"gpt_fast"} else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AttnlabError as error:
        sys.exit(f"error: {error}")
