"""The command line, as a function and as a real process."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from test_generate import SMALL, make_model
from test_tokenizer import make_bpe
from typer.testing import CliRunner

import attnlab
from attnlab import cli
from attnlab.checkpoint import save_model

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that loads in no time."""
    folder = tmp_path_factory.mktemp("models") / "small"
    save_model(make_model(SMALL), folder)
    make_bpe(folder, SMALL.vocab_size)
    return folder


def process(*args, stdin=None, **options):
    """``python -m attnlab ...`` to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "attnlab", *map(str, args)],
        input=stdin,
        capture_output=True,
        env=environment,
        timeout=300,
        **options,
    )


def run(capsys, *args):
    """Exit code, stdout and stderr of the command, in this process."""
    code = cli.run([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- help


@pytest.mark.parametrize(
    ("args", "example"),
    [
        ("", '  attnlab generate "def"'),
        ("--help", '  attnlab generate "def"'),
        ("generate --help", '  attnlab generate "def"'),
        ("explore --help", '  attnlab explore "def add(a, b):" --out maps.html'),
        ("memory -h", "  attnlab memory mistral-7b-v0.1 llama-2-7b"),
        ("choose -h", "  attnlab choose mistral-7b-v0.2 --card a100 --context 4096 --batch 16"),
        ("convert -h", "  attnlab convert multi-head --n-kv-heads 2 --out grouped"),
        ("doctor --help", "what to do"),
    ],
)
def test_help_teaches_with_examples(capsys, args, example):
    code, out, err = run(capsys, *args.split())
    assert code == 0 and err == "" and "Usage: attnlab" in out and example in out


def test_no_prompt_in_the_help_s_examples_ends_with_a_space(capsys):
    text = "".join(run(capsys, *args)[1] for args in (["--help"], ["generate", "--help"]))
    prompts = re.findall(r'attnlab generate "([^"]*)"', text)
    assert len(prompts) >= 4 and not [prompt for prompt in prompts if prompt != prompt.strip()]


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"attnlab {attnlab.__version__}\n", "")


def test_help_imports_nothing_heavy_beside_torch():
    code = (
        "import sys; from attnlab import cli; cli.run(['--help']);"
        "print({'transformers', 'matplotlib', 'mistral_common', 'tokenizers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "attnlab doctor" in done.stdout and done.stdout.endswith("set()\n")


# --- generate


def test_generate_prints_what_generate_returns(capsys, folder):
    want = attnlab.generate(attnlab.load(folder), "def", max_new_tokens=12)
    code, out, err = run(capsys, "generate", "def", "--model", folder, "--max-new-tokens", 12)
    assert (code, out.removesuffix("\n")) == (0, want.removesuffix("\n")) and "Error" not in err
    code, again, _ = run(
        capsys, "generate", "def", "--model", folder, "--max-new-tokens", 12, "--device", "cpu", "--dtype", "float32"
    )
    assert (code, again) == (0, out)


def test_settings_reach_the_sampler(capsys, folder):
    setting = {"max_new_tokens": 15, "temperature": 9.0, "top_p": 0.9, "seed": 4}
    want = attnlab.generate(attnlab.load(folder), "def", **setting)
    options = [part for name, value in setting.items() for part in (f"--{name.replace('_', '-')}", value)]
    outputs = [run(capsys, "generate", "def", "--model", folder, "--raw", *options)[1] for _ in range(2)]
    assert outputs[0] == outputs[1] and outputs[0].removesuffix("\n") == want.removesuffix("\n")
    assert run(capsys, "generate", "def", "--model", folder, *options, "--seed", 5)[1] != outputs[0]


def test_weights_are_quantized_where_asked(capsys, monkeypatch, tmp_path):
    want = attnlab.generate(attnlab.load("companion", quantize="int4"), "def", max_new_tokens=12)
    code, out, _ = run(capsys, "generate", "def", "--quantize", "int4", "--max-new-tokens", 12)
    assert (code, out.removesuffix("\n")) == (0, want.removesuffix("\n"))
    asked, load = [], attnlab.load
    monkeypatch.setattr(attnlab, "load", lambda *args, **options: asked.append(options) or load(*args, **options))
    assert run(capsys, "explore", "def", "--quantize", "int8", "--out", tmp_path / "maps.html")[0] == 0
    assert asked[0]["quantize"] == "int8"


def test_keys_and_values_are_quantized_where_asked(capsys, monkeypatch):
    asked, stream = [], attnlab.stream
    monkeypatch.setattr(attnlab, "stream", lambda *args, **options: asked.append(options) or stream(*args, **options))
    assert run(capsys, "generate", "def", "--quantize-cache", "int8", "--max-new-tokens", 2)[0] == 0
    assert asked[0]["quantize_cache"] == "int8"


def test_generate_works_through_typer_s_runner_and_from_stdin(folder):
    settings = ["--model", str(folder), "--max-new-tokens", "8"]
    want = runner.invoke(cli.app, ["generate", "def", *settings])
    assert want.exit_code == 0 and want.stdout
    for args in (["generate", *settings], ["generate", "-", *settings]):
        for text in ("def", "def\n", "def\r\n"):
            assert runner.invoke(cli.app, args, input=text).stdout == want.stdout


def test_a_trailing_space_is_pointed_out(capsys, folder):
    code, out, err = run(capsys, "generate", "def ", "--model", folder, "--max-new-tokens", 3)
    assert code == 0 and out and "the prompt ends with a space" in err
    assert "space" not in run(capsys, "generate", "def", "--model", folder, "--max-new-tokens", 3)[2]


def test_a_real_process_streams_the_same(folder, capsys):
    want = run(capsys, "generate", "def", "--model", folder, "--max-new-tokens", 8)[1]
    done = process("generate", "-", "--model", folder, "--max-new-tokens", 8, stdin=b"def\n")
    assert (done.returncode, done.stdout.decode()) == (0, want), done.stderr
    assert b"Traceback" not in done.stderr


def test_a_terminal_that_knows_no_unicode_gets_replacements(folder):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "attnlab", "memory", "mistral-7b-v0.1"],
        capture_output=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr and done.stdout.isascii()


def in_a_terminal(*args):
    """Exit code, what a terminal shows of stdout, and stderr, of a process whose stdin and stdout are one."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    child = subprocess.Popen(
        [sys.executable, "-m", "attnlab", *map(str, args)],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux says so when the other end has gone
        pass
    errors = child.stderr.read().decode()
    os.close(ours)
    return child.wait(60), shown.decode(), errors


def test_a_terminal_shows_prompt_and_text_as_one(folder, capsys):
    new = run(capsys, "generate", "def", "--model", folder, "--max-new-tokens", 8)[1]
    code, shown, _ = in_a_terminal("generate", "def", "--model", folder, "--max-new-tokens", 8)
    plain = re.sub(r"\x1b\[\d*m", "", shown).replace("\r\n", "\n")
    assert (code, plain) == (0, "def" + new)


def test_a_terminal_without_a_prompt_is_not_kept_waiting():
    code, shown, errors = in_a_terminal("generate")
    assert (code, shown) == (2, "") and errors.startswith("attnlab: no prompt came")


# --- explore


def test_explore_writes_one_page_that_holds_the_record(capsys, folder, tmp_path):
    out = tmp_path / "maps.html"
    code, said, err = run(capsys, "explore", "def add(a, b):", "--model", folder, "--out", out)
    record = attnlab.record_attention(attnlab.load(folder), "def add(a, b):")
    L, H, T, _ = record.weights.shape
    assert code == 0 and said == f"{out} ({attnlab.memory.human_bytes(out.stat().st_size)})\n"
    assert f"{T} tokens, {L} layers × {H} heads" in err
    data = re.search(r'<script type="application/json">(.*?)</script>', out.read_text(), re.DOTALL)[1]
    assert json.loads(data)["key_tokens"] == record.key_tokens
    assert len(json.loads(data)["layers"]) == L
    assert [path.name for path in tmp_path.iterdir()] == ["maps.html"]


def test_explore_takes_the_text_from_stdin(folder, tmp_path):
    pages = [tmp_path / f"{i}.html" for i in range(2)]
    runner.invoke(cli.app, ["explore", "def f", "--model", str(folder), "--out", str(pages[0])])
    runner.invoke(cli.app, ["explore", "--model", str(folder), "--out", str(pages[1])], input="def f\n")
    assert pages[0].read_text() == pages[1].read_text()


# --- memory


def cells(out, row):
    """A row of the table, without its frame."""
    line = next(line for line in out.splitlines() if "│" in line and row in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_memory_shows_models_side_by_side(capsys):
    code, out, err = run(
        capsys,
        "memory",
        "mistral-7b-v0.1",
        "llama-2-7b",
        "gemma-2-9b",
        "--context",
        32768,
        "--batch",
        8,
        "--device-gb",
        80,
    )
    assert code == 0 and err == ""
    assert cells(out, "cache, a token")[1:] == ["128.00 KiB", "512.00 KiB", "336.00 KiB"]
    assert cells(out, "cache, 8 ×")[1:3] == ["4.00 GiB", "128.00 GiB"]
    assert cells(out, "weights")[1:] == ["13.49 GiB", "12.55 GiB", "17.21 GiB"]
    assert cells(out, "fits 80 GB")[1:] == ["yes", "no", "yes"]
    assert cells(out, "heads / K/V heads")[1:] == ["32 / 8", "32 / 32", "16 / 8"]
    assert cells(out, "of multi-head's")[1:] == ["1/4", "all", "1/2"]
    assert cells(out, "window")[1:] == ["4,096", "none", "4,096 in 21 of 42"]
    assert "llama-2-7b was made for fewer than 32,768 tokens" in out


def test_memory_takes_weights_and_cache_in_fewer_bits(capsys):
    args = ["memory", "mistral-7b-v0.3", "--context", 32768, "--batch", 2, "--device-gb", 16, "--quantize", "int4"]
    code, out, _ = run(capsys, *args)
    assert code == 0 and "in bfloat16 with int4 weights" in out
    assert cells(out, "weights")[1:] == ["4.39 GiB"] and cells(out, "largest batch")[1:] == ["2"]
    code, out, _ = run(capsys, *args, "--quantize-cache", "int8")
    assert code == 0 and "in bfloat16 with int4 weights and an int8 cache" in out
    assert cells(out, "cache, a token")[1:] == ["65.00 KiB"] and cells(out, "largest batch")[1:] == ["4"]


def test_memory_reads_a_folder_and_agrees_with_the_real_cache(capsys, folder):
    code, out, _ = run(capsys, "memory", folder, "companion", "--context", 100, "--batch", 2, "--dtype", "float32")
    assert code == 0
    cache = make_model(SMALL).new_cache(batch=2, max_len=100)
    assert cells(out, "cache, 2 ×")[1] == attnlab.memory.human_bytes(cache.nbytes)
    assert "companion" in out and "small" in out


def test_choose_says_which_style_and_why(capsys, folder):
    code, out, _ = run(capsys, "choose", "mistral-7b-v0.2", "--card", "a100", "--batch", "16")
    assert code == 0 and out == f"{attnlab.memory.choose('mistral-7b-v0.2', 'A100 SXM, 80 GB', 4096, 16)}\n"
    code, out, _ = run(capsys, "choose", folder, "--card", "l4", "--context", "100", "--quantize", "int8")
    assert code == 0 and "small, 1 × 100 tokens in bfloat16 with int8 weights, L4, 24 GB" in out


def test_memory_through_typer_s_runner():
    result = runner.invoke(cli.app, ["memory", "Mistral-7B-v0.3"])
    assert result.exit_code == 0 and "mistral-7b-v0.3" in result.stdout


# --- doctor


def test_doctor_says_what_is_here_and_that_it_works(capsys):
    code, out, err = run(capsys, "doctor")
    assert code == 0, out
    for part in ("python", version("torch"), "mistral-common", "processor", "memory", "GPU", "Mistral 7B"):
        assert part in out
    assert re.search(r"generates +['\"]def.+", out)
    for form in ("float32", "bfloat16, float16", "bfloat16 with int8 weights", "bfloat16 with int4 weights"):
        assert f"on {torch.device('cuda' if torch.cuda.is_available() else 'cpu')} in {form} with 4,096 tokens" in out
    assert out.endswith("Everything essential works.\n")


def test_doctor_ends_with_1_and_says_what_to_do(capsys, monkeypatch):
    from attnlab.errors import CheckpointError

    def broken(*args, **kwargs):
        raise CheckpointError("model.safetensors is cut off")

    monkeypatch.setattr(attnlab, "load", broken)
    monkeypatch.setattr(cli, "ESSENTIAL", ("torch", "no-such-package-here"))
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "model.safetensors is cut off" in out
    assert "pip install no-such-package-here" in out.partition("to do")[2]
    assert "Everything essential works" not in out


def test_a_machine_that_is_ready_for_a_workshop_says_so_in_one_line(capsys):
    code, out, err = run(capsys, "doctor", "--room")
    assert code == 0, out
    assert re.fullmatch(
        r"ready: \d+ cores?, \d+ GB free, (no GPU|Apple GPU|.+ in b?float16), companion \d+ tokens/s, Jupyter yes, "
        r"browser (yes|no)\n",
        out,
    )


def broken_companion(*args, **kwargs):
    from attnlab.errors import CheckpointError

    raise CheckpointError("model.safetensors\nis cut off")


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        (
            "attnlab._room",
            "NEEDED",
            ("torch", "no-such-package"),
            "no no-such-package here, pip install no-such-package",
        ),
        ("attnlab._room", "FREE_MEMORY", 1e18, "GB of memory free, less than 1000000000, close other programs"),
        ("attnlab._room", "FREE_DISK", 1e18, "GB of disk free for temporary files, free some space"),
        ("attnlab", "load", broken_companion, "model.safetensors is cut off), pip install --force-reinstall"),
        ("tempfile", "tempdir", "/no/such/folder", "the temporary folder cannot be written to"),
    ],
)
def test_a_machine_that_is_not_ready_says_what_to_do_in_one_line(capsys, monkeypatch, where, name, value, said):
    from attnlab import _room

    monkeypatch.setattr(_room, "_jupyter", lambda: "Jupyter yes")  # tested beside this
    monkeypatch.setattr(f"{where}.{name}", value)
    code, out, _ = run(capsys, "doctor", "--room")
    assert code == 1 and out.startswith("not ready: ") and out.count("\n") == 1
    assert said in out


def test_an_attention_kernel_that_is_off_is_noticed(monkeypatch):
    from attnlab import _room

    right = attnlab.scaled_dot_product_attention

    def off(*args, return_weights=False, **kwargs):
        return right(*args, return_weights=True, **kwargs) if return_weights else right(*args, **kwargs) + 1e-3

    assert _room._attention() == ""
    monkeypatch.setattr(attnlab, "scaled_dot_product_attention", off)
    with pytest.raises(_room.NotReady, match=r"torch's attention is off by 0\.001"):
        _room._attention()


@pytest.mark.parametrize(
    ("imports", "seconds", "said"),
    [("import no_such_module", 60, "ModuleNotFoundError"), ("while True: pass", 3, "does not (answer|start)")],
)
def test_a_notebook_kernel_that_cannot_use_the_package_is_noticed(monkeypatch, imports, seconds, said):
    from attnlab import _room

    monkeypatch.setattr(_room, "IN_KERNEL", imports)
    monkeypatch.setattr(_room, "KERNEL_SECONDS", seconds)
    with pytest.raises(_room.NotReady, match=said):
        _room._jupyter()


# --- errors


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["generate", ""], 2, "the prompt is empty"),
        (["generate", "def", "--temperature", "-1"], 2, "temperature must be"),
        (["generate", "def", "--top-p", "2"], 2, "top_p is a probability"),
        (["generate", "def", "--max-new-tokens", "0"], 2, "max_new_tokens must be"),
        (["generate", "def", "--max-new-tokens", "many"], 2, "--max-new-tokens"),
        (["generate", "def", "--dtype", "float7"], 2, "float7"),
        (["generate", "def", "--device", "abacus"], 2, "abacus"),
        (["generate", "def", "--quantize", "int3"], 2, "got 'int3'"),
        (["explore", "def", "--quantize", "int3"], 2, "got 'int3'"),
        (["generate", "def", "--quantize-cache", "int4"], 2, "got 'int4'"),
        (["memory", "companion", "--quantize-cache", "int4"], 2, "got 'int4'"),
        (["memory", "companion", "--quantize", "int3"], 2, "got 'int3'"),
        (["serve", "--port", "0", "--quantize-cache", "int4"], 2, "got 'int4'"),
        (["generate", "def", "--model", "no such model"], 2, "no such model"),
        (["generate", "def", "--no-such-option"], 2, "--no-such-option"),
        (["explore", ""], 2, "the text is empty"),
        (["explore", "def", "--out", "no/such/folder/maps.html"], 2, "give a file in a folder that exists"),
        (["explore", "def", "--out", "."], 2, "give a file in a folder that exists"),
        (["explore", "def", "--model", "no such model"], 2, "no such model"),
        (["memory"], 2, "attnlab memory --help"),
        (["memory", "mistral-7b"], 2, "mistral-7b-v0.1"),
        (["memory", "mistral-7b-v0.1", "--context", "0"], 2, "context must be"),
        (["memory", "mistral-7b-v0.1", "--dtype", "int3"], 2, "int3"),
        (["choose", "mistral-7b-v0.1"], 2, "--card"),
        (["choose", "mistral-7b-v0.1", "--card", "abacus"], 2, "there are T4"),
        (["memory", "mistral-7b-v0.1", "--device-gb", "-5"], 2, "device_bytes"),
        (["no-such-command"], 2, "no-such-command"),
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_exit_code_2(capsys, args, code, words):
    got, out, err = run(capsys, *args)
    lines = [line for line in err.splitlines() if line.strip()]
    assert (got, out) == (code, "") and len(lines) == 1, err
    assert lines[0].startswith("attnlab: ") and words in lines[0]


def test_what_failed_is_exit_code_1(capsys, tmp_path):
    for content in ("{}", "{"):
        (tmp_path / "config.json").write_text(content)
        for command in (["generate", "def", "--model", tmp_path], ["memory", tmp_path]):
            code, out, err = run(capsys, *command)
            assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("attnlab: ")


def test_a_text_too_long_for_a_page_is_refused_before_it_is_run(capsys, folder, tmp_path):
    out = tmp_path / "maps.html"
    code, said, err = run(capsys, "explore", "def add " * 400, "--model", folder, "--out", out)
    assert (code, said, err.count("\n")) == (1, "", 1) and not out.exists()
    assert "too many for a page: it holds 512 tokens" in err


def test_a_bug_still_shows_its_traceback(monkeypatch):
    def bug(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(attnlab, "load", bug)
    with pytest.raises(ZeroDivisionError):
        cli.run(["generate", "def"])


def test_stdin_that_is_no_text_is_refused():
    done = process("generate", stdin=b"def \xff")
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode().splitlines() == ["attnlab: stdin is not UTF-8 text: byte 4 is 0xff"]


def test_a_usage_error_in_a_real_process_has_no_traceback():
    done = process("generate", "def", "--temperature", "-1")
    assert done.returncode == 2 and done.stderr.startswith(b"attnlab: temperature") and b"Traceback" not in done.stderr


def endless(folder):
    """A real process that streams until somebody stops it."""
    return subprocess.Popen(
        [sys.executable, "-m", "attnlab", "generate", "def", "--model", str(folder), "--max-new-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A windowed model that never ends its text."""
    folder = tmp_path_factory.mktemp("models") / "talkative"
    model = make_model(SMALL.replace(window=8))
    save_model(model, folder)
    make_bpe(folder, SMALL.vocab_size)
    lm = attnlab.load(folder)
    ids = attnlab.generate(lm, [0, *lm.tokenizer.encode("def", bos=False)], max_new_tokens=300)
    assert len(ids) == 300  # greedy over a short window soon goes in circles, without an end
    return folder


def test_text_comes_as_it_is_made_and_control_c_ends_it_quietly(talkative):
    child = endless(talkative)
    try:
        assert child.stdout.read(20)  # before the process has ended
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
        assert b"Traceback" not in child.stderr.read()
    finally:
        child.kill()


def test_a_reader_that_leaves_is_no_error(talkative):
    child = endless(talkative)
    try:
        child.stdout.read(20)
        child.stdout.close()
        child.wait(60)
        assert child.stderr.read().decode() == ""
    finally:
        child.kill()
