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

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from attnlab.errors import CheckpointError, InputError
from attnlab.files import brief, check_file, damage_is_said, line, read_json, read_text

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
LOOKED_FOR = "tokenizer.model.v1 (v2, v3, ...), tokenizer.model, tekken.json or tokenizer.json"
_SIZE_LIMIT = 25_000_000  # bytes; Mistral's largest has 20 million, and a hostile one takes 24 times its size in memory
_SPECIAL_LIMIT = 10_000  # Mistral's have a thousand


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
    if json_file.is_file():
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
        check_file(path, _SIZE_LIMIT)
        with _damage_is_said(path, "a tokenizer that mistral-common can read"):
            self._mistral = _open_mistral(path)
            self._inner = self._mistral.instruct_tokenizer.tokenizer
            self.vocab_size, self.bos_id, self.eos_id = self._inner.n_words, self._inner.bos_id, self._inner.eos_id
            self.version: str = self._inner.version.value  # of the instruct template
            self.begins_with_space = not hasattr(self._inner, "id_to_byte_piece")  # tekken works on bytes, adds nothing
            self._special = self._inner.special_ids | ({self._inner.unk_id} if self.begins_with_space else set())
        for which, id in (("begins", self.bos_id), ("ends", self.eos_id)):
            if not 0 <= id < self.vocab_size:
                raise CheckpointError(f"{path} has no token that {which} a text. Take the model's own tokenizer")

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
            raise InputError(f"these messages make no chat: {line(error)}") from error

    def _name(self, id: int) -> str:
        return self._inner.id_to_piece(id)


class JsonTokenizer(_ByteTokenizer):
    """A Hugging Face ``tokenizer.json``: byte-level BPE (the companion's), or SentencePiece's BPE with bytes to fall back on.

    Its chat template, if the folder has one, is the folder's own.
    """

    def __init__(self, path: Path, is_instruct: bool = False) -> None:
        from tokenizers import Tokenizer as Inner

        self.path, self.is_instruct = path, is_instruct
        check_file(path, _SIZE_LIMIT)
        with _damage_is_said(path, "a tokenizer.json that can be read"):
            self._inner = Inner.from_file(str(path))
        self._inner.encode_special_tokens = True  # "</s>" in a text is text
        self._inner.no_truncation()  # a file may ask for both, and a text is what it is
        self._inner.no_padding()
        self._added = self._inner.get_added_tokens_decoder()
        decoder = b"" if self._inner.decoder is None else self._inner.decoder.__getstate__()  # JSON
        self.byte_level = b'"ByteLevel"' in decoder
        self.begins_with_space = b'"Strip"' in decoder or b'"Metaspace"' in decoder
        vocab = self._inner.get_vocab()
        self.vocab_size = 1 + max(vocab.values(), default=-1)  # ids may have holes
        self.bos_id, self.eos_id = self._end_id("bos", "<s>", vocab), self._end_id("eos", "</s>", vocab)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        text = _checked_text(text)
        with _damage_is_said(self.path, "a tokenizer of every text"):  # one without a token for what it does not know
            ids = self._inner.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos else ids

    def token_bytes(self, id: int) -> bytes:
        self._check_id(id)
        if id in self._added:
            token = self._added[id]
            return b"" if token.special else token.content.encode()
        piece = self._name(id)
        if not self.byte_level:
            return _sentencepiece_bytes(piece)
        letters = [_BYTE_OF.get(letter) for letter in piece]
        return piece.encode() if None in letters else bytes(letters)  # a foreign letter: as the library takes it

    def encode_chat(self, messages: list[Message]) -> list[int]:
        messages = _checked_messages(messages)
        if not self.is_instruct:
            raise InputError(f"{self.path.parent.name} is no instruct model: it has no chat template; pass plain text")
        try:
            return self._templates.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # whatever the folder's own template raises
            raise InputError(f"the chat template in {self.path.parent} refused: {line(error)}") from error

    @cached_property
    def _templates(self):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.path.parent, local_files_only=True)

    def _name(self, id: int) -> str:
        name = self._inner.id_to_token(id)
        return f"<{id}>" if name is None else name

    def _end_id(self, which: str, usual: str, vocab: dict[str, int]) -> int:
        """Id of the token that begins or ends a text: as tokenizer_config.json names it, or as it is usually called."""
        named = _read_json(self.path.parent / "tokenizer_config.json").get(f"{which}_token") or usual
        name = named.get("content") if isinstance(named, dict) else named
        id = vocab.get(name) if isinstance(name, str) else None
        if id is None:
            id = _read_json(self.path.parent / "config.json").get(f"{which}_token_id")
            id = id[0] if isinstance(id, list) and id else id
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < self.vocab_size:
            raise CheckpointError(
                f"{self.path} has no {brief(name)} and the folder's config.json no {which}_token_id: "
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

    if path.suffix == ".json":  # whose special tokens are filled up to any number it says
        config = read_json(path, _SIZE_LIMIT).get("config")
        n_special = config.get("default_num_special_tokens") if isinstance(config, dict) else None
        if not isinstance(n_special, int) or n_special > _SPECIAL_LIMIT:
            raise CheckpointError(f"{path}: expected at most {_SPECIAL_LIMIT:,} special tokens; got {brief(n_special)}")
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
        return read_text(beside)
    config = folder / "tokenizer_config.json"
    template = _read_json(config).get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[0].get("template") if entries else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{config}: expected a text as chat_template; got {brief(template)}")
    return template or None


def _names(folder: Path) -> str:
    """What the model is called: its folder, the hub's folder around a snapshot, the config's own word for it."""
    path = folder.absolute()
    hub = [parent.name for parent in path.parents if parent.name.startswith("models--")]
    own = [str(_read_json(folder / "config.json").get(key) or "") for key in ("_name_or_path", "name")]
    return " ".join((path.name, *hub, *own))


def _read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one where there is no file."""
    return read_json(path) if path.is_file() else {}


def _damage_is_said(path: Path, what: str) -> AbstractContextManager:
    """For the tokenizers' libraries."""
    return damage_is_said(lambda reason: f"{path} is not {what}: {reason}")


def _sentencepiece_bytes(piece: str) -> bytes:
    """``▁`` is a space and ``<0xE2>`` a byte; all else is itself."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(byte[1])
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
