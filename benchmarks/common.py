"""What every benchmark shares: the machine, the versions, interleaved repetitions, and records on disk."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent / "src"))  # a machine with a GPU may have torch and a copy of the tree, and no more

import torch  # noqa: E402

from attnlab.errors import AttnlabError, CheckpointError, ConfigError  # noqa: E402
from attnlab.measure import processor_name  # noqa: E402


def options(doc: str, quick: str, folder: str | None = None, **counts: int | None) -> argparse.Namespace:
    """--quick (``quick`` says what it does), --overwrite, --commit; --folder if ``folder`` says what for; and numbers of 1
    or more, with their defaults.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick}, no record")
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"how many ({default or 'as torch chooses'})")
    if folder is not None:
        parser.add_argument("--folder", type=Path, help=folder)
    parser.add_argument("--overwrite", action="store_true", help="replace a record even of another machine")
    parser.add_argument("--commit", help="the tree's commit, where git can't tell")
    args = parser.parse_args()
    for name in counts:
        if (n := getattr(args, name)) is not None and n < 1:
            parser.error(f"--{name} is 1 or more")
    return args


def keep(script: str, args: argparse.Namespace, content: dict) -> None:
    """The record of a script that was run with ``options``."""
    described = machine()
    path = record_path(script, described)
    write_record(path, {"script": script, "machine": described, **provenance(args.commit), **content}, args.overwrite)
    print(f"written: results/{path.name}")


def script(main: Callable[[], int | None]) -> None:
    """A script's end: what a user can mend is said in one line."""
    try:
        sys.exit(main())
    except AttnlabError as error:
        sys.exit(f"error: {error}")


def machine(device: str = "cpu") -> dict:
    """What decides a measurement, as a reader wants to know it: the GPU, or the processor. No host names, no paths."""
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return {"gpu": gpu.name, "gpu_bytes": gpu.total_memory}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor_name(), "cores": cores, "system": platform.system()}


def versions() -> dict:
    """Of Python and of what is timed; of the driver and CUDA where there is a GPU."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "driver": _driver()}
    for package in ("transformers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the tree this file is in, "+" if files other than records differ from it; "unknown" outside of git."""
    try:
        head = _output("git", "-C", str(HERE), "rev-parse", "HEAD")
        but_records = (":(top)", ":(top,exclude)benchmarks/results")
        return head + ("+" if _output("git", "-C", str(HERE), "status", "--porcelain", "--", *but_records) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def provenance(given_commit: str | None = None) -> dict:
    """When and with what: goes into every record, and into every section of one that is made in several runs."""
    return {"date": now(), "commit": given_commit or commit(), "versions": versions()}


def timed(call: Callable[[], object], device: str = "cpu") -> Callable[[], float]:
    """``call`` as a call that returns its seconds, the work it leaves to a GPU included."""

    def seconds() -> float:
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        return time.perf_counter() - start

    return seconds


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(calls: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """What each call returned, by name: one of each in turn, so that what disturbs the machine disturbs all alike.

    The first round is a warm-up and isn't counted.
    """
    rounds = [{name: call() for name, call in calls.items()} for _ in range(repetitions + 1)]
    return {name: [values[name] for values in rounds[1:]] for name in calls}


def spread(values: list[float]) -> dict:
    """Median, extremes and how many."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
    }


def seed_by_seed(
    train: Callable[[tuple[dict, int]], tuple], asked: list[dict], seeds: int
) -> Iterator[tuple[dict, list]]:
    """Each of ``asked`` with what ``train((one, seed))`` gave for every seed; all processors work at once."""
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as workers:
        results = workers.map(train, [(one, seed) for one in asked for seed in range(seeds)])
        for one in asked:
            yield one, [next(results) for _ in range(seeds)]


def ratios(above: list[float], below: list[float]) -> dict:
    """above / below, round by round of one interleaved run."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def record_path(script: str, described: dict, folder: Path = RESULTS) -> Path:
    """``decode_attention-amd-epyc-7763-2-cores.json``: the script, and the GPU or the processor with its cores."""
    name = described.get("gpu") or f"{described['processor']} {described['cores']} cores"
    return folder / f"{script}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def read_record(path: Path, described: dict, overwrite: bool = False) -> dict | None:
    """The record at ``path``, or None if there is none (or it is to be overwritten).

    Raises ConfigError if it is of another machine, CheckpointError if it cannot be read.
    """
    if overwrite or not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        its_machine = record["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} is no record ({error}): move it away, or pass --overwrite") from error
    if its_machine != described:
        differ = ", ".join(
            f"{key}: {its_machine.get(key)!r} there, {described.get(key)!r} here"
            for key in sorted(its_machine.keys() | described.keys())
            if its_machine.get(key) != described.get(key)
        )
        raise ConfigError(f"{path.name} was measured on another machine ({differ}): move it away, or pass --overwrite")
    return record


def write_record(path: Path, record: dict, overwrite: bool = False) -> None:
    """Write a record beside its place, then move it there. Refuses to replace another machine's, as ``read_record`` does."""
    read_record(path, record["machine"], overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _driver() -> str | None:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
