"""``attnlab doctor --room``: one machine, checked before a workshop in under 20 seconds, and one line to read out.

What is checked is what the notebooks need: packages, attention that agrees with the formula, memory, a GPU that computes if
there is one, the companion, a notebook kernel that imports attnlab, and folders that can be written to. No network is asked.
"""

import os
import shutil
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from subprocess import DEVNULL

from attnlab.errors import AttnlabError

NEEDED = (
    *("torch", "numpy", "einops", "jaxtyping", "safetensors", "tokenizers", "transformers", "mistral-common"),
    *("matplotlib", "seaborn", "ipywidgets", "anywidget", "jupyterlab", "ipykernel"),
)
FREE_MEMORY = 2e9  # bytes; what a chapter takes at most is in benchmarks/results/notebook_memory-*.json
FREE_DISK = 0.5e9  # bytes, for what notebooks write into the temporary folder
KERNEL_SECONDS = 17  # for a kernel to start and import attnlab, beside the other checks
IN_KERNEL = "import attnlab, anywidget, ipywidgets"


class NotReady(Exception):
    """What is wrong, and what to do about it."""

    def __str__(self) -> str:
        return ", ".join(self.args)


def check() -> tuple[bool, str]:
    """Whether this machine is ready, and the line that says so: what it has, or what is wrong and what to do."""
    found: list[str] = []
    wrong: list[str] = []

    def note(part: Callable[[], str]) -> None:
        try:
            found.append(part())
        except NotReady as problem:
            wrong.append(str(problem))

    with ThreadPoolExecutor(max_workers=1) as pool:
        kernel = pool.submit(_jupyter)  # starts while the rest is looked at
        for part in (_packages, _cores, _memory, _gpu, _attention, _companion, _folders):
            note(part)
        note(kernel.result)
    found.append(_browser())
    if wrong:
        return False, one_line("not ready: " + "; ".join(wrong))
    return True, one_line("ready: " + ", ".join(filter(None, found)))


def one_line(text: str) -> str:
    return " ".join(text.split())


def missing(packages: tuple[str, ...]) -> list[str]:
    absent = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            absent.append(package)
    return absent


def _packages() -> str:
    if absent := missing(NEEDED):
        raise NotReady(f"no {' nor '.join(absent)} here", f"pip install {' '.join(absent)}")
    return ""


def _cores() -> str:
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{n} core{'s'[: n > 1]}"


def _memory() -> str:
    from attnlab.loading import free_bytes

    free = free_bytes("cpu")
    if free < FREE_MEMORY:
        raise NotReady(
            f"{free / 1e9:.1f} GB of memory free, less than {FREE_MEMORY / 1e9:.0f}",
            "close other programs and notebooks",
        )
    return f"{free / 1e9:.0f} GB free"


def _gpu() -> str:
    """A GPU is one only if it computes: a driver that is too old is noticed at the first product."""
    import torch

    if not torch.cuda.is_available():
        return "Apple GPU" if torch.backends.mps.is_available() else "no GPU"
    name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    try:
        x = torch.ones(64, 64, dtype=dtype, device="cuda")
        (x @ x).sum().item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise NotReady(
            f"the GPU {name} does not compute ({reason})",
            "update its driver, or set CUDA_VISIBLE_DEVICES= to do without",
        ) from error
    return f"{f'{count} × ' if count > 1 else ''}{name} in {str(dtype).removeprefix('torch.')}"


def _attention() -> str:
    """torch's kernel, which the fast path takes, against the formula."""
    import torch

    from attnlab import causal_mask, scaled_dot_product_attention

    torch_state = torch.random.get_rng_state()
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)  # (B, H, T, D), (B, Hkv, S, D)
    torch.random.set_rng_state(torch_state)
    mask = causal_mask(8, 8)
    fast = scaled_dot_product_attention(q, k, k, mask=mask)
    formula, _ = scaled_dot_product_attention(q, k, k, mask=mask, return_weights=True)
    if not torch.allclose(fast, formula, atol=1e-5):
        off = (fast - formula).abs().max().item()
        raise NotReady(f"torch's attention is off by {off:.1g}", "pip install --force-reinstall torch")
    return ""


def _companion() -> str:
    import attnlab

    try:
        lm = attnlab.load("companion", progress=False)
        ids = lm.tokenizer.encode("def")
        attnlab.generate(lm, ids, max_new_tokens=4)  # the first call is slower
        start = time.perf_counter()
        new = attnlab.generate(lm, ids, max_new_tokens=32)
        seconds = time.perf_counter() - start
    except AttnlabError as error:
        raise NotReady(
            f"the companion does not run ({error})", "pip install --force-reinstall --no-deps attnlab"
        ) from error
    return f"companion {len(new) / seconds:.0f} tokens/s"


def _folders() -> str:
    """The temporary folder, which notebooks write to, and this one, where they are saved."""
    for folder, called in ((None, "the temporary folder"), (os.curdir, "this folder")):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(1_000_000))
        except OSError as error:
            raise NotReady(
                f"{called} cannot be written to ({error.strerror})",
                "choose another one with TMPDIR, or free some space" if folder is None else "change to one of your own",
            ) from error
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < FREE_DISK:
        raise NotReady(f"{free / 1e9:.1f} GB of disk free for temporary files", "free some space")
    return ""


def _jupyter() -> str:
    """A kernel as Jupyter starts it, and what a chapter's first cell imports."""
    if missing(("ipykernel", "jupyter-client")):
        return ""  # said among the packages
    from jupyter_client.kernelspec import NoSuchKernel
    from jupyter_client.manager import start_new_kernel

    late = time.monotonic() + KERNEL_SECONDS
    again = f"start it once by hand: {sys.executable} -m jupyterlab"
    try:
        manager, client = start_new_kernel(KERNEL_SECONDS, "python3", stdout=DEVNULL, stderr=DEVNULL)
    except NoSuchKernel as error:
        raise NotReady("Jupyter knows no Python kernel", "python -m ipykernel install --sys-prefix") from error
    except (OSError, RuntimeError) as error:
        raise NotReady(f"the notebook kernel does not start ({error})", again) from error
    try:
        reply = client.execute_interactive(
            IN_KERNEL, timeout=max(1, late - time.monotonic()), output_hook=lambda message: None
        )["content"]
    except TimeoutError as error:
        raise NotReady(f"the notebook kernel does not answer in {KERNEL_SECONDS} s", again) from error
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    if reply["status"] != "ok":
        raise NotReady(
            f"in the notebook kernel: {reply['ename']}: {reply['evalue']}",
            f"start Jupyter from this environment: {sys.executable} -m jupyterlab",
        )
    return "Jupyter yes"


def _browser() -> str:
    """Said, not required: a machine that is reached through a hub has none."""
    try:
        webbrowser.get()
    except webbrowser.Error:
        return "browser no"
    return "browser yes"
