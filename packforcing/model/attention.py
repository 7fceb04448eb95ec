"""Attention outside ComfyUI: several ways to compute it, and the choice of the fastest for device, type and size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# (queries [B, Lq, H, D], keys [B, Lk, H, D], values [B, Lk, H, D]) -> [B, Lq, H, D]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

MOST_SCORES = 2**22  # above this number of scores, `fast_attention` no longer writes them out (on a CPU)


def sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Scaled dot product attention in PyTorch's own kernels."""
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


# PyTorch's kernels for large shapes, as SDPBackend names them (in capitals); older versions lack some.
BACKENDS = ("cudnn_attention", "flash_attention", "efficient_attention")


def sdpa_by(backend: str) -> Attention:
    """`sdpa` by one of BACKENDS. The function raises RuntimeError for tensors that this backend cannot take."""

    def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kernel = getattr(SDPBackend, backend.upper(), None)
        if kernel is None:
            raise RuntimeError(f"this PyTorch has no {backend}")
        with sdpa_kernel(kernel):
            return sdpa(queries, keys, values)

    return attention


def matmul_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same as two matrix products; the scores [B, H, Lq, Lk] between them are written out in memory."""
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)


def fast_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Scaled dot product attention by `sdpa` or `matmul_attention`, whichever is faster here.

    On a CPU, PyTorch's fused kernel multiplies bfloat16 at a fraction of the matrix units' rate. There two plain
    products are faster as long as the scores are few (docs/performance.md).
    """
    scores = queries.shape[0] * queries.shape[2] * queries.shape[1] * keys.shape[1]
    plain = queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and scores <= MOST_SCORES
    return (matmul_attention if plain else sdpa)(queries, keys, values)


def training_attention(device: torch.device) -> Attention:
    """The attention that trainers use. On a CPU the backward pass of PyTorch's fused kernel takes twice as long."""
    return matmul_attention if device.type == "cpu" else sdpa
