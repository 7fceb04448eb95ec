"""The VAE's norms: one function for each, which torch.compile can make one kernel of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Norm = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, ...], gamma [C, 1, ...]) -> the normalised x, of its shape."""


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Scales the channels of each position of x [B, C, ...] to length sqrt(C), and multiplies by gamma [C, 1, ...]."""
    # Not by vector_norm: with it a whole decode on a CPU takes 1.2 times (float32) to 1.6 times (bfloat16) as long.
    # The squares are summed in float32. Those of float16 are also computed in float32, since they would overflow.
    squares = (x.float() if x.dtype == torch.float16 else x).square().sum(dim=1, keepdim=True, dtype=torch.float32)
    # The least length is one that x's type can hold: in float16 the usual 1e-12 would round to zero, and an all-zero
    # pixel would become nan. It is applied before the root, so that the gradient at zero is finite.
    floor = max(1e-12, torch.finfo(x.dtype).tiny)
    length = squares.clamp_min(floor**2).sqrt()
    return x / length.to(x.dtype) * (gamma * math.sqrt(x.shape[1])).to(x.dtype)


def rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """`rms_norm`, then SiLU."""
    return F.silu(rms_norm(x, gamma))


# The orders in memory that occur for [B, C, H, W] and [B, C, T, H, W]: plain, frame by frame, channels last.
ORDERS = {4: ((0, 1, 2, 3), (0, 2, 3, 1)), 5: ((0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (0, 2, 3, 4, 1))}


def on_rows(function: Norm, x: Tensor, gamma: Tensor) -> Tensor:
    """`function(x, gamma)`, with x brought to the shape [N, C, M] for it. No gradients.

    N and M are the positions before and after the channels, in the order in which x lies in memory. So a compiled
    function sees few kinds of shapes and strides, and is compiled only a few times.
    """
    for order in ORDERS[x.ndim]:
        moved = x.permute(order)
        if moved.is_contiguous():
            break
    else:
        order, moved = ORDERS[x.ndim][0], x.contiguous()
    at = order.index(1)
    shape = moved.shape
    rows = moved.view(math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :]))
    back = [order.index(axis) for axis in range(x.ndim)]
    # `.data` gives plain tensors: for a view, torch.compile also looks at the tensor behind it.
    return function(rows.data, gamma.view(-1, 1).data).view(shape).permute(back)


class RMSNorm(nn.Module):
    """`rms_norm` of [B, C, ...] with `axes` axes after C. With `silu`, SiLU follows inside the same function."""

    def __init__(self, dim: int, axes: int, silu: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))
        self.function: Norm = rms_norm_silu if silu else rms_norm

    def forward(self, x: Tensor) -> Tensor:
        # A view, not the parameter: torch.compile would take the shape of a parameter as fixed.
        return self.function(x, self.gamma[:])
