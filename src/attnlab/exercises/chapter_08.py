"""Chapter 8: where two models cross, and what they gain when each fills a card."""

import math
from typing import Any

from attnlab import memory
from attnlab.exercises._tools import Mistake, call, compare


def crossing(answer: Any) -> str:
    """8.1: ``f(model, other)`` is the number of cached tokens from which on ``model`` reads no more a step than ``other``."""
    for model, other in (("mistral-7b-v0.2", "llama-2-7b"), ("llama-3-8b", "llama-2-7b"), ("gemma-7b", "llama-2-7b")):
        weights = memory.bytes_per_step(model, 0) - memory.bytes_per_step(other, 0)
        ours, theirs = (memory.kv_bytes_per_token(name, "bfloat16") for name in (model, other))
        exact = weights / (theirs - ours)
        with_embedding = memory.weight_bytes(model) - memory.weight_bytes(other)
        right = math.ceil(exact)
        mistakes = {
            "Rounded down: with so many tokens it still reads a little more. Take the next whole number.":
                math.floor(exact),
            "All weights are counted; a step reads one row of the embedding, not all of it (memory.bytes_per_step).":
                math.ceil(with_embedding / (theirs - ours)),
            "Parameters are counted in place of bytes: a weight takes two in bfloat16.": math.ceil(exact / 2),
            "Divided by the other's bytes per token: the model has a cache too, and only the difference is saved.":
                math.ceil(weights / theirs),
            "Divided by the model's own bytes per token; what is saved is the difference of the two.":
                math.ceil(weights / ours),
        }  # fmt: skip
        wrong = {message: value for message, value in mistakes.items() if value != right}
        compare(call(answer, model, other), right, wrong, what=f"the tokens for {model} and {other}", atol=0)
    at_once = call(answer, "gemma-2b", "llama-2-7b")
    compare(at_once, 0, {
        "For fewer weights and a smaller cache the difference is negative: it reads less from the start, so 0.":
            _without_limit("gemma-2b", "llama-2-7b"),
    }, what="the tokens for gemma-2b and llama-2-7b", atol=0)  # fmt: skip
    try:
        never = answer("llama-2-13b", "llama-2-7b")
    except Exception as error:
        raise Mistake(f"For llama-2-13b and llama-2-7b your function raised {type(error).__name__}: {error}") from error
    if never is not None:
        raise Mistake(f"llama-2-13b reads more weights and more cache than llama-2-7b: never, so None; got {never!r}.")
    return "right: the weights that are more, over the cache saved a token."


def _without_limit(model: str, other: str) -> int:
    saved = memory.kv_bytes_per_token(other) - memory.kv_bytes_per_token(model)
    return math.ceil((memory.bytes_per_step(model, 0) - memory.bytes_per_step(other, 0)) / saved)


def filled(answer: Any) -> str:
    """8.2: ``f(model, other, device_bytes, context)`` is the ratio of ceilings with as many rows as fit for each."""
    for model, other, device, context in (
        ("mistral-7b-v0.2", "llama-2-7b", 24e9, 4096),
        ("llama-2-7b", "mistral-7b-v0.2", 80e9, 1000),
        ("gemma-2b", "gemma-7b", 48e9, 8192),
    ):
        most = [memory.largest_batch(name, device, context) for name in (model, other)]

        def rates(batches, model=model, other=other, context=context):
            pairs = zip((model, other), batches, strict=True)
            return [batch / memory.bytes_per_step(name, context, batch) for name, batch in pairs]

        def times(batches, rates=rates):
            first, second = rates(batches)
            return first / second

        right = times(most)
        caches = [memory.kv_bytes_per_token(name) for name in (model, other)]
        free = [memory.largest_batch(name, device, context, reserve=0) for name in (model, other)]
        mistakes = {
            "That is the ratio of the largest batches; each step also takes its own time.": most[0] / most[1],
            "That is the ratio of bytes per step: the time of one step, in which each makes another number of tokens.":
                right / (most[0] / most[1]),
            "Upside down: how many times the tokens of the second does the first make?": 1 / right,
            "That is one row on each; fill the card, each with its own largest batch.": times((1, 1)),
            "Both have the first model's batch; the second holds its own number of rows.": times((most[0], most[0])),
            "Both have the second model's batch; the first holds its own number of rows.": times((most[1], most[1])),
            "That is the ratio of cache bytes per token; the weights are read as well.": caches[1] / caches[0],
            "Nothing is kept free beside weights and cache: leave reserve as it is.": times(free),
        }  # fmt: skip
        wrong = {message: value for message, value in mistakes.items() if abs(value / right - 1) > 1e-3}
        compare(call(answer, model, other, device, context), right, wrong, what=f"the ratio for {model} and {other}")
    return "right: its own largest batch for each, all rows over one step's time."


CHECKS = {"8.1": crossing, "8.2": filled}
