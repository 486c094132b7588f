"""Chapter 7: grouped-query attention without a copy, and heads pooled for a conversion."""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from attnlab.exercises._tools import Mistake, call, compare
from attnlab.measure import peak_bytes


def grouped(answer: Any) -> str:
    """7.1: ``f(q, k, v)``: q (B, H, T, D), k and v (B, Hkv, S, D), no mask, no copy of k or v."""
    for seed, (B, H, Hkv, T, S, D) in enumerate([(2, 6, 2, 3, 7, 4), (1, 8, 4, 1, 9, 4), (1, 4, 1, 2, 5, 4)]):
        g = torch.Generator().manual_seed(seed)
        q = torch.randn(B, H, T, D, generator=g)
        k, v = torch.randn(2, B, Hkv, S, D, generator=g)
        compare(call(answer, q, k, v), _attend(q, k, v), _grouped_mistakes(q, k, v), what="the output")
    q, k, v = torch.randn(1, 16, 1, 64), torch.randn(1, 2, 4000, 64), torch.randn(1, 2, 4000, 64)
    taken, cache = peak_bytes(lambda: answer(q, k, v)), k.nbytes + v.nbytes
    if taken > 1.5 * cache:
        raise Mistake(
            f"The numbers are right, but K or V is copied: with 16 query heads on 2 K/V heads the call took "
            f"{taken / cache:.1f} times the cache. Give the queries another shape, not the keys."
        )
    return "right: every group's query heads read their K/V head where it lies."


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, reads: Callable = lambda h, G, n: h // G
) -> Tensor:
    """The definition, head by head; ``reads`` says which K/V head a query head reads."""
    H, n = q.shape[1], k.shape[1]
    which = torch.tensor([reads(h, H // n, n) for h in range(H)])
    scores = q @ k[:, which].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(-1) @ v[:, which]


def _grouped_mistakes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    H, D, n = q.shape[1], q.shape[3], k.shape[1]
    G = H // n
    out = _attend(q, k, v)
    folded = rearrange(_attend(q, k, v), "B (n G) T D -> B n (G T) D", n=n)
    return {
        "Query head h read K/V head h % Hkv; it should read h // G: neighbours share a K/V head.":
            _attend(q, k, v, reads=lambda h, G, n: h % n),
        "All query heads read the first K/V head.": _attend(q, k, v, reads=lambda h, G, n: 0),
        "The scores are not scaled: divide by the root of the head's size.": _attend(q, k, v, scale=1.0),
        "The scores are divided by the head's size in full; the root is missing.": _attend(q, k, v, scale=1 / D),
        "The scores are divided by the root of G · D; folding heads together doesn't make them wider.":
            _attend(q, k, v, scale=1 / math.sqrt(G * D)),
        "Heads are mixed with tokens on the way back: (B, Hkv, G·T, D) was cut as T·G. Unfold in the order you folded.":
            rearrange(folded, "B n (T G) D -> B (n G) T D", G=G),
        "The group is still folded: the output should be (B, H, T, D) again.": folded,
        "The group is still an axis of its own: the output should be (B, H, T, D) again.":
            rearrange(out, "B (n G) T D -> B n G T D", n=n),
        "The heads come out in another order: h = (K/V head) · G + (place in its group).":
            rearrange(out, "B (n G) T D -> B (G n) T D", n=n),
    }  # fmt: skip


def pooled(answer: Any) -> str:
    """7.2: ``f(w, n_heads, n_kv_heads)`` averages the heads of each group of a (n_heads · D, d) matrix."""
    for seed, (n, m, D, d) in enumerate([(8, 2, 4, 6), (6, 3, 2, 5), (4, 1, 4, 4)]):
        w = torch.randn(n * D, d, generator=torch.Generator().manual_seed(seed))
        right = reduce(w, "(m G D) d -> (m D) d", "mean", m=m, D=D)
        compare(call(answer, w, n, m), right, _pooled_mistakes(w, n, m, D), what="the matrix")
    return "right: neighbours are averaged, row by row of the head."


def _pooled_mistakes(w: Tensor, n: int, m: int, D: int) -> dict[str, Tensor]:
    G = n // m
    return {
        "Heads j, j + Hkv, j + 2 Hkv … are averaged; the query heads of a group are neighbours, so pool neighbours.":
            reduce(w, "(G m D) d -> (m D) d", "mean", m=m, D=D),
        "Neighbouring rows are averaged; the rows of one head are different numbers. Average row i of one head with row i "
        "of the others.": reduce(w, "(m D G) d -> (m D) d", "mean", m=m, D=D),
        "That is the sum; the mean divides by the heads of a group.": reduce(w, "(m G D) d -> (m D) d", "sum", m=m, D=D),
        "That is the first head of each group; all of them should count.":
            rearrange(w, "(m G D) d -> m G D d", m=m, D=D)[:, 0].reshape(m * D, -1),
        "The result is divided by the root of the group; the mean divides by G.":
            reduce(w, "(m G D) d -> (m D) d", "sum", m=m, D=D) / math.sqrt(G),
        "The heads are still an axis of their own: the matrix is (n_kv_heads · D, d).":
            reduce(w, "(m G D) d -> m D d", "mean", m=m, D=D),
        "The matrix has as many rows as before: each group should leave one head.":
            reduce(w, "(m G D) d -> m 1 D d", "mean", m=m, D=D).expand(m, G, D, -1).reshape(n * D, -1),
    }  # fmt: skip


CHECKS = {"7.1": grouped, "7.2": pooled}
