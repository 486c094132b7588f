"""The worked examples in docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import attnlab

MODULES = [m.name for m in pkgutil.walk_packages(attnlab.__path__, "attnlab.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    attention = importlib.import_module("attnlab.attention")
    assert doctest.testmod(attention).attempted >= 3
