"""In JupyterLab: the widget where a kernel answers, and the still picture of a notebook that nobody has run."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest

from attnlab.explorer import DotProductExplorer

pytestmark = pytest.mark.browser
v4 = nbformat.v4
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def write(path, *cells) -> None:
    nbformat.write(v4.new_notebook(cells=list(cells), metadata=KERNEL), path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab with settings of its own, over two notebooks."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    write(
        home / "notebooks" / "live.ipynb",
        v4.new_code_cell("from attnlab.explorer import DotProductExplorer\nexplorer = DotProductExplorer()\nexplorer"),
        v4.new_code_cell(
            "explorer.data = {**explorer.data, 'labels': ['<img src=x onerror=window.hacked=1>', 'b', 'c']}"
        ),
    )
    write(
        home / "notebooks" / "all.ipynb",
        v4.new_code_cell(
            "import numpy as np\nimport attnlab\nfrom attnlab import plots\n"
            "from attnlab.explorer import MemoryExplorer, RollingBufferExplorer, ShapeExplorer\n"
            "weights = np.full((2, 4, 3, 3), 1 / 3, dtype=np.float16)\n"
            "attnlab.explore(attnlab.AttentionRecord(weights, list('abc'), list('abc'), 2, None, False, 'even'))"
        ),
        v4.new_code_cell("ShapeExplorer(64, 8)"),
        v4.new_code_cell("MemoryExplorer('mistral-7b-v0.1', 'llama-2-7b')"),
        v4.new_code_cell("RollingBufferExplorer()"),
        v4.new_code_cell("plots.knob(lambda ax, n: ax.plot([0, n]), 'n', [1, 2, 3])"),
    )
    write(
        home / "notebooks" / "companion.ipynb",
        v4.new_code_cell("from attnlab.explorer import LiveExplorer\nLiveExplorer('def add(a, b):', ('multi-query',))"),
    )
    data = {"text/html": DotProductExplorer().figure_html(), "text/plain": "DotProductExplorer()"}
    output = v4.new_output("execute_result", data=data, execution_count=1)
    write(
        home / "notebooks" / "still.ipynb",
        v4.new_code_cell("DotProductExplorer()", execution_count=1, outputs=[output]),
    )

    port = free_port()
    folders = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{name}_DIR": str(home / name) for name in ("SETTINGS", "WORKSPACES")}
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={home / 'notebooks'}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
    ]
    with (home / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env={**os.environ, **folders}, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()  # and its kernels with it
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:  # a kernel that starts meanwhile can hold it for ever
            server.kill()  # kernels see that it has gone, and go
            server.wait()


def run_all(page, lab, notebook: str) -> list[str]:
    """Open a notebook and run it; what it asks of other hosts, as it comes."""
    strangers = []
    page.on("request", lambda request: request.url.startswith((lab, "data:", "blob:")) or strangers.append(request.url))
    page.goto(f"{lab}/doc/tree/{notebook}")
    kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
    page.wait_for_function(f"{kernel} === 'idle'", timeout=60_000)
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    return strangers


def test_the_widget_draws_itself_and_takes_new_data(browser, lab):
    page = browser.new_page()
    strangers = run_all(page, lab, "live.ipynb")
    page.wait_for_selector("[data-explorer=dot-product][data-ready=true]", timeout=60_000)
    page.wait_for_selector("tbody th:has-text('<img src=x onerror=window.hacked=1>')", timeout=60_000)
    assert page.locator("[data-explorer]").count() == 1
    assert page.evaluate("window.hacked") is None
    page.focus("[data-explorer] .dot-handle")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("[data-explorer] .dot-handle", "aria-valuetext") == "x 1.60, y 1.00"
    assert strangers == []
    page.close()


def test_every_explorer_draws_itself_and_a_knob_turns(browser, lab):
    page = browser.new_page(viewport={"width": 1280, "height": 5000})  # Lab draws what is in view
    strangers = run_all(page, lab, "all.ipynb")
    for kind in ("attention", "shape", "memory", "rolling-buffer"):
        page.wait_for_selector(f"[data-explorer={kind}][data-ready=true]", timeout=60_000)
    page.get_by_role("button", name="Forward").focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text(".rolling-says").startswith("Position 6 goes to slot 2")
    picture = page.locator("img.widget-image")
    picture.wait_for(timeout=60_000)
    before = picture.get_attribute("src")
    page.focus(".widget-slider .noUi-handle")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("before => document.querySelector('img.widget-image').src !== before", arg=before)
    assert page.inner_text(".widget-slider .widget-readout") == "2"
    assert strangers == []
    page.close()


def test_the_live_companion_gets_its_weights_from_the_kernel(browser, lab):
    page = browser.new_page(viewport={"width": 1280, "height": 4000})
    strangers = run_all(page, lab, "companion.ipynb")
    page.get_by_role("button", name="Run the multi-query here").click(timeout=60_000)
    page.wait_for_selector(".live-maps .attention-title", timeout=60_000)
    page.get_by_role("button", name="Next token").click()
    page.wait_for_function("document.querySelector('.live-text b').textContent !== ''")
    assert strangers == []
    page.close()


def test_a_notebook_that_nobody_has_run_shows_the_picture(browser, lab):
    page = browser.new_page()
    page.goto(f"{lab}/doc/tree/still.ipynb")
    picture = page.locator(".jp-OutputArea-output figure img")
    picture.wait_for(timeout=60_000)
    assert picture.evaluate("async image => { await image.decode(); return image.naturalWidth; }") > 300
    assert len(picture.get_attribute("alt")) > 20
    assert '"dims"' not in page.inner_text(".jp-OutputArea-output")  # the data are not shown
    page.close()
