"""Weight-only quantization: bounds that follow from the forms, bytes as the account says, and a model that goes on working."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlab
from attnlab import memory, quantize
from attnlab.checkpoint import load_model, save_model
from attnlab.errors import ConfigError, ShapeError
from attnlab.generate import Decoder
from attnlab.mistral import Mistral, MistralConfig
from attnlab.quantize import FORMS, QuantizedLinear, quantizable, quantize_

CONFIG = MistralConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, window=8)


def random_model(config: MistralConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Mistral:
    torch.manual_seed(0)
    return Mistral(config).to(dtype).eval()


def matrices() -> dict[str, torch.Tensor]:
    """96 rows: a block of 64 and a rest, which int4 kernels pack in another order."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(96, 64, generator=g)
    return {
        "normal": normal * 0.02,
        "large": normal * 1e4,
        "with outliers": normal * torch.where(torch.rand(96, 64, generator=g) < 0.02, 50.0, 0.01),
        "far from zero": normal * 0.01 + 3,
        "constant": torch.full((96, 64), -0.7),
        "zero": torch.zeros(96, 64),
        "sixteen rows": normal[:16],
        "64 rows": normal[:64],
        "several parts": torch.randn(2304, 1024, generator=g),  # more than are worked on at a time
    }


MATRICES = matrices()


def half_steps(linear: QuantizedLinear) -> torch.Tensor:
    """Half the scale of every weight (out, in)."""
    if linear.quantize == "int8":
        return linear.scales.float()[:, None] / 2
    return linear.scales[..., 0].float().T.repeat_interleave(quantize.GROUP, dim=1) / 2


# ---- one matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MATRICES)
def test_no_weight_is_further_off_than_half_its_scale(form, name):
    weight = MATRICES[name]
    linear = QuantizedLinear(weight, form)
    off = (linear.dequantize() - weight).abs()
    assert (off <= half_steps(linear) * (1 + 1e-5) + weight.abs() * 2.0**-22).all()  # and what float32 rounds


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_is_as_small_as_its_weights_allow(form):
    weight = MATRICES["normal"]
    linear = QuantizedLinear(weight, form)
    if form == "int8":
        steps = weight.abs().amax(1) / linear.scales.float()
        assert steps.min() > 126 and steps.max() < 128
    else:
        group = weight.view(96, -1, quantize.GROUP)
        steps = (group.amax(-1) - group.amin(-1)) / linear.scales[..., 0].float().T
        assert steps.min() > 14.8 and steps.max() < 15.1


def test_int4_follows_a_group_and_int8_a_row():
    """An outlier coarsens the weights it shares a scale with, and no others."""
    weight = MATRICES["normal"].clone()
    before = {form: half_steps(QuantizedLinear(weight, form)).expand_as(weight) for form in FORMS}
    weight[3, 40] = 100.0
    after = {form: half_steps(QuantizedLinear(weight, form)).expand_as(weight) for form in FORMS}
    coarser = {form: after[form] > before[form] for form in FORMS}
    assert coarser["int8"][3].all() and coarser["int8"].sum() == 64
    assert coarser["int4"][3, 32:].all() and coarser["int4"].sum() == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64, 65, 130])
@pytest.mark.parametrize("name", ["normal", "far from zero", "sixteen rows", "64 rows", "several parts"])
@pytest.mark.parametrize("form", FORMS)
def test_the_product_is_that_with_the_dequantized_matrix(form, name, rows, dtype):
    linear = QuantizedLinear(MATRICES[name], form)
    x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    out = linear(x[:, None])
    assert out.dtype == dtype and out.shape == (rows, 1, linear.out_features)
    read, matrix = x.bfloat16().double(), linear.dequantize().double()  # activations are rounded on the way in
    # The result is rounded to bfloat16 (by 2^-8), twice where a matrix of int8 was restored; int4's weights then are, too.
    bound = 2.0**-7 * (read @ matrix.T).abs() + 2.0**-8 * (read.abs() @ matrix.abs().T) + 1e-6
    assert ((out[:, 0].double() - read @ matrix.T).abs() <= bound).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 70])
def test_without_a_kernel_the_numbers_are_the_same(form, rows, monkeypatch):
    weight, x = MATRICES["64 rows"], torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    usual = QuantizedLinear(weight, form)
    monkeypatch.setattr(quantize, "_product", lambda *args: (None, 0, 16))
    restoring = QuantizedLinear(weight, form)
    assert torch.equal(restoring.dequantize(), usual.dequantize()) and restoring.nbytes == usual.nbytes
    scale = x.abs() @ usual.dequantize().abs().T
    assert ((restoring(x) - usual(x)).abs() <= 2.0**-7 * scale).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_anywhere_in_memory_and_be_none(form, dtype):
    linear = QuantizedLinear(MATRICES["normal"], form)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.full((2, 3, 128), torch.nan, dtype=dtype)
    wide[..., ::2] = x
    for elsewhere in (wide[..., ::2], x.mT.contiguous().mT, x[..., :1].expand(2, 3, 64)):
        assert torch.equal(linear(elsewhere), linear(elsewhere.contiguous()))
    for shape in ((0, 64), (2, 0, 64)):
        assert linear(x.new_zeros(shape)).shape == (*shape[:-1], 96)


def test_an_order_of_packing_that_is_not_known_is_left_to_the_kernel(monkeypatch):
    weight, x = MATRICES["64 rows"], torch.randn(70, 64, generator=torch.Generator().manual_seed(1))
    usual = QuantizedLinear(weight, "int4")
    monkeypatch.setattr(quantize, "_cpu_block", lambda: None)
    other = QuantizedLinear(weight, "int4")
    assert torch.equal(other.packed, usual.packed) and torch.equal(other.dequantize(), usual.dequantize())
    assert ((other(x) - usual(x)).abs() <= 2.0**-7 * (x.abs() @ usual.dequantize().abs().T)).all()


def test_rows_that_no_int8_kernel_takes_are_multiplied_all_the_same():
    weight = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    linear, x = QuantizedLinear(weight, "int8"), torch.randn(3, 13, generator=torch.Generator().manual_seed(1))
    assert ((linear(x) - x @ linear.dequantize().T).abs() <= 2.0**-7 * (x.abs() @ weight.abs().T)).all()


def test_a_device_without_a_kernel_is_said_once_to_be_slow():
    with pytest.warns(UserWarning, match="no int4 kernel for mps.*restored"):
        assert quantize._product("int4", 64, 64, torch.device("mps"))[:2] == (None, 0)


@pytest.mark.parametrize(
    ("form", "capability", "triton", "product"),
    [
        ("int8", (7, 5), True, "_int8_fused"),
        ("int8", (9, 0), False, None),
        ("int4", (8, 0), True, "_int4_cuda"),
        ("int4", (7, 5), True, None),
    ],
)
def test_a_gpu_takes_the_kernel_it_has_and_says_where_it_has_none(form, capability, triton, product, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(quantize, "find_spec", lambda name: name if triton else None)
    with nullcontext() if product else pytest.warns(UserWarning, match=f"no {form} kernel for cuda"):
        found = quantize._product(form, 64, 64, torch.device("cuda"))[0]
    assert found is (getattr(quantize, product) if product else None)


@pytest.mark.compiler
def test_the_sum_that_a_gpu_compiles_is_the_product():
    linear = QuantizedLinear(MATRICES["normal"], "int8")
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.float() @ linear.dequantize().T
    for product in (quantize._int8_sum, quantize._int8_fused):
        assert (
            product(x, linear.packed, linear.scales).float() - expected
        ).abs().max() <= 2.0**-8 * expected.abs().max()


def test_a_gpu_packs_two_weights_to_a_byte():
    for columns, tiles in ((4096, 8), (64, 4), (96, 2)):
        codes = torch.empty(64, columns, dtype=torch.int32, device="meta")
        packed = quantize._pack(codes, None, quantize._int4_cuda)
        assert packed.nbytes == 64 * columns // 2 and packed.shape[1] == columns // (16 * tiles)


def test_a_matrix_says_what_it_is_and_refuses_what_it_cannot_take():
    linear = QuantizedLinear(MATRICES["normal"], "int4")
    assert repr(linear) == "QuantizedLinear(in_features=64, out_features=96, quantize='int4')"
    with pytest.raises(ShapeError, match=r"\(…, 64\); got \(2, 63\)"):
        linear(torch.zeros(2, 63))
    for shape in ((96, 48), (24, 64)):
        with pytest.raises(ConfigError, match=f"groups of 32 .*{shape[0]} × {shape[1]}: use int8"):
            QuantizedLinear(torch.zeros(shape), "int4")


def test_weights_that_are_no_numbers_stay_none():
    for bad in (float("nan"), float("inf")):
        weight = MATRICES["normal"].clone()
        weight[5, 7] = bad
        for form in FORMS:
            out = QuantizedLinear(weight, form)(torch.ones(1, 64))[0]
            assert not out[5].isfinite() and out[6:].isfinite().all()


# ---- a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_the_account(form, dtype, tied):
    config = CONFIG.replace(tie_embeddings=tied)
    model = quantize_(random_model(config, getattr(torch, dtype)), form)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert held == memory.weight_bytes(config, dtype, form)


def test_every_linear_layer_is_quantized_but_an_output_matrix_that_is_the_embedding():
    for tied in (False, True):
        model = quantize_(random_model(CONFIG.replace(tie_embeddings=tied)), "int8")
        left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        assert left == (["lm_head"] if tied else [])
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 2 * 7 + (not tied)
    assert model.lm_head.weight is model.embed.weight


def test_both_a_quantized_model_and_its_embedding_are_for_running_only():
    model = quantize_(random_model(), "int8")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(torch.tensor([[1, 2]])).requires_grad


@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize("form", FORMS)
def test_loading_into_a_form_gives_what_quantizing_after_loading_gives(tmp_path, form, layout):
    save_model(random_model(), tmp_path / "m", layout)
    loaded, quantized = load_model(tmp_path / "m", quantize=form), quantize_(load_model(tmp_path / "m"), form)
    state = quantized.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(loaded(ids), quantized(ids)) and not loaded.training


def test_weights_are_quantized_from_what_is_stored_whatever_is_computed_in(tmp_path):
    save_model(random_model(), tmp_path / "m")
    narrow, wide = (load_model(tmp_path / "m", dtype=dtype, quantize="int4") for dtype in ("bfloat16", "float32"))
    assert torch.equal(narrow.lm_head.packed, wide.lm_head.packed)
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_at_a_time_through_a_rolling_cache_gives_the_logits_of_one_pass(form, dtype):
    model = quantize_(random_model(dtype=dtype), form)
    ids = torch.randint(128, (1, 100), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole, cache = model(ids), model.new_cache()
        pieces = [model(chunk, cache=cache) for chunk in (ids[:, :70], *ids[:, 70:].split(1, dim=1))]
    close = 0.05 if dtype == torch.bfloat16 else 0.02  # of logits of standard deviation 0.6: kernels round differently
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < close
    assert 0.3 < whole.float().std() < 1.2


@pytest.mark.compiler
def test_a_compiled_step_takes_quantized_weights():
    model = quantize_(random_model(), "int4")
    ids = torch.tensor([[5, 6, 7]])
    logits = []
    for mode in ("eager", "compiled"):
        decoder = Decoder(model, 8, mode=mode)
        decoder.prefill(ids)
        logits.append(decoder.step(torch.tensor([[9]])))
    assert (logits[0] - logits[1]).abs().max() < 0.02


def test_a_dtype_leaves_packed_weights_alone_and_int4_stays_on_its_device():
    for form in FORMS:
        model = quantize_(random_model(), form)
        packed, scales = model.lm_head.packed.clone(), model.lm_head.scales.clone()
        model = copy.deepcopy(model).to(torch.bfloat16)
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.lm_head.packed, packed) and torch.equal(model.lm_head.scales, scales)
        assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="packed for cpu and cannot move to meta"):
        model.to("meta")
    assert quantize_(random_model(), "int8").lm_head.to("meta").scales.device.type == "meta"


def test_what_cannot_be_quantized_is_refused_and_said(tmp_path):
    for form in ("int3", "INT8", 8, True):
        with pytest.raises(ConfigError, match="None, 'int8' or 'int4'; got"):
            quantize_(random_model(), form)
        with pytest.raises(ConfigError, match="None, 'int8' or 'int4'; got"):
            load_model(tmp_path, quantize=form)
    with pytest.raises(ConfigError, match="got None"):
        quantize_(random_model(), None)
    quantized = quantize_(random_model(), "int8")
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_(quantized, "int4")
    with pytest.raises(ConfigError, match="int8 weights are not written: save the model they were made from"):
        save_model(quantized, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "changes", [{"d_ff": 80}, {"d_model": 48, "head_dim": 16}, {"vocab_size": 100}, {"n_kv_heads": 1, "head_dim": 8}]
)
def test_sizes_that_int4_does_not_divide_are_refused_before_anything_changes(changes, tmp_path):
    config = CONFIG.replace(**changes)
    model = random_model(config)
    before = {name: type(module) for name, module in model.named_modules()}
    assert not quantizable(config, "int4") and quantizable(config, "int8") and quantizable(CONFIG, "int4")
    with pytest.raises(ConfigError, match="use int8"):
        quantize_(model, "int4")
    assert {name: type(module) for name, module in model.named_modules()} == before
    save_model(model, tmp_path / "m")
    with pytest.raises(ConfigError, match="use int8"):
        load_model(tmp_path / "m", quantize="int4")
    assert load_model(tmp_path / "m", quantize="int8")(torch.tensor([[1]])).isfinite().all()


# ---- memory while loading ---------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from pathlib import Path
from attnlab.checkpoint import load_model

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

load_model(sys.argv[1], quantize=sys.argv[3])  # a small one first: code and libraries are in memory, and not counted
before = peak()
model = load_model(sys.argv[2], quantize=sys.argv[3], progress=False)
print(peak() - before, sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the resident set is Linux's count")
@pytest.mark.parametrize("form", FORMS)
def test_loading_needs_the_small_form_and_one_tensor_never_the_whole_model(tmp_path, form):
    config = MistralConfig(
        vocab_size=8192, d_model=1024, n_layers=6, n_heads=16, n_kv_heads=4, d_ff=4096, tie_embeddings=True
    )  # fmt: skip
    with torch.device("meta"):
        model = Mistral(config)
    model = model.to_empty(device="cpu").bfloat16()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    save_model(model, tmp_path / "large")
    save_model(random_model(), tmp_path / "small")
    stored = memory.weight_bytes(config, "bfloat16")
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), form]
    grown, held = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert held == memory.weight_bytes(config, "bfloat16", form)
    at_once = 60e6  # a tensor as stored, 8 MB, and what is in the making; the whole of it would be 199 MB more
    assert held * 0.9 < grown < held + at_once < 0.85 * stored


# ---- the companion ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def companion():
    return attnlab.load("companion", device="cpu", progress=False)


def test_a_quantized_companion_predicts_almost_as_before(companion):
    """Margins are three times what this package's own files give, or more; the record has it on held-out text."""
    source = Path(attnlab.__file__).parent
    rows = [
        companion.tokenizer.encode((source / name).read_text())[:256] for name in ("cache.py", "memory.py", "cli.py")
    ]
    ids = torch.tensor(rows)
    kept = {}
    for form in FORMS:
        lm = attnlab.load("companion", device="cpu", progress=False, quantize=form)
        with torch.inference_mode():
            exact, rounded = (model(ids).log_softmax(-1) for model in (companion.model, lm.model))
        kl = (exact.exp() * (exact - rounded)).sum(-1).mean()
        same = (exact.argmax(-1) == rounded.argmax(-1)).float().mean()
        targets = ids[:, 1:].flatten()
        worse = F.nll_loss(rounded[:, :-1].flatten(0, 1), targets) - F.nll_loss(exact[:, :-1].flatten(0, 1), targets)
        kept[form] = (float(kl), float(same), float(worse))
    assert 0 <= kept["int8"][0] < 0.005 and kept["int8"][1] > 0.92 and abs(kept["int8"][2]) < 0.03
    assert kept["int8"][0] < kept["int4"][0] < 0.3 and kept["int4"][1] > 0.55 and abs(kept["int4"][2]) < 0.25


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_language_model_says_so_writes_and_shows_its_maps(companion, form):
    lm = attnlab.load("companion", device="cpu", dtype="float32", progress=False, quantize=form)
    assert repr(lm) == f"LanguageModel('companion', 3.9 M parameters, float32 with {form} weights on cpu)"
    assert repr(companion) == "LanguageModel('companion', 3.9 M parameters, float32 on cpu)"
    assert len(attnlab.generate(lm, "def", max_new_tokens=8)) > 3
    exact, rounded = (
        attnlab.record_attention(m, "def add(a, b):\n    return a + b\n").weights for m in (companion, lm)
    )
    assert rounded.shape == exact.shape
    assert abs(rounded.astype("f4") - exact.astype("f4")).mean() < 0.03
