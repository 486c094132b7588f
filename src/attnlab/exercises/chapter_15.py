"""Chapter 15: attention on latents without restoring keys, and the parts of a split cache put together."""

from typing import Any

import torch
from torch import Tensor

from attnlab.exercises._tools import Mistake, call, compare, tensor
from attnlab.measure import peak_bytes


def absorbed(answer: Any) -> str:
    """15.1: ``f(q, w_uk, w_uv, latents)``: q (H, D), w_uk and w_uv (H, D, c), latents (S, c); the output is (H, D)."""
    for seed, (H, D, c, S) in enumerate([(4, 6, 10, 7), (3, 8, 8, 5), (1, 4, 12, 9)]):
        given = _draw(H, D, c, S, seed)
        compare(call(answer, *given), _attend(*given), _absorbed_mistakes(*given), what="the output")
    H, D, c, S = 16, 64, 64, 2000
    given = _draw(H, D, c, S, 9)
    taken, keys = peak_bytes(lambda: answer(*given)), H * D * S * 4
    if taken > 0.5 * keys:
        raise Mistake(
            f"The numbers are right, but keys or values are restored: with {S:,} latents the call took {taken / keys:.1f} "
            f"times the memory of all heads' keys. Multiply q with W_UK, and the latents with nothing."
        )
    return "right: the matrices moved to the query and to the average, and no head's keys were ever made."


def _draw(H: int, D: int, c: int, S: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, latents = torch.randn(H, D, generator=g), torch.randn(S, c, generator=g)
    w_uk, w_uv = torch.randn(2, H, D, c, generator=g) * c**-0.5
    return q, w_uk, w_uv, latents


def _attend(
    q: Tensor, w_uk: Tensor, w_uv: Tensor, latents: Tensor, *, scale: float | None = None, restore: bool = True
) -> Tensor:
    """With every head's keys and values; ``restore=False`` leaves the average a latent, (H, c)."""
    k, v = torch.einsum("hdc,sc->hsd", w_uk, latents), torch.einsum("hdc,sc->hsd", w_uv, latents)
    scores = torch.einsum("hd,hsd->hs", q, k) * (q.shape[1] ** -0.5 if scale is None else scale)
    weights = scores.softmax(-1)
    return torch.einsum("hs,hsd->hd", weights, v) if restore else weights @ latents


def _absorbed_mistakes(q: Tensor, w_uk: Tensor, w_uv: Tensor, latents: Tensor) -> dict[str, Tensor]:
    D, c = w_uk.shape[1:]
    mistakes = {
        "The scores are not scaled: divide by the root of the head's size D.":
            _attend(q, w_uk, w_uv, latents, scale=1.0),
        "The scores are divided by the root of the latent's size. The query has c numbers now, but the dot product is still "
        "the one of D numbers: divide by the root of D.": _attend(q, w_uk, w_uv, latents, scale=c**-0.5),
        "What you return is still a latent for each head: W_UV makes its value of it.":
            _attend(q, w_uk, w_uv, latents, restore=False),
        "All heads use the first head's W_UK.": _attend(q, w_uk[:1].expand_as(w_uk), w_uv, latents),
        "All heads use the first head's W_UV.": _attend(q, w_uk, w_uv[:1].expand_as(w_uv), latents),
        "The values are made with W_UK; they have a matrix of their own, W_UV.": _attend(q, w_uk, w_uk, latents),
        "The output is not an average: are the scores missing their softmax?": torch.einsum(
            "hs,hsd->hd",
            torch.einsum("hd,hdc,sc->hs", q, w_uk, latents) * D**-0.5,
            torch.einsum("hdc,sc->hsd", w_uv, latents),
        ),
    }  # fmt: skip
    if c == D:
        mistakes["W_UK is used the wrong way round: q · (W_UK c) is (W_UKᵀ q) · c."] = _attend(
            q, w_uk.mT, w_uv, latents
        )
    return mistakes


def merged(answer: Any) -> str:
    """15.2: ``f(outs, maxima, sums)`` for N parts of a cache: outs (N, H, D), maxima and sums (N, H); the output is (H, D)."""
    for seed, (lengths, H, D) in enumerate([((5, 3, 8), 2, 4), ((1, 7), 3, 2), ((4,), 1, 3), ((6, 6, 1, 2), 2, 2)]):
        g = torch.Generator().manual_seed(seed)
        scores = 2 * torch.randn(H, sum(lengths), generator=g)
        values = torch.randn(H, sum(lengths), D, generator=g)
        parts = _parts(scores, values, lengths)
        right = torch.einsum("hs,hsd->hd", scores.softmax(-1), values)
        compare(call(answer, *parts), right, _merged_mistakes(*parts), what="the output")
    far = _parts(scores + 500, values, lengths)
    if not tensor(call(answer, *far), "the output").isfinite().all():
        raise Mistake(
            "With scores around 500 your result is not finite: e to the power of a maximum overflows. Subtract the largest of "
            "the maxima first; only their differences matter."
        )
    compare(call(answer, *far), right, what="the output for scores around 500", atol=1e-3)
    return "right: each part counts as much as the exponentials it summed, brought to one maximum."


def _parts(scores: Tensor, values: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """For each part its own softmax average, its largest score, and the sum of its exponentials below that."""
    outs, maxima, sums = [], [], []
    for s, v in zip(scores.split(lengths, dim=1), values.split(lengths, dim=1), strict=True):
        outs.append(torch.einsum("hs,hsd->hd", s.softmax(-1), v))
        maxima.append(s.amax(-1))
        sums.append((s - maxima[-1][:, None]).exp().sum(-1))
    return torch.stack(outs), torch.stack(maxima), torch.stack(sums)


def _merged_mistakes(outs: Tensor, maxima: Tensor, sums: Tensor) -> dict[str, Tensor]:
    def average(shares: Tensor) -> Tensor:
        return (outs * (shares / shares.sum(0))[..., None]).sum(0)

    below = (maxima - maxima.amax(0)).exp()
    return {
        "All parts count alike: one in which nothing fits the query weighs as much as one in which everything does.":
            outs.mean(0),
        "The parts are weighted by their sums alone, but those were taken below different maxima.": average(sums),
        "The parts are weighted by their maxima alone: many middling scores may outweigh one high one.": average(below),
        "That is the sum of the parts' averages; their weights must add up to 1.": outs.sum(0),
        "The weights don't add up to 1: divide by the sum of all parts' exponentials.":
            (outs * (below * sums)[..., None]).sum(0),
        "The outputs are already divided by their sums; you divide again.":
            (outs * below[..., None]).sum(0) / (below * sums).sum(0)[..., None],
        "The maxima have the wrong sign: the part with the higher scores should count for more.":
            average((maxima.amin(0) - maxima).exp() * sums),
        "The part with the highest score was taken and the others thrown away.":
            outs.gather(0, maxima.argmax(0)[None, :, None].expand(1, -1, outs.shape[2]))[0],
    }  # fmt: skip


CHECKS = {"15.1": absorbed, "15.2": merged}
