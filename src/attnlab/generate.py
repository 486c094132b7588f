"""Generation: one token at a time, each chosen from what the model says of all before it.

``generate`` returns what is new, ``stream`` hands it out as it comes. Underneath is ``Decoder``: prefill takes the prompt in
(many tokens a pass, limited by arithmetic), then every decode step takes in one token (limited by how fast the weights and
the cache can be read).
"""

import codecs
import math
import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlab.errors import CapacityError, ConfigError, InputError, ShapeError, first_line, ran_out_of_memory
from attnlab.files import utf8_by_default
from attnlab.loading import LanguageModel, free_bytes
from attnlab.memory import human_bytes, kv_cache_bytes
from attnlab.mistral import Mistral
from attnlab.sampling import Sampler
from attnlab.tokenizer import Tokenizer

Mode = Literal["eager", "compiled", "graph"]
CACHE_IN_INT8 = ', or keep them in 8 bits: quantize_cache="int8"'
PREFILL_CHUNK = 1024  # tokens a pass: the activations of a long prompt never exist at once


class Decoder:
    """A model with the cache of one conversation (or of ``batch`` of equal length), ready to take in tokens.

    Args:
        max_len: how many tokens it must be able to take in, prompt and all. A windowed model keeps ``window`` at most.
        mode: how a decode step runs; the numbers agree to rounding.
            ``"eager"``: operation by operation, as the model is written.
            ``"compiled"``: through ``torch.compile``, over a static cache. Compiling takes up to a minute, here, once.
            ``"graph"``: recorded once as a CUDA graph and replayed, so that the host launches one thing a token and not
            a thousand. On a GPU only.
        quantize_cache: ``"int8"`` keeps keys and values in 8 bits (``QuantizedKVCache``): half of 16 bits' memory;
            every step restores what it reads.

    Raises ConfigError for an unknown mode or form, or a graph without a GPU; CapacityError where the cache finds no room.
    """

    def __init__(
        self, model: Mistral, max_len: int, batch: int = 1, mode: Mode = "eager", quantize_cache: str | None = None
    ) -> None:
        if mode not in ("eager", "compiled", "graph"):
            raise ConfigError(f'mode is "eager", "compiled" or "graph"; got {mode!r}')
        if mode == "graph" and model.device.type != "cuda":
            raise ConfigError(f'mode "graph" records a CUDA graph and the model is on {model.device}: use "compiled"')
        if max_len < 1:
            raise ConfigError(f"a decoder needs room for 1 token or more; got max_len={max_len}")
        self.model, self.mode = model, mode
        self.static = mode != "eager"
        if self.static:  # few lengths mean few compilations, and kernels like them even
            max_len = math.ceil(max_len / 256) * 256
        need = kv_cache_bytes(model.config, max_len, batch, model.dtype, quantize_cache=quantize_cache)
        if model.device.type == "cpu" and need > free_bytes("cpu"):  # a GPU says so itself; here the system would kill
            raise CapacityError(
                f"a cache of {batch} × {max_len:,} tokens takes {human_bytes(need)}, and {human_bytes(free_bytes('cpu'))} "
                f"are free: ask for fewer tokens{'' if quantize_cache else CACHE_IN_INT8}"
            )
        self.cache = model.new_cache(batch, max_len, static=self.static, quantize=quantize_cache)
        self.seen = 0  # tokens taken in by every row, known without asking the device
        if self.static:  # a step reads its ids from one place, whoever brings them
            self._ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        if mode == "compiled":
            self._compile()
        elif mode == "graph":
            self._record()

    def reset(self) -> None:
        """Forget what was taken in; keep the memory, and what was compiled or recorded."""
        self.cache.reset()
        self.seen = 0

    @torch.inference_mode()
    def prefill(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B 1 vocab"]:
        """Take in ``ids``, a chunk at a time; logits for the token after them. Raises CapacityError past ``max_len``."""
        self._make_room(ids, ids.shape[-1])
        self.cache.static = False  # a pass over many tokens can wait for the host, and a causal kernel beats a mask
        try:
            for chunk in ids.to(self.model.device).split(PREFILL_CHUNK, dim=1):
                logits = self._forward(chunk)
        finally:
            self.cache.static = self.static
        self.seen += ids.shape[1]
        return logits

    @torch.inference_mode()
    def step(self, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 vocab"]:
        """Take in one token a row; logits for the next. Raises CapacityError past ``max_len``."""
        if ids.shape[-1] != 1:
            raise ShapeError(f"a step takes one token a row, (B, 1); got {tuple(ids.shape)}: prefill takes many")
        self._make_room(ids, 1)
        if self.static:
            self._ids.copy_(ids)
        if self.mode == "eager":
            logits = self._forward(ids.to(self.model.device))
        elif self.mode == "compiled":
            logits = self._compiled(self._ids)
        else:
            self._graph.replay()
            logits = self._logits.clone()  # the next replay writes over them
        self.seen += 1
        return logits

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, cache=self.cache, last_only=True)

    def _make_room(self, ids: Tensor, T: int) -> None:
        if ids.dim() != 2 or ids.shape[0] != self.cache.batch or T < 1:
            raise ShapeError(f"expected ids ({self.cache.batch}, T) with T of 1 or more; got {tuple(ids.shape)}")
        if self.cache.max_len is not None and self.seen + T > self.cache.max_len:  # a static cache would not notice
            raise CapacityError(
                f"there is room for {self.cache.max_len} tokens, {self.seen} are in and {T} more came: "
                f"make max_len larger or the text shorter"
            )

    @torch.inference_mode()
    def _compile(self) -> None:
        """Compile one step of fixed shapes, whole or not at all: a part left to Python would be slow without a word."""
        import torch._dynamo  # takes a second, and only this mode needs it

        with utf8_by_default():
            self._compiled = torch.compile(self._forward, fullgraph=True, dynamic=False)
        try:
            with torch._dynamo.config.patch(recompile_limit=64):  # torch gives up after 8 cache lengths or batch sizes
                self._compiled(self._ids)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise ConfigError(
                f'torch could not compile the decode step ({reason}): use mode "eager", or see '
                f"to a compiler (g++ for a CPU, triton for a GPU)"
            ) from error
        self.cache.reset()  # what that step wrote lies beyond every row's length again

    @torch.inference_mode()
    def _record(self) -> None:
        """Record one step over fixed addresses: ids in, cache, logits out. Where it writes is on the device, in lengths.

        The rehearsals that CUDA wants first write to the empty cache's first slot, and ``reset`` forgets them.
        """
        with torch.cuda.device(self.model.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._forward(self._ids)
                    self.cache.reset()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._forward(self._ids)  # advances the cache too, on every replay
            self.cache.reset()


def generate(
    lm: LanguageModel,
    prompt: str | Sequence[int] | Sequence[dict[str, str]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    raw: bool = False,
    stop: Callable[[Any], bool] | None = None,
    mode: Mode = "eager",
    quantize_cache: str | None = None,
) -> str | list[int]:
    """What the model says after ``prompt``, without the prompt: text for text, ids for ids.

    Args:
        prompt: text, a list of ids, or a chat: a list of ``{"role": ..., "content": ...}``. On an instruct model a plain
            text is wrapped in its template, unless ``raw``. Ids are taken as they are: begin them with ``bos_id``.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: sample from the likeliest tokens that together have this probability (Holtzman et al. 2019, arXiv 1904.09751).
        seed: same seed, same answer, whatever else uses random numbers. None: another answer every time.
        stop: asked after each piece of text (or id) has been handed out; True ends it.
        mode, quantize_cache: how steps run, and how keys and values are kept, see ``Decoder``.

    It ends at the model's end token, which is not part of the answer, after ``max_new_tokens``, or when ``stop`` says so.

    Raises:
        InputError: an empty prompt, ids outside the vocabulary, a chat for a model without a template.
        ConfigError: a negative temperature, top_p outside (0, 1], max_new_tokens below 1, an unknown mode or form of cache.
        CapacityError: a prompt and answer for whose keys and values there is no room.
    """
    pieces = list(stream(lm, prompt, max_new_tokens, temperature, top_p, seed, raw, stop, mode, quantize_cache))
    return "".join(pieces) if _is_text(prompt) else pieces


def stream(
    lm: LanguageModel,
    prompt: str | Sequence[int] | Sequence[dict[str, str]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    raw: bool = False,
    stop: Callable[[Any], bool] | None = None,
    mode: Mode = "eager",
    quantize_cache: str | None = None,
) -> Iterator[str] | Iterator[int]:
    """The same, piece by piece as it comes; the pieces add up to what ``generate`` returns.

    A piece of text is whole characters: bytes of a character that spans tokens wait for the rest. Arguments and errors are
    those of ``generate``, and wrong arguments raise at the call, not at the first piece.
    """
    if not max_new_tokens >= 1 or max_new_tokens != int(max_new_tokens):
        raise ConfigError(f"max_new_tokens must be a whole number of 1 or more; got {max_new_tokens}")
    sampler = Sampler(temperature, top_p, seed=seed)
    ids = prompt_ids(lm, prompt, raw)
    max_len = len(ids) + int(max_new_tokens) - 1  # the last token is never taken in
    decoder = Decoder(lm.model, max_len, mode=mode, quantize_cache=quantize_cache)
    new_ids = _new_ids(lm, decoder, ids, max_new_tokens, sampler)
    if not _is_text(prompt):
        return _until(new_ids, stop)
    return _until(_as_text(TextStream(lm.tokenizer, is_chat(lm, prompt, raw)), new_ids), stop)


def _is_text(prompt: Any) -> bool:
    """Text or a chat, which are answered by text; ids are answered by ids."""
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))


def is_chat(lm: LanguageModel, prompt: Any, raw: bool) -> bool:
    """Whether the prompt goes through the model's instruct template, so that the answer begins a text of its own."""
    return not isinstance(prompt, str) or (lm.tokenizer.is_instruct and not raw)


def prompt_ids(lm: LanguageModel, prompt: Any, raw: bool = False) -> list[int]:
    """The ids that a prompt becomes, as ``generate`` takes it. Raises InputError as ``generate`` does."""
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise InputError(f"a prompt is text, a list of ids or a list of messages; got {type(prompt).__name__}")
    if len(prompt) == 0:
        raise InputError("the prompt is empty: a model needs at least one token to go on from")
    if isinstance(prompt, str):
        wrap = lm.tokenizer.is_instruct and not raw
        ids = lm.tokenizer.encode_chat([{"role": "user", "content": prompt}]) if wrap else lm.tokenizer.encode(prompt)
    elif isinstance(prompt[0], dict):
        ids = lm.tokenizer.encode_chat(list(prompt))
    else:
        try:
            ids = [operator.index(id) for id in prompt]
        except TypeError as error:
            raise InputError(f"a list of ids holds whole numbers: {error}") from error
    vocab = lm.config.vocab_size
    for position, id in enumerate(ids):
        if not 0 <= id < vocab:
            raise InputError(f"this model's ids are 0 to {vocab - 1}; number {position} of the prompt is {id}")
    return ids


def _new_ids(
    lm: LanguageModel, decoder: Decoder, ids: list[int], n: int, choose: Callable[[Tensor], int]
) -> Iterator[int]:
    """Up to ``n`` ids after ``ids``, without the end token. Ids that the tokenizer does not know are never chosen."""
    try:
        logits = decoder.prefill(torch.tensor([ids]))  # (1, 1, vocab)
        for i in range(n):
            id = choose(logits[0, 0, : lm.tokenizer.vocab_size])
            if id == lm.tokenizer.eos_id:
                return
            yield id
            if i + 1 < n:
                logits = decoder.step(torch.tensor([[id]]))
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        taken = human_bytes(decoder.cache.nbytes)
        decoder = logits = None  # a notebook keeps the last traceback, and with it the cache
        traceback.clear_frames(error.__traceback__)
        if lm.model.device.type == "cuda":
            torch.cuda.empty_cache()
        raise CapacityError(
            f"memory ran out on {lm.model.device} after {len(ids)} tokens of prompt, beside a cache of {taken} "
            f"({first_line(error)}); the cache has left memory again. Shorten the prompt, lower max_new_tokens, or load the "
            f"model in fewer bits: a 16-bit dtype or quantize"
        ) from error


class TextStream:
    """Ids to text as they come: whole characters, whose bytes may span tokens.

    ``begins``: an answer of its own, without SentencePiece's first space.
    """

    def __init__(self, tokenizer: Tokenizer, begins: bool) -> None:
        self.tokenizer, self.begins = tokenizer, begins
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, id: int) -> str:
        """The text that ``id`` completes; empty where its bytes wait for more."""
        data = self.tokenizer.token_bytes(id)
        if self.begins and data:
            if data.startswith(b" "):
                data = self.tokenizer.decode([id]).encode()
            self.begins = False
        return self._decode(data)

    def finish(self) -> str:
        """What is left when an answer ends within a character."""
        return self._decode(b"", final=True)


def _as_text(text: TextStream, new_ids: Iterator[int]) -> Iterator[str]:
    for id in new_ids:
        if piece := text.push(id):
            yield piece
    if piece := text.finish():
        yield piece


def _until(pieces: Iterator, stop: Callable[[Any], bool] | None) -> Iterator:
    for piece in pieces:
        yield piece
        if stop is not None and stop(piece):
            return
