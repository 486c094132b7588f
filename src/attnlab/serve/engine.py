"""Continuous batching: conversations of different lengths share every decode step (Yu et al., Orca, OSDI 2022).

One thread owns the model. Rows at work stand at the front of one cache, so a step is one call over exactly those rows. A row
that ends is overwritten by the last one, and its place is free for the next conversation at once. A new prompt is taken in
chunk by chunk, between the others' steps, so that nobody waits for all of it.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from attnlab.errors import AttnlabError, CapacityError, ConfigError, InputError
from attnlab.generate import CACHE_IN_INT8
from attnlab.loading import LanguageModel, free_bytes
from attnlab.memory import human_bytes, kv_cache_bytes
from attnlab.sampling import Sampler

PREFILL_CHUNK = 256  # tokens that go in between two steps of the others


@dataclass(frozen=True)
class End:
    """The last thing a conversation is told. ``reason``: the end token came, or ``max_new_tokens``, or ``error`` says what."""

    reason: Literal["stop", "length", "error"]
    error: AttnlabError | None = None


@dataclass(eq=False)
class Job:
    """One conversation. ``deliver`` is called from the engine's thread with each id as it comes, then once with ``End``."""

    ids: list[int]
    max_new_tokens: int
    sampler: Sampler
    deliver: Callable[[int | End], None]
    made: list[int] = field(default_factory=list)
    taken_in: int = 0  # of the prompt
    cancelled: bool = False


@dataclass(frozen=True)
class State:
    """What an engine is doing: rows that decode, rows in all, conversations that wait, ids given out so far."""

    decoding: int
    rows: int
    waiting: int
    tokens: int


class Engine:
    """Runs conversations on a model, many at once.

    Args:
        rows: conversations at once at most. Their cache is taken at the start, so a row that is free has its memory.
        max_len: tokens that each row can hold, prompt and answer. A model with a window takes any number and ignores it.
        max_waiting: conversations that may wait for a row. One more is refused.
        quantize_cache: ``"int8"`` keeps keys and values in 8 bits: almost twice as many rows fit as in 16, see ``Decoder``.

    Raises ConfigError for sizes below 1 or an unknown form, CapacityError where the rows' cache finds no room.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: int = 16,
        max_len: int = 2048,
        max_waiting: int = 256,
        quantize_cache: str | None = None,
    ) -> None:
        if rows < 1 or max_len < 2 or max_waiting < 0:
            raise ConfigError(f"a server needs rows of 1 or more and max_len of 2 or more; got {rows} and {max_len}")
        need = kv_cache_bytes(lm.config, max_len, rows, lm.model.dtype, quantize_cache=quantize_cache)
        hint = "" if quantize_cache else CACHE_IN_INT8
        if need > free_bytes(lm.model.device):
            raise CapacityError(
                f"{rows} rows of {max_len:,} tokens take {human_bytes(need)} of cache, and "
                f"{human_bytes(free_bytes(lm.model.device))} are free: fewer rows, or shorter ones{hint}"
            )
        self.lm, self.max_waiting = lm, max_waiting
        self.cache = lm.model.new_cache(rows, max_len, quantize=quantize_cache)
        self._waiting: deque[Job] = deque()
        self._prefilling: Job | None = None  # it stands in the row behind those that decode
        self._decoding: list[Job] = []  # the i-th is row i of the cache
        self._tokens = 0
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="attnlab-engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        at_work = len(self._decoding) + (self._prefilling is not None)
        return State(at_work, self.cache.batch, len(self._waiting), self._tokens)

    def submit(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampler: Sampler,
        deliver: Callable[[int | End], None],
        only_if_free: bool = False,
    ) -> Job:
        """Take a conversation. What comes of it goes to ``deliver``, from another thread.

        Raises InputError for no ids or more than a row holds, CapacityError where too many wait already, or one would have
        to wait and ``only_if_free`` says that it shall not.
        """
        if not ids:
            raise InputError("the prompt is empty: a model needs at least one token to go on from")
        if self.cache.max_len is not None and len(ids) + max_new_tokens - 1 > self.cache.max_len:
            raise InputError(
                f"a row holds {self.cache.max_len:,} tokens; the prompt has {len(ids):,} and {max_new_tokens:,} more were "
                f"asked for: make either smaller"
            )
        job = Job(list(ids), max_new_tokens, sampler, deliver)
        with self._wake:
            if self._closing:
                raise CapacityError("the server is shutting down and takes no new requests")
            state = self.state
            if only_if_free and state.decoding + state.waiting >= state.rows:
                raise CapacityError(f"all {state.rows} rows are at work")
            if state.waiting >= self.max_waiting:
                raise CapacityError(f"all {state.rows} rows are at work and {state.waiting} requests wait")
            self._waiting.append(job)
            self._wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Forget a conversation; its row is free before the next step. Nothing more is delivered to it."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new and finish what there is; after ``timeout`` seconds end it. True if all was finished."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        if finished := not self._thread.is_alive():
            return finished
        with self._wake:
            for job in (*self._waiting, *self._decoding, *filter(None, [self._prefilling])):
                job.cancelled = True
        self._thread.join()
        return False

    # ---- the engine's thread ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._waiting or self._prefilling or self._decoding)
                self._drop_cancelled()
                self._admit()
                if not (self._prefilling or self._decoding):
                    if self._closing:
                        return
                    continue
            try:
                if self._prefilling:
                    self._take_in_a_chunk(self._prefilling)
                if self._decoding:
                    self._step()
            except Exception as error:  # no conversation may hang because of a fault here
                self._give_up(error)

    def _admit(self) -> None:
        if self._waiting and self._prefilling is None and len(self._decoding) < self.cache.batch:
            self._prefilling = self._waiting.popleft()
            self.cache.row(len(self._decoding)).clear()  # a NaN left by the one before would reach through the mask

    def _take_in_a_chunk(self, job: Job) -> None:
        row = self.cache.row(len(self._decoding))
        chunk = job.ids[job.taken_in : job.taken_in + PREFILL_CHUNK]
        logits = self.lm.model(self._tensor([chunk]), cache=row, last_only=True)  # (1, 1, vocab)
        job.taken_in += len(chunk)
        if job.taken_in < len(job.ids):
            return
        self._prefilling = None
        self._decoding.append(job)
        if self._choose(job, logits[0, 0]):
            self._free(len(self._decoding) - 1)

    def _step(self) -> None:
        """One token for every row at work."""
        n = len(self._decoding)
        ids = self._tensor([[job.made[-1]] for job in self._decoding])  # (n, 1)
        logits = self.lm.model(ids, cache=self.cache.front(n), last_only=True)  # (n, 1, vocab)
        ended = [i for i, job in enumerate(self._decoding) if self._choose(job, logits[i, 0])]
        for i in reversed(ended):
            self._free(i)

    def _choose(self, job: Job, logits: torch.Tensor) -> bool:
        """Hand out the job's next id, or its end; True if that was its end."""
        try:
            id = job.sampler(logits[: self.lm.tokenizer.vocab_size])
        except Exception as error:  # one row's logits, one conversation's end
            job.deliver(End("error", _told(error)))
            return True
        if id == self.lm.tokenizer.eos_id:
            job.deliver(End("stop"))
            return True
        job.made.append(id)
        self._tokens += 1
        job.deliver(id)
        if len(job.made) == job.max_new_tokens:
            job.deliver(End("length"))
            return True
        return False

    def _free(self, i: int) -> None:
        """Row ``i`` has ended: the last row takes its place, and the one that is being filled stays right behind."""
        last = len(self._decoding) - 1
        if i != last:
            self.cache.move_row(last, i)
            self._decoding[i] = self._decoding[last]
        self._decoding.pop()
        if self._prefilling is not None:
            self.cache.move_row(last + 1, last)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        if self._prefilling is not None and self._prefilling.cancelled:
            self._prefilling = None
        for i in reversed(range(len(self._decoding))):
            if self._decoding[i].cancelled:
                self._free(i)

    def _give_up(self, error: Exception) -> None:
        """A fault of the model itself: every conversation that was at work ends with it; those that wait go on."""
        failed = [*self._decoding, *filter(None, [self._prefilling])]
        self._decoding, self._prefilling = [], None
        for job in failed:
            job.deliver(End("error", _told(error)))

    def _tensor(self, ids: list[list[int]]) -> torch.Tensor:
        return torch.tensor(ids, device=self.lm.model.device)


def _told(error: Exception) -> AttnlabError:
    """An error as a client may hear it."""
    if isinstance(error, AttnlabError):
        return error
    return CapacityError(f"the model failed within a step ({type(error).__name__}: {str(error)[:200]})")
