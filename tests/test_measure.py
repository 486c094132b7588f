"""measure.py: bytes that torch really took."""

import subprocess
import sys

import torch

from attnlab.measure import peak_bytes, processor_name, read_bandwidth


def test_peak_counts_what_is_held_at_once():
    def call():
        a = torch.empty(1_000_000)  # 4 MB
        b = a + 1  # and 4 more
        del a
        return b + 1  # and 4 more, when the first are gone

    assert 8_000_000 <= peak_bytes(call) < 8_100_000


def test_peak_ignores_what_was_there_before():
    before = torch.ones(10_000_000)
    assert peak_bytes(lambda: before.sum()) < 1_000_000


def test_nothing_is_printed():
    code = "import torch; from attnlab.measure import peak_bytes; peak_bytes(lambda: torch.ones(10))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_bandwidth_is_a_rate():
    assert read_bandwidth(nbytes=20_000_000, repetitions=2) > 1e6


def test_the_processor_has_a_name_without_what_differs_from_one_start_to_the_next():
    assert processor_name() and processor_name() == processor_name().strip()
    assert "MHz" not in processor_name()
