"""What checks are made of: calling a learner's function, and saying in words how its result is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Mistake(Exception):
    """An answer is not right; the message names the likely reason."""


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``function`` returns for copies of the tensors in ``args``. Whatever goes wrong becomes a Mistake."""
    if not callable(function):
        raise Mistake(f"A function is asked for; got {_kind(function)}.")
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    try:
        result = function(*copies, **kwargs)
    except Exception as error:
        raise Mistake(f"Your function raised {type(error).__name__}: {error}") from error
    if result is None or result is ...:
        raise Mistake("Your function returned nothing: is there a return?")
    for given, copy in zip(args, copies, strict=True):
        if isinstance(given, Tensor) and (given.shape != copy.shape or not torch.equal(given, copy.detach())):
            raise Mistake("Your function changes its input: work on a copy, the caller may need it again.")
    return result


def parts(answer: Any, n: int, what: str) -> Sequence[Any]:
    """``answer`` as ``n`` things, ``what`` in words ("the output and the weights")."""
    if not isinstance(answer, tuple | list) or len(answer) != n:
        got = f"{len(answer)} of them" if isinstance(answer, tuple | list) else _kind(answer)
        raise Mistake(f"{n} things are asked for, {what}; got {got}.")
    return answer


def tensor(answer: Any, what: str = "your answer") -> Tensor:
    """Numbers of any kind as a float64 tensor on the CPU."""
    try:
        return torch.as_tensor(answer).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Mistake(f"Numbers are asked for as {what}; got {_kind(answer)}.") from error


def compare(
    got: Any,
    right: Tensor | float,
    mistakes: Mapping[str, Tensor | float] | None = None,
    *,
    what: str = "your answer",
    atol: float = 1e-4,
) -> None:
    """Nothing, if ``got`` is ``right``; else a Mistake: the first of ``mistakes`` that gives these very numbers.

    Shape and NaN come after them, so that a mistake that changes the shape can be named as well.
    """
    got, right = tensor(got, what), tensor(right)

    def same(other: Tensor) -> bool:
        return got.shape == other.shape and torch.allclose(got, other, atol=atol, rtol=atol, equal_nan=True)

    if same(right):
        return
    for message, wrong in (mistakes or {}).items():
        if same(tensor(wrong)):
            raise Mistake(message)
    if got.shape != right.shape:
        raise Mistake(f"The shape of {what} should be {tuple(right.shape)}; got {tuple(got.shape)}.")
    if not got.isfinite().all():
        raise Mistake(f"There are numbers in {what} that are infinite or not numbers (NaN).")
    raise Mistake(f"The numbers are not right: {what} off by up to {(got - right).abs().max():.2g}.")


def _kind(x: Any) -> str:
    return f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else f"{type(x).__name__}"
