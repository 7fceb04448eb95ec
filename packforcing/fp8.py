"""Numbers in 8 bits (e4m3): the type, its range, and how numbers are brought into it."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def saturated(x: Tensor) -> Tensor:
    """Numbers in fp8; those beyond its range, which would become NaN, at its end."""
    return x.clamp(-LARGEST, LARGEST).to(FP8)
