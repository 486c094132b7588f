"""The text: Python's standard library as it lies on this machine, its tests, and 30 files of it held out whole."""

import gzip
import hashlib
import json
import platform
import random
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders

from attnlab.errors import InputError

BOS, EOS = "<s>", "</s>"
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings"}  # encodings: tables of numbers, not code
TEST_FOLDERS = {"test", "tests", "idle_test"}
# Every bracket and quote is a token of its own, so that a map of attention can point at one.
BRACKETS_AND_QUOTES = r"""\"\"\"|'''|[()\[\]{}"']"""


@dataclass(frozen=True)
class Corpus:
    """Texts by path. ``lib`` and ``tests`` are trained on; ``held_out`` (files of the library) never is."""

    python: str
    lib: dict[str, str]
    tests: dict[str, str]
    held_out: dict[str, str]

    @property
    def sha256(self) -> str:
        """Hash over every path and text, in order: two machines with the same hash train on the same data."""
        digest = hashlib.sha256()
        for part in (self.lib, self.tests, self.held_out):
            for path, text in part.items():
                digest.update(f"{path}\0{text}\0".encode())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        with gzip.open(path, "wt", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    @classmethod
    def load(cls, path: Path) -> "Corpus":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return cls(**json.load(file))

    @classmethod
    def from_standard_library(cls, root: Path | None = None, n_held_out: int = 30, seed: int = 0) -> "Corpus":
        """Read ``root`` (the running Python's library if not given).

        Files that are not UTF-8 or stand there twice are left out, and so is ``test_x.py`` for a held-out ``x.py``.
        Raises InputError where there are too few files to hold some out.
        """
        root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
        lib, tests, seen = {}, {}, set()
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            folders = set(PurePosixPath(name).parts[:-1])
            if folders & SKIPPED_FOLDERS:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if not text.strip() or text in seen:
                continue
            seen.add(text)
            (tests if folders & TEST_FOLDERS else lib)[name] = text
        if len(lib) <= n_held_out:
            raise InputError(f"{root} holds {len(lib)} library files; more than {n_held_out} are needed")
        chosen = sorted(random.Random(seed).sample(sorted(lib), n_held_out))
        held_out = {name: lib.pop(name) for name in chosen}
        twins = {f"test_{PurePosixPath(name).name}" for name in held_out}
        tests = {name: text for name, text in tests.items() if PurePosixPath(name).name not in twins}
        return cls(platform.python_version(), lib, tests, held_out)


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE on the library and every fourth test. ``<s>`` is token 0 and goes in front of what is encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BRACKETS_AND_QUOTES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*corpus.lib.values(), *list(corpus.tests.values())[::4]]
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode_files(tokenizer: Tokenizer, files: dict[str, str]) -> np.ndarray:
    """All files in one stream of ids, each behind a ``<s>``."""
    encodings = tokenizer.encode_batch(list(files.values()))
    return np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encodings])
