"""Linear layers that multiply in fp8 (e4m3), which Ada, Hopper and later GPUs do at up to twice bfloat16's rate.

Weights are rounded once, with one scale for each output channel. Activations are rounded in every pass, with one scale
for each token. Products are summed in float32. Only the layers inside the transformer's blocks are replaced: they are
nearly all of the arithmetic. Embeddings and head are small, and rounding them shows.

Inside ComfyUI the loader's weight type `fp8_e4m3fn_fast` does the same by ComfyUI's own operations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import PackForcingError
from ..fp8 import LARGEST, saturated
from .wan_modules import WanModules

LEAST_CAPABILITY = (8, 9)  # the compute capability of Ada GPUs
SIDE = 16  # both sides of a weight must be multiples of it

LINEAR_DTYPES = ("model", "fp8_e4m3")


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, d] as fp8 rows [N, d] and float32 scales [N, 1]: row = fp8 row * scale.

    A row's largest number becomes the largest of fp8.
    """
    rows = rows.float()  # before `amax`: for bfloat16 numbers, PyTorch's compiler (2.13, CPU) writes wrong C++ there
    scales = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return saturated(rows / scales), scales


def product(rows: Tensor, row_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """Rows [N, d] times the transposed weight [D, d], plus bias [D]: bfloat16 [N, D].

    Rows and weight are fp8, with scales [N, 1] and [D, 1].
    """
    return torch._scaled_mm(rows, weight.t(), row_scales, weight_scales.t(), bias=bias, out_dtype=torch.bfloat16)


class Fp8Linear(nn.Module):
    """A linear layer that multiplies in fp8: [..., d] -> [..., D] of the same type; the product is bfloat16."""

    weight: Tensor  # [D, d], fp8
    scales: Tensor  # [D, 1], float32
    bias: Tensor | None  # [D], bfloat16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scales = rounded(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        rows, scales = rounded(x.reshape(-1, self.in_features))
        return product(rows, scales, self.weight, self.scales, self.bias).view(*x.shape[:-1], -1).to(x.dtype)


def check_fp8(device: torch.device) -> None:
    """Raises PackForcingError when a device cannot multiply in fp8. A CPU can, slowly: enough to test."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise PackForcingError(
            f"{torch.cuda.get_device_name(device)} cannot multiply in fp8, which takes an Ada, Hopper or newer GPU "
            "(compute capability 8.9): leave --linear-dtype at 'model'."
        )
    if device.type not in ("cuda", "cpu"):
        raise PackForcingError(
            f"Multiplying in fp8 needs a CUDA device, not '{device}': leave --linear-dtype at 'model'."
        )


def multiply_in_fp8(modules: WanModules, device: torch.device | str | None = None) -> None:
    """Replaces the linear layers inside the blocks by fp8 ones, in place, on `device` (None: where they lie).

    One layer at a time, so that memory never holds both forms of all layers. Raises PackForcingError for a layer with
    a side that fp8 products cannot take.
    """
    for name, module in list(modules.blocks.named_modules()):
        if isinstance(module, nn.Linear):
            if module.in_features % SIDE or module.out_features % SIDE:
                raise PackForcingError(
                    f"Multiplying in fp8 needs sides that are multiples of {SIDE}, but blocks.{name} has "
                    f"{module.in_features} and {module.out_features}: leave --linear-dtype at 'model'."
                )
            modules.blocks.set_submodule(name, Fp8Linear(module.to(device)))
