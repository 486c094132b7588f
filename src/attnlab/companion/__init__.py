"""The models that we trained and that ship with attnlab: the companion, and its siblings. Hugging Face folders with reports.

The companion is a small Mistral. The siblings differ from each other in ``n_kv_heads`` alone (``attnlab.training.siblings``).
"""

import json
from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files(__name__)))
COMPANION = "companion"
SIBLINGS = ("multi-head", "grouped-query", "multi-query")


def folder(name: str = COMPANION) -> Path | None:
    """Where the model of that name is; None for a name that doesn't ship."""
    if name == COMPANION:
        return FOLDER
    return FOLDER / name if name in SIBLINGS else None


def report(name: str = COMPANION) -> dict:
    """What was measured of it: data and its hash, training, bits per byte, heads, and all of it over time."""
    return json.loads((folder(name) / "report.json").read_text(encoding="utf-8"))


def siblings() -> list[dict]:
    """One row for every sibling that was trained, those that don't ship among them: see ``attnlab.training.siblings.summary``."""
    return json.loads((FOLDER / "siblings.json").read_text(encoding="utf-8"))
