"""Explorers: figures to move, in a live notebook, on a page without a kernel, and in a file of their own.

Make one the last value of a cell, or call its ``save_html(path)``.
"""

from attnlab.explorer.attention import AttentionExplorer
from attnlab.explorer.dot_product import DotProductExplorer
from attnlab.explorer.live import LiveExplorer
from attnlab.explorer.memory import MemoryExplorer
from attnlab.explorer.rolling_buffer import RollingBufferExplorer
from attnlab.explorer.shape import ShapeExplorer

__all__ = [
    "AttentionExplorer",
    "DotProductExplorer",
    "LiveExplorer",
    "MemoryExplorer",
    "RollingBufferExplorer",
    "ShapeExplorer",
]
