"""Which of torch's products is quick for a single row: decoding is little else, and on a CPU it depends on the processor.

A processor with matrix instructions for bfloat16 (Intel's AMX) multiplies a bfloat16 matrix with one vector by ``torch.mv`` in a
half or a third of the time that ``F.linear`` takes; without them ``torch.mv`` is the slower one. The numbers differ by rounding.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@cache
def has_matrix_instructions() -> bool:
    """Whether this processor multiplies bfloat16 matrices in instructions of its own (AMX), as torch sees it."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.12 doesn't say
    return bool(capabilities.get("amx_bf16"))


class OneRowLinear(nn.Linear):
    """``nn.Linear`` without a bias over a weight that exists, by ``torch.mv`` where one row comes."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make another matrix
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        if x.numel() != self.in_features:
            return F.linear(x, self.weight)
        return torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], self.out_features)


def suit_processor_(model: nn.Module) -> nn.Module:
    """Let the model's bfloat16 layers take the quicker product for one row, where this processor has one. Weights stay as they are."""
    if not has_matrix_instructions():
        return model
    for name, module in list(model.named_modules()):
        if name and type(module) is nn.Linear and module.bias is None:
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
                model.set_submodule(name, OneRowLinear(weight))
    return model
