"""Memory that runs out midway: what had been taken is free again, while the error is still held, and it says what to lower."""

import gc
import importlib
import weakref

import pytest
import torch

from attnlab import cache, checkpoint
from attnlab.checkpoint import load_model, save_model
from attnlab.errors import CapacityError, first_line, ran_out_of_memory
from attnlab.generate import generate, stream
from attnlab.layers import SwiGLU
from attnlab.loading import load
from attnlab.mistral import Mistral, MistralConfig

generation = importlib.import_module("attnlab.generate")  # attnlab.generate itself is the function
CONFIG = MistralConfig(vocab_size=96, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=64)
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: tried to allocate 9 bytes"
KINDS = [(torch.OutOfMemoryError, "CUDA out of memory."), (RuntimeError, NO_MEMORY), (MemoryError, "")]


@pytest.fixture(scope="module", params=["hf", "mistral"])
def saved(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(Mistral(CONFIG), folder, request.param)
    return folder


@pytest.fixture(scope="module")
def lm():
    return load("companion", device="cpu")


def alive(pointers: set[int]) -> int:
    """Tensors over this memory that somebody can still reach."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
    return sum(t.device.type == "cpu" and t.layout == torch.strided and t.data_ptr() in pointers for t in tensors)


@pytest.mark.parametrize(("kind", "text"), KINDS)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_loading_that_runs_out_midway_frees_what_it_took(saved, monkeypatch, kind, text, quantize):
    error, taken, held = kind(text), [], []
    place, set_submodule = checkpoint._set_parameter, Mistral.set_submodule

    def set_parameter(model, name, tensor):
        if len(taken) >= 12:
            raise error
        taken.append(tensor.data_ptr())
        place(model, name, tensor)
        held.append(weakref.ref(model))

    def set_module(model, name, module):
        if len(taken) >= 12:
            raise error
        taken.extend(buffer.data_ptr() for buffer in module.buffers())
        set_submodule(model, name, module)
        held.append(weakref.ref(model))

    monkeypatch.setattr(checkpoint, "_set_parameter", set_parameter)
    monkeypatch.setattr(Mistral, "set_submodule", set_module)
    with pytest.raises(CapacityError, match=r"left memory again.*dtype, quantize=") as caught:
        load_model(saved, quantize=quantize)
    assert len(taken) >= 12 and caught.value.__cause__ is error  # and with them their tracebacks
    assert alive(set(taken)) == 0 and all(model() is None for model in held)


def test_a_model_that_loads_is_seen_alive_by_the_same_count(saved):
    model = load_model(saved)
    assert alive({p.data_ptr() for p in model.parameters()}) >= 3 + 9 * CONFIG.n_layers


@pytest.fixture
def caches(monkeypatch) -> list:
    """A weak reference to every decoder's cache."""
    made = []

    class Decoder(generation.Decoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self.cache))

    monkeypatch.setattr(generation, "Decoder", Decoder)
    return made


def fail_at(monkeypatch, call: int, error: Exception) -> None:
    forward, calls = SwiGLU.forward, []

    def failing(self, x):
        calls.append(x.shape)
        if len(calls) == call:
            raise error
        return forward(self, x)

    monkeypatch.setattr(SwiGLU, "forward", failing)


@pytest.mark.parametrize("call", [2, 3 + 4 * 5], ids=["in the prompt", "at the fifth token"])
@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_generation_that_runs_out_midway_frees_its_cache(lm, caches, monkeypatch, call, kind, text):
    error = kind(text)
    fail_at(monkeypatch, call, error)
    with pytest.raises(CapacityError, match=r"lower max_new_tokens.*quantize") as caught:
        generate(lm, "def main", max_new_tokens=16)
    assert caught.value.__cause__ is error
    gc.collect()
    assert len(caches) == 1 and caches[0]() is None
    monkeypatch.undo()
    assert generate(lm, "def main", max_new_tokens=4)  # and the model goes on


def test_what_came_before_memory_ran_out_was_handed_over(lm, monkeypatch):
    expected = generate(lm, lm.tokenizer.encode("def main"), max_new_tokens=3)
    fail_at(monkeypatch, 1 + lm.config.n_layers * 3, RuntimeError(NO_MEMORY))
    got = []
    with pytest.raises(CapacityError):
        for id in stream(lm, lm.tokenizer.encode("def main"), max_new_tokens=9):
            got.append(id)
    assert got == expected


def test_another_error_stays_what_it_is(lm, saved, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not fit")

    fail_at(monkeypatch, 2, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        generate(lm, "def main", max_new_tokens=4)
    monkeypatch.setattr(checkpoint, "_set_parameter", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        load_model(saved)
    monkeypatch.setattr(cache.torch, "zeros", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cache.KVCache(1, 1, 1, 4, 8)


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_keys_that_found_room_leave_with_the_values_that_did_not(monkeypatch, kind, text):
    zeros, taken = torch.zeros, []

    def second_fails(*args, **kwargs):
        if taken:
            raise kind(text)
        tensor = zeros(*args, **kwargs)
        taken.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(cache.torch, "zeros", second_fails)
    with pytest.raises(CapacityError, match="no room") as caught:
        cache.KVCache(1, 1, 1, 4, 8)
    monkeypatch.undo()
    assert caught.value and alive(set(taken)) == 0


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nadvice"), True),
        (RuntimeError(NO_MEMORY), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, ran_out):
    assert ran_out_of_memory(error) == ran_out
    assert "\n" not in first_line(error) and first_line(error)
