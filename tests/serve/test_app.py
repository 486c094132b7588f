"""The service over real HTTP: the announcement's request, every documented error, and clients that misbehave."""

import asyncio
import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from until import wait_until

import attnlab
from attnlab.serve import Server
from attnlab.serve.app import ANNOUNCED, MAX_BODY
from attnlab.serve.client import Client

GREEDY = {"temperature": 0, "max_tokens": 12}
ENDLESS = {"temperature": 0, "max_tokens": 100_000}  # the companion falls into a loop and stays there


def error(reply):
    answer = reply.json()
    assert answer["success"] is False and answer["result"] is None
    (only,) = answer["errors"]
    return reply.status_code, only["code"], only["message"]


def test_the_announcement_s_request_is_answered_as_a_stream(lm, http):
    body = {"prompt": "What is grouped query attention", "stream": True, "temperature": 0}
    headers = {"Authorization": "Bearer {api-token}", "Content-Type": "application/json"}
    with http.stream("POST", f"/run/{ANNOUNCED}", json=body, headers=headers) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        text = reply.read().decode()
    *events, done, rest = text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    *pieces, last = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(p["response"] for p in pieces) == attnlab.generate(lm, body["prompt"], max_new_tokens=256)
    assert all(set(p) == {"response"} for p in pieces)
    assert last["usage"]["prompt_tokens"] == len(lm.tokenizer.encode(body["prompt"]))
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]


def test_a_whole_answer_comes_in_the_success_envelope(lm, http):
    answer = http.post("/run/companion", json={"prompt": "def add(a, b):", **GREEDY}).json()
    assert answer["success"] is True and answer["errors"] == [] and answer["messages"] == []
    assert answer["result"]["response"] == attnlab.generate(lm, "def add(a, b):", max_new_tokens=12)
    assert answer["result"]["usage"]["completion_tokens"] == 12


def test_messages_are_taken_as_well_and_a_base_model_reads_their_texts(lm, http):
    chat = [{"role": "system", "content": "import os"}, {"role": "user", "content": "def main"}]
    answer = http.post("/run/companion", json={"messages": chat, **GREEDY}).json()
    assert answer["result"]["response"] == attnlab.generate(lm, "import os\ndef main", max_new_tokens=12)


def test_a_body_without_a_content_type_or_with_raw_as_a_word_is_read_all_the_same(http):
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        reply = http.post(
            "/run/companion", content='{"prompt": "def", "raw": "true", "max_tokens": 1}', headers=headers
        )
        assert reply.status_code == 200, reply.text


def test_the_same_seed_gives_the_same_answer(http):
    def ask(seed):
        body = {"prompt": "def", "seed": seed, "temperature": 1.5, "max_tokens": 20, "top_k": 50, "top_p": 2}
        return http.post("/run/companion", json=body).json()["result"]["response"]

    assert ask(7) == ask(7) != ask(8)


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (b"", 400, 3003, "body"),
        (b'{"prompt": ', 400, 3003, "JSON"),
        (b"\xff\xfe", 400, 3003, "JSON"),
        (b"[" * 100_000, 400, 3003, "JSON"),
        (b"[]", 400, 5004, "body"),
        (b"{}", 400, 5004, "prompt"),
        (b'{"prompt": ""}', 400, 5004, "prompt"),
        (b'{"prompt": 3}', 400, 5004, "prompt"),
        (b'{"prompt": "a", "max_tokens": 0}', 400, 5004, "max_tokens"),
        (b'{"prompt": "a", "max_tokens": "many"}', 400, 5004, "max_tokens"),
        (b'{"prompt": "a", "temperature": 5.1}', 400, 5004, "temperature"),
        (b'{"prompt": "a", "temperature": NaN}', 400, 5004, "temperature"),
        (b'{"prompt": "a", "top_k": 51}', 400, 5004, "top_k"),
        (b'{"prompt": "a", "seed": 0}', 400, 5004, "seed"),
        (b'{"prompt": "a", "stream": "perhaps"}', 400, 5004, "stream"),
        (b'{"prompt": "\\ud800"}', 400, 5004, ""),
        (b'{"messages": []}', 400, 5004, "messages"),
        (b'{"messages": [{"role": "wizard", "content": "a"}]}', 400, 5004, "role"),
        (b'{"messages": [{"role": "user"}]}', 400, 5004, "content"),
        (b'{"prompt": "a", "lora": "mine"}', 405, 5005, "LoRA"),
        (json.dumps({"prompt": "a" * 131_073}).encode(), 400, 5004, "prompt"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_documented_code(http, body, status, code, words):
    got = error(http.post("/run/companion", content=body))
    assert got[:2] == (status, code), got
    assert words in got[2]


def test_unknown_models_and_paths(http, url):
    assert error(http.post("/run/@cf/meta/llama-2-7b", json={"prompt": "a"}))[:2] == (400, 5007)
    assert error(httpx.post(f"{url}/client/v4/nowhere"))[:2] == (404, 7003)
    assert error(http.get("/run/companion"))[0] == 405


def test_a_body_over_the_limit_is_refused_whether_its_size_is_declared_or_not(http):
    body = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    assert error(http.post("/run/companion", content=body))[:2] == (413, 3006)
    pieces = (body[i : i + 2**16] for i in range(0, len(body), 2**16))
    assert error(http.post("/run/companion", content=pieces))[:2] == (413, 3006)
    assert len(body) > MAX_BODY


def test_a_token_is_asked_for_before_anything_else(lm):
    with Server(lm, token="s3cret", rows=1) as server:
        path = f"{server.url}/client/v4/accounts/me/ai/run/companion"
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": b"Bearer \xe9"}):
            for body in (b'{"prompt": "a"}', b"nonsense"):
                assert error(httpx.post(path, content=body, headers=headers))[:2] == (401, 10000)
        good = {"authorization": "Bearer s3cret"}
        assert httpx.post(path, json={"prompt": "a", "max_tokens": 1}, headers=good).status_code == 200
        assert httpx.get(f"{server.url}/health").json()["rows"] == 1


def test_many_streams_at_once_are_neither_lost_nor_mixed(lm, service):
    url, engine = service
    prompts = [f"def f{i}(x):\n    return x + {i}\n\n\ndef g{i}" for i in range(64)]

    def ask(prompt):
        with Client(url, "companion") as client:
            return "".join(client.stream(prompt, temperature=0, max_tokens=16))

    with ThreadPoolExecutor(64) as pool:
        got = list(pool.map(ask, prompts))
    alone = [attnlab.generate(lm, prompt, max_new_tokens=16) for prompt in prompts]
    same = sum(a == b for a, b in zip(got, alone, strict=True))
    assert same >= 60  # test_engine says what the others may differ in
    assert engine.state.decoding == engine.state.waiting == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(service, http, stream):
    _, engine = service
    body = {"prompt": "def", "stream": stream, **ENDLESS}
    if stream:
        with http.stream("POST", "/run/companion", json=body) as reply:
            lines = reply.iter_lines()  # kept: httpx closes the stream with it
            next(lines)
            assert engine.state.decoding == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/run/companion", json=body, timeout=0.5)
    wait_until(lambda: engine.state.decoding == 0)


def a_client(url: str) -> socket.socket:
    """A connection that does only what it is told."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def ask(client: socket.socket, **options) -> None:
    """Ask for a stream, whose answer is left where it is."""
    body = json.dumps({"prompt": "def", "stream": True, **options}).encode()
    head = f"POST /client/v4/accounts/a/ai/run/companion HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)


def test_a_client_that_left_while_the_service_was_held_up_is_noticed_at_once(service, monkeypatch, caplog):
    """What has gathered meanwhile isn't all sent to nobody, which asyncio would complain of."""
    url, engine = service
    loops, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda *a: (loops.append(asyncio.get_running_loop()), submit(*a))[1])
    with a_client(url) as client:
        ask(client, **ENDLESS)
        wait_until(lambda: engine.state.decoding == 1)
        loops[0].call_soon_threadsafe(time.sleep, 1)
        made = engine.state.tokens
        wait_until(lambda: engine.state.tokens > made + 20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes at once, with a reset
    wait_until(lambda: engine.state.decoding == 0)
    assert [record.message for record in caplog.records] == []


def test_a_slow_reader_holds_up_nobody(lm, service):
    url, engine = service
    with a_client(url) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        ask(slow, max_tokens=3000, temperature=0)  # and reads nothing
        wait_until(lambda: engine.state.decoding == 1)
        with Client(url, "companion") as client:
            assert client.run("def add(a, b):", **GREEDY)["usage"]["completion_tokens"] == 12
    wait_until(lambda: engine.state.decoding == 0)


def test_a_full_server_makes_requests_wait_and_says_so_to_those_who_will_not(lm):
    with Server(lm, rows=1, max_waiting=1) as server:
        path, engine = f"{server.url}/client/v4/accounts/me/ai/run/companion", server.engine
        long = {"prompt": "def", "stream": True, **ENDLESS}
        with httpx.stream("POST", path, json=long) as first:
            lines = first.iter_lines()
            next(lines)
            refused = httpx.post(path, json={"prompt": "a", "options": {"rejectIfBusy": True}})
            assert error(refused)[:2] == (429, 3040)
            waits = threading.Thread(target=httpx.post, args=(path,), kwargs={"json": {"prompt": "a", "max_tokens": 1}})
            waits.start()
            wait_until(lambda: engine.state.waiting == 1)
            assert error(httpx.post(path, json={"prompt": "a"}))[:2] == (429, 3040)
        waits.join(20)
        assert not waits.is_alive()


def test_the_openai_client_works(lm, url):
    import openai

    client = openai.OpenAI(base_url=f"{url}/client/v4/accounts/me/ai/v1", api_key="none", max_retries=0)
    ask = {"model": "companion", "messages": [{"role": "user", "content": "def add(a, b):"}], "temperature": 0}
    whole = client.chat.completions.create(**ask, max_tokens=12)
    want = attnlab.generate(lm, "def add(a, b):", max_new_tokens=12)
    assert whole.choices[0].message.content == want
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        **ask, max_completion_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    with pytest.raises(openai.BadRequestError, match="No such model"):
        client.chat.completions.create(**ask | {"model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**ask | {"temperature": 9})


def test_the_service_s_description_names_both_forms(url):
    described = httpx.get(f"{url}/openapi.json").json()
    assert {"/client/v4/accounts/{account}/ai/run/{model}", "/health"} <= set(described["paths"])
    assert described["components"]["schemas"]["Prompt"]["properties"]["temperature"]["maximum"] == 5
