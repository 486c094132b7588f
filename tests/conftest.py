"""Tests that need what a machine may lack are left out where it is missing, and a line at the end says so."""

import os
import shutil
import sys
from importlib.util import find_spec

import pytest
from reads_python import leave_uncompared

LEFT_OUT: dict[str, int] = {}


def needs() -> dict[str, tuple[str, bool]]:
    """Marker: what its tests need, and whether it is here."""
    return {
        "mistral_weights": (
            "the weights of Mistral 7B: set ATTNLAB_MISTRAL to their folder",
            bool(os.environ.get("ATTNLAB_MISTRAL")),
        ),
        "compiler": (
            "a C++ compiler, which torch.compile needs on a CPU: install g++, or set CXX to another",
            shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None,
        ),
        "triton": ("Triton, which there is for Linux: pip install triton", find_spec("triton") is not None),
    }


def pytest_configure(config: pytest.Config) -> None:
    for marker, (what, _) in needs().items():
        config.addinivalue_line("markers", f"{marker}: needs {what}")


@pytest.hookimpl(trylast=True)  # after -m and -k: what nobody asked for isn't left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_uncompared(items, "{}.{}".format(*sys.version_info))
    for marker, (what, here) in needs().items():
        out = [] if here else [item for item in items if item.get_closest_marker(marker)]
        if out:
            LEFT_OUT[what] = len(out)
            config.hook.pytest_deselected(items=out)
            items[:] = [item for item in items if item not in out]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: who started them writes the summary
        session.config.workeroutput["left_out"] = LEFT_OUT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    LEFT_OUT.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, n in LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {n} test{'s'[: n > 1]} for want of {what}")
