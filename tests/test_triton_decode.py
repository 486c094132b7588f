"""The Triton kernel gives attention's numbers, in Triton's interpreter; and it compiles for the GPUs it is meant for."""

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnlab import scaled_dot_product_attention
from attnlab.cache import KVCache
from attnlab.errors import ConfigError, ShapeError

RUNS = ["interpreted", "compiled"] if torch.cuda.is_available() else ["interpreted"]
TOLERANCE = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}  # of the largest value there is
CASE = SimpleNamespace(B=2, Hkv=2, G=4, S=70, D=16, dtype="float32", window=None, lengths=[70, 33], n_parts=None)


# ---- what is run in another process, which imports triton as its interpreter; and here where there is a GPU ----------


def be_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def tensors(case: SimpleNamespace) -> tuple[torch.Tensor, ...]:
    """A query a head, and keys and values with room beyond what is filled, where nan must never be read."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    q = torch.randn(case.B, case.Hkv * case.G, case.D).to(dtype)
    k, v = torch.randn(2, case.B, case.Hkv, case.S, case.D).to(dtype)
    for row, length in enumerate(case.lengths):
        seen = length if case.window is None else min(length, case.window)
        k[row, :, length:], v[row, :, length:] = torch.nan, torch.nan
        k[row, :, : length - seen], v[row, :, : length - seen] = torch.nan, torch.nan
    return q, k, v


def by_kernel(*arguments: torch.Tensor, **options: object) -> torch.Tensor:
    from attnlab import triton_decode

    device = "cpu" if triton_decode.interpreted() else "cuda"
    return triton_decode.decode_attention(*(x.to(device) for x in arguments), **options).cpu()


def attended(case: SimpleNamespace, **changes: object) -> torch.Tensor:
    options = {"window": case.window, "n_parts": case.n_parts} | changes
    return by_kernel(*tensors(case), torch.tensor(case.lengths), **options)


def largest_difference(case: SimpleNamespace) -> float:
    """From attention in float64, as a fraction of the largest value; infinite where a nan came through."""
    out, (q, k, v) = attended(case), tensors(case)
    assert out.shape == q.shape and out.dtype == q.dtype
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for row, length in enumerate(case.lengths):
        keys, values = (x[row : row + 1, :, :length].double() for x in (k, v))
        if case.window is not None:
            keys, values = keys[:, :, -case.window :], values[:, :, -case.window :]
        expected[row] = scaled_dot_product_attention(q[row, None, :, None].double(), keys, values)[0, :, 0]
    apart = (out.double() - expected).abs().max()
    return float("inf") if apart.isnan() else float(apart / max(1.0, expected.abs().max()))


def cache_in_place() -> tuple[float, bool]:
    """One layer of a cache that is longer than what is in it, as ``update`` returns it: how far off, and that it is a view."""
    torch.manual_seed(0)
    cache = KVCache(n_layers=2, batch=2, n_kv_heads=2, head_dim=8, max_len=50)
    for T in (36, 1):
        k, v, sees = cache.update(1, *torch.randn(2, 2, 2, T, 8))
        cache.advance(T)
    q = torch.randn(2, 6, 8)
    expected = scaled_dot_product_attention(q[:, :, None], k, v, **sees)[:, :, 0]
    return float((by_kernel(q, k, v) - expected).abs().max()), not k.is_contiguous()


def other_layouts() -> float:
    """Queries cut out of more, keys token by token as engines keep them, values head by head; and a scale of one's own."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 16)[:, :, 1], torch.randn(2, 21, 2, 16).transpose(1, 2), torch.randn(2, 2, 21, 16)
    expected = scaled_dot_product_attention(q[:, :, None], k, v, scale=0.5)[:, :, 0]
    return float((by_kernel(q, k, v, scale=0.5) - expected).abs().max())


@pytest.fixture(scope="module", params=RUNS)
def result_of(request):
    """What a function returns: in a process where triton is its interpreter, or in this one, where it compiles for the GPU."""
    if request.param == "compiled":
        yield lambda call, *arguments, **options: call(*arguments, **options)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), be_interpreter) as pool:
        yield lambda call, *arguments, **options: pool.submit(call, *arguments, **options).result()


def case(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**vars(CASE) | changes)


@st.composite
def cases(draw) -> SimpleNamespace:
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, 200))
    return case(
        B=B,
        S=S,
        Hkv=draw(st.integers(1, 3)),
        G=draw(st.sampled_from([1, 2, 3, 4, 7, 8, 17])),
        D=draw(st.sampled_from([1, 8, 16, 24, 64, 128, 256])),
        dtype=draw(st.sampled_from(sorted(TOLERANCE))),
        window=draw(st.none() | st.integers(1, 2 * S)),
        lengths=draw(st.lists(st.integers(0, S), min_size=B, max_size=B)),
        n_parts=draw(st.none() | st.integers(1, 9)),
    )


@pytest.mark.triton
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(cases())
@example(case(lengths=[0, 0]))
@example(case(B=1, Hkv=1, G=1, S=1, lengths=[1], n_parts=1))
@example(case(lengths=[70, 1], window=1, n_parts=3))
def test_every_shape_length_window_and_split_gives_attentions_numbers(result_of, some):
    assert result_of(largest_difference, some) < TOLERANCE[some.dtype]


@pytest.mark.triton
def test_the_window_ends_where_the_packages_does(result_of):
    q, k, v = tensors(case(B=1, S=9, lengths=[9]))
    for window in (3, 8, 9, 10):
        expected = scaled_dot_product_attention(q[:, :, None], k, v, causal=True, window=window)[:, :, 0]
        got = result_of(attended, case(B=1, S=9, lengths=[9]), window=window)
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.triton
def test_rows_of_length_0_give_zeros_and_a_length_beyond_the_cache_counts_as_the_cache(result_of):
    got = result_of(attended, case(lengths=[0, 70]))
    assert got[0].eq(0).all() and got[1].ne(0).all()
    full = result_of(attended, case(lengths=[70, 70]))
    assert all(torch.equal(result_of(attended, case(lengths=[70, n])), full) for n in (71, 10_000, 2**32 + 1))
    assert result_of(attended, case(lengths=[70, -1]))[1].eq(0).all()


@pytest.mark.triton
def test_more_parts_change_nothing_but_rounding(result_of):
    whole = result_of(attended, CASE, n_parts=1)
    assert all(torch.allclose(result_of(attended, CASE, n_parts=n), whole, atol=1e-5) for n in (2, 3, 128))


@pytest.mark.triton
def test_a_caches_own_slices_and_other_layouts_are_read_in_place(result_of):
    apart, is_view = result_of(cache_in_place)
    assert is_view and apart < 1e-5
    assert result_of(other_layouts) < 1e-5


# ---- the plan: what is read, and by how many programs ----------------------------------------------------------------


@pytest.fixture
def kernel():
    from attnlab import triton_decode

    return triton_decode


@pytest.mark.parametrize("span", [1, 31, 512, 4096, 32_768, 100_000])
@pytest.mark.parametrize("n_parts", [1, 3, 66, 128])
def test_parts_cover_the_span_once_and_are_no_more_than_asked_for(kernel, span, n_parts):
    part, n = kernel._split(span, 32, n_parts)
    assert 1 <= n <= n_parts and part % 32 == 0 and (n - 1) * part < span <= n * part


def test_a_gpu_is_given_programs_for_all_its_processors(kernel, monkeypatch):
    monkeypatch.setattr(
        kernel.torch.cuda, "get_device_properties", lambda d: SimpleNamespace(multi_processor_count=132)
    )
    gpu = torch.device("cuda")
    assert 8 * kernel._enough_parts(8, gpu) == pytest.approx(4 * 132, rel=0.05)
    assert kernel._enough_parts(1, gpu) == kernel.MAX_PARTS and kernel._enough_parts(10_000, gpu) == 1


class Compiled:
    """A kernel that is compiled where it would be launched, for a GPU that need not be here."""

    def __init__(self, kernel):
        self.kernel, self.made = kernel, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.made.append(self.kernel.warmup(*arguments, grid=grid, **options))


@pytest.fixture(params=[(80, 164 * 1024), (90, 228 * 1024)], ids=["A100", "H100"])
def gpu(kernel, request, tmp_path, monkeypatch):
    """What this GPU's processor has of shared memory, and the package's two kernels, compiled for it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    capability, shared_bytes = request.param
    target = GPUTarget("cuda", capability, 32)
    pretended = {"device": 0, "target": target, "stream": 0}
    functions = {f"get_current_{name}": lambda *_, it=it: it for name, it in pretended.items()}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", SimpleNamespace(**functions))
    monkeypatch.setattr(kernel, "_check_runnable", lambda q: None)
    kernels = kernel._attend_to_part, kernel._merge_parts
    for function in kernels:
        function.device_caches.clear()
    parts, merge = map(Compiled, kernels)
    monkeypatch.setattr(kernel, "_attend_to_part", parts)
    monkeypatch.setattr(kernel, "_merge_parts", merge)
    monkeypatch.setattr(kernel, "interpreted", lambda: False)
    yield SimpleNamespace(parts=parts.made, merge=merge.made, shared_bytes=shared_bytes)
    for function in kernels:
        function.device_caches.clear()


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_compiles_to_wide_copies_and_tensor_cores_with_room_for_all_its_programs(kernel, gpu, dtype):
    q, (k, v) = torch.zeros(1, 32, 128, dtype=dtype), torch.zeros(2, 1, 8, 4096, 128, dtype=dtype)  # Mistral 7B's shape
    kernel.decode_attention(q, k, v)
    (made,) = gpu.parts
    copies = re.findall(r"cp\.async\.c\w\.shared\.global .*?, 0x(\w+)", made.asm["ptx"])
    assert "mma.sync" in made.asm["ptx"] and "10" in copies and set(copies) <= {"10", "4"}  # bytes, hexadecimal
    system = 1024  # bytes of shared memory that each program costs besides
    assert kernel.PROGRAMS_PER_PROCESSOR * (made.metadata.shared + system) <= gpu.shared_bytes


@pytest.mark.triton
def test_a_cache_that_grows_is_compiled_for_once(kernel, gpu):
    q, (k, v) = torch.zeros(1, 8, 64).half(), torch.zeros(2, 1, 2, 100, 64).half()
    for S in (1, 15, 16, 17, 100):
        kernel.decode_attention(q, k[:, :, :S], v[:, :, :S])
    assert len({made.hash for made in gpu.parts}) == 1
    assert len({made.hash for made in gpu.merge}) == 2  # for one part, and for up to two
    kernel.decode_attention(q, k, v, torch.tensor([7]), window=33)
    assert len({made.hash for made in gpu.parts}) == 2  # with lengths to look up


# ---- what can't be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"q": torch.zeros(2, 8, 1, 16)}, ShapeError, "one token a row"),
        ({"v": torch.zeros(2, 2, 71, 16)}, ShapeError, "k and v alike"),
        ({"q": torch.zeros(1, 8, 16)}, ShapeError, "batch size"),
        ({"q": torch.zeros(2, 8, 32)}, ShapeError, "head dim of k and v"),
        ({"q": torch.zeros(2, 7, 16)}, ShapeError, "multiple of K/V heads; got 7 and 2"),
        ({name: torch.zeros(2, 2, 512) if name == "q" else torch.zeros(2, 2, 7, 512) for name in "qkv"}, ConfigError, "up to 256"),
        ({"k": torch.zeros(2, 2, 16, 70).mT}, ShapeError, "contiguous"),
        ({"k": torch.zeros(2, 2, 70, 16).half()}, ConfigError, "must all be float16"),
        ({name: torch.zeros(2, 2, 16, dtype=torch.float64) if name == "q" else torch.zeros(2, 2, 7, 16, dtype=torch.float64) for name in "qkv"}, ConfigError, "float64"),
        ({"q": torch.zeros(2, 8, 16, device="meta")}, ConfigError, "one device"),
        ({"lengths": torch.tensor([70])}, ShapeError, "each of the 2 rows"),
        ({"lengths": torch.tensor([70.0, 3.0])}, ShapeError, "whole number"),
        ({"window": 0}, ConfigError, "1 or more"),
        ({"n_parts": 0}, ConfigError, "1 to 128 parts"),
        ({"n_parts": 129}, ConfigError, "1 to 128 parts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(kernel, changes, error, says):
    q, k, v = tensors(CASE)
    arguments = {"q": q, "k": k, "v": v, "lengths": torch.tensor(CASE.lengths)} | changes
    with pytest.raises(error, match=says):
        kernel.decode_attention(**arguments)


def test_an_empty_cache_and_an_empty_batch_need_no_kernel(kernel):
    q, k, v = tensors(CASE)
    assert kernel.decode_attention(q, k[:, :, :0], v[:, :, :0]).eq(0).all()
    assert kernel.decode_attention(q[:0], k[:0], v[:0]).shape == (0, 8, 16)


@pytest.mark.triton
def test_on_a_cpu_it_says_how_to_have_it_interpreted(kernel):
    assert not kernel.interpreted()
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1 before triton is first imported"):
        kernel.decode_attention(*tensors(CASE))


def test_without_triton_the_module_can_be_read_and_says_how_to_get_it():
    program = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from attnlab.triton_decode import decode_attention\n"
        "try: decode_attention(torch.zeros(1, 2, 16), *torch.zeros(2, 1, 1, 4, 16))\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("ConfigError") and "pip install triton" in done.stdout, done.stderr


def test_importing_attnlab_imports_no_triton():
    program = "import sys, attnlab; print([name for name in sys.modules if name.split('.')[0] == 'triton'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
