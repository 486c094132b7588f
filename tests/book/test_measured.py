"""The page of measured results: everything in a record reaches the reader."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from docutils import nodes
from measured import render, words

SPREAD = {"median": 3.61234, "min": 3.5, "max": 3.7, "repetitions": 15}
RECORD = {
    "script": "decode_attention",
    "machine": {"processor": "One", "cores": 2},
    "versions": {"torch": "2.13.0"},
    "setting": {"cached": 32768, "n_heads": 32},
    "rows": [
        {"n_kv_heads": 8, "form": "grouped", "times_faster": SPREAD},
        {"n_kv_heads": 1, "form": "repeat", "extra_bytes": 1073741824},
    ],
    "sections": {"memory": {"date": "2026-11-24", "rows": [{"weights": {"measured": 5, "predicted": 5}}]}},
}


def test_a_spread_is_a_median_its_extremes_and_a_count():
    assert words(SPREAD) == "3.61 (3.5–3.7, 15 times)"


def test_numbers_are_written_for_readers():
    assert [words(value) for value in (32768, 0.00012345, True, None, 123456.7)] == [
        "32,768",
        "0.000123",
        "yes",
        "–",
        "123,457",
    ]


def test_everything_in_a_record_is_on_the_page():
    page = nodes.container("", *render(RECORD))
    text = page.astext()
    for expected in (
        "processor One, cores 2",
        "torch 2.13.0",
        "cached 32,768",
        "grouped",
        "1,073,741,824",
        "memory",
        "measured 5",
    ):
        assert expected in text
    assert len(list(page.findall(nodes.table))) == 2


def test_a_row_without_a_value_has_an_empty_cell():
    table = next(nodes.container("", *render(RECORD)).findall(nodes.tbody))
    assert [[cell.astext() for cell in row] for row in table] == [
        ["8", "grouped", "3.61 (3.5–3.7, 15 times)", ""],
        ["1", "repeat", "", "1,073,741,824"],
    ]
