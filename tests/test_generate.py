"""Generation: what comes out, where it ends, and that every way of running a step gives the same numbers."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import make_bpe, make_folder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnlab.errors import CapacityError, ConfigError, InputError, ShapeError
from attnlab.generate import Decoder, generate, stream
from attnlab.loading import LanguageModel
from attnlab.memory import kv_cache_bytes
from attnlab.mistral import Mistral, MistralConfig
from attnlab.tokenizer import load_tokenizer
from attnlab.training.run import initialise

module = importlib.import_module("attnlab.generate")  # attnlab.generate is the function
SMALL = MistralConfig(vocab_size=400, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64)
WINDOWED = SMALL.replace(window=6)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def make_model(config: MistralConfig, seed: int = 0) -> Mistral:
    """A model whose logits lie far enough apart for greedy decoding to be the same however they are computed."""
    model = Mistral(config)
    initialise(model, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return load_tokenizer(make_bpe(tmp_path_factory.mktemp("bpe"), SMALL.vocab_size))


@pytest.fixture(scope="module")
def lm(bpe):
    assert bpe.vocab_size <= SMALL.vocab_size
    return LanguageModel(make_model(SMALL), bpe, SMALL, "small")


class Says:
    """A model that says the given ids one after another, whatever it is asked; then its end token."""

    def __init__(self, tokenizer, ids, vocab_size=None):
        self.ids, self.tokenizer, self.asked = list(ids), tokenizer, []
        self.vocab_size = vocab_size or tokenizer.vocab_size
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = SMALL.replace(vocab_size=self.vocab_size)

    def new_cache(self, batch, max_len, static=False, quantize=None):
        self.max_len = max_len
        return MistralConfigCache(batch, max_len)

    def __call__(self, ids, cache, last_only):
        self.asked += ids[0].tolist()
        said, self.said = getattr(self, "said", 0), getattr(self, "said", 0) + 1
        logits = torch.zeros(1, 1, self.vocab_size)
        logits[..., self.ids[said] if said < len(self.ids) else self.tokenizer.eos_id] = 1.0
        return logits


class MistralConfigCache:
    def __init__(self, batch, max_len):
        self.batch, self.max_len, self.static = batch, max_len, False


def says(tokenizer, ids, vocab_size=None):
    model = Says(tokenizer, ids, vocab_size)
    return LanguageModel(model, tokenizer, model.config, "says")


def reference(model, ids, n, vocab_size):
    """Greedy among the tokenizer's ids, without a cache: the whole text again for every token."""
    ids = list(ids)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1, :vocab_size].argmax()))
    return ids[start:]


# --- what comes out


@pytest.mark.parametrize("config", [SMALL, WINDOWED, SMALL.replace(window=1), SMALL.replace(tie_embeddings=True)])
def test_greedy_equals_decoding_without_a_cache(bpe, config):
    model = make_model(config)
    ids = [0, 5, 70, 8, 300, 42, 7, 7, 9, 11]
    want = reference(model, ids, 12, bpe.vocab_size)
    assert bpe.eos_id not in want  # the reference knows no end
    assert generate(LanguageModel(model, bpe, config, "small"), ids, max_new_tokens=12) == want


def test_a_prompt_in_chunks_gives_the_same(lm, bpe, monkeypatch):
    ids = [0, *range(50, 80)]
    for config in (SMALL, WINDOWED):
        model = LanguageModel(make_model(config), bpe, config, "small")
        whole = generate(model, ids, max_new_tokens=8)
        for chunk in (1, 5, 6, 7, 30):
            monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
            assert generate(model, ids, max_new_tokens=8) == whole
        monkeypatch.undo()


def test_text_for_text_and_ids_for_ids(lm, bpe):
    ids = generate(lm, bpe.encode("def main"), max_new_tokens=9)
    assert isinstance(ids, list) and all(isinstance(id, int) for id in ids)
    assert generate(lm, "def main", max_new_tokens=9) == bpe.decode(ids)
    assert generate(lm, torch.tensor(bpe.encode("def main")), max_new_tokens=9) == ids


def test_only_what_is_new_is_returned(bpe):
    assert generate(says(bpe, bpe.encode("(self):", bos=False)), "def main") == "(self):"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 17])
def test_pieces_add_up_to_what_generate_returns(lm, temperature, n):
    setting = {"max_new_tokens": n, "temperature": temperature, "seed": 3}
    assert "".join(stream(lm, "def", **setting)) == generate(lm, "def", **setting)
    assert list(stream(lm, [0, 9], **setting)) == generate(lm, [0, 9], **setting)


# --- where it ends


def test_it_ends_at_the_end_token_and_does_not_show_it(bpe):
    model = says(bpe, [40, 41, bpe.eos_id, 42])
    assert generate(model, [0]) == [40, 41]
    assert model.model.asked == [0, 40, 41]
    assert generate(says(bpe, [bpe.eos_id]), "def") == "" and generate(says(bpe, [bpe.eos_id]), [0]) == []


def test_it_ends_after_max_new_tokens_and_asks_for_no_more(bpe):
    model = says(bpe, [40] * 9)
    assert generate(model, [0, 5], max_new_tokens=3) == [40, 40, 40]
    assert model.model.asked == [0, 5, 40, 40]  # the last token is chosen, not taken in
    assert model.model.max_len == 4  # and has no room in the cache


def test_it_ends_when_stop_says_so_with_that_piece_handed_out(bpe):
    ids = bpe.encode("a\nb\nc", bos=False)
    seen = []
    assert generate(says(bpe, ids), "x", stop=lambda piece: seen.append(piece) or "\n" in piece) == "a\n"
    assert "".join(seen) == "a\n"
    assert generate(says(bpe, ids), [0], stop=lambda id: id == ids[2]) == ids[:3]


def test_a_stream_left_early_computes_no_more(bpe):
    model = says(bpe, [40, 41, 42, 43])
    pieces = stream(model, [0])
    assert [next(pieces), next(pieces)] == [40, 41]
    pieces.close()
    assert model.model.asked == [0, 40]


# --- whole characters


def test_a_character_that_spans_tokens_comes_in_one_piece(bpe):
    ids = bpe.encode("a€漢😀b", bos=False)
    assert list(stream(says(bpe, ids), "x")) == ["a", "€", "漢", "😀", "b"]


def test_half_a_character_at_the_end_is_marked_and_still_adds_up(bpe):
    ids = bpe.encode("a€", bos=False)[:-1]
    assert list(stream(says(bpe, ids), "x")) == ["a", "\ufffd"]
    assert generate(says(bpe, ids), "x") == bpe.decode(ids) == "a\ufffd"


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(2, 390), max_size=20))
def test_whatever_bytes_come_every_piece_is_valid_text(bpe, ids):
    ids = [id % bpe.vocab_size for id in ids if id % bpe.vocab_size > 1]
    pieces = list(stream(says(bpe, ids), "x"))
    assert all(pieces) and all(piece.encode() for piece in pieces)
    assert "".join(pieces) == bpe.decode(ids)


# --- instruct models


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    return load_tokenizer(make_folder(tmp_path_factory.mktemp("v1") / "Instruct", "v1"))


def test_an_instruct_model_gets_its_template_unless_raw(v1):
    answer = v1.encode("The sky", bos=False)
    question = "Why is the sky blue?"
    chat = [{"role": "user", "content": question}]
    for prompt, raw, asked in (
        (question, False, v1.encode_chat(chat)),
        (chat, False, v1.encode_chat(chat)),
        (question, True, v1.encode(question)),
    ):
        model = says(v1, answer)
        text = generate(model, prompt, raw=raw)
        assert model.model.asked[: len(asked)] == asked
        # What goes on from a text keeps its space; an answer of its own has none before it.
        assert text == (" The sky" if raw else "The sky")
        pieces = list(stream(says(v1, answer), prompt, raw=raw))
        assert "".join(pieces) == text


def test_an_answer_in_a_chat_may_begin_with_bytes(v1):
    ids = [3 + byte for byte in "€ b".encode()]
    assert generate(says(v1, ids), "Hi") == "€ b"


def test_a_base_model_has_no_chat(lm):
    with pytest.raises(InputError, match="no chat template"):
        stream(lm, [{"role": "user", "content": "Hi"}])


# --- sampling


def test_the_same_seed_gives_the_same_text_whatever_the_global_state(lm):
    def sample(seed):
        return generate(lm, "def", max_new_tokens=12, temperature=5.0, seed=seed)

    torch.manual_seed(1)
    first = sample(0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert sample(0) == first != sample(1)
    assert torch.equal(torch.get_rng_state(), before)  # and leaves that state alone


def test_without_a_seed_answers_differ(lm):
    assert len({generate(lm, "def", max_new_tokens=12, temperature=30.0) for _ in range(4)}) > 1


def test_a_low_temperature_is_greedy(lm):
    assert generate(lm, "def", temperature=1e-6, seed=0) == generate(lm, "def")


def test_ids_that_the_tokenizer_does_not_know_are_never_chosen(bpe):
    model = Mistral(SMALL.replace(vocab_size=bpe.vocab_size + 50))
    with torch.no_grad():
        model.lm_head.weight[bpe.vocab_size :] = 0
        model.lm_head.weight[: bpe.vocab_size] = -1e-3 * model.norm(model.embed.weight[:1]).sign()
    padded = LanguageModel(model, bpe, model.config, "small")
    assert max(generate(padded, [0], temperature=50.0, seed=0, max_new_tokens=60)) < bpe.vocab_size


# --- the ways to run a step


@pytest.mark.parametrize("config", [SMALL, WINDOWED])
def test_a_cache_in_8_bits_is_the_one_that_generates(bpe, config):
    """The same ids as step by step through such a cache; not always those of a cache in full."""
    model, ids = make_model(config), [0, 5, 70, 8, 300, 42, 7, 7, 9, 11]
    decoder = Decoder(model, 60, quantize_cache="int8")
    assert decoder.cache.nbytes == kv_cache_bytes(config, 60, quantize_cache="int8")
    cache, want = model.new_cache(1, 60, quantize="int8"), []
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), cache=cache)
        for _ in range(12):
            want.append(int(logits[0, -1, : bpe.vocab_size].argmax()))
            logits = model(torch.tensor([want[-1:]]), cache=cache)
    lm = LanguageModel(model, bpe, config, "small")
    assert generate(lm, ids, 12, quantize_cache="int8") == want == list(stream(lm, ids, 12, quantize_cache="int8"))
    exact, rounded = (Decoder(model, 10, quantize_cache=form).prefill(torch.tensor([ids])) for form in (None, "int8"))
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()


def play(decoder, prompt, tokens):
    """Logits after the prompt and after each token."""
    return torch.cat(
        [decoder.prefill(prompt), *(decoder.step(tokens[:, i : i + 1]) for i in range(tokens.shape[1]))], 1
    )


@pytest.fixture
def not_compiled(monkeypatch):
    """The static path as it is written, without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)


@pytest.fixture
def traced(monkeypatch):
    """The compiler's first half: it traces the whole step and fails where it cannot. Gives the list of what was traced."""
    graphs, compile = [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step, **options: compile(step, backend=keep, **options))
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [SMALL, WINDOWED, SMALL.replace(window=1), SMALL.replace(n_kv_heads=1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_mode_gives_the_same_logits(not_compiled, config, batch, device):
    model = make_model(config).to(device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(400, (batch, 9), generator=generator)
    tokens = torch.randint(400, (batch, 11), generator=generator)
    with torch.inference_mode():
        whole = model(torch.cat((prompt, tokens), 1).to(device))[:, 8:]
    for mode in ("eager", "compiled", *(["graph"] if device == "cuda" else [])):
        decoder = Decoder(model, 20, batch, mode=mode)
        assert decoder.cache.lengths.tolist() == [0] * batch  # the rehearsal is forgotten
        for _ in range(2):  # again after a reset: nothing is left over
            torch.testing.assert_close(play(decoder, prompt, tokens), whole, rtol=1e-4, atol=1e-3)
            decoder.reset()


@pytest.mark.parametrize("quantize_cache", [None, "int8"])
@pytest.mark.parametrize("config", [SMALL, WINDOWED])
def test_a_step_is_traced_whole_and_once_for_all_of_its_shape(traced, config, quantize_cache):
    model = make_model(config.replace(n_layers=1))
    prompt, tokens = torch.tensor([[0, 9, 8]]), torch.arange(50, 65)[None]
    want = play(Decoder(model, 20, quantize_cache=quantize_cache), prompt, tokens)
    for max_len in (20, 250):  # both take a cache of 256, or of the window
        decoder = Decoder(model, max_len, mode="compiled", quantize_cache=quantize_cache)
        torch.testing.assert_close(play(decoder, prompt, tokens), want, rtol=1e-4, atol=1e-3)
    assert len(traced) == 1


def test_many_lengths_can_be_compiled(traced):
    model = make_model(SMALL.replace(n_layers=1))
    with torch._dynamo.config.patch(recompile_limit=1):
        for slots in (256, 512):
            assert Decoder(model, slots - 9, mode="compiled").cache.slots == slots
    assert len(traced) == 2


class OnMeta(TorchDispatchMode):
    """Fails where an operation leaves the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert all(leaf.is_meta for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)), function
        return out


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("config", [SMALL, WINDOWED])
def test_a_static_step_never_asks_the_host_for_a_number(config, quantize):
    """On the meta device there are no numbers: a step that runs there can be recorded as a CUDA graph."""
    model = Mistral(config).to("meta")
    ids = torch.zeros(2, 1, dtype=torch.long, device="meta")
    cache = model.new_cache(2, 256, static=True, quantize=quantize)
    with torch.inference_mode(), OnMeta():
        assert model(ids, cache=cache, last_only=True).shape == (2, 1, 400)
    with torch.inference_mode(), pytest.raises((RuntimeError, NotImplementedError)):  # the ordinary cache does ask
        cache.static = False
        model(ids, cache=cache)


def test_a_compiler_that_is_not_there_is_one_clear_error(lm, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no g++ here")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compile(step, backend=broken, **options))
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match=r'no g\+\+ here.*use mode "eager"'):
        stream(lm, "def", mode="compiled")


def test_streaming_compiled_gives_the_same_text(lm, not_compiled):
    assert generate(lm, "def", mode="compiled", max_new_tokens=12) == generate(lm, "def", max_new_tokens=12)


@pytest.mark.long
def test_generated_code_gives_the_same_text(lm):
    torch._dynamo.reset()
    assert generate(lm, "def", mode="compiled", max_new_tokens=12) == generate(lm, "def", max_new_tokens=12)


# --- bad input


@pytest.mark.parametrize("prompt", ["", [], (), torch.tensor([], dtype=torch.long)])
def test_an_empty_prompt_is_refused(lm, prompt):
    with pytest.raises(InputError, match="the prompt is empty"):
        stream(lm, prompt)


@pytest.mark.parametrize("prompt", [None, 3, b"def", {"role": "user"}, [0.5], ["def"], [[0, 1]]])
def test_what_is_no_prompt_is_refused(lm, prompt):
    with pytest.raises(InputError):
        generate(lm, prompt)


@pytest.mark.parametrize("ids", [[0, 400], [-1], [0, 10**9]])
def test_ids_outside_the_vocabulary_are_refused(lm, ids):
    with pytest.raises(InputError, match="ids are 0 to 399"):
        stream(lm, ids)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"max_new_tokens": 2.5},
        {"mode": "fast"},
        {"quantize_cache": "int4"},
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_call(lm, setting):
    with pytest.raises(ConfigError, match="'int8' or not" if "quantize_cache" in setting else next(iter(setting))):
        stream(lm, "def", **setting)


def test_a_graph_needs_a_gpu(lm):
    with pytest.raises(ConfigError, match='use "compiled"'):
        stream(lm, "def", mode="graph")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_prompt_longer_than_the_cache_is_refused(mode, not_compiled):
    decoder = Decoder(make_model(SMALL), 256, mode=mode)
    with pytest.raises(CapacityError, match="room for 256 tokens"):
        decoder.prefill(torch.zeros(1, 257, dtype=torch.long))
    decoder.prefill(torch.zeros(1, 256, dtype=torch.long))
    with pytest.raises(CapacityError, match="256 are in"):
        decoder.step(torch.zeros(1, 1, dtype=torch.long))


def test_a_cache_larger_than_the_memory_is_refused_before_it_is_made(lm):
    with pytest.raises(CapacityError, match=r'are free: ask for fewer tokens, .*quantize_cache="int8"'):
        stream(lm, "def", max_new_tokens=10**12)
    with pytest.raises(CapacityError, match=r"are free: ask for fewer tokens$"):
        stream(lm, "def", max_new_tokens=10**12, quantize_cache="int8")


def test_a_cache_without_room_has_room_in_8_bits(lm, monkeypatch):
    free = kv_cache_bytes(SMALL, 100, dtype="float32") - 1
    monkeypatch.setattr(module, "free_bytes", lambda device: free)
    with pytest.raises(CapacityError, match="quantize_cache"):
        Decoder(lm.model, 100)
    assert Decoder(lm.model, 100, quantize_cache="int8").cache.nbytes < free


def test_a_windowed_model_takes_prompts_of_any_length(bpe):
    windowed = LanguageModel(make_model(WINDOWED), bpe, WINDOWED, "small")
    assert Decoder(windowed.model, 10**9).cache.slots == 6
    ids = [0, *range(40, 200)]
    assert generate(windowed, ids, max_new_tokens=5) == reference(windowed.model, ids, 5, bpe.vocab_size)


def test_shapes_that_do_not_fit_are_refused():
    decoder = Decoder(make_model(SMALL), 8, batch=2)
    for call, ids in (
        (decoder.prefill, torch.zeros(2, 0)),
        (decoder.prefill, torch.zeros(1, 3)),
        (decoder.step, torch.zeros(2, 2)),
    ):
        with pytest.raises(ShapeError):
            call(ids.long())
    with pytest.raises(ConfigError, match="max_len=0"):
        Decoder(make_model(SMALL), 0)


def test_weights_that_give_no_numbers_are_one_clear_error(bpe):
    model = make_model(SMALL)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        generate(LanguageModel(model, bpe, SMALL, "small"), "def")
