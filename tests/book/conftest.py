"""What the tests of the built pages share: the pages, a server for them, and a browser."""

import functools
import os
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
sys.path.insert(0, str(ROOT / "tools"))


def chapters() -> list[str]:
    """The documents named in _toc.yml, in reading order, without suffix."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def cannot(reason: str) -> None:
    """A check that can't be made fails where it must be made, in CI, and is skipped elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def html() -> Path:
    if not (HTML / "index.html").exists():
        cannot("no pages in _build/html: run make book first")
    return HTML


@pytest.fixture(scope="module")
def browser(html):
    from chromium import FLAGS, MISSING, find
    from playwright.sync_api import sync_playwright

    if (path := find()) is None:
        cannot(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def http(html) -> Iterator[str]:
    """Address of a server on loopback that serves the pages."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(html)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
