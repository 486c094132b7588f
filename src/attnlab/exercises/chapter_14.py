"""Chapter 14: which key/value heads a rank holds, and a feed-forward layer in parts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.exercises._tools import Mistake, call, compare, parts, tensor


def heads_of_a_rank(answer: Any) -> str:
    """14.1: ``f(rank, ranks, n_heads, n_kv_heads)`` is the list of K/V heads that the rank's query heads read."""
    for ranks, n_heads, n_kv_heads in (
        (2, 32, 8),
        (4, 32, 8),
        (8, 32, 8),
        (16, 32, 8),
        (4, 8, 2),
        (4, 8, 8),
        (8, 8, 1),
    ):
        for rank in range(ranks):
            asked = (rank, ranks, n_heads, n_kv_heads)
            got = call(answer, *asked)
            if isinstance(got, range | set):
                got = list(got)
            got = tensor(got, "the list of K/V heads").flatten()
            group_size, local = n_heads // n_kv_heads, n_heads // ranks
            by_query = [h // group_size for h in range(rank * local, (rank + 1) * local)]
            right = sorted(set(by_query))
            where = f"rank {rank} of {ranks}, {n_heads} query heads on {n_kv_heads}: "
            if got.numel() == 0:
                raise Mistake(f"{where}no K/V head at all, and its query heads need one. Where there are more ranks than K/V "
                              "heads, neighbours hold the same one.")  # fmt: skip
            mistakes = {
                "a K/V head for each query head: they share, so each is held once.": by_query,
                "those are its query heads; several of them read one K/V head.": list(range(rank * local, (rank + 1) * local)),
                "all of them: only those that its query heads read are needed.": list(range(n_kv_heads)),
            }  # fmt: skip
            if ranks > n_kv_heads:
                mistakes["a K/V head that none of its query heads reads: with several ranks to a head, neighbours share one, "
                         "so divide and don't take the remainder."] = [rank % n_kv_heads]  # fmt: skip
            else:
                mistakes["K/V heads dealt like cards: its query heads stand side by side, so theirs do too, and these would be "
                         "read by the wrong queries."] = list(range(rank, n_kv_heads, ranks))  # fmt: skip
            wrong = {
                where + message: torch.tensor(heads) for message, heads in mistakes.items() if heads and sorted(heads) != right
            }  # fmt: skip
            compare(got.sort().values, torch.tensor(right), wrong, what="the list of K/V heads", atol=0)
    return "right: the heads that its query heads read, and no others."


def feed_forward_in_parts(answer: Any) -> str:
    """14.2: ``f(x, gate, up, down, ranks)`` is what each rank adds to the all-reduce, as a list of ``ranks`` tensors."""
    for seed, (d, d_ff, ranks) in enumerate([(6, 8, 2), (4, 12, 3), (5, 16, 4)]):
        g = torch.Generator().manual_seed(seed)
        x, gate, up, down = (
            torch.randn(*shape, generator=g) for shape in ((3, d), (d_ff, d), (d_ff, d), (d, d_ff))
        )  # fmt: skip
        got = parts(call(answer, x, gate, up, down, ranks), ranks, f"what each of {ranks} ranks adds")
        got = [tensor(p, "a rank's part") for p in got]
        whole = _feed_forward(x, gate, up, down)
        for rank, one in enumerate(got):
            if one.shape != whole.shape:
                raise Mistake(
                    f"A rank adds numbers to every output, {tuple(whole.shape)}; rank {rank} has {tuple(one.shape)}. Cut down_proj "
                    "by its inputs, the columns as nn.Linear stores it: by its outputs, each rank would need every hidden number."
                )
        sizes = torch.stack(got)
        cut = [_feed_forward(x, gate[s], up[s], down[:, s]) for s in _contiguous(d_ff, ranks)]
        dealt = [_feed_forward(x, gate[s], up[s], down[:, s]) for s in _dealt(d_ff, ranks)]
        mixed = [
            _feed_forward(x, gate[s], up[s], down[:, t])
            for s, t in zip(_contiguous(d_ff, ranks), _dealt(d_ff, ranks), strict=True)
        ]
        if any(torch.allclose(sizes, torch.stack(right).double(), atol=1e-4) for right in (cut, dealt)):
            continue
        compare(sizes, torch.stack(cut), {
            "Every rank computes all of it, so the sum is too large, and nothing was saved.": torch.stack([whole] * ranks),
            "The sum is right, but every rank computed all of it and divided: nothing was saved.":
                torch.stack([whole / ranks] * ranks),
            "Gate and up are cut by their inputs. Then a rank has a partial sum of every hidden number, and silu of a part is "
            "not a part of silu: cut them by outputs, the rows as nn.Linear stores them.":
                torch.stack(_by_inputs(x, gate, up, down, ranks)) if d % ranks == 0 else whole.new_zeros(1),
            "The columns of down_proj must be those of the hidden numbers that the rank has.": torch.stack(mixed),
        }, what="what the ranks add", atol=1e-4)  # fmt: skip
    return "right: two matrices by columns, one by rows, and a single sum at the end."


def _feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _contiguous(d_ff: int, ranks: int) -> list[slice]:
    return [slice(r * d_ff // ranks, (r + 1) * d_ff // ranks) for r in range(ranks)]


def _dealt(d_ff: int, ranks: int) -> list[slice]:
    return [slice(r, d_ff, ranks) for r in range(ranks)]


def _by_inputs(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, ranks: int) -> list[Tensor]:
    return [_feed_forward(x[:, s], gate[:, s], up[:, s], down) for s in _contiguous(x.shape[1], ranks)]


CHECKS = {"14.1": heads_of_a_rank, "14.2": feed_forward_in_parts}
