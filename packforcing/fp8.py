"""Numbers in 8 bits (fp8, e4m3): the type, its range, and rounding to it."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def saturated(x: Tensor) -> Tensor:
    """Rounds to fp8. Numbers beyond its range become its largest or smallest number; a plain cast makes them NaN."""
    return x.clamp(-LARGEST, LARGEST).to(FP8)
