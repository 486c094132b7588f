"""Chapter 11: parameters counted from a config, and a tensor read from the bytes of its file."""

import json
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from attnlab.exercises._tools import Mistake, call, compare, tensor

_GROUPED = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
_MISTRAL = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


def count(answer: Any) -> str:
    """11.1: ``f(config)`` counts the parameters of a model of Mistral's family from its config.json, a dict."""
    d, V, L = _GROUPED["hidden_size"], _GROUPED["vocab_size"], _GROUPED["num_hidden_layers"]
    right = _count(_GROUPED)
    _compare_counts(answer, _GROUPED, {
        "Keys and values are counted with as many heads as queries: there are only num_key_value_heads of them.":
            _count(_GROUPED, kv=4),
        "Keys and values are counted with one head: there are num_key_value_heads of them.": _count(_GROUPED, kv=1),
        "Two feed-forward matrices are counted a layer; a gated one has three: gate, up and down.":
            _count(_GROUPED, ffn=2),
        "W_O is missing: attention has four matrices.": right - L * d * d,
        "The norms are missing: two vectors a layer and one at the end.": _count(_GROUPED, norms=0) - d,
        "One norm a layer is counted; there are two, before attention and before the feed-forward layer.":
            _count(_GROUPED, norms=1),
        "The norm behind the last layer is missing.": right - d,
        "The output matrix is missing: tie_word_embeddings is false here, so it is one of its own.": right - V * d,
        "The embedding and the output matrix are both missing.": right - 2 * V * d,
        "One layer is counted; there are num_hidden_layers.": _count(_GROUPED | {"num_hidden_layers": 1}),
        "Those are bytes at two a parameter; parameters are asked for.": 2 * right,
        "Biases are counted; Mistral's matrices have none.": right + L * (2 * d + 2 * 12 + 2 * 40 + d),
    }, "a grouped model without head_dim")  # fmt: skip
    given = _GROUPED | {"head_dim": 16}
    ignored = (
        "head_dim stands in this config and is not hidden_size / num_attention_heads: where it is given, it counts."
    )
    _compare_counts(answer, given, {ignored: right}, "a model with a head_dim of its own")
    _compare_counts(
        answer, _GROUPED | {"head_dim": None}, {}, "a config that says head_dim: null, which is as if absent"
    )
    tied = _GROUPED | {"tie_word_embeddings": True}
    twice = "The ends are tied here (tie_word_embeddings): one matrix serves as both, and counts once."
    _compare_counts(
        answer, tied, {twice: right, "Of a tied pair one is left, not none.": right - 2 * V * d}, "a tied one"
    )
    _compare_counts(answer, _MISTRAL, {}, "Mistral 7B v0.1")
    return f"right; and Mistral 7B v0.1 has {_count(_MISTRAL):,}."


def _count(c: dict, kv: int | None = None, ffn: int = 3, norms: int = 2) -> int:
    d = c["hidden_size"]
    head_dim = c.get("head_dim") or d // c["num_attention_heads"]
    heads = 2 * c["num_attention_heads"] + 2 * (kv or c["num_key_value_heads"])
    layer = heads * head_dim * d + ffn * d * c["intermediate_size"] + norms * d
    return c["num_hidden_layers"] * layer + c["vocab_size"] * d * (1 if c["tie_word_embeddings"] else 2) + d


def _compare_counts(answer: Any, config: dict, mistakes: dict[str, int], what: str) -> None:
    got = call(answer, dict(config))
    if tensor(got).numel() != 1:
        raise Mistake(f"One number is asked for; got {tensor(got).numel()}.")
    compare(got, _count(config), mistakes, what=f"the count for {what}", atol=1e-9)


def read(answer: Any) -> str:
    """11.2: ``f(raw, name)`` reads one tensor out of the bytes of a safetensors file."""
    g = torch.Generator().manual_seed(0)
    stored = {
        "first": torch.randn(4, 3, generator=g),
        "second": torch.randn(2, 5, generator=g),
        "half": torch.randn(3, 2, generator=g).half(),
        "brain": torch.randn(2, 3, generator=g).bfloat16(),
    }
    raw = save(stored, metadata={"format": "pt"})
    _compare_read(answer, raw, stored, "second")
    for name in ("first", "brain", "half"):
        _compare_read(answer, raw, stored, name)
    moved = {"other": torch.randn(7, generator=g), **stored}  # a longer header, and other offsets
    _compare_read(answer, save(moved), moved, "brain")
    return "right: a length, a header, and offsets from where that ends."


def _compare_read(answer: Any, raw: bytes, stored: dict[str, Tensor], name: str) -> None:
    n = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + n])[name]
    start, end = entry["data_offsets"]
    right = stored[name]

    def bytes_at(first: int, dtype: torch.dtype = right.dtype) -> Tensor:
        return torch.frombuffer(bytearray(raw[first : first + end - start]), dtype=dtype).view(right.shape)

    mistakes = {
        "The offsets are counted from the beginning of the file; they count from the end of the header.": bytes_at(start),
        "The header is skipped, but not the 8 bytes before it that hold its length.": bytes_at(n + start),
        "Only the 8 bytes of the length are skipped: the header comes next, and offsets count from its end.":
            bytes_at(8 + start),
        "It reads from the end of the header whatever is asked for: data_offsets says where this tensor begins.":
            bytes_at(8 + n),
        "The numbers are right, in a row: give them the header's shape.": right.flatten(),
        "The shape is turned round: the last axis runs fastest, as everywhere in torch.":
            right.flatten().view(right.shape[::-1]),
        "It is the transpose that you return.": right.T,
    }  # fmt: skip
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}.get(right.dtype)
    if other is not None:
        mistakes[f"This tensor's dtype is {entry['dtype']}: you read its 16 bits as the other 16-bit format."] = (
            bytes_at(8 + n + start, other)
        )
    compare(call(answer, raw, name), right, mistakes, what=f"the tensor {name!r}, {entry['dtype']}", atol=1e-6)


CHECKS = {"11.1": count, "11.2": read}
