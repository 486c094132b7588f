"""Continuous batching: what each conversation gets is what it would get alone, and rows are never lost."""

import queue
import threading
import time

import pytest
import torch
from until import wait_until

import attnlab
from attnlab import memory
from attnlab.errors import CapacityError, ConfigError, InputError
from attnlab.sampling import Sampler
from attnlab.serve.engine import End, Engine

PROMPTS = [
    "def add(a, b):\n    return",
    "import os\nimport sys\n\n\ndef main",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "for i in range(10):\n    print",
    "try:\n    import json\nexcept",
]


@pytest.fixture
def engine(lm):
    engine = Engine(lm, rows=3)
    yield engine
    assert engine.close(20)


def ask(engine, prompt, n=20, only_if_free=False, **how):
    """Submit; what is delivered comes through a queue."""
    got = queue.Queue()
    ids = engine.lm.tokenizer.encode(prompt)
    return engine.submit(ids, n, Sampler(**how), got.put, only_if_free), got


def collect(got):
    ids = []
    while not isinstance(item := got.get(timeout=60), End):
        ids.append(item)
    return ids, item


def logit_margin(lm, ids):
    """How far the best logit is from the second after ``ids``."""
    with torch.inference_mode():
        top = lm.model(torch.tensor([ids]), last_only=True)[0, 0].topk(2).values
    return (top[0] - top[1]).item()


def assert_same(lm, prompt, batched, alone, near=1e-4):
    """Equal, or first different where the two best logits are as good as equal."""
    for i, (a, b) in enumerate(zip(batched, alone, strict=False)):
        if a != b:
            assert logit_margin(lm, lm.tokenizer.encode(prompt) + alone[:i]) < near
            return
    assert len(batched) == len(alone)


def assert_all_same(engine, near=1e-4, **how):
    """Five conversations of unlike lengths say what each would say alone, generated from ``how``."""
    lm, lengths = engine.lm, [30, 7, 50, 1, 22]
    asked = [ask(engine, prompt, n) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    for prompt, n, (_, got) in zip(PROMPTS, lengths, asked, strict=True):
        ids, end = collect(got)
        alone = attnlab.generate(lm, lm.tokenizer.encode(prompt), max_new_tokens=n, **how)
        assert_same(lm, prompt, ids, alone, near)
        assert end.reason == ("length" if len(ids) == n else "stop")
    assert engine.state.decoding == engine.state.waiting == 0


def test_conversations_that_share_steps_say_what_they_would_say_alone(engine):
    assert_all_same(engine)  # on three rows


def test_a_cache_in_8_bits_takes_half_and_says_what_it_would_say_alone(lm):
    engine = Engine(lm, rows=3, quantize_cache="int8")
    assert engine.cache.nbytes == memory.kv_cache_bytes(lm.config, 2048, 3, quantize_cache="int8")
    assert_all_same(engine, near=0.05, quantize_cache="int8")  # the last bit of a sum may turn a number's rounding
    assert engine.close(20)


def test_a_nan_left_in_a_row_does_not_reach_who_comes_next(lm, engine):
    engine.cache.k.fill_(torch.nan)
    engine.cache.v.fill_(torch.nan)
    asked = [ask(engine, prompt, 6 + 5 * i) for i, prompt in enumerate(PROMPTS[:3])]  # of unlike lengths: under a mask
    for i, (prompt, (_, got)) in enumerate(zip(PROMPTS, asked, strict=False)):
        alone = attnlab.generate(lm, lm.tokenizer.encode(prompt), max_new_tokens=6 + 5 * i)
        assert_same(lm, prompt, collect(got)[0], alone)


def test_a_prompt_longer_than_a_chunk_and_than_the_window_joins_others_midway(lm, engine):
    long = "x = 1\n" * 400  # some 1,200 tokens; the window is 256
    _, first = ask(engine, PROMPTS[0], 60)
    assert isinstance(first.get(timeout=60), int)  # it decodes already
    _, second = ask(engine, long, 12)
    ids, _ = collect(second)
    assert_same(lm, long, ids, attnlab.generate(lm, lm.tokenizer.encode(long), max_new_tokens=12))
    ids, _ = collect(first)
    alone = attnlab.generate(lm, lm.tokenizer.encode(PROMPTS[0]), max_new_tokens=60)
    assert_same(lm, PROMPTS[0], alone[:1] + ids, alone)


@pytest.mark.parametrize("name", ["multi-head", "grouped-query"])
def test_a_model_without_a_window_shares_steps_too(name):
    lm = attnlab.load(name, device="cpu", dtype="float32")
    engine = Engine(lm, rows=2, max_len=128)
    asked = [ask(engine, prompt, n) for prompt, n in zip(PROMPTS[:3], (9, 25, 14), strict=True)]
    for prompt, n, (_, got) in zip(PROMPTS, (9, 25, 14), asked, strict=False):
        assert_same(lm, prompt, collect(got)[0], attnlab.generate(lm, lm.tokenizer.encode(prompt), max_new_tokens=n))
    with pytest.raises(InputError, match="a row holds 128 tokens"):
        ask(engine, PROMPTS[0], 128)
    engine.close()


def test_sampling_with_a_seed_gives_the_same_in_company(lm, engine):
    how = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    alone = collect(ask(engine, PROMPTS[0], 25, **how)[1])[0]
    asked = [ask(engine, PROMPTS[1], 40), ask(engine, PROMPTS[0], 25, **how), ask(engine, PROMPTS[2], 40)]
    assert collect(asked[1][1])[0] == alone == attnlab.generate(lm, lm.tokenizer.encode(PROMPTS[0]), 25, 0.8, 0.9, 5)
    for _, got in asked[::2]:
        collect(got)


def test_a_cancelled_conversation_frees_its_row_and_hears_nothing_more(lm, engine):
    asked = [ask(engine, prompt, 100_000, temperature=1.0) for prompt in PROMPTS[:3]]
    for _, got in asked:
        assert isinstance(got.get(timeout=60), int)
    _, waits = ask(engine, PROMPTS[3], 3)
    assert engine.state.decoding == 3 and waits.empty()
    engine.cancel(asked[1][0])
    assert len(collect(waits)[0]) == 3  # it got the row
    heard = asked[1][1].qsize()
    time.sleep(0.05)
    assert asked[1][1].qsize() == heard
    for job, _ in asked:
        engine.cancel(job)
    wait_until(lambda: engine.state.decoding == 0)


def test_what_finds_no_room_is_refused_in_words(lm):
    engine = Engine(lm, rows=1, max_waiting=1)
    job, got = ask(engine, PROMPTS[0], 100_000, temperature=1.0)
    got.get(timeout=60)
    with pytest.raises(CapacityError, match="all 1 rows are at work"):
        ask(engine, PROMPTS[1], 1, only_if_free=True)
    other, _ = ask(engine, PROMPTS[1], 1)
    with pytest.raises(CapacityError, match="1 requests wait"):
        ask(engine, PROMPTS[2], 1)
    with pytest.raises(InputError, match="empty"):
        engine.submit([], 1, Sampler(), print)
    assert not engine.close(0.1)  # what was at work was ended
    with pytest.raises(CapacityError, match="shutting down"):
        ask(engine, PROMPTS[0], 1)
    for how in ({"rows": 0}, {"max_len": 1}, {"max_waiting": -1}, {"quantize_cache": "int4"}):
        with pytest.raises(ConfigError):
            Engine(lm, **how)
    with pytest.raises(CapacityError, match=r"fewer rows.*quantize_cache"):
        Engine(lm, rows=10**9)


def test_closing_finishes_what_was_taken(lm):
    engine = Engine(lm, rows=2)
    asked = [ask(engine, prompt, 15) for prompt in PROMPTS]
    assert engine.close(60)
    assert all(len(collect(got)[0]) > 0 for _, got in asked)
    assert not any(thread is engine._thread for thread in threading.enumerate())


@pytest.mark.parametrize("kind", [ConfigError, RuntimeError])
def test_a_fault_in_one_conversation_ends_only_that(lm, engine, kind):
    class Broken(Sampler):
        def __call__(self, logits):
            raise kind("this row is broken")

    got = queue.Queue()
    _, good = ask(engine, PROMPTS[0], 20)
    engine.submit(engine.lm.tokenizer.encode(PROMPTS[1]), 5, Broken(), got.put)
    assert "this row is broken" in str(collect(got)[1].error)
    assert_same(
        lm, PROMPTS[0], collect(good)[0], attnlab.generate(lm, lm.tokenizer.encode(PROMPTS[0]), max_new_tokens=20)
    )


def test_a_fault_of_the_model_ends_its_conversations_and_the_next_ones_go_on(lm, engine, monkeypatch):
    real, calls = type(lm.model).forward, []

    def fails_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(lm.model), "forward", fails_once)
    _, got = ask(engine, PROMPTS[0], 20)
    error = collect(got)[1].error
    assert isinstance(error, CapacityError) and "out of luck" in str(error)
    ids, _ = collect(ask(engine, PROMPTS[0], 20)[1])
    assert_same(lm, PROMPTS[0], ids, attnlab.generate(lm, lm.tokenizer.encode(PROMPTS[0]), max_new_tokens=20))
