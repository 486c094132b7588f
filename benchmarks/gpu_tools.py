"""What the sections of gpu.py share: how large, what was gathered, the machine, and models with their decoding steps."""

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import interleave, spread, timed, wait

from attnlab import memory
from attnlab.errors import CapacityError
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
    few_contexts: tuple[int, ...]  # the same, where each takes a compilation or a slow peer
    steps: int  # tokens timed at a stretch
    batches: tuple[int, ...]  # besides the largest that fits
    batch_contexts: tuple[int, ...]  # tokens a row, the timed ones included
    batch_steps: int
    attention_contexts: tuple[int, ...]
    kernel_contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    memory_contexts: tuple[int, ...]
    bandwidth_bytes: int
    flops_size: int
    shard_bytes: int
    repetitions: int
    limit: int | None = None  # bytes of a pretended device, where the real one has none that a toy could reach
    folder: Path | None = None  # where the checkpoint goes; None: the system's folder for what is temporary
    gpt_fast: Path | None = None  # a checkout of gpt-fast

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def modes(self) -> tuple[str, ...]:
        return ("eager", "graph") if self.cuda else ("eager",)

    @property
    def device_bytes(self) -> int:
        return self.limit or torch.cuda.get_device_properties(self.device).total_memory

    @property
    def every_key(self) -> MistralConfig:
        return self.config.replace(window=None)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Multi-head first, then the model's own number, then multi-query."""
        return (self.config.n_heads, self.config.n_kv_heads, 1)


def full(device: str) -> Setting:
    return Setting(
        PRESETS["mistral-7b-v0.1"], device, "bfloat16",
        contexts=(128, 512, 2048, 4096, 8192, 16_384, 32_768), few_contexts=(128, 8192), steps=128,
        batches=(1, 8, 64), batch_contexts=(1024, 4096, 16_384), batch_steps=16,
        attention_contexts=(2048, 8192, 32_768), kernel_contexts=(512, 2048, 8192, 32_768), prefills=(512, 2048, 8192, 16_384), memory_contexts=(2048, 8192, 32_768),
        bandwidth_bytes=4_000_000_000, flops_size=8192, shard_bytes=5_000_000_000, repetitions=5,
    )  # fmt: skip


def toy() -> Setting:
    config = MistralConfig(
        vocab_size=128, d_model=64, n_layers=2, n_heads=8, n_kv_heads=2, d_ff=96, window=16, name="toy"
    )
    return Setting(
        config, "cpu", "float32",
        contexts=(5, 24), few_contexts=(5, 24), steps=4, batches=(1, 2), batch_contexts=(16, 32), batch_steps=2,
        attention_contexts=(64,), kernel_contexts=(128, 512), prefills=(8, 40), memory_contexts=(8, 24),
        bandwidth_bytes=1_000_000, flops_size=64, shard_bytes=200_000, repetitions=2, limit=600_000,
    )  # fmt: skip


@dataclass
class Gathered:
    """What a section measured, and what it could not and why. ``until``: no row is begun after this."""

    until: float = float("inf")
    rows: list[dict] = field(default_factory=list)
    left_out: list[dict] = field(default_factory=list)

    def attempt(self, what: str, call: Callable, *args: Any) -> Any:
        """What the call returns; None if it failed or there was no time for it, and then ``what`` is left out."""
        why = "no time left in this section" if time.monotonic() > self.until else None
        if not why:
            try:
                return call(*args)
            except Exception as error:  # the rest can still be had
                why = reason(error)
            free()
        self.leave_out(what, why)
        return None

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append({"what": what, "why": why})
        print(f"  left out: {what}: {why}", flush=True)

    def race(self, s: Setting, where: str, entrants: dict[str, Callable[[], Callable[[], float]]]) -> dict[str, list]:
        """Interleaved rates by name. An entrant that can't be made, or fails when first called, doesn't spoil the others."""
        calls = {}
        for name, make in entrants.items():
            call = self.attempt(f"{name}, {where}", make)
            if call and self.attempt(f"{name}, {where}", call) is not None:
                calls[name] = call
        return self.attempt(where, interleave, calls, s.repetitions) or {}


def reason(error: Exception) -> str:
    """In a line, without this machine's paths."""
    chain = [error, error.__cause__, error.__context__]
    if any(isinstance(e, torch.OutOfMemoryError) for e in chain):
        return "out of memory"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {re.sub(r'(?:/[^/ :]+)+/', '…/', line)[:200]}"


# ---- the machine -----------------------------------------------------------------------------------------------------


def measured_bandwidth(s: Setting) -> tuple[dict, dict[str, list[float]]]:
    """What this device reads a second, by the faster of two ways that only read; and the rates of all ways."""
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
    medians = {name: spread(rates[name])["median"] for name in ("matrix_vector", "sum")}
    best = max(medians, key=medians.get)
    return {"read_bytes_per_second": medians[best], "read_by": best}, rates


def measured_peak(call: Callable[[], object], s: Setting) -> tuple[object, int]:
    """What ``call`` returns, and the most bytes it held at once beyond what was there before it."""
    if not s.cuda:
        results: list[object] = []
        taken = peak_bytes(lambda: results.append(call()))
        return results[0], taken
    wait(s.device)
    before = torch.cuda.memory_allocated(s.device)
    torch.cuda.reset_peak_memory_stats(s.device)
    result = call()
    wait(s.device)
    return result, torch.cuda.max_memory_allocated(s.device) - before


@contextmanager
def host_bytes_taken() -> Iterator[dict]:
    """``most``: bytes of this process that are not pages of files, beyond those before, seen every few milliseconds."""
    found: dict[str, int] = {}
    done = threading.Event()

    def anonymous() -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:  # Linux alone says so
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)

    before = anonymous()

    def watch() -> None:
        while True:
            last = done.wait(0.002)
            found["most"] = max(found.get("most", 0), anonymous() - before)
            if last:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if before is not None:
        watcher.start()
    try:
        yield found
    finally:
        done.set()
        if before is not None:
            watcher.join()


def drop_from_page_cache(files: list[Path]) -> str:
    """Have the files read from the disk next time, where a system lets a user ask for that; in words what was done."""
    if not hasattr(os, "posix_fadvise"):
        return "not dropped: this system has no way to ask for it, so cold is not cold"
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # a page that is not yet written stays
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "dropped (posix_fadvise, file by file) before each cold row; where cold is no slower, the system did not"


def read_all(files: list[Path]) -> None:
    buffer = bytearray(16 * 2**20)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def file_system(folder: Path) -> str:
    try:
        told = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True)
        return told.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_compiled() -> None:
    """What torch compiled holds on to the models it compiled."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    free()


# ---- models and their steps ------------------------------------------------------------------------------------------


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


def with_config(model: Mistral, config: MistralConfig) -> Mistral:
    """The very same weights under another config, which must agree on every size."""
    with torch.device("meta"):
        other = Mistral(config).to(model.dtype)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.requires_grad_(False).eval()


def random_ids(s: Setting, T: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(s.config.vocab_size, (1, T), generator=generator).to(s.device)


def filled(model: Mistral, s: Setting, context: int, batch: int = 1, mode: str = "eager") -> Decoder:
    """A decoder with room for ``s.steps`` tokens after ``context``, whose keys and values are random: they read no slower."""
    config, max_len = model.config, context + s.steps
    if s.limit:
        need = memory.weight_bytes(config, s.dtype) + memory.kv_cache_bytes(config, max_len, batch, s.dtype)
        if need > s.limit:
            raise CapacityError(f"weights and cache take {need:,} bytes and the pretended device has {s.limit:,}")
    decoder = Decoder(model, max_len, batch, mode="compiled" if mode == "compiled graph" else mode)
    if mode == "compiled graph":  # what Decoder has no mode for: its compiled step, recorded and replayed
        decoder.mode, decoder._forward = "graph", decoder._compiled
        decoder._record()
    decoder.cache.k.normal_()
    decoder.cache.v.normal_()
    return decoder


def decode_rate(model: Mistral, s: Setting, context: int, mode: str, batch: int = 1) -> Callable[[], float]:
    """A call that returns tokens a second, all rows together, of decoding ``s.steps`` greedily after ``context`` tokens."""
    decoder = filled(model, s, context, batch, mode)
    first = torch.zeros(batch, 1, dtype=torch.long, device=s.device)

    def steps() -> None:
        decoder.cache.lengths.fill_(context)
        decoder.seen = context
        token = first
        for _ in range(s.steps):
            token = decoder.step(token).argmax(-1)

    seconds = timed(steps, s.device)
    return lambda: batch * s.steps / seconds()


def speed_row(
    s: Setting,
    config: MistralConfig,
    context: int,
    name: str,
    rates: list[float],
    read: dict,
    quantize: str | None = None,
) -> dict:
    """Tokens a second, and the bytes they had to read against what this run's memory gave."""
    cached = context + s.steps // 2  # half-way through
    ceiling = memory.decode_ceiling(config, read["read_bytes_per_second"], cached, dtype=s.dtype, quantize=quantize)
    found = spread(rates)
    return {
        "what": name,
        "context": context,
        "window": config.window,
        "steps": s.steps,
        "bytes_per_step": memory.bytes_per_step(config, cached, dtype=s.dtype, quantize=quantize),
        "tokens_per_second": found,
        "fraction_of_bandwidth": found["median"] / ceiling,
    }
