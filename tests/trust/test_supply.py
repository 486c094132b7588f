"""What the project stands on, and whom it speaks to: licences, known vulnerabilities, no call to anybody."""

import json
import re
import subprocess
import sys

import pytest

from .isolation import ROOT, astray, run, strangers, watched

sys.path.insert(0, str(ROOT / "tools"))
import licences

SECURITY = ROOT / "SECURITY.md"


def test_the_list_of_licences_is_up_to_date():
    assert licences.PAGE.read_text(encoding="utf-8") == licences.render(), "run python tools/licences.py"


def test_every_licence_is_permissive_or_explained():
    assert licences.unexplained() == {}


@pytest.mark.parametrize(
    "expression, more",
    [
        ("MIT", set()),
        ("Apache-2.0 WITH LLVM-exception AND MIT", set()),
        ("GPL-3.0-only OR MIT", set()),
        ("MIT AND AGPL-3.0-only", {"AGPL-3.0-only"}),
        ("(MIT OR Apache-2.0) AND SSPL-1.0", {"SSPL-1.0"}),
        ("not said", {"not said"}),
    ],
)
def test_a_licence_that_asks_for_more_is_noticed(expression, more):
    assert licences.asking_more(expression) == more


def test_an_unexplained_licence_stops_the_tool(monkeypatch, capsys):
    monkeypatch.setitem(licences.READ, "numpy", "AGPL-3.0-only")
    monkeypatch.setattr(sys, "argv", ["licences.py", "--check"])
    assert licences.main() == 1
    assert "numpy: AGPL-3.0-only is neither permissive nor explained" in capsys.readouterr().err


# ---- nobody is called

USE = '''
"""Everything that needs no network, in the order of the README."""
import sys
from pathlib import Path

import attnlab
from attnlab.serve import Server

out = Path(sys.argv[1])
lm = attnlab.load("companion")
assert attnlab.generate(lm, "def", max_new_tokens=4)
record = attnlab.record_attention(lm, "for i in range(3): print(i)")
record.save(out / "record.npz")
attnlab.explore(record).save_html(out / "maps.html")
attnlab.memory.fits("mistral-7b-v0.1", device_bytes=16e9, context=8192)
attnlab.exercises.check("1.1", lambda *_: None)
import transformers
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, attn_implementation="eager"
)
attnlab.record_attention(transformers.LlamaForCausalLM(config).eval(), [1, 2, 3])
with Server(lm) as server:
    import httpx
    assert httpx.get(f"{server.url}/openapi.json").status_code == 200
from attnlab import cli
cli.run(["doctor"])
print("done")
'''


def test_whoever_uses_the_package_calls_nobody_and_leaves_nothing_behind(scratch):
    """With no switch such as HF_HUB_OFFLINE set: there is nothing to switch off."""
    (scratch / "use.py").write_text(USE, encoding="utf-8")
    done = run([scratch / "use.py", scratch / "out"], scratch, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "done", done.stdout
    written, called = watched(scratch)
    assert f"{scratch}/out/record.npz" in {
        path.removesuffix(".new") for path in written
    }  # the watch sees what is written
    assert called & {"127.0.0.1"}  # and who is called: the service
    assert strangers(called) == set()
    assert astray(written, scratch) == set()


def test_who_builds_the_book_calls_nobody(hostile_book):
    written, called = watched(hostile_book.scratch)
    assert f"{hostile_book.html}/notebooks/one.html" in written  # the watch was on
    assert strangers(called) == set()


# ---- what is promised
def test_every_promise_of_security_md_names_tests_that_are_there():
    rows = [line for line in SECURITY.read_text(encoding="utf-8").splitlines() if line.startswith("| **")]
    assert len(rows) >= 8
    for row in rows:
        named = re.findall(r"`(tests/[\w/.]+)`", row.rsplit("|", 2)[1])
        assert named and all((ROOT / name).exists() for name in named), row


# ---- known vulnerabilities


def explained() -> set[str]:
    """The advisories that SECURITY.md speaks of."""
    return set(
        re.findall(r"\b(?:GHSA(?:-\w{4}){3}|CVE-\d{4}-\d+|PYSEC-\d{4}-\d+)\b", SECURITY.read_text(encoding="utf-8"))
    )


@pytest.mark.long
def test_no_pinned_package_has_a_known_vulnerability_that_is_not_explained():
    """Asks the index that packages come from."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "requirements.txt")]
    command += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    answers = json.loads(done.stdout)["dependencies"] if done.stdout.startswith("{") else []
    asked = [package for package in answers if "vulns" in package]
    if not asked:  # no network, or a mirror that hands on packages but no advisories
        pytest.skip("nobody here knows of vulnerabilities: pip-audit got no answer for any package")
    found = {
        (package["name"], frozenset([hole["id"], *hole["aliases"]])) for package in asked for hole in package["vulns"]
    }
    assert {(name, *sorted(ids)) for name, ids in found if not ids & explained()} == set()
    known = {name for _, ids in found for name in ids}
    assert explained() <= known, "SECURITY.md explains what is mended by now"
