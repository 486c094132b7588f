"""measure.py: bytes that torch really took."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnlab.attention import causal_mask, scaled_dot_product_attention
from attnlab.errors import ConfigError
from attnlab.measure import (
    attention_kernels,
    grouped_query_forms,
    peak_bytes,
    peak_flops,
    processor_name,
    read_bandwidth,
    window_forms,
)


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


def test_the_peak_of_arithmetic_is_a_rate():
    assert peak_flops(size=256, repetitions=2) > 1e6


def test_the_processor_has_a_name_without_what_differs_from_one_start_to_the_next():
    assert processor_name() and processor_name() == processor_name().strip()
    assert "MHz" not in processor_name()


def new_token(n_kv_heads, S=500):
    g = torch.Generator().manual_seed(n_kv_heads)
    return torch.randn(1, 8, 1, 16, generator=g), *torch.randn(2, 1, n_kv_heads, S, 16, generator=g)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 8])
def test_all_forms_of_grouped_query_attention_give_the_same_numbers(n_kv_heads):
    forms = grouped_query_forms(*new_token(n_kv_heads))
    assert list(forms) == ["repeat", "enable_gqa", "grouped", "matmul"]
    outputs = [call() for call in forms.values()]
    for output in outputs:
        assert output.shape == (1, 8, 1, 16)
        torch.testing.assert_close(output, outputs[0])


def test_only_repeating_copies_keys_and_values():
    q, k, v = new_token(2, S=20_000)
    taken = {form: peak_bytes(call) for form, call in grouped_query_forms(q, k, v).items()}
    assert taken.pop("repeat") >= 4 * (k.nbytes + v.nbytes)  # the multi-head cache, made anew
    assert max(taken.values()) < 0.5 * (k.nbytes + v.nbytes)


def test_the_kernel_that_ran_is_named():
    forms = grouped_query_forms(*new_token(2))
    assert attention_kernels(forms["enable_gqa"]) == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert attention_kernels(forms["matmul"]) == []
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernels(forms["enable_gqa"]) == ["_scaled_dot_product_attention_math"]


def a_text(n_kv_heads, T=300):
    g = torch.Generator().manual_seed(n_kv_heads)
    return torch.randn(1, 4, T, 16, generator=g), *torch.randn(2, 1, n_kv_heads, T, 16, generator=g)


@pytest.mark.compiler
def test_all_forms_of_a_window_give_the_same_numbers():
    q, k, v = a_text(n_kv_heads=2)
    forms = window_forms(q, k, v, window=50)
    expected = scaled_dot_product_attention(q, k, v, causal_mask(300, window=50))
    for form, call in forms.items():
        torch.testing.assert_close(call(), expected, msg=lambda differs, form=form: f"{form}: {differs}")
    assert list(forms) == ["masked", "blocks", "flex"]


@pytest.mark.compiler
def test_only_the_masked_form_takes_memory_with_the_square_of_the_length():
    q, k, v = a_text(1, T=1024)
    forms = window_forms(q, k, v, window=50)
    assert peak_bytes(forms["masked"]) > 1024 * 1024 * 4
    assert peak_bytes(forms["flex"]) < 1024 * 1024
    longer = window_forms(*a_text(1, T=2048), window=50)
    assert peak_bytes(longer["blocks"]) < 2.2 * peak_bytes(forms["blocks"])
    longest = window_forms(*a_text(1, T=4096), window=50)  # what a kernel keeps beside the mask counts for little
    assert peak_bytes(longest["masked"]) > 3.5 * peak_bytes(longer["masked"])


def test_without_a_compiler_flex_says_what_is_missing(tmp_path):
    code = (
        "import torch; from attnlab.errors import ConfigError; from attnlab.measure import window_forms\n"
        "forms = window_forms(*torch.randn(3, 1, 2, 130, 16), window=40)\n"
        "try: forms['flex']()\n"
        "except ConfigError as error: print(error)"
    )
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "needs a C++ compiler" in done.stdout and "CXX" in done.stdout, done.stderr


def test_a_window_that_no_key_fits_in_is_an_error():
    with pytest.raises(ConfigError, match="1 or more"):
        window_forms(*a_text(1), window=0)


@pytest.mark.compiler
def test_what_compiles_does_so_in_a_locale_without_utf_8(tmp_path):
    """torch opens its own templates in the locale's encoding."""
    code = (
        "import locale, torch\n"
        "from attnlab.measure import window_forms\n"
        "q = torch.randn(1, 2, 256, 16)\n"
        "forms = window_forms(q, q, q, 64)\n"
        "assert locale.getpreferredencoding(False) != 'utf-8'\n"
        "torch.testing.assert_close(forms['flex'](), forms['blocks'](), atol=1e-5, rtol=1e-5)\n"
        "print(locale.getpreferredencoding(False))\n"
    )
    ascii_only = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ANSI_X3.4-1968"]  # as before
