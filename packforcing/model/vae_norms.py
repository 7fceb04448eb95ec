"""The VAE's norms: one function for each, which torch.compile can make one kernel of.

They write into a tensor that is given. So a norm's result lies where the next convolution reads it, behind the frames
that came before, and is not copied there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Norm = Callable[[Tensor, Tensor, Tensor], None]
"""(x [B, C, ...], gamma [C, 1, ...], out): writes the normalised x into `out`, of its shape."""


def lengths(x: Tensor, spare: Tensor | None = None) -> Tensor:
    """Of the channels of each position of x [B, C, ...], in x's type [B, 1, ...]; no less than what that can hold.

    `spare`: a tensor like x that may be overwritten, if there is one.
    """
    # In float16 the usual 1e-12 would round to zero, and an all-zero pixel would become nan.
    floor = max(1e-12, torch.finfo(x.dtype).tiny)
    if x.device.type == "cpu" and x.stride(1) != 1:
        # There vector_norm takes up to ten times as long. The squares of float16 would overflow in their own type.
        squares = x.float().square() if x.dtype == torch.float16 else torch.square(x, out=spare)
        # The floor is applied before the root, so that the gradient at zero is finite.
        length = squares.sum(dim=1, keepdim=True, dtype=torch.float32).clamp_min(floor**2).sqrt()
    else:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(floor)
    return length.to(x.dtype)


def rms_norm(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Scales the channels of each position of x [B, C, ...] to length sqrt(C), and multiplies by gamma [C, 1, ...]."""
    scale = (gamma * math.sqrt(x.shape[1])).to(x.dtype)
    if is_traced():
        out.copy_(x / lengths(x) * scale)
    else:
        torch.div(x, lengths(x, spare=out), out=out).mul_(scale)


def rms_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """`rms_norm`, then SiLU."""
    if is_traced():
        normed = torch.empty_like(x)
        rms_norm(x, gamma, normed)
        out.copy_(F.silu(normed))
    else:
        rms_norm(x, gamma, out)
        F.silu(out, inplace=True)


def is_traced() -> bool:
    """Whether autograd needs what comes between, or a compiler makes one kernel of all: then nothing is overwritten."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


# For frames [B, C, H, W], and for clips [B, C, T, H, W]: as they are, or with time first, for frames that lie one after
# the other, each of them plain.
ORDERS = {4: ((0, 1, 2, 3),), 5: ((0, 1, 2, 3, 4), (0, 2, 1, 3, 4))}


def on_rows(function: Norm, x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """`function(x, gamma, out)`, with x and `out` as views [N, C, M]. No gradients.

    N and M are the positions before and after the channels. So a compiled function sees few kinds of shapes and
    strides, and is compiled only a few times.
    """
    for order in ORDERS[x.ndim]:
        rows, into = as_rows(x, order), as_rows(out, order)
        if rows is not None and into is not None:
            # `.data` gives plain tensors: for a view, torch.compile also looks at the tensor behind it.
            return function(rows.data, gamma.view(-1, 1).data, into.data)
    plain = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    on_rows(function, x.contiguous(), gamma, plain)
    out.copy_(plain)


def as_rows(x: Tensor, order: tuple[int, ...]) -> Tensor | None:
    """A view [N, C, M] of x with its axes in this order, or None where there is none."""
    moved = x.permute(order)
    at = order.index(1)
    shape = math.prod(moved.shape[:at]), moved.shape[at], math.prod(moved.shape[at + 1 :])
    try:
        return moved.view(shape)
    except RuntimeError:  # the axes that would become one do not lie so
        return None


class RMSNorm(nn.Module):
    """`rms_norm` of [B, C, ...] with `axes` axes after C. With `silu`, SiLU follows inside the same function."""

    def __init__(self, dim: int, axes: int, silu: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))
        self.function: Norm = rms_norm_silu if silu else rms_norm

    def into(self, x: Tensor, out: Tensor) -> None:
        """Writes the norm of x into `out`, a tensor or a part of one."""
        # A view, not the parameter: torch.compile would take the shape of a parameter as fixed.
        self.function(x, self.gamma[:], out)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self.into(x, out)
        return out
