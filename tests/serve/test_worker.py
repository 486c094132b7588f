"""The Worker of chapter 13 in workerd, Cloudflare's own runtime, bound to the service here."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from until import wait_until

import attnlab

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from node import MISSING, find, with_packages  # noqa: E402


@pytest.fixture(scope="module")
def folder():
    """book/worker with miniflare installed, kept in _build while the versions stay."""
    if find() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    return with_packages(ROOT / "book" / "worker")


@contextmanager
def worker(folder, service, script="worker.js"):
    process = subprocess.Popen(
        ["node", "run.mjs", service, script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_the_stream_passes_through_token_by_token(lm, service, folder):
    url, engine = service
    with worker(folder, url) as at:
        pieces = []
        with httpx.stream("GET", at, params={"prompt": "def add(a, b):"}, timeout=60) as reply:
            assert reply.headers["content-type"] == "text/event-stream"
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    if not pieces:
                        assert engine.state.decoding == 1  # the first token is here while the others are not made yet
                    pieces.append(json.loads(line.removeprefix("data: "))["response"])
        assert line == "" or line == "data: [DONE]"
        assert len([p for p in pieces if p]) > 10
        with httpx.stream(
            "GET", at, params={"prompt": "def"}, timeout=60
        ) as reply:  # whoever leaves, leaves all the way
            lines = reply.iter_lines()
            next(lines)
    wait_until(lambda: engine.state.decoding == 0)


def test_the_announced_script_does_not_stream(service, folder):
    with worker(folder, service[0], "announced.js") as at:
        answer = httpx.get(at, timeout=60).text
    assert "data:" not in answer and isinstance(json.loads(answer), dict)  # the stream object itself, as JSON


def test_run_says_what_it_needs(folder):
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr


def test_the_whole_answer_is_the_model_s(lm, service, folder):
    url, _ = service
    script = folder / "whole.js"
    script.write_text(
        "export default { async fetch(r, env) { return Response.json(await env.AI.run('companion', "
        "{ prompt: 'def add(a, b):', temperature: 0, max_tokens: 12 })); } };"
    )
    with worker(folder, url, "whole.js") as at:
        answer = httpx.get(at, timeout=60).json()
    assert answer["response"] == attnlab.generate(lm, "def add(a, b):", max_new_tokens=12)
    assert answer["usage"]["completion_tokens"] == 12
