"""Checkpoints on disk: Hugging Face folders and Mistral's own, read and written.

A Hugging Face folder is ``config.json`` with ``model.safetensors``, or with shards and ``model.safetensors.index.json``. A
Mistral-native one is ``params.json`` with ``consolidated.safetensors`` or ``consolidated.00.pth``. They hold the same numbers
under other names, and the rows of the query and key projections in another order (``rotary.py`` says why): read one with
the other's order and the model runs and is wrong.

What an absent key means differs, and is a trap:

================  =================================================  ================================================
key               config.json (defaults of transformers' own class)  params.json (mistral-inference)
================  =================================================  ================================================
window            ``sliding_window`` absent: 4096; null: none        ``sliding_window`` absent or null: none
rope_theta        10 000                                             10 000 with a window, 1 000 000 without one
head_dim          hidden_size / num_attention_heads                  dim / n_heads
norm eps          ``rms_norm_eps`` absent: 1e-6                      must be there
K/V heads         ``num_key_value_heads`` absent: 8; null: as many   must be there
                  as query heads
================  =================================================  ================================================

Sources: transformers ``configuration_mistral.py`` and ``convert_mistral_weights_to_hf.py``; mistral-inference
``transformer.py`` at eb3d6c2 (later versions take 1 000 000 always, which is wrong for 7B v0.1).
"""

import errno
import json
import os
import pickletools
import re
import shutil
import sys
import traceback
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnlab.errors import CapacityError, CheckpointError, ConfigError, first_line, ran_out_of_memory
from attnlab.files import JSON_LIMIT, brief, check_file, damage_is_said, line, read_json, shown
from attnlab.kernels import suit_processor_
from attnlab.memory import weight_bytes
from attnlab.mistral import Mistral, MistralConfig
from attnlab.quantize import QuantizedLinear, is_quantized, linear_names, parse_quantize
from attnlab.rotary import halves_to_interleaved, interleaved_to_halves

Layout = Literal["hf", "mistral"]
CONFIG_FILES: dict[Layout, str] = {"hf": "config.json", "mistral": "params.json"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HF_FILE, _HF_INDEX, _NATIVE_FILE = "model.safetensors", "model.safetensors.index.json", "consolidated.safetensors"
_READERS = 2  # tensors read at a time: one waits for the disk while the other is copied
_READ_BYTES = 16 * 2**20  # asked of the system at a time
_SIZE_LIMIT = 10_000_000  # no vocabulary, width or window comes near
_LAYER_LIMIT = 10_000
_PICKLE_LIMIT = 1_000_000  # bytes; names and shapes of 7B take 40 thousand, and a hostile byte makes 72 in memory
_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# our name: (Hugging Face's, Mistral's); the lower ones once a layer
_NAMES = {
    "embed.weight": ("model.embed_tokens.weight", "tok_embeddings.weight"),
    "norm.weight": ("model.norm.weight", "norm.weight"),
    "lm_head.weight": ("lm_head.weight", "output.weight"),
}
_BLOCK_NAMES = {
    "attention_norm.weight": ("input_layernorm.weight", "attention_norm.weight"),
    "attention.q_proj.weight": ("self_attn.q_proj.weight", "attention.wq.weight"),
    "attention.k_proj.weight": ("self_attn.k_proj.weight", "attention.wk.weight"),
    "attention.v_proj.weight": ("self_attn.v_proj.weight", "attention.wv.weight"),
    "attention.o_proj.weight": ("self_attn.o_proj.weight", "attention.wo.weight"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "feed_forward.gate_proj.weight": ("mlp.gate_proj.weight", "feed_forward.w1.weight"),
    "feed_forward.up_proj.weight": ("mlp.up_proj.weight", "feed_forward.w3.weight"),
    "feed_forward.down_proj.weight": ("mlp.down_proj.weight", "feed_forward.w2.weight"),
}
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq|rope\.freqs")  # old files store what rope_theta says
# What the pickle in a .pth of tensors names. torch runs no code in it, but lets others of its names take any memory.
_PTH_NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"float32"``, ``"bfloat16"`` or ``"float16"`` as torch's object. Raises ConfigError for another."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    return found


def parse_device(device: str | torch.device) -> torch.device:
    """``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"`` as torch's object. Raises ConfigError for one that is not here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f'device must be "cpu", "cuda", "cuda:0" … or "mps"; got {device!r}') from error
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(found.type)
    if count is None:
        raise ConfigError(f'device must be "cpu", "cuda", "cuda:0" … or "mps"; got {device!r}')
    if (found.index or 0) >= count:
        raise ConfigError(f'device {str(found)!r} is not here: torch sees {count} of that kind; use another, or "cpu"')
    return found


# ---- what a folder holds ----------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> MistralConfig:
    """The config of a checkpoint folder; its ``name`` is the folder's.

    Raises CheckpointError for a folder without one, a file that is no JSON object, another architecture, or a setting
    this decoder has not (scaled rotary positions, another activation, quantised weights, experts).
    """
    folder = _existing(folder)
    layout = _layout(folder)
    file = folder / CONFIG_FILES[layout]
    stored = read_json(file)
    try:
        config = (_config_from_hf if layout == "hf" else _config_from_native)(file, stored)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: has a value of another kind than expected: {line(error)}") from error
    if config.n_layers > _LAYER_LIMIT:  # accounts go through layer by layer
        raise CheckpointError(f"{file}: expected at most {_LAYER_LIMIT:,} layers; got {config.n_layers} layers")
    return config


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype most of the weights are stored in; float32 where that is float64. Raises CheckpointError."""
    folder = _existing(folder)
    return _main_dtype(_stored_tensors(folder, _layout(folder)))


@dataclass(frozen=True)
class _StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # the file's own word for it where it is none of ours
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _existing(folder: str | Path) -> Path:
    path = os.path.expanduser(folder)
    if not os.path.isdir(path):  # os.path, which says no where pathlib raises: names too long, unknown users
        raise CheckpointError(
            f"expected a model folder; {shown(path)} is {'a file' if os.path.exists(path) else 'not there'}"
        )
    return Path(path)


def _layout(folder: Path) -> Layout:
    """Hugging Face's where both are complete, as in the folders of v0.3: it is the one that needs no reordering."""
    native = (folder / "params.json").exists()
    if (folder / "config.json").exists() and not (native and not _has_hf_weights(folder)):
        return "hf"
    if native:
        return "mistral"
    raise CheckpointError(
        f"{folder}: expected config.json (Hugging Face) or params.json (Mistral); it has neither. Give the folder of a "
        "whole model, or download it again"
    )


def _has_hf_weights(folder: Path) -> bool:
    return (folder / _HF_FILE).exists() or (folder / _HF_INDEX).exists()


def _config_from_hf(file: Path, stored: dict) -> MistralConfig:
    model_type, architectures = stored.get("model_type"), stored.get("architectures") or ["MistralForCausalLM"]
    if model_type != "mistral" or "MistralForCausalLM" not in architectures:
        raise CheckpointError(
            f'{file}: expected model_type "mistral" and MistralForCausalLM; got {brief(model_type)} and '
            f"{brief(architectures)}. attnlab "
            "loads Mistral's architecture; record_attention takes any model of transformers"
        )
    if stored.get("quantization_config"):
        raise CheckpointError(
            f"{file}: expected plain weights; these are quantised. Give the folder they were made from"
        )
    if len(set(stored.get("layer_types") or [])) > 1:
        raise CheckpointError(
            f"{file}: expected one kind of layer; layer_types mixes windows. That is another architecture"
        )
    activation = stored.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(
            f'{file}: expected hidden_act "silu"; got {brief(activation)}, which this decoder has not'
        )
    rope = stored.get("rope_scaling") or stored.get("rope_parameters") or {}  # transformers 5 moved it under the latter
    if not isinstance(rope, dict):
        raise CheckpointError(f"{file}: expected rotary settings in a JSON object; got {brief(rope)}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", stored.get("partial_rotary_factor"))
    if kind != "default" or part not in (None, 1):
        raise CheckpointError(
            f"{file}: expected rotary positions of type 'default' over whole heads; got type {brief(kind)}, share "
            f"{brief(part or 1)}. "
            "Scaled positions give wrong numbers here, so they are refused"
        )
    n_heads = _number(file, stored, "num_attention_heads", int)
    window = _number(file, stored, "sliding_window", int, absent=4096, null=None)
    context = _number(file, stored, "max_position_embeddings", int, absent=None, null=None)
    if stored.get("sliding_window") is not None and context is not None and window > context:
        raise CheckpointError(
            f"{file}: expected a sliding_window within max_position_embeddings, {context:,} tokens; got {window:,}, which no "
            "text would ever reach. One of the two belongs to another model: set it to its own, or to null for no window"
        )
    return MistralConfig(
        vocab_size=_number(file, stored, "vocab_size", int),
        d_model=_number(file, stored, "hidden_size", int),
        n_layers=_number(file, stored, "num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=_number(file, stored, "num_key_value_heads", int, absent=8, null=n_heads),
        d_ff=_number(file, stored, "intermediate_size", int),
        head_dim=_number(file, stored, "head_dim", int, absent=None, null=None),
        window=window,
        rope_theta=_number(file, {"rope_theta": stored.get("rope_theta")} | rope, "rope_theta", float, null=10_000.0),
        norm_eps=_number(file, stored, "rms_norm_eps", float, absent=1e-6),
        tie_embeddings=_flag(file, stored, "tie_word_embeddings"),
        name=file.parent.name or "mistral",
    )


def _config_from_native(file: Path, stored: dict) -> MistralConfig:
    for key in ("moe", "quantization", "vision_encoder", "yarn", "lora", "q_lora_rank", "_sliding_window"):
        if stored.get(key):
            raise CheckpointError(f"{file}: has {key!r}, which this decoder has not: it is Mistral 7B's architecture")
    window = _number(file, stored, "sliding_window", int, absent=None, null=None)
    theta = 1e6 if window is None else 1e4  # the later models had no window and a slower rotation
    return MistralConfig(
        vocab_size=_number(file, stored, "vocab_size", int),
        d_model=_number(file, stored, "dim", int),
        n_layers=_number(file, stored, "n_layers", int),
        n_heads=_number(file, stored, "n_heads", int),
        n_kv_heads=_number(file, stored, "n_kv_heads", int),
        d_ff=_number(file, stored, "hidden_dim", int),
        head_dim=_number(file, stored, "head_dim", int, absent=None, null=None),
        window=window,
        rope_theta=_number(file, stored, "rope_theta", float, absent=theta, null=theta),
        norm_eps=_number(file, stored, "norm_eps", float),
        tie_embeddings=_flag(file, stored, "tied_embeddings"),
        name=file.parent.name or "mistral",
    )


_REQUIRED = object()


def _number(file: Path, stored: dict, key: str, kind: type, absent=_REQUIRED, null=_REQUIRED):
    """``stored[key]`` as ``kind``, or what stands for it where the key is absent or null."""
    value = stored.get(key)
    if value is None:
        value = null if key in stored else absent
        if value is _REQUIRED:
            raise CheckpointError(f"{file}: expected a number for {key!r}; it has none. Download the file again")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        raise CheckpointError(f"{file}: expected a number for {key!r}; got {brief(value)}")
    if kind is int and (value != int(value) or abs(value) > _SIZE_LIMIT):
        raise CheckpointError(f"{file}: expected a whole number below {_SIZE_LIMIT:,} for {key!r}; got {brief(value)}")
    return kind(value)


def _flag(file: Path, stored: dict, key: str) -> bool:
    value = stored.get(key) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"{file}: expected true or false for {key!r}; got {brief(value)}")
    return value


def _stored_tensors(folder: Path, layout: Layout) -> dict[str, _StoredTensor]:
    """Every tensor of a checkpoint by the name it has on disk, from the headers of its files."""
    index = None
    if layout == "hf":
        if (folder / _HF_FILE).exists():
            files = [folder / _HF_FILE]
        elif (folder / _HF_INDEX).exists():
            files, index = _indexed_files(folder)
        else:
            files = []
    else:
        files = sorted(folder.glob("consolidated*.safetensors")) or sorted(folder.glob("consolidated*.pth"))
    if not files:
        wanted = f"{_HF_FILE} or {_HF_INDEX}" if layout == "hf" else f"{_NATIVE_FILE} or consolidated.00.pth"
        others = sorted(shown(p.name) for p in folder.glob("*") if p.suffix in (".bin", ".gguf", ".pt", ".pth"))
        hint = f"; it has {', '.join(others[:3])}, which attnlab does not read" if others else ""
        raise CheckpointError(f"{folder}: expected weights in {wanted}; there are none{hint}. Download the model again")

    stored: dict[str, _StoredTensor] = {}
    for file in files:
        for name, tensor in _header(file):
            if name in stored:
                raise CheckpointError(
                    f"{file}: tensor {shown(name)} is in {stored[name].file.name} as well. Files that share names are the parts "
                    "of a model cut for several GPUs; attnlab reads whole tensors. Give a checkpoint in one piece"
                )
            stored[name] = tensor
    if not stored:
        raise CheckpointError(f"{files[0]}: expected weights; there is no tensor in it. Download the model again")
    for name, tensor in stored.items():
        if isinstance(tensor.dtype, str):
            raise CheckpointError(
                f"{tensor.file}: expected floating-point weights (float32, bfloat16 or float16); {shown(name)} is {tensor.dtype}. "
                "Quantised weights are not read; give the folder they were made from"
            )
    if index is not None:
        _check_index(folder / _HF_INDEX, index, stored)
    return stored


def _indexed_files(folder: Path) -> tuple[list[Path], dict]:
    file = folder / _HF_INDEX
    index = read_json(file)
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(v, str) for v in placed.values()):
        raise CheckpointError(f"{file}: expected weight_map, a file name for every tensor; got {type(placed).__name__}")
    files = []
    for name in sorted(set(placed.values())):  # names are checked, links followed: the hub's cache consists of links
        if re.search(r"[/\\:\0]", name) or name in ("", ".", ".."):
            raise CheckpointError(f"{file}: expected names of files beside it; {brief(name)} points outside the folder")
        if not os.path.exists(folder / name):
            raise CheckpointError(
                f"{folder / shown(name)}: this shard is missing; the index places {sum(v == name for v in placed.values())} "
                "tensors in it. Download it again"
            )
        files.append(folder / name)
    return files, index


def _check_index(file: Path, index: dict, stored: dict[str, _StoredTensor]) -> None:
    for name, shard in index["weight_map"].items():
        if name not in stored or stored[name].file.name != shard:
            found = f"it is in {stored[name].file.name}" if name in stored else "no file has it"
            raise CheckpointError(
                f"{file}: expected {shown(name)} in {shown(shard)}; {found}. Download the index and the shards again"
            )
    unlisted = [name for name in stored if name not in index["weight_map"]]
    if unlisted:
        file_name = stored[unlisted[0]].file.name
        raise CheckpointError(
            f"{file}: does not list {shown(unlisted[0])}, which is in {file_name}. Download both again"
        )
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(tensor.nbytes for tensor in stored.values())
    if total is not None and total != found:
        raise CheckpointError(f"{file}: expected {brief(total)} bytes of weights (total_size); the shards hold {found}")


def _open(file: Path) -> AbstractContextManager:
    """A weight file, memory-mapped: safetensors' reader, or the dict of a .pth. Damage becomes CheckpointError."""
    with _damage_is_said(file):
        if file.suffix != ".pth":
            _safetensors_header(file)
            return safe_open(file, framework="pt")
        _check_archive(file)
        return nullcontext(_dict_of_tensors(file, torch.load(file, map_location="cpu", weights_only=True, mmap=True)))


def _damage_is_said(file: Path) -> AbstractContextManager:
    """For the readers of a weight file."""
    check_file(file)

    def say(reason: str) -> str:
        size = f"{file.stat().st_size:,} bytes" if file.exists() else "nothing"
        return (
            f"{file}: expected a whole weight file; got {size} that cannot be read as one ({reason}). "
            "It may be cut off: download it again"
        )

    return damage_is_said(say)


def _header(file: Path) -> list[tuple[str, _StoredTensor]]:
    """Every tensor of a weight file: what it is and where its bytes begin. None of those is read."""
    with _damage_is_said(file):
        return _pth_tensors(file) if file.suffix == ".pth" else _safetensors_tensors(file)


def _safetensors_header(file: Path) -> bytes:
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > JSON_LIMIT:
            raise CheckpointError(
                f"{file}: expected a header of at most {JSON_LIMIT:,} bytes; it says {size:,}. Damaged: download it again"
            )
        return opened.read(size)


def _safetensors_tensors(file: Path) -> list[tuple[str, _StoredTensor]]:
    header = _safetensors_header(file)
    with safe_open(file, framework="pt") as content:  # finds it sound, and doesn't say where a tensor begins
        slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
        kinds = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    begins = {name: entry["data_offsets"][0] for name, entry in json.loads(header).items() if name != "__metadata__"}
    return [
        (name, _StoredTensor(file, shape, _STORED_DTYPES.get(dtype, dtype), 8 + len(header) + begins[name]))
        for name, (shape, dtype) in kinds.items()
    ]


def _pth_tensors(file: Path) -> list[tuple[str, _StoredTensor]]:
    # Loaded onto no device, a tensor is a shape; its storage notes where in the file it would be (torch 2.11 and later).
    _check_archive(file)
    size, taken, known, found = file.stat().st_size, 0, _STORED_DTYPES.values(), []
    for name, t in _dict_of_tensors(file, torch.load(file, map_location="meta", weights_only=True)).items():
        offset = t.untyped_storage()._checkpoint_offset + t.storage_offset() * t.element_size()
        if not t.is_contiguous() or offset + t.nbytes > size:
            raise CheckpointError(
                f"{file}: expected whole tensors; {shown(name)}, of shape {tuple(t.shape)}, is a view of another or goes "
                "beyond the file's end. Save it again, or download it again"
            )
        taken += t.nbytes
        found.append((name, _StoredTensor(file, tuple(t.shape), t.dtype if t.dtype in known else str(t.dtype), offset)))
    if taken > 1.5 * size:  # a matrix that has two names is less than half of a model
        raise CheckpointError(
            f"{file}: expected {size:,} bytes of tensors; they take {taken:,}, as many share memory. Save each as its own"
        )
    return found


def _dict_of_tensors(file: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided for name, t in content.items()
    ):
        raise CheckpointError(f"{file}: expected a dict of tensors; got something else, so it is not a model's weights")
    return content


def _check_archive(file: Path) -> None:
    """Refuse a .pth that ``torch.save`` of a dict of tensors would not have written, before torch reads it.

    A packed part may unpack to any size, a pickle may ask for any memory, and torch takes byte order and alignment on trust.
    """
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename.partition("/")[2]: part for part in archive.infolist()}
        if len(parts) < len(archive.infolist()) or any(p.compress_type != zipfile.ZIP_STORED for p in parts.values()):
            raise CheckpointError(
                f"{file}: expected an archive of torch.save; this one has names twice, or packed parts"
            )
        small = [part for name, part in parts.items() if not name.startswith("data/")]
        if sum(part.file_size for part in small) > _PICKLE_LIMIT:
            raise CheckpointError(f"{file}: expected at most {_PICKLE_LIMIT:,} bytes besides the tensors; it has more")
        order = archive.read(parts["byteorder"]) if "byteorder" in parts else b"little"
        alignment = archive.read(parts[".storage_alignment"]) if ".storage_alignment" in parts else b"64"
        pickled = archive.read(parts["data.pkl"])
    if order != sys.byteorder.encode() or not alignment.isdigit() or int(alignment) == 0:
        raise CheckpointError(
            f"{file}: expected {sys.byteorder}-endian numbers, aligned; got {brief(order)} and {brief(alignment)}. Save it again"
        )
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "GLOBAL" and not _PTH_NAMES.fullmatch(argument):
            raise CheckpointError(
                f"{file}: expected a dict of tensors and nothing else; it names {brief(argument)}, which is not loaded"
            )


def _main_dtype(stored: dict[str, _StoredTensor]) -> torch.dtype:
    held: dict[torch.dtype, int] = {}
    for tensor in stored.values():
        held[tensor.dtype] = held.get(tensor.dtype, 0) + tensor.nbytes
    dtype = max(held, key=held.get)
    return torch.float32 if dtype == torch.float64 else dtype


# ---- reading ----------------------------------------------------------------------------------------------------------


def load_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    quantize: str | None = None,
) -> Mistral:
    """The model of a checkpoint folder, on ``device`` in ``dtype`` (None: as stored), in evaluation mode.

    With ``quantize`` its linear weights go straight into 8 or 4 bits, from what is stored, not from its rounding to ``dtype``.

    Everything is checked against the config from the files' headers before a byte of weights is read. Then each tensor
    goes by itself from the file to its place while the next is read, so that memory beyond the weights is that of a few.

    Raises:
        CheckpointError: a tensor that is missing, too many, of another shape or not floating-point; a file that is
            missing or cut off; an index that disagrees with its files or points outside the folder; a config that
            ``read_config`` refuses.
        ConfigError: an unknown dtype, device or form of quantizing, sizes that int4 does not divide.
        CapacityError: not enough memory.
    """
    folder = _existing(folder)
    device, quantize = parse_device(device), parse_quantize(quantize)
    layout, config = _layout(folder), read_config(folder)
    stored = _stored_tensors(folder, layout)
    dtype = _main_dtype(stored) if dtype is None else parse_dtype(dtype)
    model, names = _checked_model(folder, layout, config, stored)
    quantized = {f"{name}.weight" for name in linear_names(model, quantize)} if quantize else set()

    from tqdm.auto import tqdm

    total = weight_bytes(config, dtype, quantize)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {config.name}", delay=2, disable=not progress)
    with bar, closing(_in_turn(list(names.values()), stored, _cached(total, device))) as tensors:
        for name in names:
            try:
                tensor = next(tensors)
                heads = _permuted_heads(name, config)
                if layout == "mistral" and heads:
                    tensor = interleaved_to_halves(tensor, heads)
                if name in quantized:
                    placed = QuantizedLinear(tensor, quantize, device)
                    model.set_submodule(name.removesuffix(".weight"), placed)
                else:
                    placed = tensor.to(device, dtype)
                    _set_parameter(model, name, placed)
                del tensor
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                # A notebook keeps the last traceback, and with it every frame's variables: what was taken goes back now.
                model = placed = tensor = None  # noqa: F841
                tensors.close()
                traceback.clear_frames(error.__traceback__)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                raise CapacityError(
                    f"the weights take {total / 1e9:.1f} GB in {quantize or str(dtype).removeprefix('torch.')}, and {device} has no "
                    f"room for them ({first_line(error)}); what was loaded has left memory again. Free memory, use another device, or a "
                    'smaller form: a 16-bit dtype, quantize="int8", quantize="int4"'
                ) from error
            bar.update(placed.nbytes)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    suit_processor_(model)
    return model.requires_grad_(False).eval() if quantize else model.eval()


def _cached(total: int, device: torch.device) -> bool:
    """Whether the system should keep the files in memory for the next time: not where there is no room for them and the weights."""
    if not hasattr(os, "posix_fadvise"):
        return True
    return (2 if device.type == "cpu" else 1) * total < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _in_turn(names: list[str], stored: dict[str, _StoredTensor], cached: bool) -> Iterator[Tensor]:
    """The tensors, in order. Two are read at a time, or one while the caller uses what came before."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque = deque()
        for name in names:
            # Made here, not in the reader: each thread keeps freed memory to itself.
            tensor = torch.empty(stored[name].shape, dtype=stored[name].dtype, device=torch.device("cpu"))
            waiting.append(pool.submit(_read, name, stored[name], tensor, cached))
            del tensor
            if len(waiting) == _READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(name: str, stored: _StoredTensor, tensor: Tensor, cached: bool) -> Tensor:
    """``tensor``, with what the file holds. Read, not mapped: where memory is short, mapped pages come at half the disk's speed."""
    rest = memoryview(tensor.flatten().view(torch.uint8).numpy())
    try:
        with open(stored.file, "rb", buffering=0) as opened:
            opened.seek(stored.offset)
            while n := opened.readinto(rest[:_READ_BYTES]):
                rest = rest[n:]
            if not cached:  # making room for pages that nobody will find again costs more than the disk
                os.posix_fadvise(opened.fileno(), stored.offset, stored.nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{stored.file}: cannot be read: {error.strerror or error}") from error
    if rest:
        raise CheckpointError(f"{stored.file}: ends within {name}. It may be cut off: download it again")
    return tensor


class _ShapesOnly(TorchFunctionMode):
    """Modules made under it have matrices without memory (on the meta device), which nobody fills with random numbers.

    Not ``torch.device("meta")``, which would also send small sums there; doing those imports torch's compiler: seconds.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.empty, torch.ones):
            kwargs = kwargs | {"device": "meta"}
        elif getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def stored_name(name: str, layout: Layout) -> str:
    """``blocks.3.attention.q_proj.weight`` as ``model.layers.3.self_attn.q_proj.weight`` or ``layers.3.attention.wq.weight``."""
    which = 0 if layout == "hf" else 1
    if name in _NAMES:
        return _NAMES[name][which]
    _, layer, rest = name.split(".", 2)
    return f"{('model.layers', 'layers')[which]}.{layer}.{_BLOCK_NAMES[rest][which]}"


def _permuted_heads(name: str, config: MistralConfig) -> int | None:
    """How many heads' rows the two layouts order differently in this tensor; None for those they agree on."""
    if name.endswith("attention.q_proj.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("attention.k_proj.weight") else None


def _checked_model(
    folder: Path, layout: Layout, config: MistralConfig, stored: dict[str, _StoredTensor]
) -> tuple[Mistral, dict[str, str]]:
    """The model without memory for its matrices, and its parameters' names in the files, once all are seen to be there."""
    if config.n_layers > len(stored):  # or a damaged config would have us build a million layers to say so
        raise CheckpointError(
            f"{folder}: expected {config.n_layers} layers; its files hold {len(stored)} tensors in all"
        )
    try:
        with _ShapesOnly():
            model = Mistral(config)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: no tensors can have the sizes its config gives: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del wanted["lm_head.weight"]
    _check_tensors(folder, layout, config, wanted, stored)
    return model, {name: stored_name(name, layout) for name in wanted}


def _check_tensors(
    folder, layout: Layout, config: MistralConfig, wanted: dict, stored: dict[str, _StoredTensor]
) -> None:
    by_stored_name = {stored_name(name, layout): shape for name, shape in wanted.items()}
    missing = [name for name in by_stored_name if name not in stored]
    if missing:
        output = _NAMES["lm_head.weight"][0 if layout == "hf" else 1]
        key = "tie_word_embeddings" if layout == "hf" else "tied_embeddings"
        hint = f' If the model has one matrix for both, {CONFIG_FILES[layout]} must say "{key}": true.'
        raise CheckpointError(
            f"{folder}: expected {len(by_stored_name)} tensors; {_some(missing)} missing.{hint if missing == [output] else ''}"
            " Download the model again"
        )
    tied = {_NAMES["lm_head.weight"][0 if layout == "hf" else 1]} if config.tie_embeddings else set()
    extra = [n for n in stored if n not in by_stored_name and n not in tied and not _HARMLESS.fullmatch(n)]
    if extra:
        raise CheckpointError(
            f"{stored[extra[0]].file}: expected {len(by_stored_name)} tensors for {config.n_layers} layers; {_some(extra)} "
            f"too many. {CONFIG_FILES[layout]} may belong to another model"
        )
    for name, shape in by_stored_name.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{stored[name].file}: expected {name} of shape {shape}; got {stored[name].shape}. "
                f"{CONFIG_FILES[layout]} may belong to another model"
            )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more are" if len(names) > 3 else (" are" if len(names) > 1 else " is")
    return ", ".join(map(shown, names[:3])) + rest


# ---- writing ----------------------------------------------------------------------------------------------------------


def save_model(
    model: Mistral,
    folder: str | Path,
    layout: Layout = "hf",
    max_shard_bytes: int = 5_000_000_000,
    bos_id: int = 1,
    eos_id: int = 2,
) -> None:
    """Write config and weights of ``model``, in its dtype, so that transformers (``"hf"``) or Mistral's code can read it.

    Args:
        max_shard_bytes: where ``"hf"`` starts another file; a tensor is never cut. Mistral's layout is always one file.
        bos_id, eos_id: said in config.json, for programs that generate; the defaults are Mistral's own.

    All is written into a folder beside and moved in when complete. In a folder that held a checkpoint of this layout, the old
    config leaves first and the new one comes last: cut off between, it has none and is refused, not mixed.

    Raises CapacityError for a full disk, CheckpointError for a folder that cannot be written or that holds the other layout
    (readers would not know which to believe), ConfigError for an unknown layout or a quantized model.
    """
    if layout not in CONFIG_FILES:
        raise ConfigError(f'layout must be "hf" or "mistral"; got {layout!r}')
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes must be 1 or more; got {max_shard_bytes}")
    if is_quantized(model):
        raise ConfigError(
            f"{is_quantized(model)} weights are not written: save the model they were made from, and quantize on loading"
        )
    folder = Path(folder).expanduser().absolute()
    other = CONFIG_FILES["mistral" if layout == "hf" else "hf"]
    if (folder / other).exists():
        raise CheckpointError(f"{folder}: holds {other}, a checkpoint of the other layout; give another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        if layout == "hf":
            _write_hf(model, partial, max_shard_bytes, bos_id, eos_id)
        else:
            _write_native(model, partial)
        for file in partial.glob("*.safetensors"):  # which safetensors keeps to the owner alone
            shutil.copymode(partial / CONFIG_FILES[layout], file)
        _move_in(partial, folder, layout)
    except (OSError, SafetensorError) as error:
        if _disk_is_full(error):
            raise CapacityError(
                f"{folder}: the weights take {_model_bytes(model) / 1e9:.2f} GB and the disk is full. Nothing was left "
                "half-written; free some space or give a folder on another disk"
            ) from error
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _disk_is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(re.search(rf"(os error|code:) {code}\b", str(error)) for code in full)  # safetensors keeps only the text


def _model_bytes(model: Mistral) -> int:
    return sum(p.nbytes for p in model.parameters())  # a tied matrix counts once


def _weights(model: Mistral) -> dict[str, Tensor]:
    """What is written, under our names and still where the model has it. A tied output matrix is not written twice."""
    weights = model.state_dict()
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    return weights


def _write_hf(model: Mistral, folder: Path, max_shard_bytes: int, bos_id: int, eos_id: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in _weights(model).items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][stored_name(name, "hf")] = tensor
        size += tensor.nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [_HF_FILE]
    for file, shard in zip(files, shards, strict=True):
        on_host = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        save_file(on_host, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": _model_bytes(model)}, "weight_map": placed}
        _write_json(folder / _HF_INDEX, index)
    c = model.config
    stored = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # where transformers before 5 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "sliding_window": c.window,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    _write_json(folder / "config.json", stored)


def _write_native(model: Mistral, folder: Path) -> None:
    c = model.config
    tensors = {}
    for name, tensor in _weights(model).items():
        heads = _permuted_heads(name, c)
        tensor = tensor.cpu()
        tensor = halves_to_interleaved(tensor, heads) if heads else tensor
        tensors[stored_name(name, "mistral")] = tensor.contiguous()
    save_file(tensors, folder / _NATIVE_FILE)
    stored = {
        "dim": c.d_model,
        "n_layers": c.n_layers,
        "head_dim": c.head_dim,
        "hidden_dim": c.d_ff,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "norm_eps": c.norm_eps,
        "vocab_size": c.vocab_size,
        "rope_theta": c.rope_theta,  # always said, so that no reader has to guess
    }
    if c.window is not None:
        stored["sliding_window"] = c.window
    if c.tie_embeddings:
        stored["tied_embeddings"] = True
    _write_json(folder / "params.json", stored)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move_in(partial: Path, folder: Path, layout: Layout) -> None:
    if not folder.exists():
        os.replace(partial, folder)
        return
    config = CONFIG_FILES[layout]
    patterns = (_HF_FILE, _HF_INDEX, "model-*-of-*.safetensors") if layout == "hf" else ("consolidated*",)
    (folder / config).unlink(missing_ok=True)
    for pattern in patterns:
        for old in folder.glob(pattern):
            old.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: file.name == config):
        os.replace(file, folder / file.name)
