"""Text to ids and back: Mistral's own tokenizers through ``mistral-common``, any ``tokenizer.json`` through ``tokenizers``.

Both hide behind one small protocol, ``Tokenizer``; ``load_tokenizer`` picks the right one for a model's folder.

**The trailing space is a trap.** A byte-pair tokenizer keeps a space with the word that *follows*: " main" is one token,
and "def main" is "def", " main". A prompt that ends in a space, "def ", hands the model a lone space token, after which
training almost never showed it a word: every word it could want begins with a space of its own. So "def " continues
badly and "def" continues well. Prompts here end without a space.

**Instruct templates** wrap what a user says in the marks a model was tuned on. Three belong to Mistral 7B:

====  ==========================  =====================================================================================
V1    Instruct v0.1, v0.2         ``<s> [INST] user [/INST] answer</s> [INST] next [/INST]``; ``[INST]`` is plain text of
                                  three tokens; system text goes in front of the first user message
V2    no 7B model                 ``<s>[INST] user[/INST] answer</s>[INST] next[/INST]``; ``[INST]`` is one token; system
                                  text goes in front of the last user message
V3    Instruct v0.3               as V2, and tools
====  ==========================  =====================================================================================

(mistral-common's ``instruct.py``.) The template in Hugging Face's v0.2 folder has the same words with fewer spaces, so it
gives other ids than V1 does. Compare ids, never strings.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from attnlab.errors import CheckpointError, InputError

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
LOOKED_FOR = "tokenizer.model.v1 (v2, v3, ...), tokenizer.model, tekken.json or tokenizer.json"


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    is_instruct: bool  # has a chat template, so that ``generate`` wraps a plain string in it

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of ``text``, behind the token that begins every text if ``bos``. Marks such as ``</s>`` in it are text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text that begins with these ids. Special tokens leave nothing; bytes that are no character leave U+FFFD."""

    def token_bytes(self, id: int) -> bytes:
        """What one token adds to a text: several may be needed for one character. Nothing for a special token."""

    def piece(self, id: int) -> str:
        """A label for figures: ``·`` for a space, ``⏎`` for a line's end, ``⇥`` for a tab, ``<s>``, ``<0xE2>``."""

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Ids of a chat of ``{"role": ..., "content": ...}`` messages, up to where the answer begins."""


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model's folder.

    The first of these wins: ``tokenizer.model.v3`` and its like (the highest version), ``tokenizer.model``, ``tekken.json``,
    ``tokenizer.json``. Mistral's folders on Hugging Face hold the second and the last: the second is the original. But a
    chat template without ``[INST]`` is not Mistral's: then somebody tuned the model on another, and ``tokenizer.json`` wins.

    Which instruct template: the one the file's name says; for a plain ``tokenizer.model``, V1 with a vocabulary of 32,000,
    else V3, or V2 where the control tokens that V3 named have no names. Whether there is one at all: the folder has a chat
    template, or is called Instruct. Base models share their tokenizer files with their instruct siblings.

    Raises CheckpointError for a folder without a tokenizer, or with a damaged one.
    """
    folder = Path(folder)
    template = _chat_template(folder)
    json_file = folder / "tokenizer.json"
    foreign_template = template is not None and "[INST]" not in template
    mistral_file = _mistral_file(folder)
    if mistral_file is not None and not (foreign_template and json_file.exists()):
        named_instruct = template is None and "instruct" in _names(folder).lower()
        is_instruct = named_instruct or (template is not None and not foreign_template)
        return MistralTokenizer(mistral_file, is_instruct, foreign_template)
    if json_file.exists():
        return JsonTokenizer(json_file, is_instruct=template is not None)
    raise CheckpointError(f"no tokenizer in {folder}: looked for {LOOKED_FOR}")


class _ByteTokenizer:
    """What both tokenizers do in the same way, given ``encode``, ``_name`` and ``token_bytes``."""

    vocab_size: int
    bos_id: int
    begins_with_space = False  # SentencePiece writes a space in front of every text and takes it off again

    def decode(self, ids: Sequence[int]) -> str:
        text = b"".join(self.token_bytes(id) for id in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.begins_with_space else text

    def piece(self, id: int) -> str:
        data = self.token_bytes(id)
        if not data:
            return self._name(id)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)
        for plain, visible in ((" ", "·"), ("\n", "⏎"), ("\t", "⇥")):
            text = text.replace(plain, visible)
        return text if text.isprintable() else repr(text)[1:-1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path.name}, vocab_size={self.vocab_size}, is_instruct={self.is_instruct})"

    def _check_id(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise InputError(f"token ids are 0 to {self.vocab_size - 1}; got {id}")


class MistralTokenizer(_ByteTokenizer):
    """One of Mistral's own files: SentencePiece (V1 to V3, V7) or tekken, with the instruct template that goes with it."""

    def __init__(self, path: Path, is_instruct: bool = False, foreign_template: bool = False) -> None:
        self.path, self.is_instruct, self.foreign_template = path, is_instruct, foreign_template
        try:
            self._mistral = _open_mistral(path)
        except Exception as error:  # a damaged file shows itself as RuntimeError, KeyError, AssertionError, ...
            raise CheckpointError(f"{path} is not a tokenizer that mistral-common can read: {_line(error)}") from error
        self._inner = self._mistral.instruct_tokenizer.tokenizer
        self.vocab_size, self.bos_id, self.eos_id = self._inner.n_words, self._inner.bos_id, self._inner.eos_id
        self.version: str = self._inner.version.value  # of the instruct template
        self.begins_with_space = not hasattr(self._inner, "id_to_byte_piece")  # tekken works on bytes, and adds nothing
        self._special = self._inner.special_ids | ({self._inner.unk_id} if self.begins_with_space else set())

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return self._inner.encode(_checked_text(text), bos=bos, eos=False)

    def token_bytes(self, id: int) -> bytes:
        self._check_id(id)
        if id in self._special:
            return b""
        if not self.begins_with_space:
            return self._inner.id_to_byte_piece(id)
        return _sentencepiece_bytes(self._inner.id_to_piece(id))

    def encode_chat(self, messages: list[Message]) -> list[int]:
        messages = _checked_messages(messages)
        if self.foreign_template:
            raise InputError(
                f"the chat template of {self.path.parent.name} is not one of Mistral's, which {self.path.name} goes with: it "
                "writes no [INST]. It needs the tokenizer.json that it was made for, beside it; or pass plain text"
            )
        if not self.is_instruct:
            raise InputError(f"{self.path.parent.name} is no instruct model: it has no chat template; pass plain text")
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            return self._mistral.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        except (MistralCommonException, ValueError) as error:
            raise InputError(f"these messages make no chat: {_line(error)}") from error

    def _name(self, id: int) -> str:
        return self._inner.id_to_piece(id)


class JsonTokenizer(_ByteTokenizer):
    """A Hugging Face ``tokenizer.json``: byte-level BPE (the companion's), or SentencePiece's BPE with bytes to fall back on.

    Its chat template, if the folder has one, is the folder's own.
    """

    def __init__(self, path: Path, is_instruct: bool = False) -> None:
        from tokenizers import Tokenizer as Inner

        self.path, self.is_instruct = path, is_instruct
        try:
            self._inner = Inner.from_file(str(path))
            layout = json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer.json that can be read: {_line(error)}") from error
        self._inner.encode_special_tokens = True  # "</s>" in a text is text
        self._added = {token["id"]: token for token in layout.get("added_tokens") or []}
        decoder = json.dumps(layout.get("decoder"))
        self.byte_level = '"ByteLevel"' in decoder
        self.begins_with_space = '"Strip"' in decoder or '"Metaspace"' in decoder
        self.vocab_size = self._inner.get_vocab_size()
        self.bos_id, self.eos_id = self._end_id("bos", "<s>"), self._end_id("eos", "</s>")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        ids = self._inner.encode(_checked_text(text), add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos else ids

    def token_bytes(self, id: int) -> bytes:
        self._check_id(id)
        if id in self._added:
            token = self._added[id]
            return b"" if token["special"] else token["content"].encode()
        piece = self._name(id)
        if self.byte_level:
            return bytes(_BYTE_OF[letter] for letter in piece)
        return _sentencepiece_bytes(piece)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        messages = _checked_messages(messages)
        if not self.is_instruct:
            raise InputError(f"{self.path.parent.name} is no instruct model: it has no chat template; pass plain text")
        try:
            return self._templates.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # whatever the folder's own template raises
            raise InputError(f"the chat template in {self.path.parent} refused: {_line(error)}") from error

    @cached_property
    def _templates(self):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.path.parent, local_files_only=True)

    def _name(self, id: int) -> str:
        name = self._inner.id_to_token(id)
        return f"<{id}>" if name is None else name  # ids may have holes

    def _end_id(self, which: str, usual: str) -> int:
        """Id of the token that begins or ends a text: as tokenizer_config.json names it, or as it is usually called."""
        named = _read_json(self.path.parent / "tokenizer_config.json").get(f"{which}_token") or usual
        name = named["content"] if isinstance(named, dict) else named
        id = self._inner.token_to_id(name)
        if id is None:
            id = _read_json(self.path.parent / "config.json").get(f"{which}_token_id")
            id = id[0] if isinstance(id, list) and id else id
        if not isinstance(id, int):
            raise CheckpointError(
                f"{self.path} has no {name!r} and the folder's config.json no {which}_token_id: "
                f"name the token in tokenizer_config.json as {which}_token"
            )
        return id


def _open_mistral(path: Path):
    """The tokenizer in ``path`` with its template; a plain ``tokenizer.model`` needs a closer look at its vocabulary."""
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV2, InstructTokenizerV3
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Inner
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    if path.name == "tokenizer.model":
        vocab = SentencePieceTokenizer(path).vocab()
        if len(vocab) > 32_000:
            template, version = (InstructTokenizerV3, "v3") if "[PREFIX]" in vocab else (InstructTokenizerV2, "v2")
            version = TokenizerVersion(version)
            validator = get_validator(version, mode=ValidationMode.test)
            inner = SentencePieceTokenizer(path, tokenizer_version=version)
            return Inner(template(inner), validator=validator, request_normalizer=get_normalizer(version, None))
    return Inner.from_file(path)


def _mistral_file(folder: Path) -> Path | None:
    versioned = sorted(folder.glob("*.model.v*"), key=lambda path: _version_number(path.name))
    for path in (*versioned[::-1], folder / "tokenizer.model", *sorted(folder.glob("tekken*.json"))[::-1]):
        if path.is_file():
            return path
    return None


def _version_number(name: str) -> int:
    """7 of tokenizer.model.v7m1; 0 if the name says none."""
    digits = name.rpartition(".v")[2].partition("m")[0]
    return int(digits) if digits.isdecimal() else 0


def _chat_template(folder: Path) -> str | None:
    """The folder's chat template, the default one where there are several; None if it has none."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8", errors="replace")
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template or None


def _names(folder: Path) -> str:
    """What the model is called: its folder, the hub's folder around a snapshot, the config's own word for it."""
    path = folder.absolute()
    hub = [parent.name for parent in path.parents if parent.name.startswith("models--")]
    own = [str(_read_json(folder / "config.json").get(key) or "") for key in ("_name_or_path", "name")]
    return " ".join((path.name, *hub, *own))


def _read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object; it holds a {type(content).__name__}")
    return content


def _sentencepiece_bytes(piece: str) -> bytes:
    """``▁`` is a space and ``<0xE2>`` a byte; all else is itself."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode("utf-8")


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes every byte as one visible letter: itself if printable, else the next letter from 256 on.

    (GPT-2's ``bytes_to_unicode``, which ``tokenizers`` follows: a space is Ġ, a line's end Ċ.)
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_of_letter()


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"expected text; got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text holds half a character (a lone surrogate) at position {error.start}") from error
    return text


def _checked_messages(messages: list[Message]) -> list[Message]:
    shape = 'a chat is a list of {"role": "user", "content": "..."}'
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"{shape} with one message or more; got {messages!r}")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InputError(f"{shape}; got {message!r}")
        if message["role"] not in ROLES:
            raise InputError(f"a message's role is one of {', '.join(ROLES)}; got {message['role']!r}")
        _checked_text(message["content"])
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise InputError("nobody asks anything: a chat needs a user message that is not empty")
    if next(message["role"] for message in messages if message["role"] != "system") != "user":
        raise InputError("a chat begins with the user's message, after the system's if there is one")
    if messages[-1]["role"] != "user":
        raise InputError(
            f"a chat ends with the user's message, which is answered; this one ends with {messages[-1]['role']}"
        )
    return list(messages)


def _line(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
