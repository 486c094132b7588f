"""Run notebooks as a reader's Jupyter would, and write what they showed into a folder: play.py OUT [--interrupt] NOTEBOOK …

With --interrupt a notebook's first half runs, its next longest cell is interrupted, as the stop button does, and then every
cell runs from the top in the same kernel.
"""

import asyncio
import sys
import threading
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from notebooks import execute, normalise

AFTER = 0.3  # seconds into the cell


def execute_after_interruption(notebook: nbformat.NotebookNode, folder: Path) -> None:
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    middle = len(code) // 2
    with client.setup_kernel():
        for i in code[:middle]:
            client.execute_cell(notebook.cells[i], i)
        endless = nbformat.v4.new_code_cell(notebook.cells[code[middle]].source + "\nwhile True: pass")
        stop = threading.Timer(AFTER, lambda: asyncio.run(client.km.interrupt_kernel()))
        notebook.cells.append(endless)
        stop.start()
        try:
            client.execute_cell(endless, len(notebook.cells) - 1)
        except CellExecutionError as error:
            if error.ename != "KeyboardInterrupt":
                raise
        notebook.cells.pop()
        for i in code:
            client.execute_cell(notebook.cells[i], i)


def main() -> None:
    out, *names = sys.argv[1:]
    play = execute
    if "--interrupt" in names:
        names.remove("--interrupt")
        play = execute_after_interruption
    for path in map(Path, names):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        play(notebook, path.parent)
        normalise(notebook)
        (Path(out) / path.name).write_text(nbformat.writes(notebook), encoding="utf-8")


if __name__ == "__main__":
    main()
