"""Checkpoint folders, damaged in every way we could think of, and what loading makes of them.

A case is ``base:damage:seed``: a folder of ``BASES``, a function of ``DAMAGES``, and what decides the rest. Its outcome is "loads" (and
then tokenizer and model work), the name of one of our errors, or a complaint: another exception, code that ran, a file that was
written, memory beyond one and a half times the folder, 20 seconds of work, or the death of the process.

Cases run in a process of their own, which says which one it began: ``python tests/trust/fuzz_checkpoints.py FILE`` for a file of
cases, a line each. ``run`` does that, and goes on behind a case that took the process with it.
"""

import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

BASES = ("hf", "sharded", "native", "pth")
CONSTANT = 256 * 2**20  # bytes, beyond one and a half times the folder
SECONDS = 20  # of processor time
STUCK = 120  # seconds in which a process that does nothing is given up
COMPLAINT = "complaint: "

DAMAGES: dict[str, tuple[tuple[str, ...], Callable]] = {}
Rng = random.Random


def damage(*bases: str) -> Callable:
    """A way to damage those bases (none named: all); it may return the folder under another name."""

    def keep(function: Callable) -> Callable:
        DAMAGES[function.__name__] = (bases or BASES, function)
        return function

    return keep


def cases(seeds: Iterator[int] | range) -> list[str]:
    """Every damage of every base it is made for, once a seed."""
    return [f"{base}:{name}:{seed}" for seed in seeds for name, (bases, _) in DAMAGES.items() for base in bases]


# ---- whole folders ----------------------------------------------------------------------------------------------------


def make_bases(root: Path) -> None:
    """A tiny model in four forms, each with a tokenizer of another kind."""
    import sentencepiece
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from attnlab import Mistral, MistralConfig
    from attnlab.checkpoint import save_model

    torch.manual_seed(0)
    model = Mistral(MistralConfig(vocab_size=400, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, window=6))
    save_model(model, root / "hf")
    save_model(model, root / "sharded", max_shard_bytes=20_000)
    save_model(model, root / "native", "mistral")
    save_model(model, root / "pth", "mistral")
    weights = root / "pth" / "consolidated.safetensors"
    torch.save(load_file(weights), root / "pth" / "consolidated.00.pth")
    weights.unlink()

    text = ["def main(self):\n    return self.main()\n"] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}
    for name in ("hf", "sharded"):
        tokenizer.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text(json.dumps(settings))

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(text).split("\n")), model_writer=file, vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", num_threads=1, minloglevel=2,
    )  # fmt: skip
    (root / "native" / "tokenizer.model").write_bytes(file.getvalue())
    import base64

    pieces = [bytes([i]) for i in range(256)] + [b"de", b"def", b" m", b"ma", b"in"]
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": p.decode("utf-8", "replace")}
        for i, p in enumerate(pieces)
    ]
    config = {
        "pattern": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + 20, "default_num_special_tokens": 20, "version": "v3",
    }  # fmt: skip
    (root / "pth" / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))


# ---- any file ---------------------------------------------------------------------------------------------------------


def some_file(rng: Rng, folder: Path) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def weights_of(rng: Rng, folder: Path) -> Path:
    return rng.choice(sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth")))


@damage()
def cut_off(rng, folder):
    file = some_file(rng, folder)
    os.truncate(file, rng.randrange(file.stat().st_size))


@damage()
def flipped_bytes(rng, folder):
    file = some_file(rng, folder)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 30))):
        content[rng.randrange(len(content))] = rng.randrange(256)
    file.write_bytes(content)


@damage()
def flipped_bits_at_the_front_or_end(rng, folder):
    file = some_file(rng, folder)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 2, 5))):
        i = rng.randrange(min(400, len(content)))
        content[i if rng.random() < 0.7 else -1 - i] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@damage()
def a_piece_missing_or_doubled(rng, folder):
    file = some_file(rng, folder)
    content = file.read_bytes()
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    file.write_bytes(content[:a] + content[b:] if rng.random() < 0.5 else content[:b] + content[a:])


@damage()
def a_range_of_zeros(rng, folder):
    file = some_file(rng, folder)
    content = bytearray(file.read_bytes())
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    content[a:b] = bytes(b - a)
    file.write_bytes(content)


@damage()
def something_behind_the_end(rng, folder):
    with some_file(rng, folder).open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 7, 4096))) if rng.random() < 0.5 else b"\n" * 64)


@damage()
def empty_or_missing(rng, folder):
    file = some_file(rng, folder)
    file.unlink()
    if rng.random() < 0.5:
        file.touch()


@damage()
def two_files_swapped(rng, folder):
    one, other = rng.sample(sorted(folder.iterdir()), 2)
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


@damage()
def not_a_file(rng, folder):
    file = some_file(rng, folder)
    file.unlink()
    what = rng.choice(
        ("folder", "pipe", "/dev/zero", "/dev/null", "/dev/full", "itself", "nowhere", "/proc/self/mem", "/")
    )
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"itself": file.name, "nowhere": "nowhere"}.get(what, what))


@damage()
def a_link_to_the_file_elsewhere(rng, folder):
    for file in list(folder.iterdir()):
        there = folder.parent / "elsewhere" / file.name
        there.parent.mkdir(exist_ok=True)
        file.rename(there)
        file.symlink_to(os.path.relpath(there, folder) if rng.random() < 0.5 else there)


@damage()
def a_hole_of_gigabytes_at_the_end(rng, folder):
    os.truncate(some_file(rng, folder), rng.choice((10**8, 10**10, 10**12)))


@damage()
def another_folder_name(rng, folder):
    names = (
        "\N{SNOWMAN} ü 漢字",
        "line\nfeed",
        "x" * 255,
        "-rf",
        "%s{0}{name}",
        "~nobody",
        "a'b\"c",
        "tab\there",
        ".hidden",
        "\x1b[2J",
    )
    return folder.rename(folder.with_name(rng.choice(names)))


# ---- JSON -------------------------------------------------------------------------------------------------------------

VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, 1e-300, 1e308, -0.0, 10**30, -(10**30), 2**31, 2**32, 2**63, 9_999_999, 10_000_001,
    float("nan"), float("inf"), "", "x", "<s>", "mistral", "x" * 1000, "\x00", "\ud800", "\x1b[2J", "../../x", [], [None], [[]],
    {}, {"a": 1}, {"content": None}, [{"name": "default"}], ["default"], [{"name": "default", "template": 3}],
)  # fmt: skip


def json_file(rng: Rng, folder: Path) -> tuple[Path, dict]:
    file = rng.choice(sorted(folder.glob("*.json")))
    return file, json.loads(file.read_text(encoding="utf-8"))


def somewhere(rng: Rng, content: dict | list) -> tuple[dict | list, str | int]:
    """A place in it: what holds it and the key or index there. Near the top as often as deep down."""
    while True:
        key = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
        inside = content[key]
        if not isinstance(inside, dict | list) or not inside or rng.random() < 0.3:
            return content, key
        content = inside


@damage()
def a_value_of_json(rng, folder):
    file, content = json_file(rng, folder)
    for _ in range(rng.choice((1, 1, 2))):
        place, key = somewhere(rng, content)
        place[key] = copy.deepcopy(rng.choice(VALUES))
    file.write_text(json.dumps(content), encoding="utf-8")


@damage("hf", "native")
def a_value_of_the_config(rng, folder):
    file = folder / ("config.json" if (folder / "config.json").exists() else "params.json")
    content = json.loads(file.read_text())
    for _ in range(rng.choice((1, 1, 2))):
        content[rng.choice(list(content))] = copy.deepcopy(rng.choice(VALUES))
    file.write_text(json.dumps(content))


@damage()
def a_key_of_json_missing(rng, folder):
    file, content = json_file(rng, folder)
    place, key = somewhere(rng, content)
    del place[key]
    file.write_text(json.dumps(content), encoding="utf-8")


@damage()
def a_key_of_json_renamed_or_added(rng, folder):
    file, content = json_file(rng, folder)
    place, key = somewhere(rng, content)
    if isinstance(place, dict):
        name = rng.choice(
            (
                "",
                "\ud800",
                "x" * 300_000,
                "a\nb",
                "\x1b[2J",
                "added_tokens",
                "quantization_config",
                "moe",
                "layer_types",
            )
        )
        place[name] = place.pop(key) if rng.random() < 0.7 else copy.deepcopy(rng.choice(VALUES))
    else:
        place.append(copy.deepcopy(place[key]))
    file.write_text(json.dumps(content), encoding="utf-8")


@damage()
def a_key_of_json_twice(rng, folder):
    file, content = json_file(rng, folder)
    key, value = rng.choice(list(content)), copy.deepcopy(rng.choice(VALUES))
    file.write_text(json.dumps(content)[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}", encoding="utf-8")


@damage()
def a_bomb_of_json(rng, folder):
    file, content = json_file(rng, folder)
    size = rng.choice((100_000, 2_000_000, 3_000_000))
    bomb = rng.choice((
        "[" * size, "[" * 900 + "]" * 900, '{"a":' * size, f"[{'{},' * (size // 3)}{{}}]", f"[{'[],' * (size // 3)}[]]", f'"{"x" * size}"',
        f"[{'1e0,' * (size // 4)}1]", "9" * 5000, "1e999999", '"' + "\\u0000" * (size // 6) + '"',
    ))  # fmt: skip
    head = json.dumps(content)[1:-1] if rng.random() < 0.8 else ""
    file.write_text(f'{{"bomb": {bomb}{", " if head else ""}{head}}}', encoding="utf-8")


@damage("hf", "pth")
def json_of_a_hundred_million_bytes(rng, folder):
    file, content = json_file(rng, folder)
    with file.open("w", encoding="utf-8") as opened:
        opened.write('{"bomb": "')
        for _ in range(100):
            opened.write("x" * 1_000_000)
        opened.write(f'", {json.dumps(content)[1:]}')


@damage()
def json_in_another_encoding(rng, folder):
    file, content = json_file(rng, folder)
    text = json.dumps(content, ensure_ascii=False)
    file.write_bytes(text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1", "cp037")), errors="replace"))


# ---- the header of a safetensors file ---------------------------------------------------------------------------------


def split(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(file: Path, header: dict | str, data: bytes, says: int | None = None, fill: int = 0) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode() + b" " * fill
    file.write_bytes(int.to_bytes(len(text) if says is None else says, 8, "little") + text + data)


def some_tensor(rng: Rng, header: dict) -> dict:
    return header[rng.choice([name for name in header if name != "__metadata__"])]


@damage("hf", "sharded", "native")
def a_header_that_lies_about_its_length(rng, folder):
    file = weights_of(rng, folder)
    header, data = split(file)
    size = len(json.dumps(header))
    join(
        file,
        header,
        data,
        rng.choice((0, 1, size - 1, size + 1, size + 10**6, 3_999_999, 10**8, 2**31, 2**63, 2**64 - 1, 2**64 - 8)),
    )


@damage("hf", "sharded", "native")
def offsets_that_lie(rng, folder):
    file = weights_of(rng, folder)
    header, data = split(file)
    offsets = some_tensor(rng, header)["data_offsets"]
    changed = rng.choice((0, 1, -1, 4, -4, 64, 2**31, 2**63, -(2**63), 2**64, 0.5, "0", None, []))
    if rng.random() < 0.3:  # all of them on the first
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"][:] = [0, entry["data_offsets"][1] - entry["data_offsets"][0]]
    if rng.random() < 0.2:
        offsets.reverse()
    elif rng.random() < 0.2:
        offsets.append(0)
    else:
        i = rng.randrange(2)
        offsets[i] = offsets[i] + changed if isinstance(changed, int) else changed
    join(file, header, data)


@damage("hf", "sharded", "native")
def a_shape_or_dtype_that_lies(rng, folder):
    file = weights_of(rng, folder)
    header, data = split(file)
    entry = some_tensor(rng, header)
    if rng.random() < 0.5:
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "float32", "", None, 32, "F32\n")
        )
    else:
        shape = entry["shape"]
        entry["shape"] = rng.choice((
            [], [0], [-1], [2**63], [2**32, 2**32], [2**64], [1.5], ["16"], None, 16, [1] * 10_000, shape[::-1], [*shape, 1], [1, *shape],
            [0, *shape], [shape], [shape[0] * 2, *shape[1:]], [shape[0] // 2, 2, *shape[1:]],
        ))  # fmt: skip
    join(file, header, data)


@damage("hf", "sharded", "native")
def a_file_that_is_as_large_as_it_says_and_mostly_hole(rng, folder):
    """A matrix of another shape, consistent throughout, and nothing behind it."""
    file = weights_of(rng, folder)
    header, data = split(file)
    last = max((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][1])
    rows = rng.choice((10**7, 10**9, 10**11))
    last["shape"] = [rows]
    last["data_offsets"][1] = last["data_offsets"][0] + 4 * rows
    join(file, header, data)
    os.truncate(file, file.stat().st_size - len(data) + last["data_offsets"][1])


@damage("hf", "sharded", "native")
def names_of_tensors(rng, folder):
    file = weights_of(rng, folder)
    header, data = split(file)
    names = [name for name in header if name != "__metadata__"]
    old = rng.choice(names)
    new = rng.choice(
        (
            "",
            "\n",
            "\x1b[2J",
            "x" * 300_000,
            "\N{SNOWMAN}",
            "\u202e",
            "__metadata__",
            "\x00",
            rng.choice(names),
            "lm_head.weight",
            "\ud800",
            "'",
            '"',
        )
    )
    entry = header.pop(old) if rng.random() < 0.7 else header[old]
    text = json.dumps(header)[:-1] + f", {json.dumps(new)}: {json.dumps(entry)}}}"  # so that one may be there twice
    join(file, text, data)


@damage("hf", "sharded", "native")
def two_tensors_swapped(rng, folder):
    file = weights_of(rng, folder)
    header, data = split(file)
    one, other = some_tensor(rng, header), some_tensor(rng, header)
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    if rng.random() < 0.5:
        one["shape"], other["shape"] = other["shape"], one["shape"]
    join(file, header, data)


@damage("hf", "native")
def a_header_of_any_length_before_the_tensors(rng, folder):
    """Sound: what is read has to begin where the header says, aligned or not."""
    file = weights_of(rng, folder)
    header, data = split(file)
    join(file, header, data, fill=rng.choice((1, 2, 3, 5, 7, 1000, 3_900_000)))


@damage("hf", "native")
def very_many_tensors(rng, folder):
    file = weights_of(rng, folder)
    header, data = split(file)
    for i in range(rng.choice((1, 1000, 60_000))):
        header[f"{i}"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    if rng.random() < 0.3:
        header["__metadata__"] = {str(i): "x" for i in range(100_000)}
    join(file, header, data)


@damage("hf", "native")
def no_tensors(rng, folder):
    join(weights_of(rng, folder), rng.choice(({}, {"__metadata__": {}}, {"__metadata__": {"format": "pt"}})), b"")


# ---- shards and their index -------------------------------------------------------------------------------------------


@damage("sharded")
def names_in_the_index(rng, folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    placed = index["weight_map"]
    name = rng.choice((
        "../m.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:x", "nul\0", "\ud800", "x" * 255, "x" * 5000, "line\nfeed",
        "\x1b[2J", "config.json", "tokenizer.json", "model.safetensors.index.json", "sub", "link.safetensors", "pipe.safetensors",
        3, None, ["x"],
    ))  # fmt: skip
    (folder / "sub").mkdir()
    (folder / "link.safetensors").symlink_to("/proc/self/environ")
    os.mkfifo(folder / "pipe.safetensors")
    if rng.random() < 0.5:
        placed[rng.choice(list(placed))] = name
    else:
        index["weight_map"] = dict.fromkeys(placed, name)
    file.write_text(json.dumps(index))


@damage("sharded")
def shards_swapped_doubled_or_cut(rng, folder):
    one, other = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    how = rng.randrange(4)
    if how == 0:
        shutil.copy(one, other)
    elif how == 1:
        third = folder / "third"
        one.rename(third), other.rename(one), third.rename(other)
    elif how == 2:
        one.unlink()
        one.symlink_to(other.name)
    else:
        shutil.copy(one, folder / "model.safetensors")  # one file, which wins over the index


# ---- .pth -------------------------------------------------------------------------------------------------------------


def rewritten(file: Path, change: dict[str, bytes], packed: bool = False, doubled: tuple[str, ...] = ()) -> None:
    """The same archive with other contents of some parts."""
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    top = next(iter(parts)).partition("/")[0]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED, compresslevel=1) as archive:
        for name, content in (parts | {f"{top}/{name}": content for name, content in change.items()}).items():
            archive.writestr(name, content)
        for name in doubled:
            archive.writestr(f"{top}/{name}", change.get(name, parts[f"{top}/{name}"]))


def pickle_of(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


class _Call:
    """Pickled, it asks for a call."""

    def __init__(self, function, *arguments):
        self.asked = (function, arguments)

    def __reduce__(self):
        return self.asked


@damage("pth")
def a_pickle_with_code(rng, folder):
    import torch

    trap = folder / "sprung"
    call = rng.choice((
        _Call(os.mkdir, str(trap)), _Call(os.system, f"touch {trap}"), _Call(eval, f"open({str(trap)!r}, 'w')"), _Call(open, str(trap), "w"),
        _Call(__import__, "antigravity"), _Call(torch.load, str(trap)), _Call(bytearray, 2 * 10**9),
        _Call(bytearray, 10**15), _Call(complex, "x"), _Call(torch.Size, [10**18]), _Call(set, "abc"), _Call(torch.device, "cuda:7"),
    ))  # fmt: skip
    content = rng.choice(
        ({"output.weight": call}, call, [call], {call: 1} if call.asked[0] is complex else {"a": [call]})
    )
    pickled = pickle.dumps(content, protocol=rng.choice((0, 1, 2, 2, 2, 4, 5)))
    if rng.random() < 0.2:
        (folder / "consolidated.00.pth").write_bytes(pickled)  # without an archive around it
    else:
        rewritten(
            folder / "consolidated.00.pth", {"data.pkl": pickled}, doubled=("data.pkl",) if rng.random() < 0.2 else ()
        )


@damage("pth")
def a_pickle_that_is_damaged(rng, folder):
    file = folder / "consolidated.00.pth"
    content = bytearray(pickle_of(file))
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] = rng.choice((rng.randrange(256), *b"].}()tRrhqQX0123cb\x80\x8a\xff"))
    rewritten(file, {"data.pkl": bytes(content)})


@damage("pth")
def a_pickle_of_other_things(rng, folder):
    import torch

    file = folder / "consolidated.00.pth"
    good = torch.load(file, weights_only=True)
    name = rng.choice(list(good))
    tensor = good[name]
    one = torch.zeros(1)
    how = rng.choice((
        "list", "nested", "none", "numbers", "int keys", "sparse", "view", "lie", "all one", "int8", "complex", "parameter", "quantized", "script",
        "empty", "double", "module", "bytes", "transposed",
    ))  # fmt: skip
    content = {
        "list": list(good.values()), "nested": {"model": good}, "none": None, "numbers": {name: 3.0},
        "int keys": {i: t for i, t in enumerate(good.values())}, "sparse": good | {name: tensor.to_sparse()},
        "view": good | {name: torch.zeros(*tensor.shape, 3)[..., 1]}, "lie": good | {name: one.expand(10**6, 10**7)},
        "all one": {n: one.expand(t.shape) for n, t in good.items()}, "int8": good | {name: tensor.to(torch.int8)},
        "complex": good | {name: tensor.to(torch.complex64)}, "parameter": good | {name: torch.nn.Parameter(tensor)},
        "quantized": good, "script": good, "empty": {}, "double": {n: t.double() for n, t in good.items()},
        "module": torch.nn.Linear(2, 2), "bytes": {name: b"x"}, "transposed": {n: t.mT.contiguous().mT if t.dim() == 2 else t for n, t in good.items()},
    }[how]  # fmt: skip
    if how == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    else:
        torch.save(content, file)


@damage("pth")
def an_archive_that_lies(rng, folder):
    file = folder / "consolidated.00.pth"
    change, packed, doubled = rng.choice((
        ({"byteorder": b"big"}, False, ()), ({"byteorder": b""}, False, ()), ({".storage_alignment": b"0"}, False, ()),
        ({".storage_alignment": b"-64"}, False, ()), ({".storage_alignment": b"9" * 15}, False, ()), ({".storage_alignment": b"1"}, False, ()),
        ({".format_version": b"0"}, False, ()), ({".format_version": b"9"}, False, ()), ({"version": b"0"}, False, ()),
        ({"version": b"999999999999"}, False, ()), ({"version": b"x"}, False, ()), ({}, True, ()), ({}, False, ("data.pkl",)),
        ({}, False, ("data/0",)), ({"data/0": b""}, False, ()), ({"data/0": b"x" * 10}, False, ()), ({"data.pkl": b""}, False, ()),
        ({"data.pkl": b"." * 5_000_000}, False, ()), ({"data.pkl": b"\x80\x02" + b"}" * 990_000 + b"."}, False, ()), ({"byteorder": b"x" * 1000}, False, ()),
    ))  # fmt: skip
    rewritten(file, change, packed, doubled)


@cache
def _packed_zeros() -> bytes:
    """An archive whose pickle is 600 MB of nothing in three megabytes."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a/data.pkl", "w") as part,
    ):
        for _ in range(600):
            part.write(bytes(10**6))
    return file.getvalue()


@damage("pth")
def an_archive_that_unpacks_to_much_more(rng, folder):
    (folder / "consolidated.00.pth").write_bytes(_packed_zeros())


@damage("pth")
def several_parts(rng, folder):
    names = (
        "consolidated.01.pth",
        "consolidated.\N{SNOWMAN}.pth",
        "consolidated.pth",
        "consolidated.safetensors",
        "consolidated\n.pth",
    )
    there = folder / rng.choice(names)
    shutil.copy(folder / "consolidated.00.pth", there)
    if rng.random() < 0.3:
        os.truncate(there, rng.randrange(there.stat().st_size))


# ---- tokenizers -------------------------------------------------------------------------------------------------------


@damage("hf")
def what_tokenizer_json_asks_for(rng, folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    content |= rng.choice((
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}},
        {"model": content["model"] | {"vocab": vocab | {"a": 2**32 - 1}}}, {"model": content["model"] | {"vocab": vocab | {"a": 100_000}}},
        {"model": content["model"] | {"vocab": vocab | {"漢": 299}}}, {"model": content["model"] | {"vocab": {}, "merges": []}},
        {"decoder": None}, {"decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"decoder": {"type": "ByteFallback"}, "model": content["model"] | {"vocab": vocab | {"<0xZZ>": 299}}}, {"added_tokens": []},
        {"added_tokens": [dict(content["added_tokens"][0], id=10**6, content="<s>")]}, {"added_tokens": [dict(content["added_tokens"][0], content="")]},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}}, {"pre_tokenizer": None},
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["<s>", 0.0], ["</s>", 0.0]], "byte_fallback": False}},
        {"model": {"type": "WordLevel", "unk_token": "?", "vocab": {"<s>": 0, "</s>": 1}}}, {"model": content["model"] | {"unk_token": "gone"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}},
    ))  # fmt: skip
    file.write_text(json.dumps(content), encoding="utf-8")


@damage("native")
def a_sentencepiece_file_changed(rng, folder):
    from sentencepiece import sentencepiece_model_pb2

    file = folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    piece = model.pieces[rng.randrange(len(model.pieces))]
    how = rng.randrange(9)
    if how == 0:
        piece.piece = rng.choice(("", "<0xZZ>", "\N{SNOWMAN}" * 10_000, "▁", "<s>"))
    elif how == 1:
        piece.type = rng.choice((1, 2, 3, 4, 5, 6))
    elif how == 2:
        piece.score = rng.choice((float("nan"), float("inf"), -1e38))
    elif how == 3:
        del model.pieces[rng.randrange(len(model.pieces)) :]
    elif how == 4:
        model.trainer_spec.bos_id, model.trainer_spec.eos_id = rng.choice(((-1, -1), (10**9, 2), (0, 0)))
    elif how == 5:
        model.trainer_spec.model_type = rng.choice((1, 2, 3, 4))
    elif how == 6:
        model.normalizer_spec.precompiled_charsmap = rng.randbytes(rng.choice((1, 4, 100, 5000)))
    elif how == 7:
        model.trainer_spec.byte_fallback = not model.trainer_spec.byte_fallback
    else:
        for _ in range(200_000):
            model.pieces.add().piece = str(rng.random())
    file.write_bytes(model.SerializeToString())


@damage("pth")
def what_tekken_json_asks_for(rng, folder):
    file = folder / "tekken.json"
    content = json.loads(file.read_text())
    key = rng.choice(("num_vocab_tokens", "default_vocab_size", "default_num_special_tokens", "pattern", "version"))
    how = rng.randrange(4)
    if how == 0:
        content["config"][key] = rng.choice((*VALUES, "(", "(a+)+$", "v1", "v99", "v7", 10**9))
    elif how == 1:
        rng.choice(content["vocab"])[rng.choice(("rank", "token_bytes", "token_str"))] = rng.choice(
            (*VALUES, "AA==", "====", "!")
        )
    elif how == 2:
        content["vocab"] = content["vocab"] * 2 if rng.random() < 0.5 else content["vocab"][rng.randrange(260) :]
    else:
        content["special_tokens"] = [
            {"rank": rng.choice((0, 1, 5, 10**6)), "token_str": "<s>", "is_control": rng.choice((True, None))}
        ] * rng.choice((1, 30))
    file.write_text(json.dumps(content))


# ---- while it is read -------------------------------------------------------------------------------------------------


class Meanwhile:
    """What happens to the folder between the check of its headers and the first byte of weights that is read."""

    then: Callable[[], None] | None = None


@damage()
def a_file_that_shrinks_while_it_is_read(rng, folder):
    file = weights_of(rng, folder)
    keep = rng.choice((0, 8, rng.randrange(file.stat().st_size), file.stat().st_size - 1))
    Meanwhile.then = lambda: os.truncate(file, keep)


@damage()
def a_file_that_changes_while_it_is_read(rng, folder):
    file = weights_of(rng, folder)
    how = rng.choice(("gone", "folder", "noise", "longer"))

    def then() -> None:
        content = file.read_bytes()
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how != "gone":
            file.write_bytes(rng.randbytes(len(content)) if how == "noise" else content + bytes(100))

    Meanwhile.then = then


# ---- one case ---------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.link", "os.symlink",
    "os.truncate", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "pickle.find_class", "shutil.rmtree", "ctypes.dlopen", "webbrowser.open",
}  # fmt: skip


class Watch:
    """Notes what the package has no business to do, by Python's audit events."""

    def __init__(self) -> None:
        self.armed, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.armed and (event in FORBIDDEN or (event == "open" and self._writes(*arguments))):
            self.seen.append(f"{event}{arguments!r}"[:200])

    @staticmethod
    def _writes(path, mode, flags) -> bool:
        return bool(mode and set(str(mode)) & set("wax+")) or bool(
            (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )


def peak() -> int:
    """The most memory this process had at a time, in bytes, since ``forget_peak``."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def use(folder: Path) -> str:
    """Load what is there and put it to work; what we say of it."""
    import torch

    import attnlab

    try:
        lm = attnlab.load(folder, device="cpu", progress=False)
    except attnlab.AttnlabError as error:
        said = str(error)
        if len(said) > 3000:
            return f"{COMPLAINT}a message of {len(said)} characters: {said[:200]}"
        if not said.replace("\n", "").replace(str(folder).replace("\n", ""), "").isprintable():
            return f"{COMPLAINT}a message that cannot be printed: {said!r}"
        return type(error).__name__
    try:
        ids = lm.tokenizer.encode("def main(self):\n    a漢")
    except attnlab.AttnlabError as error:
        return type(error).__name__
    if not ids or not all(0 <= id < lm.config.vocab_size for id in ids):
        return f"{COMPLAINT}ids outside the vocabulary: {ids}"
    if len(ids) > 200:
        return f"{COMPLAINT}a short text became {len(ids)} tokens"
    for id in range(0, lm.tokenizer.vocab_size, 17):
        lm.tokenizer.decode([id]), lm.tokenizer.piece(id)
    lm.tokenizer.decode(ids)
    with torch.inference_mode():
        logits = lm.model(torch.tensor([ids[:12]]))
    if logits.shape != (1, min(len(ids), 12), lm.config.vocab_size):
        return f"{COMPLAINT}logits of shape {tuple(logits.shape)}"
    return "loads"


def try_case(case: str, bases: Path, watch: Watch) -> str:
    base, name, _ = case.split(":")
    rng, Meanwhile.then = random.Random(case), None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(bases / base, Path(scratch) / "m"))
        folder = DAMAGES[name][1](rng, folder) or folder
        size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and not p.is_symlink())
        forget_peak()
        before = peak()
        watch.armed, watch.seen = True, []
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # at its end the system ends the process, whatever it is in
        try:
            outcome = use(folder)
        except BaseException as error:
            outcome = f"{COMPLAINT}{type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            watch.armed = False
        taken = peak() - before
        if watch.seen:
            outcome = f"{COMPLAINT}it did {watch.seen[0]}"
        elif (folder / "sprung").exists():
            outcome = f"{COMPLAINT}code in the folder ran"
        elif taken > 1.5 * size + CONSTANT:
            outcome = f"{COMPLAINT}{taken:,} bytes of memory for a folder of {size:,} ({outcome})"
    return outcome


def child(file: str) -> None:
    import faulthandler

    import attnlab.checkpoint as checkpoint

    _, _, hard = (None, *resource.getrlimit(resource.RLIMIT_AS))
    watch = Watch()
    with tempfile.TemporaryDirectory() as root:
        bases = Path(root)
        make_bases(bases)
        check = checkpoint._check_tensors

        def check_and_then(*arguments):
            check(*arguments)
            if Meanwhile.then is not None:
                watch.armed = False
                Meanwhile.then()
                watch.armed = True

        checkpoint._check_tensors = check_and_then
        for base in BASES:  # the first of each loads libraries; that is no case's doing
            assert use(bases / base) == "loads", base
        mapped = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 8 * 2**30, hard))  # a bomb takes this process, not the machine
        for case in Path(file).read_text().split():
            print(json.dumps([case]), flush=True)
            faulthandler.dump_traceback_later(STUCK, exit=True)
            outcome = try_case(case, bases, watch)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps([case, outcome]), flush=True)


def run(wanted: list[str], script: str | Path = __file__) -> dict[str, str]:
    """Every case and its outcome. A process that dies is a complaint about the case it was at; another goes on behind it."""
    found: dict[str, str] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    while left := [case for case in wanted if case not in found]:
        with tempfile.NamedTemporaryFile("w+") as file, tempfile.TemporaryFile("w+") as errors:
            file.write("\n".join(left))
            file.flush()
            process = subprocess.run(
                [sys.executable, str(script), file.name],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
            begun = None
            for line in process.stdout.splitlines():
                begun, *outcome = json.loads(line)
                if outcome:
                    found[begun], begun = outcome[0], None
            errors.seek(0)
            last = errors.read()[-1500:]
        if begun is None and process.returncode:
            raise RuntimeError(f"the cases could not be run: {last}")
        if begun is not None:
            died = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit {process.returncode}"
            found[begun] = f"{COMPLAINT}the process died: {died}; {last[-300:]}"
    return found


if __name__ == "__main__":
    child(sys.argv[1])
