"""A running service for the tests: the companion behind real HTTP on a port of this machine."""

import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

import attnlab
from attnlab.serve import _listen
from attnlab.serve.app import build_app
from attnlab.serve.engine import Engine


@pytest.fixture(scope="session")
def lm():
    return attnlab.load("companion", device="cpu", dtype="float32")


@contextmanager
def running(lm, token=None, **how):
    """The url of a service over ``lm``, and its engine; both end with the block."""
    engine, listening = Engine(lm, **how), _listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(engine, token), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def service(lm):
    with running(lm, rows=8) as (url, engine):
        yield url, engine


@pytest.fixture
def url(service):
    return service[0]


@pytest.fixture
def http(url):
    with httpx.Client(base_url=f"{url}/client/v4/accounts/me/ai", timeout=60) as client:
        yield client


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
