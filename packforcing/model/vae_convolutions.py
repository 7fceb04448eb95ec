"""Convolutions of small inputs that are fast in float32 on a CPU.

PyTorch gives a convolution to oneDNN only where it finds the input large, and it looks at no more than batch, channels,
frames and height: 8 channels of 18 frames of 128x128 pixels go to a kernel that takes 20 times as long. So these layers
ask for oneDNN by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN is asked for by name: in float32 on a CPU. In all other types PyTorch's own choice is right."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class FastOnCPU(nn.Module):
    """A convolution by oneDNN where `takes_onednn`; its padding is numbers."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not takes_onednn(x):
            return super()._conv_forward(x, weight, bias)  # type: ignore[misc]  # of the class that follows
        return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)  # type: ignore[arg-type]


class Conv2d(FastOnCPU, nn.Conv2d):
    """`torch.nn.Conv2d`, fast in float32 on a CPU."""


class Conv3d(FastOnCPU, nn.Conv3d):
    """`torch.nn.Conv3d`, fast in float32 on a CPU."""
