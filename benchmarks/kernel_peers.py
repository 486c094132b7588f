"""One row times one matrix, by kernels that the package calls and by others: how many weights a second each takes.

Others round the row to 8 bits as well, so that whole numbers are multiplied; some are in packages that aren't pinned here, and
are left out where those are missing.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from common import interleave, spread, timed
from torch import Tensor

from attnlab.mistral import MistralConfig
from attnlab.quantize import FORMS, GROUP, QuantizedLinear

BEYOND_CACHES = 300_000_000  # bytes that a kernel goes through before it meets the same matrix again


@dataclass
class Kernel:
    """``call`` multiplies with every copy of the matrix once; ``why`` says what is missing where it can't."""

    what: str
    bits: int
    rounds_row: bool
    call: Callable[[], list] | None
    why: str = ""


def kernel_rows(config: MistralConfig, repetitions: int, nbytes: int = BEYOND_CACHES) -> tuple[list[dict], list[dict]]:
    """The feed-forward matrix of ``config``, d_ff × d_model, by every kernel there is here; and those left out, with the reason."""
    N, K = config.d_ff, config.d_model
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
    row = torch.randn(1, K, generator=torch.Generator().manual_seed(1))
    found = list(kernels(weight, row, nbytes))
    here = {kernel.what: kernel for kernel in found if kernel.call}
    exact, copies = row @ weight.T, {}
    for what, kernel in here.items():
        products = kernel.call()
        copies[what] = len(products)
        apart = (torch.as_tensor(products[-1]).float() - exact).norm() / exact.norm()
        assert apart < 0.2, f"{what} computes something else"  # four bits in groups of 32 come to a tenth
    seconds = interleave({what: timed(kernel.call) for what, kernel in here.items()}, repetitions)
    rows = [
        {"what": what, "rows": N, "columns": K, "bits": here[what].bits, "row_rounded_to_8_bits": here[what].rounds_row,
         "weights_per_second": spread([copies[what] * N * K / s for s in taken])}
        for what, taken in seconds.items()
    ]  # fmt: skip
    return rows, [{"what": kernel.what, "why": kernel.why} for kernel in found if not kernel.call]


def kernels(weight: Tensor, row: Tensor, nbytes: int) -> Iterator[Kernel]:
    """torch's kernels, in two dtypes and in the package's forms; then those that round the row."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = [weight.to(dtype).clone() for _ in range(_copies(nbytes, weight.numel() * dtype.itemsize))]
        yield Kernel(f"torch {str(dtype)[6:]}", 8 * dtype.itemsize, False, _each(F.linear, row.to(dtype), plain))
    for form in FORMS:
        first = QuantizedLinear(weight, form)
        stored = [(first.packed.clone(), first.scales.clone()) for _ in range(_copies(nbytes, first.nbytes))]
        call = _each(lambda x, matrix, product=first.product: product(x, *matrix), row.to(torch.bfloat16), stored)
        yield Kernel(f"torch {form}", int(form[3:]), False, call)
    yield _fbgemm(weight, row, nbytes)
    yield _onnxruntime(weight, row, nbytes)


def _fbgemm(weight: Tensor, row: Tensor, nbytes: int) -> Kernel:
    """torch's older int8 product, which rounds the row to as many levels as its largest and least entry need."""
    kernel = Kernel("fbgemm int8", 8, True, None, "torch was built without it")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return kernel
    int8, engine = QuantizedLinear(weight, "int8"), torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors will leave torch
            scales, zeros = int8.scales.double(), torch.zeros(len(weight), dtype=torch.long)
            stored = torch._make_per_channel_quantized_tensor(int8.packed, scales, zeros, 0)
            packed = [torch.ops.quantized.linear_prepack(stored, None) for _ in range(_copies(nbytes, weight.numel()))]
    finally:
        torch.backends.quantized.engine = engine
    # True: to 7 bits, where the processor adds pairs of products in 16
    kernel.call = _each(lambda x, matrix: torch.ops.quantized.linear_dynamic(x, matrix, True), row, packed)
    return kernel


def _onnxruntime(weight: Tensor, row: Tensor, nbytes: int) -> Kernel:
    """MatMulNBits, four bits with a scale for every 32, which rounds the row block by block (accuracy level 4)."""
    kernel = Kernel("onnxruntime int4", 4, True, None, "onnxruntime and onnx are not installed")
    if not (find_spec("onnxruntime") and find_spec("onnx")):
        return kernel
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    (N, K), copies = weight.shape, _copies(nbytes, weight.numel() * 5 // 8)
    blocks = weight.view(N, -1, GROUP)
    scales = blocks.abs().amax(-1) / 7
    codes = (blocks / scales[..., None]).round().add(8).to(torch.uint8)
    pairs, scales = (codes[..., ::2] | codes[..., 1::2] << 4).numpy(), scales.flatten().numpy()
    form = {"domain": "com.microsoft", "K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    nodes, constants, outputs = [], [], []
    for i in range(copies):
        nodes.append(helper.make_node("MatMulNBits", ["x", f"pairs{i}", f"scales{i}"], [f"y{i}"], **form))
        constants += [numpy_helper.from_array(pairs, f"pairs{i}"), numpy_helper.from_array(scales, f"scales{i}")]
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, N]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, K])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "matrices", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = {"x": row.numpy()}
    kernel.call = lambda: session.run(None, x)
    return kernel


def _each(product: Callable, x: Tensor, matrices: list) -> Callable[[], list]:
    return lambda: [product(x, matrix) for matrix in matrices]


def _copies(nbytes: int, each: int) -> int:
    return max(1, nbytes // each)
