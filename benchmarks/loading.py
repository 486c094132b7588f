"""How fast does a checkpoint come from the disk, and what memory does that take beside the weights themselves?

A checkpoint of Mistral 7B's full shape, bfloat16 in shards, random weights, is written first. Then, in each round: its files
leave the page cache and are read in order, past it and through it; they leave it again and are loaded in a process of its own by
``attnlab.checkpoint.load_model``, on the CPU. As much memory is written once, with nothing read. The targets: 80 % of the disk's
own speed, which is the faster way of reading, and less than 1.5 GB of memory beyond weights and page cache. Rounds take turns in
what comes first.

    python benchmarks/loading.py --folder /a/disk    minutes, 15 GB of disk and of memory; writes results/loading-<machine>.json
    python benchmarks/loading.py --quick             seconds, toy size; writes nothing
"""

import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from common import keep, options, ratios, script, spread, timed
from gpu_tools import drop_from_page_cache, file_system, host_bytes_taken, read_all

from attnlab import memory
from attnlab.checkpoint import load_model, save_model
from attnlab.errors import AttnlabError, CapacityError
from attnlab.loading import free_bytes
from attnlab.mistral import PRESETS, Mistral, MistralConfig

FULL = PRESETS["mistral-7b-v0.1"]
TOY = MistralConfig(vocab_size=1000, d_model=256, n_layers=3, n_heads=8, n_kv_heads=2, d_ff=700, name="toy")
SHARD_BYTES = {FULL: 2_000_000_000, TOY: 3_000_000}
FRACTION, HOST_BYTES = 0.8, 1.5e9  # the targets
POOL = 2**20  # random numbers are dear by the billion


def write_checkpoint(config: MistralConfig, folder: Path, shard_bytes: int) -> list[Path]:
    """Shards, index and config as Hugging Face's folders have them, with one shard in memory at a time; the shards."""
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    with torch.device("meta"):
        model = Mistral(config)
    # a matrix's rows are stretches of the pool, each begun one number further on: none exists until it is written
    weights = {
        name: pool.as_strided(t.shape, (1, 1)) if t.dim() == 2 else pool[: t.numel()].clone()
        for name, t in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    save_model(model, folder, max_shard_bytes=shard_bytes)
    return sorted(folder.glob("*.safetensors"))


def read_past_the_page_cache(files: list[Path]) -> None:
    """In order, straight into this process's memory, as fast as the disk gives it. Raises OSError where that can't be asked for."""
    buffer = mmap.mmap(-1, 16 * 2**20)  # aligned to a page, as the disk wants it
    for file in files:
        opened = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            while os.readv(opened, [buffer]):
                pass
        finally:
            os.close(opened)


def write_fresh_memory(nbytes: int) -> None:
    """As many bytes as the weights, asked of the system and written for the first time: what loading can't do without."""
    part = 64 * 2**20
    taken = [torch.empty(min(part, nbytes - at), dtype=torch.uint8).fill_(1) for at in range(0, nbytes, part)]
    del taken


def load_here(folder: str) -> None:
    """What the process of its own does: loads, and prints seconds and bytes."""
    with host_bytes_taken() as host:
        start = time.perf_counter()
        model = load_model(folder, progress=False)
        seconds = time.perf_counter() - start
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"seconds": seconds, "weights": weights, "most": host.get("most")}))


def load_elsewhere(folder: Path) -> dict:
    command = [sys.executable, __file__, "--load", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AttnlabError(f"the loading process failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout)


def seconds_of(result: float | dict) -> float:
    return result["seconds"] if isinstance(result, dict) else result


def measure(config: MistralConfig, folder: Path, repetitions: int) -> dict:
    """Rounds of reading and loading; the checkpoint is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        write = partial(write_checkpoint, config, Path(parent), SHARD_BYTES[config])
        files: list[Path] = []
        written = timed(lambda: files.extend(write()))()
        nbytes = sum(file.stat().st_size for file in files)
        print(f"{nbytes / 1e9:.2f} GB written in {len(files)} files in {written:.0f} s", flush=True)
        ways = [
            ("read past the page cache", timed(partial(read_past_the_page_cache, files))),
            ("read through it, cold", timed(partial(read_all, files))),
            ("memory written for the first time", timed(partial(write_fresh_memory, nbytes))),
            ("loaded, cold", partial(load_elsewhere, Path(parent))),
        ]
        try:
            read_past_the_page_cache(files[-1:])
        except (OSError, AttributeError):  # not every file system and not every system has it
            del ways[0]
        found: dict[str, list] = {what: [] for what, _ in ways}
        for i in range(repetitions):
            for what, call in ways[i % len(ways) :] + ways[: i % len(ways)]:
                dropped = drop_from_page_cache(files)
                found[what].append(call())
            print(
                *(f"{what}: {seconds_of(results[-1]):.2f} s" for what, results in found.items()), sep="; ", flush=True
            )
        again = timed(partial(read_all, files[:1]))()
        where = file_system(Path(parent))
    loads = found["loaded, cold"]
    seconds = {what: list(map(seconds_of, results)) for what, results in found.items()}
    *reads, _, load = seconds.values()
    read = min(reads, key=statistics.median)
    beyond = [one["most"] - one["weights"] for one in loads if one["most"] is not None]
    return {
        "setting": {"shape": config.name, "dtype": "bfloat16", "bytes": nbytes, "files": len(files), "file_system": where,
                    "page_cache": dropped, "weights": "random"},
        "rows": [
            {"what": what, "seconds": spread(took), "bytes_per_second": spread([nbytes / s for s in took])}
            for what, took in seconds.items()
        ] + [{"what": "one file read again", "bytes_per_second": spread([nbytes / len(files) / again])}],
        "fraction_of_reading": ratios(read, load),
        "host_bytes_beyond_weights_and_page_cache": spread(beyond) if beyond else None,
    }  # fmt: skip


def show(result: dict) -> None:
    fraction, beyond = result["fraction_of_reading"], result["host_bytes_beyond_weights_and_page_cache"]
    for row in result["rows"]:
        print(f"{row['what']}: {row['bytes_per_second']['median'] / 1e9:.2f} GB/s")
    verdict = "reached" if fraction["median"] >= FRACTION else "missed"
    print(f"loading at {fraction['median']:.0%} of the reading speed: target of {FRACTION:.0%} {verdict}")
    if beyond:
        verdict = "reached" if beyond["max"] < HOST_BYTES else "missed"
        held = memory.human_bytes(max(0, beyond["max"]))
        print(f"{held} beyond weights and page cache: target of {HOST_BYTES / 1e9} GB {verdict}")


def main() -> int:
    if sys.argv[1:2] == ["--load"]:
        load_here(sys.argv[2])
        return 0
    where = "where the checkpoint is written, and removed afterwards; otherwise a temporary folder"
    args = options(__doc__, "toy size", folder=where, repetitions=3)
    folder = args.folder or Path(tempfile.gettempdir())
    config = TOY if args.quick else FULL
    weights = memory.weight_bytes(config)
    for what, free in (("disk", shutil.disk_usage(folder).free), ("memory", free_bytes("cpu"))):
        if free < weights + 2e9:
            raise CapacityError(
                f"{memory.human_bytes(weights)} of weights and 2 GB need more {what} than {memory.human_bytes(free)}: "
                "use --quick, or give a --folder on another disk"
            )
    result = measure(config, folder, 1 if args.quick else args.repetitions)
    show(result)
    if args.quick:
        print("toy size: the times mean nothing, and nothing was recorded")
        return 0
    keep("loading", args, result)
    return 0


if __name__ == "__main__":
    script(main)
