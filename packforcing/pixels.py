"""Frames: the models' numbers in [-1, 1], and the bytes of files and screens."""

from __future__ import annotations

import torch


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames [3, F, H, W] in [-1, 1] -> bytes [F, H, W, 3], rounded and clipped, on the same device."""
    scaled = frames.float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def from_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Bytes [F, H, W, 3] -> frames [3, F, H, W] in [-1, 1], float32; `to_uint8` gives the same bytes back."""
    return frames.permute(3, 0, 1, 2).float().div(127.5).sub(1)
