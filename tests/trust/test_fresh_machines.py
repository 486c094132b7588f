"""On a machine that has nothing yet: an install that is cut short or finds no room, an old and a new Python, no make, an empty root.

tools/environment.py is tried on a checkout in small, whose packages are wheels made here, so that nothing is downloaded.
"""

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from .isolation import ROOT

ENVIRONMENT = ROOT / "tools" / "environment.py"
PINS = {"torch": "2.13.0", "middle": "1.0", "last": "1.0"}  # in the order that they are installed in
# Builds the checkout's own package without asking an index for a build backend.
BACKEND = """
import zipfile

def build_editable(folder, settings=None, metadata=None):
    name = "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("small.py", "")
        wheel.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\n")
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("small-1.0.dist-info/RECORD", "")
    return name
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "small"\nversion = "1.0"\n'


def write_wheel(folder: Path, name: str, version: str, n_bytes: int = 0) -> Path:
    """A package of one module, as large as asked."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    files = {
        f"{name}.py": f"VERSION = {version!r}\n".encode(),
        f"{name}.bin": os.urandom(n_bytes),
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{name}-{version}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name}-{version}.dist-info/RECORD"
    lines = []
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in files.items():
            wheel.writestr(file, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{file},sha256={digest},{len(content)}")
        wheel.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")
    return path


class Checkout:
    """A checkout in small."""

    def __init__(self, tree: Path, wheels: Path) -> None:
        self.tree, self.wheels = tree, wheels
        (tree / "tools").mkdir(parents=True)
        wheels.mkdir()
        shutil.copy(ENVIRONMENT, tree / "tools")
        (tree / "requirements.txt").write_text("".join(f"{name}=={version}\n" for name, version in PINS.items()))
        (tree / "pyproject.toml").write_text(PYPROJECT)
        (tree / "backend.py").write_text(BACKEND)
        for name, version in PINS.items():
            write_wheel(wheels, name, version)

    @property
    def environment(self) -> dict[str, str]:
        given = {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_CACHE_DIR": "1",
            "TMPDIR": str(self.wheels),
        }
        return {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))} | given

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(self.tree / "tools" / "environment.py")]

    def run(self) -> subprocess.CompletedProcess:
        return subprocess.run(self.command, env=self.environment, capture_output=True, text=True, timeout=300)

    def stands(self) -> bool:
        """Whether everything pinned can be imported, and the next run finds nothing to do."""
        python = self.tree / ".venv" / "bin" / "python"
        names = ", ".join([*PINS, "small"])
        imported = subprocess.run([python, "-c", f"import {names}"], cwd="/", capture_output=True).returncode == 0
        again = self.run()
        return imported and again.returncode == 0 and again.stdout == ""


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "checkout", tmp_path / "wheels")


def test_an_install_that_finds_no_package_says_so_and_recovers_when_it_is_there(checkout):
    hidden = checkout.wheels / "middle-1.0-py3-none-any.whl"
    hidden.rename(checkout.wheels / "hidden")
    done = checkout.run()
    assert done.returncode != 0
    assert "run it again, it starts where it must" in done.stderr and "Traceback" not in done.stderr
    (checkout.wheels / "hidden").rename(hidden)
    done = checkout.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkout.stands()


@pytest.mark.parametrize("when", ["venv", pytest.param("torch==2.13.0", marks=pytest.mark.long), "requirements.txt"])
def test_an_install_that_was_killed_recovers_on_the_second_try(checkout, when):
    process = subprocess.Popen(
        checkout.command, env=checkout.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("+") and when in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    assert process.wait() != 0
    assert not (checkout.tree / ".venv" / "made-from").exists()
    done = checkout.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkout.stands()


# What a disk holds at first, where it is, what is copied there, and the program, which runs twice: without room, and with it.
FULL = """
disk=$2
mount -t tmpfs -o size=$1 tmpfs "$disk"
cp -r "$3/." "$disk"
shift 3
"$@"
echo "first $?" >&2
mount -o remount,size=500m "$disk"
"$@"
"""


def can_mount() -> bool:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, "--mount", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "room",
    [pytest.param("1m", id="none for Python", marks=pytest.mark.long), pytest.param("24m", id="none for the packages")],
)
def test_an_install_that_fills_the_disk_says_so_and_recovers_on_the_second_try(checkout, tmp_path, room):
    if not can_mount():
        pytest.skip("a full disk is a small one, which this machine does not let a test mount")
    write_wheel(checkout.wheels, "last", "1.0", n_bytes=40_000_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    program = [sys.executable, str(disk / "tools" / "environment.py")]
    command = ["unshare", *user, "--mount", "sh", "-c", FULL, "sh", room, str(disk), str(checkout.tree), *program]
    done = subprocess.run(command, env=checkout.environment, capture_output=True, text=True, timeout=300)
    first, _, second = done.stderr.partition("first ")
    assert second and second[0] != "0", done.stderr
    assert "run it again, it starts where it must" in first, first
    assert "Traceback" not in first.splitlines()[-1]
    assert done.returncode == 0, second


# ---- without make, and older and newer Pythons


def test_without_make_the_readme_runs_what_make_runs():
    readme, make = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    section = readme.split("## Without make")[1].split("```bash\n")[1].split("```")[0]
    commands = section.replace("\\\n", " ")
    for script in ("tools/environment.py", "tools/book.py"):
        assert script in commands and script in make
    make = make.replace("$(PROCESSES)", re.search(r"^PROCESSES \?= (\d+)$", make, re.MULTILINE)[1])
    mine = re.search(r"-m pytest (.*)", commands)[1].split()
    theirs = re.search(r"-m pytest (-m \"not long\" .*)", make.replace("\\\n", " "))[1].split()
    bounds = {"--durations", "10", "--nbval-cell-timeout", "300"}
    assert set(theirs) - bounds == set(mine) - bounds


def pythons() -> dict[str, str]:
    """The oldest and the newest Python that this machine has and the package is for."""
    names = [f"python3.{minor}" for minor in range(11, 30)]
    found = {name: path for name in names if (path := pyenv(name) or shutil.which(name))}
    return {name: found[name] for name in (*list(found)[:1], *list(found)[1:][-1:])}


def pyenv(name: str) -> str | None:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return next((str(path) for path in sorted(root.glob(f"versions/*/bin/{name}"))), None)


def test_the_oldest_python_named_is_the_same_everywhere():
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {oldest} or newer" in ENVIRONMENT.read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert oldest in str(workflow["jobs"])


@pytest.mark.parametrize("name", pythons())
def test_every_file_compiles_in_the_oldest_and_the_newest_python(name, tmp_path):
    command = [pythons()[name], "-W", "error::SyntaxWarning", "-m", "compileall", "-q", "-f"]
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    done = subprocess.run(
        [*command, "src", "tools", "benchmarks", "tests", "book/_ext"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def export(tree: Path) -> Path:
    """The files that git keeps, or would keep, elsewhere."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.mark.long
@pytest.mark.parametrize("name", pythons())
def test_the_environment_and_the_package_stand_in_the_oldest_and_the_newest_python(name, tmp_path):
    tree = export(tmp_path / "checkout")
    done = subprocess.run([pythons()[name], "tools/environment.py"], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tests = ["tests/test_attention.py", "tests/test_layers.py", "tests/test_mistral.py", "tests/test_cli.py"]
    command = [".venv/bin/python", "-m", "pytest", "-q", "-m", "not long", *tests]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# What a bare Debian needs besides the checkout.
PACKAGES = "python3,python3-venv,make,git,ca-certificates"
# What a machine has mounted; torch asks /sys what its processor can do.
INSIDE = """
mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /dev/shm && mount -t devpts devpts /dev/pts
cd /checkout && git init -q . && git add -A && git -c user.name=x -c user.email=x@localhost commit -qm x
make book && CI=true make test
"""


@pytest.mark.long
def test_both_commands_run_in_an_empty_root(tmp_path):
    """Debian's newest, its Python, and nothing else; the rest comes by itself. An hour, and 10 GB of disk."""
    if os.geteuid() != 0 or not (debootstrap := shutil.which("debootstrap")):
        pytest.skip("needs root and debootstrap (apt-get install debootstrap)")
    root = tmp_path / "root"
    made = subprocess.run([debootstrap, f"--include={PACKAGES}", "stable", root], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:]
    for file in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):  # how this machine reaches an index
        shutil.copy(file, root / file[1:])
    tree = export(root / "checkout")
    enter = ["unshare", "--mount", "--pid", "--fork", "--mount-proc=" + str(root / "proc"), "chroot", str(root)]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    certificates = {name: "/etc/ssl/certs/ca-certificates.crt" for name in ("PIP_CERT", "NODE_EXTRA_CA_CERTS")}
    environment |= {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")} | certificates
    done = subprocess.run([*enter, "bash", "-ec", INSIDE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (tree / "_build" / "html" / "index.html").exists()
