"""Some cells of the notebooks let a model read the source of Python's standard library, which changes from one Python to the next.

They are tagged ``reads-python``, run and assert everywhere, and are compared with what is committed on the Python it was made with.
"""

import pytest

COMMITTED_WITH = "3.11"  # the Python that made the notebooks' outputs


def leave_uncompared(items: list[pytest.Item], python: str) -> list[pytest.Item]:
    """The cells that read another Python's source than the one whose outputs are committed; they run and aren't compared."""
    if python == COMMITTED_WITH:
        return []
    tagged = [item for item in items if "reads-python" in getattr(item, "cell", {}).get("metadata", {}).get("tags", [])]
    for item in tagged:
        item.options["check"] = False
    return tagged
