"""What the tests of explorers share: a browser, and an explorer opened in it as a reader opens it."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture(scope="module")
def browser():
    from chromium import FLAGS, MISSING, find
    from playwright.sync_api import sync_playwright

    if (path := find()) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page with an explorer, the network off, and everything it asked for and complained about."""

    def __init__(self, browser, url: str, *, width: int, theme: str, wait: bool, **context) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=theme, offline=True, **context
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("dialog", lambda dialog: (self.complaints.append("a dialog"), dialog.dismiss()))
        self.page.goto(url)
        if wait:
            self.page.wait_for_selector("[data-ready=true]")

    @property
    def root(self):
        """The element that the explorer draws into."""
        return self.page.locator("[data-explorer]")

    def strangers(self) -> list[str]:
        """What it asked of anybody: a saved file has everything in it."""
        return [url for url in self.requests[1:] if not url.startswith(("data:", "blob:"))]

    def violations(self) -> list[tuple[str, list[str]]]:
        """What axe-core finds: rules, and where."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page).response["violations"]
        return [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found]

    def wider_than_the_screen(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


@pytest.fixture
def opened(browser, tmp_path):
    """``opened(explorer)``: saved as one file and opened from the folder. Wait=False for one that can't be drawn."""
    contexts = []

    def open_explorer(explorer, *, width=900, theme="light", wait=True, change=None, **context) -> Opened:
        path = explorer.save_html(tmp_path / f"{len(contexts)}.html")
        if change:  # damage the file, say
            path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
        page = Opened(browser, path.as_uri(), width=width, theme=theme, wait=wait, **context)
        contexts.append(page.context)
        return page

    yield open_explorer
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def kept_open(browser, tmp_path_factory):
    """``kept_open(explorer)``: its page, open for all tests of a module."""
    context = browser.new_context(offline=True)

    def open_explorer(explorer):
        page = context.new_page()
        page.goto(explorer.save_html(tmp_path_factory.mktemp("kept") / "page.html").as_uri())
        page.wait_for_selector("[data-ready=true]")
        return page

    yield open_explorer
    context.close()
