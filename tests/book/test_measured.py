"""The page of measured results: everything in a record reaches the reader."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from docutils import nodes
from measured import cell, render, words

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


def test_the_speed_of_a_memory_is_in_gigabytes_a_second():
    assert cell("read_bytes_per_second", 3.3512e12) == "3,350 GB/s"
    spread = {"median": 4.2e9, "min": 4e9, "max": 4.5e9, "repetitions": 3}
    assert cell("bytes_per_second", spread) == "4.2 GB/s (4 GB/s–4.5 GB/s, 3 times)"
    assert cell("bandwidth", {"read_bytes_per_second": 4e9, "read_by": "sum"}) == (
        "read bytes per second 4 GB/s, read by sum"
    )
    assert cell("bytes", 3_000) == "3,000" and cell("bytes_per_second", None) == "–"


def test_a_list_without_items_says_nothing():
    assert "rows" not in nodes.container("", *render({"script": "gpu", "rows": []})).astext()


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
