"""The client, against our service and against answers as the provider's clients have met them."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from until import wait_until

import attnlab
from attnlab.errors import CapacityError, InputError
from attnlab.serve import client as module
from attnlab.serve.client import Client, ServiceError


@pytest.fixture
def scripted():
    """A server that plays a list of answers, each (status, [chunks of the body]), and keeps what it was asked."""
    plays, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            asked.append((self.path, dict(self.headers), body))
            status, chunks = plays.pop(0)
            self.send_response(status)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(chunk)
                self.wfile.flush()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Client(f"http://127.0.0.1:{server.server_port}", "@cf/m", account="acc", token="tok", retries=2) as client:
        yield client, plays, asked
    server.shutdown()


BUSY = (429, [b'{"result":null,"success":false,"errors":[{"code":3040,"message":"Capacity temporarily exceeded"}]}'])


def test_it_streams_and_runs_on_our_service(lm, url):
    with Client(url, "companion") as client:
        want = attnlab.generate(lm, "def add(a, b):", max_new_tokens=12)
        assert "".join(client.stream("def add(a, b):", temperature=0, max_tokens=12)) == want
        assert client.run("def add(a, b):", temperature=0, max_tokens=12)["response"] == want
        chat = [{"role": "user", "content": "def add(a, b):"}]
        assert client.run(chat, temperature=0, max_tokens=12)["response"] == want
        with pytest.raises(ServiceError, match="temperature") as caught:
            client.run("a", temperature=9)
        assert caught.value.status == 400 and caught.value.codes == (5004,)
    with Client(url, "nobody") as client, pytest.raises(ServiceError, match="No such model"):
        list(client.stream("a"))


def test_leaving_a_stream_frees_the_row(service):
    url, engine = service
    with Client(url, "companion") as client:
        pieces = client.stream("def", temperature=0, max_tokens=100_000)
        next(pieces)
        assert engine.state.decoding == 1
        pieces.close()
        wait_until(lambda: engine.state.decoding == 0)


def test_frames_that_are_split_padded_or_unfinished_are_read(scripted):
    client, plays, asked = scripted
    frames = 'data: {"response":"Né","p":"abcdefgh"}\n\ndata: {"response":"w"}\r\n\r\n: a comment\n\ndata: {"response":"","usage":{}}\n\ndata: [DONE]'
    data = frames.encode()
    for cuts in ([data], [data[i : i + 1] for i in range(len(data))], [data[:20], data[20:21], data[21:]]):
        plays.append((200, cuts))
        assert "".join(client.stream("x")) == "Néw"
    path, headers, body = asked[0]
    assert path == "/client/v4/accounts/acc/ai/run/@cf/m" and headers["authorization"] == "Bearer tok"
    assert b'"stream":true' in body.replace(b" ", b"")


def test_a_stream_that_breaks_off_is_not_taken_for_complete(scripted):
    client, plays, _ = scripted
    plays.append((200, [b'data: {"response":"Half"}\n\n']))
    pieces = client.stream("x")
    assert next(pieces) == "Half"
    with pytest.raises(ServiceError, match="broke off"):
        next(pieces)
    plays.append(
        (200, [b'data: {"response":"a"}\n\ndata: {"errors":[{"code":3040,"message":"the model failed"}]}\n\n'])
    )
    with pytest.raises(ServiceError, match="the model failed"):
        list(client.stream("x"))


def test_it_waits_while_there_is_no_room_and_gives_up_in_the_end(scripted, monkeypatch):
    client, plays, asked = scripted
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    plays += [BUSY, BUSY, (200, [b'{"result":{"response":"at last"},"success":true}'])]
    assert client.run("x") == {"response": "at last"}
    assert len(pauses) == 2 and 0.1 <= pauses[0] <= 0.25 < pauses[1] <= 0.5
    plays += [BUSY] * 3
    with pytest.raises(CapacityError, match="no room"):
        client.run("x")
    asked.clear()
    plays.append((429, [b'{"errors":[{"code":3036,"message":"daily allocation used up"}]}']))
    with pytest.raises(ServiceError, match="daily allocation"):  # waiting would not help
        client.run("x")
    assert len(asked) == 1


@pytest.mark.parametrize(
    "body", [b"<html>bad gateway</html>", b"", b"[1]", b'{"errors": "none"}', b'{"errors": [null]}']
)
def test_an_answer_that_is_no_envelope_is_an_error_in_words(scripted, body):
    client, plays, _ = scripted
    plays += [(502, [body]), (200, [body])]
    with pytest.raises(ServiceError, match="502"):
        client.run("x")
    with pytest.raises(ServiceError, match="no result"):
        client.run("x")


def test_no_service_and_no_url():
    with Client("http://127.0.0.1:1", "m") as client, pytest.raises(CapacityError, match="no service answers"):
        client.run("x")
    with pytest.raises(InputError, match="http://"):
        Client("localhost:8000", "m")
