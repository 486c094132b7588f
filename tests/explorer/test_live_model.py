"""The decoder of the live companion, in Chromium: its tokens, logits and maps are those of Python on the same int8 weights."""

import base64
import functools
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import attnlab
from attnlab import companion
from attnlab.explorer import attention, base, live
from attnlab.loading import LanguageModel
from attnlab.quantize import QuantizedLinear
from attnlab.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
quantized = functools.cache(live.quantized)  # read only
NASTY = [
    "", " ", "  x", "\n\n\n", "\t\t\tx = 1", "a\u0085b", "a\ufeff b", "\u180e x", "</s><s>", "<s>", "it's we'll don't",
    "'''\"\"\"'s", "''''\"\"\"\"", "( [ { \t\n ) ] }", "日本語のテキスト。漢字", "한국어 텍스트", "नमस्ते दुनिया", "مرحبا بالعالم",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈", "é", "१२३ Ⅷ ²½", "\u2028x\u2029y", "\x00\x1f\x7f", "y \u00a0 \u3000 z", "x" * 3000, "ab " * 1000, "\U0010ffff",
    "\U000e0041", "__proto__ constructor toString", "  \n  \n    return", "ﬁ ﷺ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]  # fmt: skip

# What the page keeps of a model: by name, and how a test asks it.
LOAD = """([name, texts]) => {
  const parts = texts.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) { bytes.set(part, at); at += part.length; }
  globalThis.models ??= {};
  models[name] = load_model(bytes);
}"""
# Ids in chunks → every position's logits, and every layer's rows of weights, as base64 of float32.
RUN = """([name, chunks]) => {
  const { model } = models[name];
  const cache = model.new_cache(600);
  const rows = model.blocks.map(() => []);
  const on_weights = (layer, position, weights) => rows[layer].push(weights);
  const logits = chunks.map((ids) => model.forward(ids, cache, { on_weights }));
  const base64 = (arrays) => {
    const bytes = new Uint8Array(arrays.reduce((sum, array) => sum + array.byteLength, 0));
    let at = 0;
    for (const array of arrays) {
      bytes.set(new Uint8Array(array.buffer, array.byteOffset, array.byteLength), at);
      at += array.byteLength;
    }
    let text = "";
    for (let i = 0; i < bytes.length; i += 30000) text += String.fromCharCode(...bytes.subarray(i, i + 30000));
    return btoa(text);
  };
  return { logits: base64(logits), rows: rows.map(base64), nbytes: cache.nbytes, filled: cache.filled };
}"""


def have(page, name: str) -> None:
    if not page.evaluate("name => name in (globalThis.models ?? {})", name):
        page.evaluate(LOAD, [name, list(live.files(name).values())])


@pytest.fixture(scope="module")
def page(browser):
    """A page that knows ``live_model.js``; ``have`` gives it a model."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.add_script_tag(content=base.source("live_model.js"))
    have(page, "companion")
    yield page
    context.close()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(companion.folder())


@pytest.fixture(scope="module", params=live.MODELS)
def model(request):
    return quantized(request.param)


def library_lines(n: int) -> list[str]:
    """Lines of Python's library and of this repository, drawn with a seed."""
    draw = random.Random(0)
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    paths = draw.sample(paths, 60) + sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "book").glob("*.md"))
    lines = []
    for path in paths:
        lines += path.read_text(encoding="utf-8", errors="ignore").splitlines()
    return draw.sample([line for line in lines if line.strip()], n)


def texts() -> list[str]:
    """Stretches of this repository's own code, none of which the models were trained on."""
    paths = sorted((ROOT / "src" / "attnlab").glob("*.py"))
    return [path.read_text(encoding="utf-8")[1500:2600] for path in random.Random(1).sample(paths, 6)]


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.float32)


def run(page, model, chunks: list[list[int]]) -> tuple[np.ndarray, list[np.ndarray], dict]:
    """Logits (T, vocab), weights of each layer (H, T, T) and what the page says of the cache."""
    have(page, model.config.name)
    done = page.evaluate(RUN, [model.config.name, chunks])
    T, H = sum(map(len, chunks)), model.config.n_heads
    maps = []
    for text in done["rows"]:
        values, full, at = floats(text), np.zeros((H, T, T), dtype=np.float32), 0
        for q in range(T):
            full[:, q, : q + 1] = values[at : at + H * (q + 1)].reshape(H, q + 1)
            at += H * (q + 1)
        maps.append(full)
    return floats(done["logits"]).reshape(T, -1), maps, done


def reference(model, ids: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    maps = []
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), on_weights=lambda layer, weights: maps.append(weights[0].numpy()))
    return logits[0].numpy(), maps


# ---- what is packed


@pytest.mark.parametrize("name", live.MODELS)
def test_a_models_files_join_to_its_package_and_stay_under_8_mb(name):
    files = live.files(name)
    assert b"".join(map(base64.b64decode, files.values())) == live.package(name)
    assert sum(map(len, files.values())) < 8_000_000
    assert len(files) > 4 and len(set(files)) == len(files)  # several, so that a download has steps


def test_a_package_is_a_byte_a_weight_and_its_matrices_those_of_quantize():
    data = live.package("companion")
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    model = live.float_model("companion")
    n_bytes = 0
    for name, tensor in model.state_dict().items():
        entry = header["tensors"][name]
        start = 4 + length + entry["at"]
        if tensor.dim() == 1:
            stored = np.frombuffer(data, np.float32, len(tensor), start)
            assert np.array_equal(stored, tensor.numpy())
            n_bytes += stored.nbytes
            continue
        stored = np.frombuffer(data, np.int8, tensor.numel(), start).reshape(tensor.shape)
        scale = np.frombuffer(data, np.float32, tensor.shape[0], 4 + length + entry["scale"])
        assert np.array_equal(stored * scale[:, None], QuantizedLinear(tensor, "int8").dequantize().numpy())
        assert (np.abs(stored * scale[:, None] - tensor.numpy()) <= 0.5001 * scale[:, None]).all()
        n_bytes += stored.nbytes + scale.nbytes if name != "lm_head.weight" else 0  # tied: stored once
    assert header["tensors"]["lm_head.weight"] == header["tensors"]["embed.weight"]
    assert len(data) == 4 + length + n_bytes


# ---- tokens


@pytest.mark.browser
def test_a_thousand_lines_become_the_tokens_that_python_makes(page, tokenizer):
    lines = library_lines(1000)
    got = page.evaluate("lines => lines.map((line) => models.companion.tokenizer.encode(line))", lines)
    assert got == [tokenizer.encode(line) for line in lines]


@pytest.mark.browser
def test_texts_that_are_hard_to_split_become_the_tokens_that_python_makes(page, tokenizer):
    whole = ["\n".join(library_lines(200)), *texts(), *NASTY]
    got = page.evaluate("texts => texts.map((text) => models.companion.tokenizer.encode(text))", whole)
    for text, ids in zip(whole, got, strict=True):
        assert ids == tokenizer.encode(text), repr(text[:60])


@pytest.mark.browser
def test_tokens_become_the_text_that_python_makes_even_from_the_middle_of_a_character(page, tokenizer):
    draw = random.Random(2)
    rows = [tokenizer.encode(text) for text in NASTY] + [
        draw.choices(range(tokenizer.vocab_size), k=20) for _ in range(200)
    ]
    got = page.evaluate("rows => rows.map((ids) => models.companion.tokenizer.decode(ids))", rows)
    assert got == [tokenizer.decode(ids) for ids in rows]


@pytest.mark.browser
def test_tokens_carry_the_labels_that_figures_use(page, tokenizer):
    assert page.evaluate("models.companion.tokenizer.pieces") == [
        tokenizer.piece(id) for id in range(tokenizer.vocab_size)
    ]


# ---- numbers


@pytest.mark.browser
def test_logits_and_maps_are_pytorchs_and_the_first_choice_is_the_same(page, model, tokenizer):
    agree = positions = 0
    for text in texts():
        ids = tokenizer.encode(text)[:96]
        logits, maps, _ = run(page, model, [ids])
        right, right_maps = reference(model, ids)
        assert np.abs(logits - right).max() < 1e-3
        for layer, right_layer in zip(maps, right_maps, strict=True):
            assert np.abs(layer - right_layer).max() < 1e-3
        agree += (logits.argmax(-1) == right.argmax(-1)).sum()
        positions += len(ids)
    assert positions > 500 and agree >= 0.99 * positions


@pytest.mark.browser
def test_beyond_the_window_a_rolling_cache_gives_what_pytorch_gives(page, tokenizer):
    model = quantized("companion")
    window = model.config.window
    ids = (tokenizer.encode("\n".join(texts())) * 2)[: window + 60]
    chunks = [ids[:100], ids[100:255], ids[255:256], ids[256:259], ids[259:]]
    logits, maps, said = run(page, model, chunks)
    right, right_maps = reference(model, ids)
    assert np.abs(logits - right).max() < 1e-3
    assert all(np.abs(got - wanted).max() < 1e-3 for got, wanted in zip(maps, right_maps, strict=True))
    assert said["filled"] == window
    assert said["nbytes"] == model.new_cache(max_len=len(ids)).nbytes  # all of its slots are filled


@pytest.mark.browser
@pytest.mark.parametrize("name", live.MODELS)
def test_a_cache_holds_the_bytes_that_the_account_says(page, name):
    have(page, name)
    config = live.described(name)
    nbytes = page.evaluate(
        "name => { const cache = models[name].model.new_cache(64); cache.advance(40); return cache.nbytes; }", name
    )
    shape = attnlab.memory.ModelShape(
        name, config["n_layers"], config["n_heads"], config["n_kv_heads"], config["head_dim"]
    )
    assert nbytes == 40 * attnlab.memory.kv_bytes_per_token(shape, "float32")


@pytest.mark.browser
def test_a_text_goes_on_as_attnlab_generates_it(page, model, tokenizer):
    prompt = "def read(path):\n    with open("
    right = attnlab.generate(
        LanguageModel(model, tokenizer, model.config, "it"), prompt, max_new_tokens=24, temperature=0
    )
    have(page, model.config.name)
    got = page.evaluate(
        """([name, text]) => {
          const reading = new Reading(models[name]);
          reading.take(reading.tokenizer.encode(text));
          for (let i = 0; i < 24; i++) reading.take([reading.next()[0].id]);
          return reading.tokenizer.decode(reading.ids);
        }""",
        [model.config.name, prompt],
    )
    assert got == prompt + right


@pytest.mark.browser
def test_probabilities_are_those_of_softmax_the_most_probable_first(page, tokenizer):
    model = quantized("companion")
    ids = tokenizer.encode("import ")
    got = page.evaluate("ids => { const r = new Reading(models.companion); r.take(ids); return r.next(); }", ids)
    odds = torch.tensor(reference(model, ids)[0][-1]).softmax(-1)
    right = odds.topk(10)
    assert [one["id"] for one in got] == right.indices.tolist()
    assert [one["probability"] for one in got] == pytest.approx(right.values.tolist(), abs=1e-4)
    assert [one["piece"] for one in got] == [tokenizer.piece(id) for id in right.indices.tolist()]


# ---- what the attention explorer is given


@pytest.mark.browser
@pytest.mark.parametrize("n_tokens", [1, 3, 40, 270])
@pytest.mark.parametrize("name", ["companion", "multi-head"])
def test_maps_are_handed_over_as_the_attention_explorer_packs_them(page, tokenizer, name, n_tokens):
    have(page, name)
    ids = tokenizer.encode("\n".join(texts()))[:n_tokens]
    got = page.evaluate(
        """([name, ids]) => {
          const reading = new Reading(models[name]);
          reading.take(ids);
          const record = reading.record();
          return { ...record, layers: record.layers.map((bytes) => new TextDecoder("utf-16le").decode(Uint16Array.from(bytes))) };
        }""",
        [name, ids],
    )
    record = attnlab.record_attention(quantized(name), ids)
    record.query_tokens = record.key_tokens = got["query_tokens"]
    record.weights = np.stack(reference(quantized(name), ids)[1])  # a record's float16 would be the larger difference
    assert got["query_tokens"] == [tokenizer.piece(id) for id in ids]
    right = attention.payload(record)
    right_layers = [attention.encode(layer, attention.sent_cells(n_tokens, n_tokens, True)) for layer in record.weights]
    assert right.keys() - got.keys() == {"head"}
    for key in ("n_layers", "n_heads", "n_kv_heads", "query_tokens", "key_tokens", "cross", "causal", "window"):
        assert got[key] == right[key], key
    for layer, wanted in zip(got["layers"], right_layers, strict=True):
        # numbers at the edge of a byte, or of a row's scale, may fall to the other side: a scale is a twenty-third off
        assert len(layer) == len(wanted)
        assert (
            np.abs(np.array([ord(letter) for letter in layer]) - wanted.astype(int)) <= 1 + wanted / 20
        ).mean() > 0.999
    for kind in ("heads", "groups"):
        assert (got["numbers"][kind] is None) == (right["numbers"][kind] is None)
        for key, values in (right["numbers"][kind] or {}).items():
            assert got["numbers"][kind][key] == pytest.approx(values, abs=0.02), (kind, key)
