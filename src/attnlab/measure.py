"""Measuring what `memory` predicts: bytes that a call really takes, and how fast this machine reads memory."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise writes two lines a call into a notebook


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory on the CPU that ``call`` holds at once beyond what is there before it, its result included.

    Counted from torch's own allocations, kernels' scratch space too; not what the operating system makes of them.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()  # kept, so that it counts
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def read_bandwidth(device: torch.device | str = "cpu", nbytes: int = 512_000_000, repetitions: int = 5) -> float:
    """Bytes a second that a matrix-vector product reads, the work a decoder does: median of ``repetitions``.

    ``nbytes`` should be well above the last cache. On a CPU this is torch's kernel, which can be slower than the memory.
    """
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    columns = 4096
    matrix = torch.ones(max(1, nbytes // columns // dtype.itemsize), columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)
    out = matrix @ vector  # warm-up

    def wait() -> None:
        if device.type != "cpu":
            float(out[0])  # the host waits for the number

    rates = []
    for _ in range(repetitions):
        wait()
        start = time.perf_counter()
        torch.mv(matrix, vector, out=out)
        wait()
        rates.append(matrix.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def processor_name() -> str:
    """The processor as its maker calls it, where the system says so; else its architecture."""
    try:
        if platform.system() == "Linux":
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
            return named[0] if named else platform.machine()
        if platform.system() == "Darwin":
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()
