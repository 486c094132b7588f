"""``load``: names, devices, dtypes, room; and the hub, played by a small server on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import attnlab.loading as loading
from attnlab import companion
from attnlab.checkpoint import load_model, save_model
from attnlab.errors import CapacityError, CheckpointError, ConfigError, InputError
from attnlab.loading import LanguageModel, free_bytes, load
from attnlab.mistral import Mistral, MistralConfig
from attnlab.quantize import is_quantized

CONFIG = MistralConfig(
    vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, window=8, tie_embeddings=True
)  # fmt: skip


def write_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def main(): return 1\n" * 3, "class Thing: pass\n"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Mistral:
    torch.manual_seed(0)
    return Mistral(CONFIG)


@pytest.fixture
def folder(tmp_path, model) -> Path:
    save_model(model, tmp_path / "tiny", bos_id=0, eos_id=1)
    write_tokenizer(tmp_path / "tiny")
    return tmp_path / "tiny"


def same_logits(lm: LanguageModel, model: Mistral) -> bool:
    ids = torch.tensor([lm.tokenizer.encode("def main")])
    with torch.no_grad():
        return torch.equal(lm.model(ids), model(ids))


# ---- names ------------------------------------------------------------------------------------------------------------


def test_the_companion_loads_from_inside_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "companion").mkdir()  # a folder of that name does not get in the way
    lm = load("companion", device="cpu")
    assert lm.name == lm.config.name == lm.model.config.name == "companion"
    assert lm.tokenizer.vocab_size == lm.config.vocab_size
    assert lm.model(torch.tensor([lm.tokenizer.encode("def")])).isfinite().all()


@pytest.mark.parametrize(("name", "n_kv_heads"), [("multi-head", 8), ("grouped-query", 2), ("multi-query", 1)])
def test_the_siblings_load_by_name_and_differ_in_kv_heads_alone(name, n_kv_heads, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a folder of the same name doesn't hide it
    lm = load(name, device="cpu")
    assert (lm.name, lm.config.n_kv_heads, lm.config.window) == (name, n_kv_heads, None)
    of = {row["name"]: row for row in companion.siblings() if row["seed"] == 0}[name]
    assert sum(p.numel() for p in lm.model.parameters()) == of["parameters"]
    assert of["bits_per_byte"]["cold_256"] == companion.report(name)["bits_per_byte"]["cold_256"]


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_a_folder_loads_in_either_layout_under_any_spelling_of_its_path(tmp_path, model, layout, monkeypatch):
    save_model(model, tmp_path / "tiny", layout)
    write_tokenizer(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (tmp_path / "tiny", str(tmp_path / "tiny"), ".", "../tiny", "~/tiny"):
        lm = load(name, device="cpu")
        assert (lm.name, lm.config) == ("tiny", CONFIG.replace(name="tiny"))
        assert same_logits(lm, model)


def test_repr_is_short_and_says_what_it_is(folder):
    assert repr(load(folder, device="cpu")) == "LanguageModel('tiny', 0.0 M parameters, float32 on cpu)"


@pytest.mark.parametrize("name", ["", "companio", "a/b/c", "/no/such/folder", "owner/", "../x", "owner/na me", "ö/x"])
def test_a_name_that_is_no_name_is_refused_and_the_possible_ones_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"companion.*folder.*hub id"):
        load(name)


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(ConfigError, match="revision"):
        load(folder, revision="main")


def test_a_missing_tokenizer_is_an_error_that_names_what_was_looked_for(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model.*tokenizer\.json"):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_has_is_refused(tmp_path, model):
    save_model(Mistral(CONFIG.replace(vocab_size=200)), tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    with pytest.raises(CheckpointError, match="another model"):
        load(tmp_path / "m")


# ---- device, dtype, room ----------------------------------------------------------------------------------------------


def test_the_device_is_the_best_there_is(monkeypatch):
    for cuda, mps, best in ((True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert loading._best_device() == best


def test_on_a_cpu_a_small_model_is_float32_and_a_large_one_as_stored(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_model(Mistral(CONFIG).bfloat16(), tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    in_float32 = 4 * sum(p.numel() for p in Mistral(CONFIG).parameters())
    for free, expected in ((4 * in_float32, torch.float32), (4 * in_float32 - 1, torch.bfloat16)):
        monkeypatch.setattr(loading, "free_bytes", lambda device, free=free: free)
        assert load(tmp_path / "m", device="cpu").model.dtype == expected
    assert load(tmp_path / "m", device="cpu", dtype="float16").model.dtype == torch.float16


@pytest.mark.parametrize("computes_bfloat16", [True, False], ids=["A100", "T4"])
def test_a_gpu_without_bfloat16_gets_float16(monkeypatch, computes_bfloat16):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if computes_bfloat16 else (7, 5))
    gpu = torch.device("cuda")
    expected = torch.bfloat16 if computes_bfloat16 else torch.float16
    assert loading._best_dtype(CONFIG, torch.bfloat16, gpu) == expected
    assert loading._best_dtype(CONFIG, torch.float32, gpu) == torch.float32
    assert loading._best_dtype(CONFIG, torch.bfloat16, torch.device("mps")) == torch.bfloat16


@pytest.mark.parametrize(
    ("free", "device", "bfloat16", "dtype", "quantize", "words"),
    [
        (80e9, "cuda", True, "bfloat16", None, "free on cuda"),
        (15e9, "cuda", False, "float16", "int8", "float16 as it does not compute in bfloat16"),
        (8e9, "cpu", True, "bfloat16", "int4", "with int8 weights"),
        (200e9, "cpu", True, "float32", None, "float32 as there is plenty"),
        (4e9, "cpu", True, None, None, '"companion", which runs anywhere'),
    ],
)
def test_what_fits_is_the_plan_for_what_is_free_here(monkeypatch, free, device, bfloat16, dtype, quantize, words):
    monkeypatch.setattr(loading, "_best_device", lambda: device)
    monkeypatch.setattr(loading, "parse_device", torch.device)
    monkeypatch.setattr(loading, "free_bytes", lambda device: int(free))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if bfloat16 else (7, 5))
    plan = loading.what_fits(context=4096)
    chosen = plan.chosen
    assert (chosen and chosen.dtype, chosen and chosen.quantize) == (dtype, quantize)
    assert words in str(plan).replace("\n", " ")
    assert all(way.fit.device == int(free) for way in plan.ways)


def test_what_does_not_fit_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "free_bytes", lambda device: 10_000)
    monkeypatch.setattr(loading, "load_model", lambda *args: pytest.fail("read"))
    with pytest.raises(CapacityError, match=r"tiny does not fit on cpu.*need 0\.00 GB; 0\.00 GB are free.*companion"):
        load(folder, device="cpu")


def test_the_advice_is_what_would_help(monkeypatch):
    config = MistralConfig.preset("mistral-7b-v0.1")
    free = {"cuda": 16e9, "cpu": 64e9}
    monkeypatch.setattr(loading, "free_bytes", lambda device: free[torch.device(device).type])
    with pytest.raises(CapacityError, match=r"need 29\.\d\d GB; 16\.00 GB are free.*bfloat16.*device=\"cpu\""):
        loading._check_room(config, torch.float32, torch.device("cuda"))
    loading._check_room(config, torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(
    ("dtype", "quantize", "device", "free", "ways"),
    [  # in GB: 29.0 in float32, 14.5 in 16 bits, 7.4 in int8, 4.7 in int4
        ("float32", None, "cuda", 16, ['dtype="bfloat16"', 'quantize="int8"', 'quantize="int4"', 'device="cpu"']),
        ("bfloat16", None, "cpu", 14, ['quantize="int8"', 'quantize="int4"']),
        ("float16", None, "cpu", 6, ['quantize="int4"']),
        ("bfloat16", "int8", "cpu", 6, ['quantize="int4"']),
        ("float32", None, "cpu", 5, ['dtype="bfloat16" with quantize="int4"']),
        ("bfloat16", "int4", "cpu", 4, []),
    ],
)
def test_what_does_not_fit_names_the_forms_that_would(monkeypatch, dtype, quantize, device, free, ways):
    config, asked = MistralConfig.preset("mistral-7b-v0.1"), getattr(torch, dtype)
    monkeypatch.setattr(loading, "free_bytes", lambda at: free * 1e9 if torch.device(at).type == device else 64e9)
    with pytest.raises(CapacityError, match=f"{free}.00 GB are free") as raised:
        loading._check_room(config, asked, torch.device(device), quantize)
    advice = str(raised.value).split("What would help: ")[1].split("; ")
    assert [line.split(", which")[0] for line in advice[:-1]] == ways
    for line in advice[: len(ways)]:
        options = dict(re.findall(r'(\w+)="(\w+)"', line))
        taken = getattr(torch, options.get("dtype", dtype))
        loading._check_room(
            config, taken, torch.device(options.get("device", device)), options.get("quantize", quantize)
        )


def test_a_form_whose_sizes_do_not_divide_is_no_advice(monkeypatch):
    config = MistralConfig.preset("mistral-7b-v0.1").replace(d_ff=14_330)
    monkeypatch.setattr(loading, "free_bytes", lambda device: 8e9)
    with pytest.raises(CapacityError, match=r"What would help: quantize=\"int8\", which needs 7\.\d\d GB; a device"):
        loading._check_room(config, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_folder_loads_into_fewer_bits_when_asked(tmp_path, model, quantize):
    config = CONFIG.replace(d_ff=64, name="tiny")
    torch.manual_seed(0)
    save_model(Mistral(config), tmp_path / "tiny")
    write_tokenizer(tmp_path / "tiny")
    lm = load(tmp_path / "tiny", device="cpu", quantize=quantize)
    assert is_quantized(lm.model) == quantize and lm.config == config
    assert repr(lm) == f"LanguageModel('tiny', 0.0 M parameters, float32 with {quantize} weights on cpu)"


def test_a_quantized_model_is_computed_in_float32_where_its_small_form_leaves_room(monkeypatch):
    config = MistralConfig.preset("mistral-7b-v0.1")
    monkeypatch.setattr(loading, "free_bytes", lambda device: 24e9)
    dtypes = [loading._best_dtype(config, torch.bfloat16, torch.device("cpu"), form) for form in (None, "int8", "int4")]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_free_bytes_is_within_what_the_machine_has():
    assert 0 < free_bytes("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_unknown_devices_and_dtypes_are_refused(folder):
    with pytest.raises(ConfigError, match="device"):
        load(folder, device="gpu")
    with pytest.raises(ConfigError, match="dtype"):
        load(folder, dtype="int8")
    with pytest.raises(ConfigError, match="'int8' or 'int4'; got 'int3'"):
        load("no/such/folder", quantize="int3")  # said before anything is looked for
    with pytest.raises(ConfigError, match=r"down_proj is 32 × 48: use int8|gate_proj is 48"):
        load(folder, quantize="int4")


# ---- the hub ----------------------------------------------------------------------------------------------------------

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The four requests a snapshot takes: the model, its tree, and HEAD and GET of a file. ``server`` holds the state."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        api = path[:2] == ["api", "models"]
        repo = "/".join(path[2:4] if api else path[:2])
        if repo == "owner/unknown":
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo == "owner/down":
            self.answer(500, b"")
        elif api and path[4:5] == ["revision"] and path[5] not in ("main", SHA):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif api and path[4:5] == ["tree"]:
            self.answer_json([
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in self.server.files
            ])  # fmt: skip
        elif api:
            siblings = [{"rfilename": p.name} for p in self.server.files]
            self.answer_json({"id": repo, "sha": SHA, "siblings": siblings})
        elif repo == "owner/gated" and self.headers.get("Authorization") != "Bearer accepted":
            self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        else:
            self.answer_file(self.server.folder / path[-1])

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def answer_json(self, content) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, file: Path) -> None:
        headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        body, asked = file.read_bytes(), self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[start:], headers)
        else:
            cut = self.command == "GET" and file.name == self.server.cut_off
            self.answer(200, body, headers, cut=len(body) // 2 if cut else None)


@pytest.fixture
def hub(folder):
    """A hub on 127.0.0.1 that offers ``folder`` under any name but owner/unknown and owner/down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.requests, server.cut_off = folder, [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    type(server).files = property(lambda self: sorted(self.folder.iterdir()))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


# In a process of its own: huggingface_hub takes its address and its cache from the environment when it is imported.
_LOAD = """
import sys
from attnlab.errors import AttnlabError
from attnlab.loading import load
for name in sys.argv[2:]:
    name, _, revision = name.partition("@")
    try:
        lm = load(name, device="cpu", progress=sys.argv[1] == "bar", revision=revision or None)
        print("loaded", lm.name, lm.config.name, lm.model.embed.weight.double().sum().item())
    except AttnlabError as error:
        print(type(error).__name__, error)
"""


def load_elsewhere(url: str, cache: Path, *names: str, bar: bool = False, **environment: str) -> tuple[list[str], str]:
    """What a process says that loads ``names`` from the hub at ``url``: a line for each, and its standard error."""
    dropped = re.compile("HF_|TQDM_|.*proxy", re.IGNORECASE)
    kept = {key: value for key, value in os.environ.items() if not dropped.match(key)}
    environment = kept | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    command = [sys.executable, "-c", _LOAD, "bar" if bar else "no bar", *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines(), run.stderr


def files_fetched(hub) -> list[str]:
    return sorted(path.split("/")[-1] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path)


CLOSED_PORT = "http://127.0.0.1:9"


def test_a_hub_id_is_downloaded_once_and_then_needs_no_network(hub, tmp_path, folder):
    (folder / "pytorch_model.bin").write_bytes(b"0" * 1000)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    expected = f"loaded owner/tiny owner/tiny {load_model(folder).embed.weight.double().sum().item()}"
    out, err = load_elsewhere(hub.url, tmp_path / "cache", "owner/tiny", "owner/tiny@main", f"owner/tiny@{SHA}")
    assert out == [expected] * 3
    assert "%" not in err  # no bar was asked for
    assert files_fetched(hub) == ["config.json", "model.safetensors", "tokenizer.json"]  # and nothing twice
    assert load_elsewhere(CLOSED_PORT, tmp_path / "cache", "owner/tiny")[0] == [expected]
    assert load_elsewhere(hub.url, tmp_path / "cache", "owner/tiny", HF_HUB_OFFLINE="1")[0] == [expected]


def test_a_broken_connection_is_taken_up_where_it_stopped(hub, tmp_path, folder):
    save_model(Mistral(CONFIG.replace(d_ff=30_000)), folder)  # 23 MB: the hub's client writes 10 MB at a time
    hub.cut_off = "model.safetensors"
    out, err = load_elsewhere(hub.url, tmp_path / "cache", "owner/tiny", bar=True)
    assert out[0].startswith("loaded owner/tiny")
    assert "%" in err
    asked = [asked for _, path, asked in hub.requests if path.endswith("model.safetensors") and asked]
    assert asked == [f"bytes={10 * 2**20}-"]


def test_a_gated_model_says_the_three_ways_on(hub, tmp_path):
    (out,), _ = load_elsewhere(hub.url, tmp_path / "cache", "owner/gated")
    assert out.startswith("HubError owner/gated is gated")
    for way in ("https://huggingface.co/owner/gated", "hf auth login", "HF_TOKEN", "folder", "companion"):
        assert way in out
    (out,), _ = load_elsewhere(hub.url, tmp_path / "cache", "owner/gated", HF_TOKEN="accepted")
    assert out.startswith("loaded owner/gated")


def test_what_the_hub_has_not_is_said(hub, tmp_path, folder):
    (folder / "model.safetensors").rename(folder / "model.gguf")
    names = ("owner/unknown", "owner/tiny@v9", "owner/down", "owner/tiny")
    (unknown, revision, down, format), _ = load_elsewhere(hub.url, tmp_path / "cache", *names)
    assert unknown.startswith("HubError") and "knows no model 'owner/unknown'" in unknown and "companion" in unknown
    assert revision.startswith("HubError") and "no revision 'v9'" in revision
    assert down.startswith("HubError") and "cannot be reached or does not answer" in down and "companion" in down
    assert format.startswith("CheckpointError") and "model.gguf" in format
    assert files_fetched(hub) == []


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["no answer", "offline mode"])
def test_without_a_network_the_companion_is_named(tmp_path, environment):
    (out,), _ = load_elsewhere(CLOSED_PORT, tmp_path / "cache", "owner/tiny", **environment)
    assert out.startswith("HubError owner/tiny") and "network" in out and "companion" in out


@pytest.mark.parametrize(
    ("listed", "weights"),
    [
        (["config.json", "model.safetensors", "consolidated.safetensors", "params.json"], ["model.safetensors"]),
        (
            ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json", "pytorch_model-00001-of-00002.bin", "consolidated.safetensors", "params.json"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (["params.json", "consolidated.safetensors", "consolidated.00.pth"], ["consolidated.safetensors"]),
        (["params.json", "consolidated.00.pth", "extra/config.json"], ["consolidated.00.pth"]),
    ],
    ids=["one file", "shards", "native", "pth"],
)  # fmt: skip
def test_weights_are_fetched_once_hugging_faces_first(listed, weights):
    others = [
        "tokenizer.model.v3",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "original/model.safetensors",
    ]
    needed = loading._needed("owner/tiny", listed + others)
    assert {name for name in needed if "model" in name or "consolidated" in name} - {"tokenizer.model.v3"} == set(
        weights
    )
    assert {"tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json"} < set(needed)
    assert "README.md" not in needed
