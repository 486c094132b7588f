"""The dot-product explorer: one query, a few keys, and the way from scores to the output, for any ``d_k`` of a row.

The reader moves a query in a plane, but its dot products have ``d_k`` coordinates. The query is the plane's (x, y) over
and over: (x, y, x, y, …). A key's first two coordinates are given; the others are random numbers with mean 0 and variance 1.
Then q·k = x · (sum of the key's odd coordinates) + y · (sum of the even ones): the plane's dot product of the query with the
key's *arrow*, the sum of its pairs, and nothing is left out. Where x² + y² = 2, the query's coordinates have the mean square
1, and the score of a key of random coordinates has the variance ``d_k``.
"""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from attnlab import plots
from attnlab.attention import scaled_dot_product_attention
from attnlab.errors import ConfigError, InputError, ShapeError
from attnlab.explorer.base import Explorer

DIMS = tuple(2**n for n in range(1, 11))  # 2 … 1024
REACH = 3.0  # the plane shows -3 … 3
MAX_KEYS = 12


class DotProductExplorer(Explorer):
    """Move a query, turn ``d_k``, switch the division by √d_k off; see scores, weights and output follow.

    Args:
        keys: (S, 2), the keys' first two coordinates, within ±3. values: (S,) or (S, 1), a number for each key.
        query: (2,), where the query stands at first. d_k: one of 2, 4, … 1024. divide: by √d_k.
        seed: of the keys' other coordinates.

    Raises ShapeError for sizes that do not fit, InputError for numbers that are not finite or lie outside the plane,
    ConfigError for a ``d_k`` that is not in the row.
    """

    kind = "dot-product"

    def __init__(
        self,
        keys: Sequence | Tensor = ((2, 0), (0, 2), (-2, 0)),
        values: Sequence | Tensor = (10, 20, 30),
        query: Sequence | Tensor = (1.5, 1.0),
        d_k: int = 2,
        divide: bool = True,
        seed: int = 0,
    ) -> None:
        keys, values, query = (torch.as_tensor(x, dtype=torch.float64) for x in (keys, values, query))
        S = len(keys) if keys.dim() else 0
        if keys.shape != (S, 2) or values.numel() != S or query.numel() != 2 or not 1 <= S <= MAX_KEYS:
            raise ShapeError(
                f"expected keys (S, 2) with S from 1 to {MAX_KEYS}, a value for each, and a query of 2 coordinates; "
                f"got keys {tuple(keys.shape)}, values {tuple(values.shape)}, query {tuple(query.shape)}"
            )
        for name, numbers, limit in (("keys", keys, REACH), ("values", values, math.inf), ("query", query, REACH)):
            if not (numbers.isfinite().all() and numbers.abs().max() <= limit):
                within = f" from -{limit:g} to {limit:g}" if math.isfinite(limit) else ""
                raise InputError(f"{name} must be finite numbers{within}; got {numbers.tolist()}")
        if d_k not in DIMS:
            raise ConfigError(f"d_k must be one of {', '.join(map(str, DIMS))}; got {d_k!r}")
        self.values, self.query, self.d_k, self.divide = values.flatten(), query.flatten(), d_k, bool(divide)
        others = torch.randn(S, DIMS[-1] - 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self._keys = torch.cat([keys, others], dim=1)  # (S, 1024)
        super().__init__(
            {
                "dims": list(DIMS),
                "arrows": [self.arrows(d).tolist() for d in DIMS],
                "values": self.values.tolist(),
                "labels": [str(i) for i in range(S)],
                "query": self.query.tolist(),
                "d_k": d_k,
                "divide": self.divide,
            }
        )

    def key_vectors(self, d_k: int) -> Float[Tensor, "S d_k"]:
        """The keys with ``d_k`` coordinates: a longer key begins with the shorter one."""
        return self._keys[:, :d_k]

    def arrows(self, d_k: int) -> Float[Tensor, "S 2"]:
        """What a query of the plane sees of each key: the sum of its pairs of coordinates."""
        return self.key_vectors(d_k).unflatten(1, (-1, 2)).sum(1)

    def numbers(self, query: Sequence | Tensor, d_k: int, divide: bool = True) -> dict[str, Tensor]:
        """Scores, what softmax sees, weights and output for a query (2,) of the plane, from all ``d_k`` coordinates."""
        q = (
            torch.as_tensor(query, dtype=torch.float64).flatten().repeat(d_k // 2)[None, None, None]
        )  # (B=1, H=1, T=1, D)
        k, v = self.key_vectors(d_k)[None, None], self.values[None, None, :, None]  # (1, 1, S, D), (1, 1, S, 1)
        scale = d_k**-0.5 if divide else 1.0
        output, weights = scaled_dot_product_attention(q, k, v, scale=scale, return_weights=True)
        scores = (q @ k.mT).flatten()
        return {"scores": scores, "scaled": scores * scale, "weights": weights.flatten(), "output": output.flatten()}

    @property
    def alt(self) -> str:
        return (
            "Left, a query and keys as arrows in the plane. Right, the weight of each key as a bar: "
            "a key that points the query's way has the longest"
        )

    def still(self) -> Figure:
        weights = self.numbers(self.query, self.d_k, self.divide)["weights"]
        arrows = self.arrows(self.d_k) / math.sqrt(self.d_k / 2)
        plots.style()
        fig, (plane, bars) = plt.subplots(1, 2, figsize=plots.SIZE, width_ratios=(3, 2))
        plt.close(fig)
        plane.add_patch(plt.Circle((0, 0), math.sqrt(2), fill=False, linestyle=":", edgecolor=plots.FAINT))
        for i, (x, y) in enumerate(arrows.tolist()):
            plane.plot([0, x], [0, y], color=plots.COLOURS[1])
            plane.plot(x, y, "o", color=plots.COLOURS[1], markersize=4 + 9 * math.sqrt(weights[i]))
            plane.annotate(f"key {i}", (x, y), (4, 8), textcoords="offset points", fontsize=9)
        x, y = self.query.tolist()
        plane.plot([0, x], [0, y], color=plots.COLOURS[2], linestyle="--")
        plane.plot(x, y, "D", color=plots.COLOURS[2], markersize=7)
        plane.annotate("query", (x, y), (4, 8), textcoords="offset points", fontsize=9)
        plane.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal")
        plots.bars([f"key {i}" for i in range(len(weights))], weights.numpy().round(3), "weight", ax=bars)
        bars.set_xlim(0, 1.25)
        plane.set_title(f"d_k = {self.d_k}" + ("" if self.divide else ", not divided"))
        return fig
