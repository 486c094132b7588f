"""Older and newer versions of what the package stands on: the bounds of pyproject.toml are those it was tried with.

A venv with the lowest series that pyproject.toml allows, and one with the newest of torch and transformers that there are,
pass the tests that compare with transformers and torch. Both download gigabytes: make test-long.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from .isolation import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The comparisons with torch and transformers, the files that both read and write, and what calls torch where it changes most:
# its packed kernels, its compiler, its ranks.
PARITY = ["attention", "layers", "rotary", "mistral", "checkpoint", "record", "tokenizer", "loading"]
PARITY += ["quantize", "generate", "parallel"]
TOOLS = ["pytest", "hypothesis", "protobuf", "httpx", "nbformat"]  # what those tests use, at the pinned versions
CPU = "https://download.pytorch.org/whl/cpu"
# What transformers 5 named anew, and the one module that knows both names.
RENAMED = {
    "rope_parameters": {"checkpoint.py"},
    "rope_scaling": {"checkpoint.py"},
    "past_key_values": set(),
    "past_key_value": set(),
}


def lowest() -> dict[str, str]:
    """Package -> the lowest version that pyproject.toml allows."""
    found = {}
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        (bound,) = (s.version for s in requirement.specifier if s.operator in (">=", "=="))
        found[canonicalize_name(requirement.name)] = bound
    return found


def lowest_pins() -> list[str]:
    """As pip takes them: the last release of the lowest series, since the first is often missing. `2.11` asks for `2.11.*`."""
    found = []
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
        bound = Version(lowest()[canonicalize_name(requirement.name)])
        found.append(f"{requirement.name}{extras}=={bound.major}.{bound.minor}.*")
    return found


def test_every_dependency_has_a_lower_bound_at_or_below_its_pin():
    sys.path.insert(0, str(ROOT / "tools"))
    from requirements import parse_pins

    pins = parse_pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert {name: v for name, v in lowest().items() if Version(v) > Version(pins[name])} == {}
    assert len(lowest()) == len(PROJECT["dependencies"])


@pytest.mark.parametrize("name, modules", RENAMED.items())
def test_what_transformers_renamed_is_named_in_one_place(name, modules):
    files = (ROOT / "src" / "attnlab").rglob("*.py")
    assert {path.name for path in files if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))} == modules


def try_with(folder: Path, *packages: str) -> None:
    """The comparisons, in an environment of these packages, the package itself, and what its tests need."""
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in PARITY]
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--extra-index-url", CPU]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    steps = [
        [sys.executable, "-m", "venv", folder / "venv"],
        [*pip, *packages],
        [*pip, *TOOLS],
        [*pip, "--no-deps", "--editable", ROOT],
        [python, "-m", "pip", "list", "--format", "freeze"],
        [python, "-m", "pytest", "-q", "-x", "-m", "not long", "-p", "no:cacheprovider", *tests],
    ]
    for step in steps:
        done = subprocess.run(list(map(str, step)), cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(map(str, step))}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


@pytest.mark.long
def test_the_lowest_versions_allowed_pass_the_comparisons(tmp_path):
    try_with(tmp_path, *lowest_pins())


@pytest.mark.long
def test_the_newest_torch_and_transformers_pass_the_comparisons(tmp_path):
    try_with(tmp_path, "--upgrade", *PROJECT["dependencies"])
