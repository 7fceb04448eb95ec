"""Attention for training on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..wan import Attention, sdpa


def matmul_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot product attention as two matrix products, [B, L, H, D] like `wan.sdpa`.

    PyTorch's fused kernel has a backward pass on the CPU that takes twice as long in bfloat16.
    """
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)


def training_attention(device: torch.device) -> Attention:
    """What trainers run on a device."""
    return matmul_attention if device.type == "cpu" else sdpa
