"""The companion: the small Mistral that we trained and that ships with attnlab. A Hugging Face folder, and its report."""

import json
from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files(__name__)))


def report() -> dict:
    """What was measured of it: data and its hash, training, bits per byte, heads, and all of it over time."""
    return json.loads((FOLDER / "report.json").read_text(encoding="utf-8"))
