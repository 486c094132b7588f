"""Notebooks run where little is there, and show what is committed: no network, no home, one core, 4 GB, ASCII, no right to write."""

import configparser
import random
import re
from pathlib import Path

import nbformat
import pytest

from .isolation import ROOT, astray, can_isolate, run, strangers, watched

PLAY = Path(__file__).with_name("play.py")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKEST = ["07_grouped_query_attention", "08_three_styles_side_by_side"]  # which also read records

# What matplotlib says where it finds no home to keep its list of fonts in.
NO_HOME = re.compile(
    r"^(mkdir -p failed for path .*|Matplotlib (created a temporary cache directory|is building the font cache).*"
    r"|.* is not a writable directory)\n?",
    re.MULTILINE,
)


def sanitizers() -> list[tuple[re.Pattern, str]]:
    """What nbval lets pass in a comparison (tests/nbval_sanitize.cfg)."""
    rules = configparser.RawConfigParser()
    rules.read(ROOT / "tests" / "nbval_sanitize.cfg", encoding="utf-8")
    return [(re.compile(rules[name]["regex"]), rules[name]["replace"]) for name in rules.sections()]


def shown(path: Path) -> list[tuple[int, str]]:
    """The text that a notebook's cells show, where it is compared: cell and text."""
    found = []
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type != "code" or "nbval-ignore-output" in cell.metadata.get("tags", []):
            continue
        texts = [o.text if o.output_type == "stream" else o.get("data", {}).get("text/plain", "") for o in cell.outputs]
        text = NO_HOME.sub("", "\n".join(texts)).strip()
        for pattern, to in sanitizers():
            text = pattern.sub(to, text)
        found.append((i, text))
    return found


def check(paths: list[Path], scratch: Path, *options: str, timeout: float = 600) -> None:
    done = run([PLAY, scratch / "out", *options, *paths], scratch, timeout)
    assert done.returncode == 0, done.stdout
    for path in paths:
        assert shown(scratch / "out" / path.name) == shown(path), path.name
    written, called = watched(scratch)
    assert astray(written, scratch) == set()
    assert strangers(called) == set()


def test_the_two_quickest_run_where_little_is_there(scratch):
    check([ROOT / "notebooks" / f"{name}.ipynb" for name in QUICKEST], scratch)


def test_a_notebook_that_was_interrupted_shows_the_same_when_run_again(scratch):
    check([ROOT / "notebooks" / f"{QUICKEST[1]}.ipynb"], scratch, "--interrupt")


def test_where_they_run_nothing_can_be_written_to_the_checkout_and_nobody_called(scratch):
    """The place itself: each thing that must be refused is tried."""
    (scratch / "try.py").write_text(TRY, encoding="utf-8")
    done = run([scratch / "try.py", ROOT], scratch, timeout=60)
    assert done.returncode == 0, done.stdout
    said = done.stdout.splitlines()
    assert (said[0], said[-1]) == ("ascii", "done")
    if can_isolate():
        assert said[1:-1] == ["checkout refused", "network refused", "memory refused"]
    written, called = watched(scratch)
    assert astray(written, scratch) == {f"{ROOT}/written-by-a-test"}
    assert strangers(called) == {"192.0.2.1"}


TRY = """
import codecs, os, socket, sys
print(codecs.lookup(sys.stdout.encoding).name)
try:
    path = os.path.join(sys.argv[1], "written-by-a-test")
    open(path, "w").close()
    os.remove(path)
except OSError:
    print("checkout refused")
try:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as it:  # an address for documentation (RFC 5737): nothing is sent
        it.connect(("192.0.2.1", 9))
except OSError:
    print("network refused")
try:
    bytearray(5 * 10**9)
except MemoryError:
    print("memory refused")
print("done")
"""


@pytest.mark.long
@pytest.mark.parametrize("again", range(3))
def test_all_of_them_run_in_any_order_where_little_is_there(scratch, again):
    paths = random.Random(again).sample(NOTEBOOKS, len(NOTEBOOKS))
    check(paths, scratch, timeout=3600)


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_one_that_was_interrupted_shows_the_same_when_run_again(scratch, path):
    check([path], scratch, "--interrupt", timeout=900)
