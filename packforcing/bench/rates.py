"""What this machine reaches on the model's own shapes: operations and bytes a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import fast_dtype
from ..model.attention import Attention, fast_attention
from ..model.fp8_linear import product, rounded
from .clock import best_ms
from .work import Workload, attend, layer_linear

CPU_FLOP_PER_CALL = 2e10  # a CPU's rate shows on part of the rows, and all of them would take minutes
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
SQUARE = {"cuda": 8192, "cpu": 1024}  # sides of matrices large enough to reach the device's best rate


@dataclass(frozen=True)
class Rates:
    """FLOP or bytes a second that this machine reaches."""

    gemm: float  # FLOP/s of the linear layers, in the model's type or in fp8
    vae_gemm: float  # FLOP/s of large square products in the VAE's type, which stand for convolutions; 0 without a VAE
    attention: float  # FLOP/s of attention to a full context
    cross_attention: float  # FLOP/s of attention to the prompt
    copy: float  # bytes/s from device to device, read plus written
    host_copy: float  # bytes/s from pinned host memory to the device; on the CPU equal to `copy`


def best_of(first: Rates, second: Rates) -> Rates:
    """The better of two measurements, rate by rate: a floor is what the machine can do, not what it did just then."""
    return Rates(*map(max, astuple(first), astuple(second)))


def measure_rates(workload: Workload, repeats: int, attention: Attention = fast_attention) -> Rates:
    """Measures this machine, which takes seconds. On a CPU it uses only as many rows as show the rate.

    Args:
        repeats: measurements of each rate, of which the best counts.
        attention: the model's attention function.
    """
    device = workload.device
    copy, host_copy = _copy_rates(device, repeats)
    return Rates(
        gemm=_linear_rate(workload, repeats),
        vae_gemm=0.0 if workload.vae_dim is None else _square_rate(device, fast_dtype(device), repeats),
        attention=_attention_rate(workload, workload.layout.context_tokens, repeats, attention),
        cross_attention=_attention_rate(workload, workload.text_tokens, repeats, attention),
        copy=copy,
        host_copy=host_copy,
    )


def _rows(workload: Workload, flop_per_row: int) -> int:
    """How many of a block's tokens are enough to measure with."""
    tokens = workload.layout.tokens_per_block
    if workload.device.type == "cuda":
        return tokens
    return max(1, min(tokens, int(CPU_FLOP_PER_CALL / flop_per_row)))


def _linear_rate(workload: Workload, repeats: int) -> float:
    """FLOP/s of a layer's own mixture of products: six square ones, one up and one down."""
    sizes, device, dtype = workload.sizes, workload.device, workload.dtype
    rows = _rows(workload, 2 * sizes.dim * sizes.ffn_dim)
    up = torch.randn(sizes.ffn_dim, sizes.dim, device=device, dtype=dtype)
    square = torch.randn(sizes.dim, sizes.dim, device=device, dtype=dtype)
    wide = torch.randn(rows, sizes.dim, device=device, dtype=dtype)
    tall = torch.randn(rows, sizes.ffn_dim, device=device, dtype=dtype)
    down = up.T.contiguous()
    ms = 6 * best_ms(_product(wide, square, workload.fp8), device, repeats)
    ms += best_ms(_product(wide, up, workload.fp8), device, repeats)
    ms += best_ms(_product(tall, down, workload.fp8), device, repeats)
    return 1000 * layer_linear(sizes, rows, dtype.itemsize).flop / ms


def _product(rows: Tensor, weight: Tensor, fp8: bool) -> Callable[[], Tensor]:
    """What multiplies rows [N, inner] by a weight [columns, inner]; in fp8 without the rounding of both."""
    if not fp8:
        return lambda: F.linear(rows, weight)
    factors = *rounded(rows), *rounded(weight)
    return lambda: product(*factors, None)


def _square_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of the product of two large square matrices."""
    side = SQUARE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 1000 * 2 * side**3 / best_ms(lambda: a @ b, device, repeats)


def _attention_rate(workload: Workload, keys: int, repeats: int, attention: Attention) -> float:
    """FLOP/s of a block's attention to that many keys."""
    sizes, device, dtype = workload.sizes, workload.device, workload.dtype
    rows = _rows(workload, 4 * keys * sizes.dim)
    q, k, v = (
        torch.randn(1, length, sizes.heads, sizes.dim // sizes.heads, device=device, dtype=dtype)
        for length in (rows, keys, keys)
    )
    ms = best_ms(lambda: attention(q, k, v), device, repeats)
    return 1000 * attend(rows, keys, sizes.dim, dtype.itemsize).flop / ms


def _copy_rates(device: torch.device, repeats: int) -> tuple[float, float]:
    """Bytes/s within the device, and from pinned host memory to it."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * 1000 * source.nbytes / best_ms(lambda: target.copy_(source), device, repeats)
    if device.type != "cuda":
        return copy, copy
    host = torch.ones(target.shape, dtype=target.dtype, pin_memory=True)
    return copy, 1000 * host.nbytes / best_ms(lambda: target.copy_(host, non_blocking=True), device, repeats)
