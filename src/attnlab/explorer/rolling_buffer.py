"""The rolling-buffer explorer: a ``RollingKVCache`` token by token, and beside it the mask that it must answer for.

A page has no kernel, so ``static/rolling_buffer.js`` goes through the same steps under the same names. ``steps`` takes them
from the cache itself: its keys carry their own position, so that what lies in a slot says whose key it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attnlab import plots
from attnlab.attention import causal_mask
from attnlab.cache import RollingKVCache
from attnlab.errors import ConfigError, InputError
from attnlab.explorer.base import Explorer

MAX_WINDOW, MAX_TOKENS = 12, 24
EMPTY = -1  # in a slot that nothing was written to


class Step(NamedTuple):
    """What one step does. All numbers are positions, counted from 0.

    A pass of one token is one step: it is written, then it looks. A pass of several is a step for each of its queries,
    which write nothing, and a last one that writes and has no query.
    """

    query: int | None
    sees: tuple[int, ...]
    written: tuple[int, ...]
    overwritten: tuple[int, ...]
    held: tuple[int | None, ...]  # slot by slot, when the step is over


class RollingBufferExplorer(Explorer):
    """Step through a rolling cache: which slot a position takes, what it overwrites, and what its query sees.

    Args:
        window: slots of the cache, and keys that a query sees, its own included.
        tokens: how many go through it, or a list of words, which are then shown too.
        chunk: tokens of a pass. 1: one at a time, as in decoding; more: a prefill in chunks.

    Raises ConfigError for a window, a number of tokens or a chunk below 1 or beyond what a page draws, InputError for
    tokens that are not text.
    """

    kind = "rolling-buffer"

    def __init__(self, window: int = 4, tokens: int | Sequence[str] = 12, chunk: int = 1) -> None:
        words = None if isinstance(tokens, int) else as_words(tokens)
        n_tokens = tokens if words is None else len(words)
        for name, given, largest in (
            ("window", window, MAX_WINDOW), ("tokens", n_tokens, MAX_TOKENS), ("chunk", chunk, MAX_TOKENS),
        ):  # fmt: skip
            if not (isinstance(given, int) and 1 <= given <= largest):
                raise ConfigError(f"{name} is a whole number from 1 to {largest} on a page; got {given!r}")
        self.window, self.n_tokens, self.chunk = window, n_tokens, min(chunk, n_tokens)
        self.steps = steps(window, n_tokens, self.chunk)
        self.opens_at = telling(self.steps)
        super().__init__(
            data={
                "window": window,
                "n_tokens": n_tokens,
                "chunk": self.chunk,
                "words": words,
                "step": self.opens_at,
                "max_window": MAX_WINDOW,
                "max_tokens": MAX_TOKENS if words is None else n_tokens,
            }
        )

    def still(self) -> Figure:
        step, laps = self.steps[self.opens_at], -(-self.n_tokens // self.window)
        plots.style()
        widths = (self.window + 1.5, max(6, min(12, self.n_tokens)))
        height = min(6.4, max(plots.SIZE[1], 1.1 + 0.26 * (laps + 2)))
        fig, (slots, mask) = plt.subplots(1, 2, figsize=(4.2 + 0.18 * self.window, height), width_ratios=widths)
        plt.close(fig)
        self._draw_slots(slots, step, laps)
        self._draw_mask(mask, step)
        return fig

    def _draw_slots(self, ax: Axes, step: Step, laps: int) -> None:
        """Every position in the column of its slot, as many rows as the text goes round; above them what is kept."""
        W, newest = self.window, max((step.query or 0, *step.written))
        for p in range(self.n_tokens):
            face, ink, look = plots.GROUND, plots.INK, {}
            if p in step.sees:
                face, ink = plots.COLOURS[1], plots.GROUND
                if p not in step.held:  # of a chunk that is not written yet
                    look = {"edgecolor": plots.GROUND, "linestyle": "--", "linewidth": 1.5}
            elif p in step.overwritten:
                look = {"edgecolor": plots.COLOURS[0], "linewidth": 2, "hatch": "//////"}
            elif p not in step.held:
                ink, look = "#6a6a6a", {"edgecolor": plots.FAINT, "linestyle": ":" if p > newest else "none"}
            _box(ax, p % W, p // W + 1.4, str(p), face, ink, **look)
        for s, p in enumerate(step.held):
            seen = p in step.sees
            face, ink = (plots.COLOURS[1], plots.GROUND) if seen else (plots.GROUND, plots.INK)
            _box(ax, s, 0, "–" if p is None else str(p), face, ink)
        starts = range(0, self.n_tokens, W)
        names = [str(a) if W == 1 else f"{a}–{min(a + W, self.n_tokens) - 1}" for a in starts]
        ax.set_yticks([0.5, *(a // W + 1.9 for a in starts)], ["kept", *names])
        ax.set_xticks([s + 0.5 for s in range(W)], [str(s) for s in range(W)])
        ax.set(xlim=(-0.1, W + 0.1), ylim=(laps + 1.5, -0.1))
        _bare(ax, "slot = position mod " + str(W))

    def _draw_mask(self, ax: Axes, step: Step) -> None:
        N = self.n_tokens
        for q, row in enumerate(causal_mask(N, window=self.window).tolist()):
            first, strength = row.index(True), 1 if q == step.query else 0.62
            ax.add_patch(Rectangle((0, q), first, 1, fill=False, edgecolor=plots.FAINT, hatch="//////", linewidth=0))
            ax.add_patch(Rectangle((first, q), q + 1 - first, 1, facecolor=plots.COLOURS[1], alpha=strength))
        ax.hlines(range(N), 0, N, colors=plots.GROUND, linewidth=1)
        ax.vlines(range(N), 0, N, colors=plots.GROUND, linewidth=1)
        band = step.written if step.query is None else (step.query,)
        outline = {"fill": False, "edgecolor": plots.INK, "linewidth": 2, "zorder": 3}
        ax.add_patch(Rectangle((0, band[0]), N, len(band), **outline))
        for axis, most in ((ax.xaxis, 8), (ax.yaxis, 12)):
            named = range(0, N, -(-N // most))
            axis.set_ticks([i + 0.5 for i in named], [str(i) for i in named])
        ax.set(xlim=(-0.1, N + 0.1), ylim=(N + 0.1, -0.1), ylabel="query", aspect="equal")
        _bare(ax, "key")

    @property
    def alt(self) -> str:
        step = self.steps[self.opens_at]
        over = "no slot is overwritten"
        if step.overwritten:
            over = "the new token takes the slot of one that lies beyond the window"
        elif not step.written:
            over = "a chunk's query looks before the chunk is written over what it still sees"
        return (
            f"Left, positions in columns, one for each of {self.window} slots, and what each slot holds; right, the mask, "
            f"a band of {self.window} keys a query with the row of this step outlined: {over}"
        )


def as_words(tokens: Sequence[str]) -> list[str]:
    """Raises InputError for what is no list of text."""
    if isinstance(tokens, str):
        raise InputError(f"tokens are a number or a list of words; got one text: {tokens!r}.split() makes a list of it")
    if not isinstance(tokens, Sequence):
        raise InputError(f"tokens are a number or a list of words; got {tokens!r}")
    if wrong := [token for token in tokens if not isinstance(token, str)]:
        raise InputError(f"tokens are a number or a list of words; got {wrong[0]!r} among them")
    return list(tokens)


def steps(window: int, n_tokens: int, chunk: int = 1) -> list[Step]:
    """What a ``RollingKVCache`` of one layer and one row does with ``n_tokens`` that come ``chunk`` at a time.

    >>> steps(window=3, n_tokens=5)[-1]
    Step(query=4, sees=(2, 3, 4), written=(4,), overwritten=(1,), held=(3, 4, 2))
    """
    cache = RollingKVCache(n_layers=1, batch=1, n_kv_heads=1, head_dim=1, window=window)
    cache.k.fill_(EMPTY)
    taken = []
    before = [EMPTY] * window
    for start in range(0, n_tokens, chunk):
        positions = range(start, min(start + chunk, n_tokens))
        T = len(positions)
        keys = torch.tensor(positions, dtype=torch.float32).reshape(1, 1, T, 1)  # (B, Hkv, T, D): each its own position
        read, _, sees = cache.update(0, keys, keys)
        cache.advance(T)
        read = read.flatten().long()  # (S,)
        seen = torch.ones(T, len(read), dtype=torch.bool)  # (T, S)
        if "mask" in sees:
            seen = sees["mask"][0, 0]
        elif sees:
            seen = causal_mask(T, len(read), sees["window"])
        looks = [(p, tuple(sorted(read[row].tolist()))) for p, row in zip(positions, seen, strict=True)]
        after = cache.k.flatten().long().tolist()
        written = tuple(sorted(set(after) - set(before) - {EMPTY}))
        overwritten = tuple(sorted(set(before) - set(after) - {EMPTY}))
        if T == 1:
            taken.append(Step(*looks[0], written, overwritten, _held(after)))
        else:
            taken += [Step(*look, (), (), _held(before)) for look in looks]
            taken.append(Step(None, (), written, overwritten, _held(after)))
        before = after
    return taken


def telling(taken: list[Step]) -> int:
    """The step to open at: of single tokens the second that overwrites, so that one is gone already; of a chunk the first
    query that still sees what the chunk will overwrite."""
    overwriting = [i for i, step in enumerate(taken) if step.overwritten]
    if not overwriting:
        return len(taken) - 1
    at = overwriting[0]
    if taken[at].query is not None:
        return overwriting[min(1, len(overwriting) - 1)]
    while at and not taken[at - 1].written:
        at -= 1
    return at


def _held(slots: list[int]) -> tuple[int | None, ...]:
    return tuple(None if p == EMPTY else p for p in slots)


def _box(ax: Axes, x: float, y: float, text: str, face: str, ink: str, **look) -> None:
    look = {"edgecolor": plots.INK, "linewidth": 1} | look
    ax.add_patch(Rectangle((x + 0.06, y + 0.08), 0.88, 0.84, facecolor=face, **look))
    ground = {"facecolor": face, "edgecolor": "none", "pad": 1} if "hatch" in look else None
    ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color=ink, bbox=ground)


def _bare(ax: Axes, title: str) -> None:
    """Columns are named above, and there are no lines around."""
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_title(title, fontsize=9, loc="center")
