"""Explorers: figures to move, in a live notebook, on a page without a kernel, and in a file of their own.

Make one the last value of a cell, or call its ``save_html(path)``.
"""

from attnlab.explorer.attention import AttentionExplorer
from attnlab.explorer.dot_product import DotProductExplorer
from attnlab.explorer.memory import MemoryExplorer
from attnlab.explorer.shape import ShapeExplorer
from attnlab.record import AttentionRecord

__all__ = ["AttentionExplorer", "DotProductExplorer", "MemoryExplorer", "ShapeExplorer", "explore"]


def explore(record: AttentionRecord, **options) -> AttentionExplorer:
    """The attention explorer of a record; see :class:`attnlab.explorer.attention.AttentionExplorer` for the options."""
    return AttentionExplorer(record, **options)
