"""How long a reader waits: importing attnlab, executing each chapter, building the book again when nothing changed.

python benchmarks/waiting.py            writes results/waiting-<machine>.json; needs make book first
python benchmarks/waiting.py --quick    the import alone, once, no record
"""

import subprocess
import sys
from pathlib import Path

from common import interleave, keep, options, script, spread, timed

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"import attnlab, beyond torch": 0.3, "all chapters": 120.0, "book, nothing changed": 20.0}  # seconds


def imports(repetitions: int) -> dict:
    """Seconds that ``import attnlab`` takes in a process that has imported torch."""

    def seconds() -> float:
        code = "import time, torch; t = time.perf_counter(); import attnlab; print(time.perf_counter() - t)"
        done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
        return float(done.stdout)

    return {"what": "import attnlab, beyond torch", "seconds": spread(interleave({"": seconds}, repetitions)[""])}


def chapters(repetitions: int) -> list[dict]:
    """Seconds to execute each notebook in a fresh kernel, and all of them."""
    import nbformat
    from nbclient import NotebookClient

    def execute(path: Path) -> None:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()

    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    runs = [{path.name: timed(lambda path=path: execute(path))() for path in paths} for _ in range(repetitions)]
    rows = [{"what": name, "seconds": spread([run[name] for run in runs])} for name in runs[0]]
    return [*rows, {"what": "all chapters", "seconds": spread([sum(run.values()) for run in runs])}]


def warm_rebuild(repetitions: int) -> dict:
    """Seconds of ``make book`` when nothing changed since the last one."""

    def build() -> None:
        subprocess.run([sys.executable, "tools/book.py"], cwd=ROOT, check=True, capture_output=True)

    return {"what": "book, nothing changed", "seconds": spread(interleave({"": timed(build)}, repetitions)[""])}


def main() -> int:
    args = options(__doc__, "the import alone, once")
    if args.quick:
        print(imports(1))
        return 0
    rows = [imports(7), *chapters(2), warm_rebuild(2)]
    for row in rows:
        row["target"] = TARGETS.get(row["what"])
        print(
            f"{row['what']:50} {row['seconds']['median']:8.2f} s"
            + (f"  (at most {row['target']:g})" if row["target"] else "")
        )
    keep("waiting", args, {"rows": rows})
    return 0


if __name__ == "__main__":
    script(main)
