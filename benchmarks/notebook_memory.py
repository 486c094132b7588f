"""How much memory each chapter takes: which of them run on a small machine, such as Binder's with 2 GB.

python benchmarks/notebook_memory.py            writes results/notebook_memory-<machine>.json; eight minutes
python benchmarks/notebook_memory.py --quick    a notebook of two cells, no record

The most that a notebook's kernel and the processes it starts have resident together, looked at every 20 ms while the notebook is
executed; for the kernel alone, the system's own account of its peak. Pages of files that processes share count in each. Binder's
limit covers the Jupyter server too, so a chapter fits if it and an idle JupyterLab take less than 2 GB together.
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil
from common import keep, options, script
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 2_000_000_000  # bytes
SECONDS = 0.02


class Watch(threading.Thread):
    """Looks at a process and all below it until told to stop; ``peak`` is the most they held together, in bytes."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.done = process, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(SECONDS):
            self.peak = max(self.peak, resident(self.process), own_peak(self.process))


def resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:  # ended while it was looked at
        pass
    return total


def own_peak(process: psutil.Process) -> int:
    """The kernel's account of the process itself, which misses no moment; 0 on a system that keeps none."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def of_notebook(path: Path) -> int:
    """Bytes that executing a notebook takes at most."""
    client = NotebookClient(
        nbformat.read(path, as_version=4), timeout=600, resources={"metadata": {"path": str(path.parent)}}
    )
    with (
        tempfile.TemporaryDirectory() as compiled,
        client.setup_kernel(
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": compiled}  # a new machine has compiled nothing yet
        ),
    ):
        watch = Watch(psutil.Process(client.km.provisioner.pid))
        watch.start()
        try:
            for index, cell in enumerate(client.nb.cells):
                client.execute_cell(cell, index)
        finally:
            watch.done.set()
            watch.join()
    return watch.peak


def of_server() -> int:
    """Bytes of a JupyterLab that nobody uses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                f"--port={port}",
                f"--notebook-dir={folder}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            time.sleep(2)  # its extensions
            return resident(psutil.Process(server.pid))
        finally:
            server.terminate()
            server.wait(30)


def small(folder: Path) -> Path:
    """A notebook that holds 300 MB for a moment."""
    cells = ["x = bytearray(300_000_000)", "del x"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbformat.write(notebook, folder / "small.ipynb")
    return folder / "small.ipynb"


def main() -> int:
    args = options(__doc__, "a notebook of two cells")
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            print(f"small.ipynb: {of_notebook(small(Path(folder))):,} bytes")
        return 0
    server = of_server()
    print(f"{'JupyterLab, idle':40} {server / 1e6:6.0f} MB")
    rows = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        peak = of_notebook(path)
        rows.append({"chapter": path.stem, "peak_bytes": peak, "fits_with_server": peak + server < LIMIT})
        print(
            f"{path.stem:40} {peak / 1e6:6.0f} MB  {'fits' if rows[-1]['fits_with_server'] else 'does not fit'}",
            flush=True,
        )
    keep("notebook_memory", args, {"limit_bytes": LIMIT, "jupyterlab_bytes": server, "rows": rows})
    return 0


if __name__ == "__main__":
    script(main)
