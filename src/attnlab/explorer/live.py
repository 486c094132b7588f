"""The live companion: the models that ship with attnlab, in int8, for a decoder that runs in the reader's browser.

``package`` is what ``static/live_model.js`` reads: a header in JSON (config, tokenizer, where each tensor lies), then the
tensors. Matrices are int8 with one scale a row, as ``attnlab.quantize`` defines it, the tied embedding among them: about a byte a
weight. Vectors and scales are float32. A page gets a package as
files of base64 in classic scripts, since a page opened from a folder can fetch nothing else; several files a model, so that a
download shows how far it is, and one that breaks is taken up where it stopped.

``quantized`` is the same model in PyTorch: what the page's numbers are held to.
"""

import base64
import hashlib
import json
from functools import cache

import numpy as np
import torch
from matplotlib.figure import Figure

from attnlab import companion, plots
from attnlab.checkpoint import load_model, read_config
from attnlab.companion import COMPANION, SIBLINGS
from attnlab.errors import ConfigError, InputError
from attnlab.explorer.attention import visible
from attnlab.explorer.base import Explorer
from attnlab.mistral import Mistral
from attnlab.quantize import QuantizedLinear
from attnlab.record import AttentionRecord, record_attention
from attnlab.tokenizer import load_tokenizer

MODELS = (COMPANION, *SIBLINGS)
FILE_BYTES = 393_216  # of a package in one file, before base64: a multiple of 3, so that each file decodes alone
ALIGNED = 4  # tensors begin at multiples of it, as typed arrays must
TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write(path, text):\n    with open("
HEAD = (3, 3)  # of the companion, an induction head


class LiveExplorer(Explorer):
    """The companion and its siblings, to be run in the reader's browser: next tokens, every head's map, the KV cache.

    The weights are loaded when a button is pressed: from the page's own files, from a saved file itself, or in a live
    notebook from the kernel.

    Args:
        text: what stands in the box at first; the still picture shows a head of the first model over it.
        models: names out of "companion", "multi-head", "grouped-query", "multi-query", the one to start with first.

    Raises InputError for what is not text or holds nothing, ConfigError for a model that does not ship.
    """

    kind = "live"

    def __init__(self, text: str = TEXT, models: tuple[str, ...] = MODELS) -> None:
        if not isinstance(text, str) or not text:
            raise InputError(f"expected some text to start with; got {text!r}")
        if not models or (unknown := [name for name in models if name not in MODELS]):
            raise ConfigError(f"models are one or more of {', '.join(MODELS)}; got {unknown if models else 'none'}")
        self.text, self.models = text, tuple(models)
        super().__init__(data={"text": text, "head": list(HEAD), "models": [described(name) for name in models]})
        self.on_msg(self._answer)

    def files(self) -> dict[str, str]:
        return {file: text for name in self.models for file, text in files(name).items()}

    def _answer(self, widget: Explorer, message: dict, buffers: list) -> None:
        """A live notebook asks for a file of weights."""
        if (name := message.get("file")) in (files := self.files()):
            self.send({"file": name, "text": files[name]})

    def record(self) -> AttentionRecord:
        """The recorded example: the first model on the text, at most the last 64 tokens of it."""
        name = self.models[0]
        tokenizer = load_tokenizer(companion.folder(name))
        bos, *ids = tokenizer.encode(self.text)
        return record_attention(quantized(name), [bos, *ids[-63:]], tokenizer)

    def still(self) -> Figure:
        record = self.record()
        title = f"{self.models[0]}, layer {HEAD[0]}, head {HEAD[1]}"
        return plots.attention_map(
            record.weights[HEAD], record.query_tokens, record.key_tokens, title=title, mask=visible(record)
        )

    @property
    def alt(self) -> str:
        return f"Heat map of one head of the {self.models[0]} on a short text: each token looks back at earlier ones"


def described(name: str) -> dict:
    """What the page knows of a model before it is loaded."""
    config = read_config(companion.folder(name))
    shape = {key: getattr(config, key) for key in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "window")}
    return {"name": name, **shape, "files": [{"file": file, "length": len(text)} for file, text in files(name).items()]}


def float_model(name: str) -> Mistral:
    return load_model(companion.folder(name), torch.device("cpu"), torch.float32, progress=False)


def quantized(name: str = COMPANION) -> Mistral:
    """The model of that name with every matrix replaced by what int8 leaves of it, the embedding among them."""
    model = float_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(QuantizedLinear(parameter, "int8").dequantize())
    return model


def package(name: str = COMPANION) -> bytes:
    """A model and its tokenizer as the page reads them."""
    folder, model = companion.folder(name), float_model(name)
    tokenizer = load_tokenizer(folder)
    tensors, blobs, at = {}, [], 0

    def place(array: np.ndarray) -> int:
        nonlocal at
        start, data = at, array.tobytes()
        data += bytes(-len(data) % ALIGNED)
        blobs.append(data)
        at += len(data)
        return start

    stored: dict[int, dict] = {}  # by where the weights lie: a tied matrix is stored once
    for tensor_name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in stored:
            entry = {"shape": list(tensor.shape)}
            if tensor.dim() == 2:
                matrix = QuantizedLinear(tensor, "int8")
                entry |= {"at": place(matrix.packed.numpy()), "scale": place(matrix.scales.float().numpy())}
            else:
                entry["at"] = place(tensor.numpy())
            stored[tensor.data_ptr()] = entry
        tensors[tensor_name] = stored[tensor.data_ptr()]
    header = {
        "config": model.config.to_dict() | {"name": name},
        "tokenizer": json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")),
        "pieces": [tokenizer.piece(id) for id in range(tokenizer.vocab_size)],
        "tensors": tensors,
    }
    return with_header(header, b"".join(blobs))


def with_header(header: dict, data: bytes) -> bytes:
    """Length of the header, header, data; places in the header count from the start of ``data``."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(4, "little") + text + data


@cache
def files(name: str = COMPANION) -> dict[str, str]:
    """The package as base64 by file name, in order. Names hold a hash of the content: a browser may keep them for good."""
    data = package(name)
    digest = hashlib.sha256(data).hexdigest()[:12]
    parts = [data[start : start + FILE_BYTES] for start in range(0, len(data), FILE_BYTES)]
    return {f"{name}-{digest}-{i}.js": base64.b64encode(part).decode("ascii") for i, part in enumerate(parts)}
