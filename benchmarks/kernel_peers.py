"""One row times one matrix, by kernels that the package calls and by others: how many weights a second each takes.

Others round the row to 8 bits as well, so that whole numbers are multiplied; some are in packages that aren't pinned here, and
are left out where those are missing.
"""

import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from common import interleave, spread, timed

from attnlab.mistral import MistralConfig
from attnlab.quantize import FORMS, GROUP, QuantizedLinear, quantizable

BEYOND_CACHES = 300_000_000  # bytes that a kernel goes through before it meets the same matrix again


def kernel_rows(config: MistralConfig, repetitions: int, nbytes: int = BEYOND_CACHES) -> tuple[list[dict], list[dict]]:
    """The feed-forward matrix of ``config``, d_ff × d_model, by every kernel there is here; and those left out, with the reason."""
    assert quantizable(config, "int4")
    N, K = config.d_ff, config.d_model
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
    row = torch.randn(1, K, generator=torch.Generator().manual_seed(1))
    calls, described, left_out = {}, {}, []
    for make in (*_ours(), _fbgemm, _onnxruntime):
        what, bits, rounds_row, made = make(weight, row, nbytes)
        if isinstance(made, str):
            left_out.append({"what": what, "why": made})
            continue
        calls[what] = timed(made[0])
        described[what] = {"bits": bits, "row_rounded_to_8_bits": rounds_row, "copies": made[1]}
    rates = {}
    for what, seconds in interleave(calls, repetitions).items():
        rates[what] = [described[what]["copies"] * N * K / s for s in seconds]
    rows = [
        {"what": what, "rows": N, "columns": K, **described[what], "weights_per_second": spread(values)}
        for what, values in rates.items()
    ]
    return rows, left_out


def _ours() -> Iterator[Callable]:
    """F.linear in two dtypes, and the package's forms."""
    for dtype in (torch.float32, torch.bfloat16):

        def plain(weight, row, nbytes, dtype=dtype):
            copies = _copies(nbytes, weight.numel() * dtype.itemsize)
            matrices, x = [weight.to(dtype).clone() for _ in range(copies)], row.to(dtype)
            return (
                f"torch {str(dtype)[6:]}",
                8 * dtype.itemsize,
                False,
                (lambda: [F.linear(x, m) for m in matrices], copies),
            )

        yield plain
    for form in FORMS:

        def quantized(weight, row, nbytes, form=form):
            first = QuantizedLinear(weight, form)
            copies = _copies(nbytes, first.nbytes)
            stored = [(first.packed.clone(), first.scales.clone()) for _ in range(copies)]
            x = row.to(torch.bfloat16)
            return f"torch {form}", int(form[3:]), False, (lambda: [first.product(x, *m) for m in stored], copies)

        yield quantized


def _fbgemm(weight, row, nbytes):
    """torch's older int8 product, which rounds the row to as many levels as its largest and least entry need."""
    what = "fbgemm int8"
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return what, 8, True, "torch was built without it"
    int8 = QuantizedLinear(weight, "int8")
    copies, engine = _copies(nbytes, weight.numel()), torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors will leave torch
            scales, zeros = int8.scales.double(), torch.zeros(len(weight), dtype=torch.long)
            stored = torch._make_per_channel_quantized_tensor(int8.packed, scales, zeros, 0)
            packed = [torch.ops.quantized.linear_prepack(stored, None) for _ in range(copies)]
    finally:
        torch.backends.quantized.engine = engine
    # True: 7 bits, where the processor adds pairs of products in 16
    return what, 8, True, (lambda: [torch.ops.quantized.linear_dynamic(row, p, True) for p in packed], copies)


def _onnxruntime(weight, row, nbytes):
    """MatMulNBits, four bits with a scale for every 32, which rounds the row block by block (accuracy level 4)."""
    what = "onnxruntime int4"
    if not (find_spec("onnxruntime") and find_spec("onnx")):
        return what, 4, True, "onnxruntime and onnx are not installed"
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    (N, K), copies = weight.shape, _copies(nbytes, weight.numel() * 5 // 8)
    blocks = weight.view(N, -1, GROUP)
    scales = blocks.abs().amax(-1) / 7
    codes = (blocks / scales[..., None]).round().to(torch.int8).add(8).to(torch.uint8)
    pairs = numpy_helper.from_array((codes[..., ::2] | codes[..., 1::2] << 4).numpy(), "pairs")
    scales = numpy_helper.from_array(scales.flatten().numpy(), "scales")
    form = {"domain": "com.microsoft", "K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    nodes = [helper.make_node("MatMulNBits", ["x", f"p{i}", f"s{i}"], [f"y{i}"], **form) for i in range(copies)]
    constants = []
    for i in range(copies):
        for constant, name in ((pairs, f"p{i}"), (scales, f"s{i}")):
            constants.append(numpy_helper.from_array(numpy_helper.to_array(constant), name))
    one = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "matrices",
        [helper.make_tensor_value_info("x", one, [1, K])],
        [helper.make_tensor_value_info(f"y{i}", one, [1, N]) for i in range(copies)],
        constants,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = {"x": row.numpy()}
    off = np.abs(session.run(["y0"], x)[0] - (row @ weight.T).numpy()).max()
    assert off < 0.2 * float((row @ weight.T).abs().max()), "another product"
    return what, 4, True, (lambda: session.run(None, x), copies)


def _copies(nbytes: int, each: int) -> int:
    return max(1, nbytes // each)
