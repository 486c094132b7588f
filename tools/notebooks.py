"""Execute notebooks and write their outputs back: `make notebooks`, or `python tools/notebooks.py FILE …`.

What is written depends on the notebook and the package, not on the machine or the moment: cells numbered from 1, no
times in the metadata, no widget state, no process ids. So a difference in git is a difference in what the notebook does.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
KEEP_NOTEBOOK = {"kernelspec", "language_info", "mystnb"}
KEEP_CELL = {"tags", "mystnb"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PROCESS = re.compile(r"/tmp/ipykernel_\d+/\d+\.py")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run every cell in order in a fresh kernel; a cell that raises ends it, unless tagged raises-exception."""
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()


def steady(text: str) -> str:
    """The same text without what changes from run to run."""
    return ADDRESS.sub("at 0x0", PROCESS.sub("cell.py", text))


def normalise(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata = {k: v for k, v in notebook.metadata.items() if k in KEEP_NOTEBOOK}
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python"}
    count = 0
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEEP_CELL}
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = merged(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "text" in output:
                output.text = steady(output.text)
            for kind, value in output.get("data", {}).items():
                if isinstance(value, str) and kind.startswith("text/"):
                    output.data[kind] = steady(value)
            if "metadata" in output:
                output.metadata = {}
            if len(output.get("data", {})) > 1:  # a widget lives as long as its kernel; what stands beside it stays
                output.data.pop(WIDGET_VIEW, None)


def merged(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """One output for each run of the same stream: how it arrives in pieces is chance."""
    result: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = result[-1] if result else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            result.append(output)
    return result


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    nbformat.validate(notebook)
    beside = path.with_suffix(".new")
    beside.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")
    os.replace(beside, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="notebooks; all of notebooks/ if none is named")
    os.environ["TQDM_DISABLE"] = "1"  # a bar says how fast a machine is
    paths = parser.parse_args().files or sorted([*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("template/*.ipynb")])
    for number, path in enumerate(paths, 1):
        print(f"[{number}/{len(paths)}] {path.name} …", end=" ", flush=True)
        started = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        try:
            execute(notebook, path.resolve().parent)
        except CellExecutionError as error:
            print(f"failed, and is left as it was\n{error}", file=sys.stderr)
            return 1
        normalise(notebook)
        write(notebook, path)
        print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
