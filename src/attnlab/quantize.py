"""Weight-only quantization: linear weights in 8 or 4 bits, multiplied in that form.

A decoded token reads every weight once, so fewer bits a weight are fewer bytes a token. Only what is stored shrinks:
activations, norms, the embedding (also where it is the output matrix too) and the cache stay as they are.

======  ==================================================================================  ==================
form    a weight is                                                                         bytes a weight
======  ==================================================================================  ==================
int8    q · scale, q from -127 to 127; one scale for a row of the matrix                    1, 2 more a row
int4    (q - 8) · scale + offset, q from 0 to 15; both shared by 32 neighbours in a row     5/8
======  ==================================================================================  ==================

Scales and offsets are bfloat16. Nearest whole numbers are taken after the scale was rounded, so that no weight is further off
than half its scale. The products are torch's own kernels where it has one (``_weight_int8pack_mm`` and
``_weight_int4pack_mm_for_cpu`` on a CPU, ``_weight_int4pack_mm`` on a GPU), which take bfloat16: activations are rounded to
it on the way in and out, whatever the model computes in.
"""

import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attnlab.cache import rounded_to_int8
from attnlab.errors import ConfigError, ShapeError
from attnlab.files import utf8_by_default
from attnlab.memory import QUANTIZED
from attnlab.mistral import Mistral, MistralConfig

Quantize = Literal["int8", "int4"]
FORMS: tuple[Quantize, ...] = get_args(Quantize)
GROUP = QUANTIZED["int4"][1]  # neighbours in a row that share a scale and an offset
_PACKED_ROWS = 16  # int4 kernels take rows in such numbers
_PART, _RESTORED = (
    2**18,
    2**21,
)  # weights that are rounded, or restored, at a time: no matrix exists in float32 as a whole
_ANY = 2**62


def parse_quantize(quantize: str | None) -> Quantize | None:
    """None, ``"int8"`` or ``"int4"``. Raises ConfigError for another."""
    if quantize is not None and quantize not in FORMS:
        raise ConfigError(f"quantize is None, {' or '.join(map(repr, FORMS))}; got {quantize!r}")
    return quantize


def quantize_(model: Mistral, quantize: Quantize) -> Mistral:
    """Store the model's linear weights in 8 or 4 bits, in place, one matrix after the other. For running, not for training.

    Raises ConfigError for an unknown form, a model that is quantized already, or sizes that int4 does not divide.

    >>> config = MistralConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=64)
    >>> quantize_(Mistral(config), "int8").lm_head
    QuantizedLinear(in_features=32, out_features=64, quantize='int8')
    """
    if parse_quantize(quantize) is None:
        raise ConfigError('quantize_ stores weights in "int8" or "int4"; got None: leave the model as it is')
    for name in linear_names(model, quantize):
        model.set_submodule(name, QuantizedLinear(model.get_submodule(name).weight.detach(), quantize))
    return model.requires_grad_(False)


def linear_names(model: Mistral, quantize: Quantize) -> list[str]:
    """The modules that are quantized: every linear one, but for an output matrix that is the embedding too.

    Raises ConfigError for a model that is quantized already, or sizes that int4 does not divide.
    """
    if is_quantized(model):
        raise ConfigError("the model is quantized already: take the one it was made from")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if model.config.tie_embeddings:
        del linears["lm_head"]
    for name, linear in linears.items():
        _check_size(quantize, linear.out_features, linear.in_features, name)
    return list(linears)


def quantizable(config: MistralConfig, quantize: Quantize) -> bool:
    """Whether all its matrices have sizes that ``quantize`` divides."""
    widths = (config.d_model, config.n_heads * config.head_dim, config.d_ff)
    rows = (config.n_kv_heads * config.head_dim, *(() if config.tie_embeddings else (config.vocab_size,)))
    return quantize == "int8" or not (any(n % GROUP for n in widths) or any(n % _PACKED_ROWS for n in rows))


def is_quantized(model: nn.Module) -> Quantize | None:
    """The form its linear weights are stored in, or None."""
    return next((module.quantize for module in model.modules() if isinstance(module, QuantizedLinear)), None)


class QuantizedLinear(nn.Module):
    """``nn.Linear`` without a bias, its matrix in 8 or 4 bits. ``packed`` holds the whole numbers, ``scales`` the rest.

    Args:
        weight: (out_features, in_features), of any floating dtype; read a part at a time.
        device: where it will be multiplied; that of ``weight`` if not given. How int4 is packed depends on it.

    Raises ConfigError for an unknown form, or sizes that int4 does not divide.
    """

    def __init__(
        self, weight: Float[Tensor, "out in"], quantize: Quantize, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = N, K = weight.shape
        self.quantize = parse_quantize(quantize)
        _check_size(quantize, N, K, "a matrix")
        device = weight.device if device is None else torch.device(device)
        self.product, self.few_rows, self.block = _product(quantize, N, K, device)
        shape = (N,) if quantize == "int8" else (K // GROUP, N, 2)
        self.register_buffer("scales", torch.empty(shape, dtype=torch.bfloat16, device=device))
        by_row = self.scales if quantize == "int8" else self.scales.transpose(0, 1)
        for start, stop in _parts(N, K, _PART):
            codes, by_row[start:stop] = _quantized(weight[start:stop].to(device, torch.float32), quantize)
            packed = codes if quantize == "int8" else _pack(codes, self.block, self.product)
            here = slice(start * len(packed) // (stop - start), stop * len(packed) // (stop - start))
            if start == 0:  # all its memory at once, before what the other parts take and give back
                self.register_buffer("packed", packed.new_empty(len(packed) * N // stop, *packed.shape[1:]))
            self.packed[here] = packed

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, quantize={self.quantize!r}"

    @property
    def nbytes(self) -> int:
        """Bytes it holds: what ``memory.weight_bytes`` counts for such a matrix."""
        return self.packed.nbytes + self.scales.nbytes

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"expected x (…, {self.in_features}); got {tuple(x.shape)}")
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()  # (M, in)
        product = self.product if len(rows) <= self.few_rows else self._restored_product
        return product(rows, self.packed, self.scales).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The matrix that stands for the original one, in float32."""
        if self.quantize == "int8":
            return self.packed.float() * self.scales.float()[:, None]
        plain = torch.tensor([1.0, 8.0], device=self.packed.device).expand_as(self.scales).to(torch.bfloat16)
        one_hot = torch.eye(self.in_features, dtype=torch.bfloat16, device=self.packed.device)
        product = self.product or self._restored_product  # (q - 8) · 1 + 8: the codes, however they are packed
        codes = rearrange(product(one_hot, self.packed, plain.contiguous()), "(g k) out -> out g k", k=GROUP).float()
        scale, offset = rearrange(self.scales.float(), "g out two -> two out g 1")
        return rearrange((codes - 8) * scale + offset, "out g k -> out (g k)")

    def _restored_product(self, rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        """By restoring some rows of the matrix at a time: worth it for many rows of x, and the way where there's no kernel."""
        outs = []
        for start, stop in _parts(self.out_features, self.in_features, _RESTORED):
            if self.quantize == "int8":
                outs.append(F.linear(rows, packed[start:stop].to(rows.dtype)) * scales[start:stop])
            else:
                some = _unpack(packed[start:stop], scales[:, start:stop], self.block)
                outs.append(rearrange(rows @ some, "n M b -> M (n b)"))
        return torch.cat(outs, dim=1)

    def _apply(self, fn, recurse=True):
        """What ``.to`` does to a module. A dtype is none of ours; int4 is packed for its device."""
        packed = fn(self.packed)
        if packed.device != self.packed.device and self.quantize == "int4":
            raise ConfigError(
                f"int4 weights are packed for {self.packed.device} and cannot move to {packed.device}: move the model "
                "before quantize_, or load it there"
            )
        self.packed, self.scales = packed, self.scales.to(packed.device)
        return self


# ---- numbers ----------------------------------------------------------------------------------------------------------


def _quantized(w: Tensor, quantize: Quantize) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales of some rows w (out, in): int8 and (out,); or int32 from 0 to 15 and (out, groups, 2)."""
    if quantize == "int8":
        codes, scale = rounded_to_int8(w)
        return codes, scale[:, 0]
    w = rearrange(w, "out (g k) -> out g k", k=GROUP)
    low, high = w.amin(-1), w.amax(-1)  # four times as fast as aminmax
    # 15 steps from the least to the greatest, and a little more: rounding the offset moves them by up to 2^-8 of it
    span = high - low + torch.maximum(low.abs(), high.abs()) * 2.0**-7
    tiny = torch.finfo(torch.bfloat16).tiny  # zeros need a scale that can be divided by
    scale = (span / 15).clamp_min(tiny).to(torch.bfloat16)
    offset = ((low + high + scale.float()) / 2).to(torch.bfloat16)  # q = 7.5 is the middle
    codes = (w - offset.float()[..., None]).div_(scale.float()[..., None]).add_(8).round_().clamp_(0, 15)
    return rearrange(codes, "out g k -> out (g k)").to(torch.int32), torch.stack((scale, offset), dim=-1)


def _parts(out_features: int, in_features: int, size: int) -> Iterator[tuple[int, int]]:
    """Rows from … to, of about ``size`` weights; a multiple of 64, which int4 kernels pack together at most."""
    step = max(64, size // in_features // 64 * 64)
    return ((start, min(start + step, out_features)) for start in range(0, out_features, step))


def _check_size(quantize: Quantize, out_features: int, in_features: int, name: str) -> None:
    if quantize == "int4" and (in_features % GROUP or out_features % _PACKED_ROWS):
        raise ConfigError(
            f"int4 takes matrices whose rows divide into groups of {GROUP} and whose number of rows divides by "
            f"{_PACKED_ROWS}; {name} is {out_features} × {in_features}: use int8"
        )


# ---- products: rows (M, in) of bfloat16, packed, scales -> (M, out) of bfloat16 ---------------------------------------


def _product(quantize: Quantize, N: int, K: int, device: torch.device):
    """torch's kernel for such a matrix on this device, up to how many rows it is worth taking, and how int4 is packed.

    Kernels for few rows read the packed matrix once a row or so; from some number on, restoring it first is quicker. The
    third value: rows of the matrix that one block of int4 holds, or None where only the kernel knows the order.
    """
    if device.type == "cpu":
        if quantize == "int8":
            return (_int8_cpu, 8, None) if K % 16 == 0 else (None, 0, None)  # it reads 16 at a time
        block = _cpu_block()
        return (_int4_cpu, 64, block) if block and N % block == 0 else (_int4_cpu, _ANY, None)
    if device.type == "cuda":
        if quantize == "int8" and find_spec("triton"):  # what torch.compile needs on a GPU
            return _int8_fused, 1, None
        if quantize == "int4" and torch.cuda.get_device_capability(device) >= (8, 0):  # tensor cores that take bfloat16
            return _int4_cuda, _ANY, None
    warnings.warn(
        f"torch has no {quantize} kernel for {device}: a matrix is restored whenever it is multiplied with. The numbers are "
        "the same; it saves memory and costs time",
        stacklevel=4,
    )
    return None, 0, _PACKED_ROWS


def _int8_cpu(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(rows, packed, scales)


def _int4_cpu(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scales)


def _int4_cuda(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(rows, packed, GROUP, scales)


def _int8_sum(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """The definition, for one row: compiled, it is one kernel that reads 8 bits a weight and writes none of them back."""
    return ((rows.float() * packed).sum(-1) * scales).to(rows.dtype)[None]


def _int8_fused(rows: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """That kernel, made at the first use of each size; within a model that is compiled as a whole, a part of it."""
    product = _int8_sum if torch.compiler.is_compiling() else _compiled_sum()
    return product(rows, packed, scales)


@cache
def _compiled_sum():
    with utf8_by_default():
        return torch.compile(_int8_sum, dynamic=False)


def _pack(codes: Tensor, block: int | None, product) -> Tensor:
    """Whole numbers from 0 to 15 (out, in), two to a byte, in the order the product reads them."""
    if product is _int4_cpu:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    if product is _int4_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
        return torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
    return _in_blocks(codes, block)


def _in_blocks(codes: Tensor, block: int) -> Tensor:
    """Blocks of so many rows, column by column: a byte holds a row of the first half and one of the second."""
    low, high = rearrange(codes, "(n half b) k -> half n k b", half=2, b=block // 2)
    return (low | high << 4).to(torch.uint8).reshape(codes.shape[0], -1)


def _unpack(packed: Tensor, scales: Tensor, block: int) -> Float[Tensor, "n in block"]:
    """The weights in such blocks, in bfloat16: n blocks of ``block`` rows of the matrix, each transposed."""
    pairs = rearrange(packed.view(-1, block // 2), "(n g k) b -> n g k 1 b", k=GROUP, n=packed.shape[0] // block)
    codes = torch.cat((pairs & 15, pairs >> 4), dim=-2).flatten(-2).to(torch.bfloat16) - 8  # (n, g, k, block)
    scale, offset = rearrange(scales, "g (n b) two -> two n g 1 b", b=block).contiguous()
    return torch.addcmul(offset, codes, scale).reshape(codes.shape[0], -1, block)


@cache
def _cpu_block() -> int | None:
    """How many rows of a matrix this processor's kernel packs together, found by packing one; None for an unknown order."""
    codes = torch.arange(64 * GROUP, dtype=torch.int32).view(64, GROUP) * 7 // 3 % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return next((block for block in (64, 32, 16) if torch.equal(_in_blocks(codes, block), packed)), None)
