"""``attnlab serve`` as a process: it starts, drains, dies and starts again, and says what it will not do."""

import re
import signal
import subprocess
import sys

import httpx
import pytest

import attnlab
from attnlab.cli import run
from attnlab.serve.client import Client


def start(*args):
    """The process and the url it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "attnlab", "serve", "--device", "cpu", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    return process, re.search(r"http://\S+", line)[0]


def test_sigterm_lets_an_answer_finish_and_after_kill_it_starts_again_on_the_same_port():
    process, url = start("--port", "0")
    port = url.rsplit(":", 1)[1]
    process.kill()
    process.wait(20)
    process, again = start("--port", port)
    assert again == url
    with Client(url, "companion") as client:
        pieces = client.stream("def", temperature=0, max_tokens=200)
        first = next(pieces)
        process.send_signal(signal.SIGTERM)
        answer = first + "".join(pieces)  # whole, or it would raise
    assert len(answer) > 200
    out, err = process.communicate(timeout=40)
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in err and "def" not in out + err
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_model_with_fewer_bits_is_served_as_it_is_generated_from():
    process, url = start("--port", "0", "--quantize", "int4", "--quantize-cache", "int8")
    with Client(url, "companion") as client:
        served = client.run("def add(a, b):", temperature=0, max_tokens=16)["response"]
    process.kill()
    process.communicate()
    lm = attnlab.load("companion", device="cpu", quantize="int4")
    assert served == attnlab.generate(lm, "def add(a, b):", max_new_tokens=16, quantize_cache="int8")


def test_what_it_will_not_do_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv("ATTNLAB_TOKEN", raising=False)
    process, url = start("--port", "0", "--rows", "1")
    port = url.rsplit(":", 1)[1]
    for args, words in {
        ("--host", "0.0.0.0"): "callers must bring a token",
        ("--token", "caf\xe9"): "printable ASCII",
        ("--port", port): "choose another --port",
        ("--port", "99999999"): "choose another --port",
        ("--host", "no.such.host.invalid", "--token", "t"): "can't be listened at",
        ("--rows", "0"): "rows of 1 or more",
    }.items():
        assert run(["serve", "--device", "cpu", *(["--port", "0"] if "--port" not in args else []), *args]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    process.kill()
    process.communicate()


@pytest.mark.long
def test_memory_is_flat_over_two_thousand_requests():
    process, url = start("--port", "0", "--rows", "8")

    def resident():
        with open(f"/proc/{process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024  # MiB

    with Client(url, "companion") as client:

        def ask(n):
            for i in range(n):
                body = {"max_tokens": 2 + i % 7, "temperature": 1.0, "seed": i + 1}
                if i % 2:
                    assert client.run(f"def f{i}(x):", **body)["usage"]["completion_tokens"] >= 0
                else:
                    list(client.stream(f"def f{i}(x):", **body))

        ask(500)  # what is allocated once is allocated
        before = resident()
        ask(2000)
        grown = resident() - before
    process.kill()
    process.communicate()
    assert grown < 16, f"{grown:.0f} MiB more after 2,000 requests"
