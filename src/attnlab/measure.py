"""Measuring what `memory` predicts: bytes that a call really takes, and how fast this machine reads memory."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from attnlab.attention import check_window, online_softmax_attention, scaled_dot_product_attention
from attnlab.errors import ConfigError
from attnlab.files import utf8_by_default

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


def attention_kernels(call: Callable[[], object]) -> list[str]:
    """The operations named after attention that torch ran in ``call``, innermost ones: which kernel did the work.

    ``_scaled_dot_product_flash_attention_for_cpu`` is fused; ``_scaled_dot_product_attention_math`` is the formula in
    single steps; none means that no kernel of attention was asked.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.name.removeprefix("aten::") for event in profile.events()}
    return sorted(name for name in names if name.startswith("_scaled_dot_product"))


def grouped_query_forms(
    q: Float[Tensor, "B H 1 D"], k: Float[Tensor, "B Hkv S D"], v: Float[Tensor, "B Hkv S D"]
) -> dict[str, Callable[[], Tensor]]:
    """Attention of one new token, in four ways that give the same numbers, as calls without arguments.

    ``repeat``: every K/V head copied until there are as many as query heads, if there are fewer, then torch's kernel.
    ``enable_gqa``: torch's kernel told that there are fewer. ``grouped``: this package's, a group's query heads as so many
    queries. ``matmul``: the same grouping by two matrix products and a softmax.
    """
    Hkv, D = k.shape[1], k.shape[3]
    G = q.shape[1] // Hkv

    def repeat() -> Tensor:
        keys, values = (x if G == 1 else x.repeat_interleave(G, dim=1) for x in (k, v))  # (B, H, S, D)
        return F.scaled_dot_product_attention(q, keys, values)

    def matmul() -> Tensor:
        queries = rearrange(q, "B (Hkv G) 1 D -> B Hkv G D", Hkv=Hkv)
        weights = (queries @ k.mT * D**-0.5).softmax(-1)  # (B, Hkv, G, S)
        return rearrange(weights @ v, "B Hkv G D -> B (Hkv G) 1 D")

    return {
        "repeat": repeat,
        "enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "grouped": lambda: scaled_dot_product_attention(q, k, v),
        "matmul": matmul,
    }


def window_forms(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B Hkv T D"], v: Float[Tensor, "B Hkv T D"], window: int
) -> dict[str, Callable[[], Tensor]]:
    """Causal attention of a whole text with a window, in three ways that give the same numbers, as calls without arguments.

    ``masked``: torch's kernel under a mask of T × T, which computes what it hides. ``blocks``: this package's
    ``online_softmax_attention``, which leaves out the blocks that nobody sees. ``flex``: torch's ``flex_attention``, which
    leaves them out as well; its first call compiles it for these shapes, and on a CPU that takes a C++ compiler.

    The list of blocks that ``flex`` needs is made here, once: all layers of a model could share it.

    Raises ConfigError for a window below 1; ``flex`` does where it cannot be compiled.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    check_window(window)
    T = q.shape[2]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # ``visible``, of one query and one key
        return (j <= i) & (j > i - window)

    blocks = create_block_mask(sees, None, None, T, T, device=q.device)
    with utf8_by_default():
        compiled = torch.compile(flex_attention)

    def flex() -> Tensor:
        try:
            return compiled(q, k, v, block_mask=blocks, enable_gqa=k.shape[1] < q.shape[1])
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"flex_attention could not be compiled here ({reason}): on a CPU it needs a C++ compiler such as g++ or "
                f"clang++ (the environment variable CXX may name one). The other forms give the same numbers without"
            ) from error

    return {
        "masked": lambda: scaled_dot_product_attention(q, k, v, causal=True, window=window),
        "blocks": lambda: online_softmax_attention(q, k, v, causal=True, window=window),
        "flex": flex,
    }


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


def peak_flops(device: torch.device | str = "cpu", size: int = 2048, repetitions: int = 5) -> float:
    """Operations a second of a square matrix product, the most that a machine does: median of ``repetitions``.

    In float32 on a CPU and in bfloat16 elsewhere, as ``read_bandwidth``; a GPU wants a ``size`` of 8,192 or so.
    """
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = a @ a  # warm-up

    rates = []
    for _ in range(repetitions):
        float(out[0, 0])  # the host waits for the number
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        float(out[0, 0])
        rates.append(2 * size**3 / (time.perf_counter() - start))
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
