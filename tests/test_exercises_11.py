"""What the checks of chapter 11 catch, and what they say."""

import json

import pytest
import torch
from exercise_cells import solution

from attnlab import memory
from attnlab.exercises import check
from attnlab.mistral import MistralConfig


def test_the_notebook_s_solutions_are_right():
    assert check("11.1", solution("11.1")) and check("11.2", solution("11.2"))


def counted(c, heads=None, kv=None, ffn=3, norms=2, last=1, ends=None, wo=1, layers=None, head_dim=None):
    d, H = c["hidden_size"], c["num_attention_heads"]
    D = head_dim(c) if head_dim else c.get("head_dim") or d // H
    attention = (1 + wo) * d * H * D + 2 * d * D * (c["num_key_value_heads"] if kv is None else kv(c))
    layer = attention + ffn * d * c["intermediate_size"] + norms * d
    n_ends = ends if ends is not None else 1 if c["tie_word_embeddings"] else 2
    return (layers or c["num_hidden_layers"]) * layer + n_ends * c["vocab_size"] * d + last * d


WRONG_COUNTS = {
    "as many heads as queries": lambda c: counted(c, kv=lambda c: c["num_attention_heads"]),
    "with one head": lambda c: counted(c, kv=lambda c: 1),
    "has three: gate": lambda c: counted(c, ffn=2),
    "W_O is missing": lambda c: counted(c, wo=0),
    "The norms are missing": lambda c: counted(c, norms=0, last=0),
    "One norm a layer": lambda c: counted(c, norms=1),
    "behind the last layer": lambda c: counted(c, last=0),
    "output matrix is missing": lambda c: counted(c, ends=1),
    "both missing": lambda c: counted(c, ends=0),
    "One layer is counted": lambda c: counted(c, layers=1),
    "are bytes": lambda c: 2 * counted(c),
    "where it is given, it counts": lambda c: counted(
        c, head_dim=lambda c: c["hidden_size"] // c["num_attention_heads"]
    ),
    "counts once": lambda c: counted(c, ends=2),
    "not none": lambda c: counted(c, ends=0 if c["tie_word_embeddings"] else 2),
    "raised KeyError: 'head_dim'": lambda c: counted(c, head_dim=lambda c: c["head_dim"]),
    "raised TypeError": lambda c: counted(
        c, head_dim=lambda c: c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    ),
    "One number is asked for": lambda c: [counted(c), 0],
    "off by up to": lambda c: counted(c) + 1,
    "returned nothing": lambda c: None,
}


@pytest.mark.parametrize("words", WRONG_COUNTS)
def test_a_wrong_count_is_told_why(words):
    result = check("11.1", WRONG_COUNTS[words])
    assert not result.ok and words in result.message


def test_biases_that_are_not_there_are_told_of():
    def with_biases(c):
        D = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        rows = D * (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) + 2 * c["intermediate_size"]
        return counted(c) + c["num_hidden_layers"] * (rows + 2 * c["hidden_size"])

    assert "have none" in check("11.1", with_biases).message


def test_another_right_count_is_right():
    def by_the_package(c):
        return memory.n_params(
            MistralConfig(
                vocab_size=c["vocab_size"], d_model=c["hidden_size"], n_layers=c["num_hidden_layers"],
                n_heads=c["num_attention_heads"], n_kv_heads=c["num_key_value_heads"], d_ff=c["intermediate_size"],
                head_dim=c.get("head_dim"), tie_embeddings=c["tie_word_embeddings"],
            )
        )  # fmt: skip

    result = check("11.1", by_the_package)
    assert result and "7,241,732,096" in result.message


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read(raw, name, base=lambda n: 8 + n, shape=list, dtypes=DTYPES, start_of=lambda entry: entry["data_offsets"][0]):
    n = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + n])[name]
    start, length = base(n) + start_of(entry), entry["data_offsets"][1] - entry["data_offsets"][0]
    return torch.frombuffer(bytearray(raw[start : start + length]), dtype=dtypes[entry["dtype"]]).view(
        shape(entry["shape"])
    )


WRONG_READS = {
    "beginning of the file": lambda r, n: read(r, n, base=lambda n: 0),
    "8 bytes before it": lambda r, n: read(r, n, base=lambda n: n),
    "the header comes next": lambda r, n: read(r, n, base=lambda n: 8),
    "says where this tensor begins": lambda r, n: read(r, n, start_of=lambda entry: 0),
    "in a row": lambda r, n: read(r, n, shape=lambda s: (-1,)),
    "last axis runs fastest": lambda r, n: read(r, n, shape=lambda s: s[::-1]),
    "transpose": lambda r, n: read(r, n).T,
    "dtype is BF16": lambda r, n: read(r, n, dtypes=DTYPES | {"BF16": torch.float16}),
    "dtype is F16": lambda r, n: read(r, n, dtypes=DTYPES | {"F16": torch.bfloat16}),
    "raised": lambda r, n: json.loads(r)[n],
    "returned nothing": lambda r, n: None,
}


@pytest.mark.parametrize("words", WRONG_READS)
def test_a_wrong_reading_is_told_why(words):
    result = check("11.2", WRONG_READS[words])
    assert not result.ok and words in result.message


def test_a_reader_that_trusts_one_length_of_header_is_found():
    seen = []

    def remembers(raw, name):
        seen.append(int.from_bytes(raw[:8], "little"))
        return read(raw, name, base=lambda n: 8 + seen[0])

    assert not check("11.2", remembers)


def test_another_right_reading_is_right():
    assert check("11.2", lambda r, n: read(r, n).float())
