"""Chapter 12: rounding a matrix to four bits, and the longest conversation that fits."""

from typing import Any

import torch
from torch import Tensor

from attnlab import memory
from attnlab.exercises._tools import Mistake, call, compare


def four_bits(answer: Any) -> str:
    """12.1: ``f(W, sharing)`` is W (out, in) on the 16 levels that every ``sharing`` neighbours in a row share."""
    for seed, (rows, columns, sharing) in enumerate([(4, 64, 32), (6, 96, 16), (16, 16, 8)]):
        W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        right = _on_levels(W, sharing)
        mistakes = {
            "That is W itself: nothing was rounded.": W,
            "There are 17 levels: 16 levels have 15 steps between them, so divide by 2**4 - 1.":
                _on_levels(W, sharing, steps=16),
            "Rounded down: the error is up to a whole step; the nearest level is at most half a step away.":
                _on_levels(W, sharing, nearest=torch.floor),
            "That is the distance above the smallest weight: the offset must be added again.":
                _on_levels(W, sharing, offset=False),
            "The levels are those of 8 bits: four bits tell 16 levels apart.": _on_levels(W, sharing, steps=255),
            "One grid for the whole matrix: every few neighbours have their own.": _on_levels(W, W.numel()),
            "One grid for a whole row: every few neighbours in it have their own.": _on_levels(W, columns),
            "The neighbours are taken down a column; those that share a grid stand side by side in a row.":
                _on_levels(W.T.contiguous(), sharing).T,
            "The grid is centred on 0: it should reach from the smallest of them to the largest.":
                _centred(W, sharing),
        }  # fmt: skip
        wrong = {message: value for message, value in mistakes.items() if not torch.allclose(value, right, atol=1e-4)}
        compare(call(answer, W, sharing), right, wrong, what="the rounded matrix")
    return "right: no weight is further away than half a step of its own grid."


def _on_levels(W: Tensor, sharing: int, steps: int = 15, nearest=torch.round, offset: bool = True) -> Tensor:
    part = W.reshape(-1, sharing)
    low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
    step = (high - low) / steps
    return (nearest((part - low) / step) * step + low * offset).reshape(W.shape)


def _centred(W: Tensor, sharing: int) -> Tensor:
    part = W.reshape(-1, sharing)
    step = part.abs().amax(1, keepdim=True) / 7
    return ((part / step).round().clamp(-8, 7) * step).reshape(W.shape)


def longest(answer: Any) -> str:
    """12.2: ``f(model, device_bytes, quantize)`` is the most tokens one conversation may have: 0 none, None no limit."""
    for model, device, quantize in (
        ("mistral-7b-v0.3", 8e9, "int4"), ("mistral-7b-v0.3", 16e9, "int8"), ("llama-2-7b", 24e9, None),
        ("llama-2-7b", 6e9, "int4"),
    ):  # fmt: skip
        right = _most(model, device, quantize)
        stored = memory.weight_bytes(model, "bfloat16", quantize)
        per_token = memory.kv_bytes_per_token(model)
        fewer_bits = {None: 1, "int8": 2, "int4": 4}[quantize]  # times
        mistakes = {
            "One token too many: that many no longer fit.": right + 1,
            "One token too few: one more still fits.": right - 1,
            "Nothing is kept free beside weights and cache: leave reserve as it is.": (device - stored) // per_token,
            "The weights are counted as bfloat16; they are stored in fewer bits.": _most(model, device, None),
            "The cache is counted as quantized too; only weights are, keys and values stay in 16 bits.":
                (_usable(device) - stored) // (per_token // fewer_bits),
        }  # fmt: skip
        wrong = {message: value for message, value in mistakes.items() if value != right}
        compare(call(answer, model, device, quantize), right, wrong, what=f"the tokens for {model}", atol=0)
    compare(call(answer, "mistral-7b-v0.3", 4e9, "int4"), 0, {
        "On 4 GB not even the int4 weights fit: 0 tokens.": -1,
    }, what="the tokens where the weights alone don't fit", atol=0)  # fmt: skip
    try:
        windowed = answer("mistral-7b-v0.1", 8e9, "int4")
    except Exception as error:
        raise Mistake(f"For mistral-7b-v0.1 your function raised {type(error).__name__}: {error}") from error
    if windowed is not None:
        raise Mistake(
            f"mistral-7b-v0.1 has a window: its cache stops growing at 4,096 tokens, and that fits, so None; got "
            f"{windowed!r}."
        )
    return "right: what the weights leave free, over the bytes of a token."


def _usable(device: float) -> int:
    """The most that weights and cache may take beside the reserve that ``memory.fits`` keeps."""
    free = int(device)
    while free + memory.reserve_bytes(free) > device:
        free -= max(1, (free + memory.reserve_bytes(free) - int(device)) // 2)
    return free


def _most(model: str, device: float, quantize: str | None) -> int:
    stored = memory.weight_bytes(model, "bfloat16", quantize)
    return max(0, (_usable(device) - stored) // memory.kv_bytes_per_token(model))


CHECKS = {"12.1": four_bits, "12.2": longest}
