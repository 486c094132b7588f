"""Folders from elsewhere: whatever is wrong with one, it loads or one of our errors says why; nothing in it runs."""

import json
import os
import pickle
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attnlab
from attnlab import checkpoint
from attnlab.checkpoint import load_model
from attnlab.errors import AttnlabError, CheckpointError, InputError
from attnlab.files import JSON_LIMIT, line, read_json, shown
from attnlab.tokenizer import load_tokenizer

from . import fuzz_checkpoints as fuzz

SEEDS = Path(__file__).with_name("seeds.txt")
measured = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux does")


def complaints(found: dict[str, str]) -> dict[str, str]:
    return {case: outcome for case, outcome in found.items() if outcome.startswith(fuzz.COMPLAINT)}


def kept() -> list[str]:
    return [text for text in SEEDS.read_text().split("\n") if text and not text.startswith("#")]


# ---- the fuzzer -------------------------------------------------------------------------------------------------------


@measured
def test_every_kind_of_damage_is_refused_in_our_words_or_harmless():
    found = fuzz.run([*kept(), *fuzz.cases(range(1))])
    assert complaints(found) == {}
    outcomes = set(found.values())
    assert {"loads", "CheckpointError"} <= outcomes and len(found) >= 119


@measured
@pytest.mark.long
@pytest.mark.parametrize("batch", range(13))
def test_ten_thousand_damaged_folders(batch):
    """Seven seeds of every damage and base: 13 · 7 · 119 cases. What fails is kept in seeds.txt."""
    found = fuzz.run(fuzz.cases(range(1 + 7 * batch, 8 + 7 * batch)))
    failed = complaints(found)
    with SEEDS.open("a") as file:
        file.writelines(f"{case}\n" for case in failed if case not in kept())
    assert failed == {}


def fuzzer_with(folder: Path, change: str) -> Path:
    """The fuzzer's process, with ``change`` made in it before its cases run."""
    script = folder / "fuzz_with_a_change.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(fuzz.__file__).parent)!r})\n"
        "import fuzz_checkpoints as fuzz\n"
        "import attnlab\n"
        f"{change}"
        "fuzz.child(sys.argv[1])\n"
    )
    return script


@measured
def test_the_fuzzer_sees_what_it_looks_for(tmp_path):
    """A death, code that runs, memory and another exception: each is a complaint, and the cases behind it still run."""
    script = fuzzer_with(
        tmp_path,
        "faults = {'dies': lambda: os.kill(os.getpid(), signal.SIGKILL), 'runs': lambda: os.system('true'),\n"
        "          'grows': lambda: b'x' * 400_000_000, 'raises': lambda: {}['x'], 'writes': lambda: open(os.devnull, 'w')}\n"
        "load = attnlab.load\n"
        "def broken(folder, **options):\n"
        "    fault = next((f for name, f in faults.items() if os.path.exists(os.path.join(folder, name))), None)\n"
        "    if fault: fault()\n"
        "    return load(folder, **options)\n"
        "attnlab.load = broken\n"
        "for name in faults:\n"
        "    def make(rng, folder, name=name): (folder / name).touch()\n"
        "    fuzz.DAMAGES[name] = (fuzz.BASES, make)\n"
        "fuzz.DAMAGES['nothing'] = (fuzz.BASES, lambda rng, folder: None)\n",
    )
    names = ("dies", "nothing", "runs", "grows", "raises", "writes", "nothing")
    found = fuzz.run([f"hf:{name}:{i}" for i, name in enumerate(names)], script)
    said = {case.split(":")[1]: outcome for case, outcome in found.items()}
    assert said.pop("nothing") == "loads"
    for name, words in {
        "dies": "SIGKILL",
        "runs": "os.system",
        "grows": "of memory",
        "raises": "KeyError",
        "writes": "open",
    }.items():
        assert said[name].startswith(fuzz.COMPLAINT) and words in said[name]


# Other ways to read a folder, each put in the place of ``attnlab.load``.
READERS = {
    "int8": "load = attnlab.load\nattnlab.load = lambda folder, **options: load(folder, quantize='int8', **options)\n",
    "a rank's part": (
        "from attnlab import parallel\n"
        "group = parallel.process_group(f'file://{__file__}.{os.getpid()}', 0, 1)\n"
        "mesh = group.__enter__()\n"
        "attnlab.load = lambda folder, device, progress: parallel.load_part(folder, mesh, 'float32', progress)\n"
    ),
}


@measured
@pytest.mark.parametrize("reader", READERS)
def test_other_ways_to_read_a_folder_are_as_careful(tmp_path, reader):
    found = fuzz.run(fuzz.cases(range(1))[::3], fuzzer_with(tmp_path, READERS[reader]))
    assert complaints(found) == {}
    assert {"loads", "CheckpointError"} <= set(found.values())


# ---- what it found, by name -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    fuzz.make_bases(root)
    return root


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(bases, tmp_path, request) -> Path:
    import shutil

    return Path(shutil.copytree(bases / getattr(request, "param", "hf"), tmp_path / "m"))


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody/model", "nul\0", "a/" * 3000, "", "two\nlines"])
def test_a_name_that_no_file_can_have_is_no_folder(name):
    for way in (attnlab.load, load_model):
        with pytest.raises(AttnlabError) as caught:
            way(name)
        assert len(str(caught.value)) < 1000
    with pytest.raises(InputError, match="no folder of that name"):
        attnlab.load(name)


@pytest.mark.parametrize("folder", fuzz.BASES, indirect=True)
@pytest.mark.parametrize("cached", [True, False], ids=["files stay in memory", "they leave it"])
@pytest.mark.parametrize("read_bytes", [7, 4096, 16 * 2**20])
def test_two_readers_in_pieces_of_any_size_read_every_tensor_where_the_header_says(
    bases, folder, monkeypatch, read_bytes, cached
):
    monkeypatch.setattr(checkpoint, "_READ_BYTES", read_bytes)
    monkeypatch.setattr(checkpoint, "_cached", lambda total, device: cached)
    whole = load_model(bases / "hf").state_dict()
    for fill in range(9):  # tensors begin at any byte
        for file in folder.glob("*.safetensors"):
            fuzz.join(file, *fuzz.split(file), fill=1)
        got = load_model(folder).state_dict()
        assert all(torch.equal(got[name], whole[name]) for name in whole), fill


def test_the_order_in_a_file_is_not_the_order_of_the_model(folder):
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # they lie in the file's own pages
    before = load_model(folder).state_dict()
    header, data = fuzz.split(file)
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][0], reverse=True)
    moved, at = b"", 0
    for name in names:
        begin, end = header[name]["data_offsets"]
        moved += data[begin:end]
        header[name]["data_offsets"] = [at, at + end - begin]
        at += end - begin
    fuzz.join(file, header, moved)
    assert moved != data and all(torch.equal(load_file(file)[n], tensors[n]) for n in tensors)
    after = load_model(folder).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def pool_threads():
    return {t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")}


@pytest.mark.parametrize("folder", fuzz.BASES, indirect=True)
def test_a_file_cut_off_while_it_is_read_is_said_and_no_reader_is_left(folder, monkeypatch):
    file = max(folder.glob("*.[sp]*t*"), key=lambda p: p.stat().st_size * (p.suffix in (".safetensors", ".pth")))
    check, size = checkpoint._check_tensors, file.stat().st_size

    def check_and_cut(*arguments):
        check(*arguments)
        os.truncate(file, size // 2)

    monkeypatch.setattr(checkpoint, "_check_tensors", check_and_cut)
    before = pool_threads()
    with pytest.raises(CheckpointError, match="It may be cut off"):
        load_model(folder)
    assert pool_threads() <= before  # torch's compiler, once used in this process, keeps a pool of its own


def test_a_config_of_millions_of_layers_is_refused_before_anything_goes_through_them(folder):
    edit(folder / "config.json", lambda content: content.update(num_hidden_layers=9_999_999))
    with pytest.raises(CheckpointError, match="at most 10,000 layers; got 9999999 layers"):
        checkpoint.read_config(folder)


def test_a_file_without_a_tensor_is_said(folder):
    save_file({}, folder / "model.safetensors")
    for way in (attnlab.load, load_model, checkpoint.stored_dtype):
        with pytest.raises(CheckpointError, match="no tensor in it"):
            way(folder)


def test_json_is_bounded_and_a_header_too(folder):
    deep = {"vocab_size": 1}
    for text, says in (
        ("[" * 10**5, "not readable as JSON"),
        ('"' + "x" * JSON_LIMIT + '"', f"at most {JSON_LIMIT:,} bytes"),
    ):
        (folder / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match=says):
            read_json(folder / "x.json")
    (folder / "x.json").write_text(json.dumps(deep))
    assert read_json(folder / "x.json") == deep
    os.truncate(folder / "tokenizer.json", 25_000_001)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected at most 25,000,000 bytes"):
        load_tokenizer(folder)
    file = folder / "model.safetensors"
    fuzz.join(file, *fuzz.split(file), fill=JSON_LIMIT)
    with pytest.raises(CheckpointError, match=f"header of at most {JSON_LIMIT:,} bytes"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_is_no_file_is_not_opened(folder, name):
    """Reading a pipe would wait for ever; ``/dev/zero`` would fill the memory."""
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(
        CheckpointError, match="tokenizer" if name == "tokenizer.json" else "a folder, a pipe or a device"
    ):
        attnlab.load(folder)


def test_a_message_is_a_line_that_can_be_printed(folder):
    assert shown("model.norm.weight") == "model.norm.weight"
    assert shown("\x1b[2J") == r"'\x1b[2J'" and len(shown("x" * 10**6)) < 100
    assert line(ValueError("in `\x1b[2J`\n\u202e")) == r"in `\x1b[2J` \u202e" and line(KeyError()) == "KeyError"
    file = folder / "model.safetensors"
    header, data = fuzz.split(file)
    header["\x1b[2J" + "x" * 10**5] = header.pop("model.norm.weight")
    fuzz.join(file, header, data)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing") as caught:
        load_model(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


# ---- .pth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["pth"], indirect=True)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {n: torch.zeros(1).expand(x.shape) for n, x in t.items()}, "is a view of another"),
        (lambda t: dict.fromkeys(t, next(iter(t.values()))), "share memory"),
        (lambda t: t | {"norm.weight": t["norm.weight"].to_sparse()}, "nothing else; it names"),
        (lambda t: dict(enumerate(t.values())), "expected a dict of tensors"),
        (lambda t: list(t.values()), "expected a dict of tensors"),
        (lambda t: t | {"norm.weight": fuzz._Call(bytearray, 2 * 10**9)}, "nothing else; it names"),
    ],
    ids=["expanded", "one for all", "sparse", "numbered", "list", "two gigabytes"],
)
def test_a_pth_of_anything_but_tensors_of_their_own_is_refused(folder, change, says):
    file = folder / "consolidated.00.pth"
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder)


@pytest.mark.parametrize("folder", ["pth"], indirect=True)
def test_a_pth_whose_output_is_its_embedding_or_of_parameters_is_read(folder):
    file = folder / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    torch.save(
        {name: torch.nn.Parameter(t) for name, t in tensors.items()} | {"output.weight": tensors["output.weight"]}, file
    )
    loaded = load_model(folder)
    assert torch.equal(loaded.lm_head.weight, loaded.embed.weight)
    assert torch.equal(loaded.embed.weight, tensors["tok_embeddings.weight"])


@pytest.mark.parametrize("folder", ["pth"], indirect=True)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"byteorder": b"big"}, "little-endian"),
        ({".storage_alignment": b"0"}, "aligned"),
        ({"data.pkl": b"." * (JSON_LIMIT + 1)}, "besides the tensors"),
    ],
)
def test_an_archive_that_torch_would_take_on_trust_is_checked_before(folder, change, says):
    fuzz.rewritten(folder / "consolidated.00.pth", change)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder)


@pytest.mark.parametrize("folder", ["pth"], indirect=True)
def test_packed_or_doubled_parts_of_a_pth_are_refused(folder):
    file = folder / "consolidated.00.pth"
    kept = file.read_bytes()
    for options in ({"packed": True}, {"doubled": ("data.pkl",)}):
        file.write_bytes(kept)
        with pytest.warns(UserWarning) if "doubled" in options else zipfile.ZipFile(file):
            fuzz.rewritten(file, {}, **options)
        with pytest.raises(CheckpointError, match="names twice, or packed parts"):
            load_model(folder)
    file.write_bytes(pickle.dumps(fuzz._Call(os.mkdir, str(folder / "sprung"))))
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        load_model(folder)
    assert not (folder / "sprung").exists()


# ---- tokenizers -------------------------------------------------------------------------------------------------------


def test_ids_with_holes_count_by_the_largest(folder):
    """An id beyond the model's vocabulary would be an index error at the first text that uses it."""
    file = folder / "tokenizer.json"
    edit(file, lambda content: content["model"]["vocab"].update({"a": 350}))
    assert load_tokenizer(folder).vocab_size == 351
    assert 350 in attnlab.load(folder).tokenizer.encode("a")
    edit(file, lambda content: content["model"]["vocab"].update({"a": 400}))
    with pytest.raises(CheckpointError, match="at most 400 tokens"):
        attnlab.load(folder)


@pytest.mark.parametrize(
    "asks",
    [
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 1000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
            }
        },
    ],
    ids=["truncation", "padding"],
)  # fmt: skip
def test_a_text_is_neither_cut_nor_filled_because_its_tokenizer_says_so(bases, folder, asks):
    edit(folder / "tokenizer.json", lambda content: content.update(asks))
    text = "def main(self): return"
    assert load_tokenizer(folder).encode(text) == load_tokenizer(bases / "hf").encode(text)


def test_a_piece_that_is_not_made_of_bytes_stands_for_itself(folder):
    edit(folder / "tokenizer.json", lambda content: content["model"]["vocab"].update({"漢": 299}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.token_bytes(299) == "漢".encode() and tokenizer.piece(299) == "漢"
    assert tokenizer._inner.decode([299]) == "漢"  # as the library has it
    edit(folder / "tokenizer.json", lambda content: content.update(decoder={"type": "ByteFallback"}))
    edit(folder / "tokenizer.json", lambda content: content["model"]["vocab"].pop("漢"))
    edit(folder / "tokenizer.json", lambda content: content["model"]["vocab"].update({"<0xZZ>": 299}))
    assert load_tokenizer(folder).token_bytes(299) == b"<0xZZ>"


def test_a_tokenizer_without_a_word_for_the_unknown_says_so(folder):
    words = {"type": "WordLevel", "unk_token": "?", "vocab": {"<s>": 0, "</s>": 1, "known": 2}}
    edit(folder / "tokenizer.json", lambda content: content.update(model=words))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("known") == [0, 2]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer of every text: .*UNK"):
        tokenizer.encode("unknown")


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": 3}, {"bos_token": {"content": None}}, {"bos_token": "\ud800"}, {"bos_token": ["<s>"]}, {"chat_template": 3}, {"chat_template": {"a": 1}},
        {"chat_template": [{"name": "default", "template": ["x"]}]},
    ],
)  # fmt: skip
def test_settings_of_another_kind_are_said(folder, settings):
    edit(folder / "tokenizer_config.json", lambda content: content.update(settings))
    (folder / "config.json").unlink()  # or its bos_token_id would do
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder)


def test_templates_of_another_kind_in_a_list_are_passed_over(folder):
    edit(
        folder / "tokenizer_config.json",
        lambda content: content.update(chat_template=["x", {"template": "y"}, {"name": "default"}]),
    )
    assert not load_tokenizer(folder).is_instruct


@pytest.mark.parametrize("id", [-1, 400, True, 10**30, [], "1"])
def test_an_end_that_is_no_token_is_refused(folder, id):
    edit(folder / "tokenizer_config.json", lambda content: content.update(bos_token="gone"))
    edit(folder / "config.json", lambda content: content.update(bos_token_id=id))
    with pytest.raises(CheckpointError, match="bos_token"):
        load_tokenizer(folder)


@pytest.mark.parametrize("folder", ["pth"], indirect=True)
def test_a_tekken_file_that_asks_for_a_billion_special_tokens_is_refused(folder):
    edit(folder / "tekken.json", lambda content: content["config"].update(default_num_special_tokens=10**9))
    with pytest.raises(CheckpointError, match="at most 10,000 special tokens; got 1000000000"):
        load_tokenizer(folder)


@pytest.mark.parametrize("folder", ["native"], indirect=True)
def test_a_sentencepiece_file_without_a_beginning_is_refused(folder):
    from sentencepiece import sentencepiece_model_pb2

    file = folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    model.trainer_spec.bos_id = -1
    for piece in model.pieces:
        if piece.piece == "<s>":
            piece.piece = "gone"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__base__.__subclasses__()[0] }}",
        "{{ cycler.__init__.__globals__.os.mkdir(trap) }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{% include trap %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ],
)
def test_a_chat_template_is_played_in_a_sandbox(folder, template):
    trap = folder / "sprung"
    template = template.replace("trap", repr(str(trap)))
    edit(folder / "tokenizer_config.json", lambda content: content.update(chat_template=template))
    with pytest.raises(InputError, match=r"the chat template in .* refused"):
        load_tokenizer(folder).encode_chat([{"role": "user", "content": "hi"}])
    assert not trap.exists()
