"""A running service for the tests: the companion behind real HTTP on a port of this machine."""

import httpx
import pytest

import attnlab
from attnlab.serve import Server


@pytest.fixture(scope="session")
def lm():
    return attnlab.load("companion", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def service(lm):
    with Server(lm, rows=8) as server:
        yield server.url, server.engine


@pytest.fixture
def url(service):
    return service[0]


@pytest.fixture
def http(url):
    with httpx.Client(base_url=f"{url}/client/v4/accounts/me/ai", timeout=60) as client:
        yield client
