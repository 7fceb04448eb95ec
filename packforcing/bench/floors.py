"""What a block takes at least: its arithmetic and its bytes, at the rates that this machine reaches (method 9).

Counts are formulas of the sizes. Each kind of work has a floor of its own, max(FLOP / rate, bytes / copy rate), and a
stage's floor is their sum: a stage that reached it would compute nothing slower than this machine's own matrix products
and attention kernels on the same shapes, and spend no time on norms, rotations, launches or waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..config import LATENT_CHANNELS, PATCH, VAE_TIME_STRIDE, Layout
from ..model.attention import Attention, fast_attention
from ..model.compressor import lr_latents
from ..model.fp8_linear import product, rounded
from ..model.vae import StreamingDecoder, WanVAE
from ..model.wan_modules import MODULATIONS, WanSizes
from .clock import best_ms

CPU_FLOP_PER_CALL = 2e10  # a CPU's rate shows on part of the rows, and all of them would take minutes
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
SQUARE = {"cuda": 8192, "cpu": 1024}  # sides of matrices large enough to reach the device's best rate


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiplication and an addition are two) and bytes that must be moved."""

    flop: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.flop * times, self.bytes * times)


@dataclass(frozen=True)
class PassWork:
    """One pass of the transformer, by kind: linear layers, self-attention, and cross-attention to the prompt."""

    linear: Work
    attention: Work
    cross_attention: Work


def _matmul(rows: int, inner: int, columns: int, itemsize: int) -> Work:
    return Work(2 * rows * inner * columns, itemsize * (rows * inner + inner * columns + rows * columns))


def _attend(queries: int, keys: int, dim: int, itemsize: int) -> Work:
    """Scores and weighted sums of all heads, `dim` wide together; reads queries, keys and values, writes the result."""
    return Work(4 * queries * keys * dim, itemsize * dim * 2 * (queries + keys))


def denoise_work(sizes: WanSizes, tokens: int, context: int, text: int, itemsize: int) -> PassWork:
    """A denoising pass of one block.

    Args:
        tokens: the block's tokens N.
        context: keys that they attend to, their own included.
        text: tokens of the prompt, whose keys and values are made once a run.
        itemsize: bytes of a value.
    """
    layer = _layer_linear(sizes, tokens, itemsize)
    patch = LATENT_CHANNELS * PATCH * PATCH
    return PassWork(
        layer * sizes.layers
        + _matmul(tokens, patch, sizes.dim, itemsize)
        + _matmul(tokens, sizes.dim, patch, itemsize)
        + _time_linear(sizes, itemsize),
        _attend(tokens, context, sizes.dim, itemsize) * sizes.layers,
        _attend(tokens, text, sizes.dim, itemsize) * sizes.layers,
    )


def clean_work(sizes: WanSizes, tokens: int, compressed: int, context: int, text: int, itemsize: int) -> PassWork:
    """The clean pass: `compressed` more tokens, which attend to each other in place of the block; the last layer only
    makes keys and values (and queries, by which it would select)."""
    dim, rows, whole = sizes.dim, tokens + compressed, sizes.layers - 1
    attention = _attend(tokens, context, dim, itemsize)
    if compressed:
        attention += _attend(compressed, context - tokens + compressed, dim, itemsize)
    return PassWork(
        _layer_linear(sizes, rows, itemsize) * whole
        + _matmul(rows, dim, dim, itemsize) * 3
        + _matmul(tokens, LATENT_CHANNELS * PATCH * PATCH, dim, itemsize)
        + _time_linear(sizes, itemsize),
        attention * whole,
        _attend(rows, text, dim, itemsize) * whole,
    )


def _layer_linear(sizes: WanSizes, rows: int, itemsize: int) -> Work:
    """q, k, v, o of self-attention, q, o of cross-attention, and the feed-forward layer's two."""
    dim, ffn = sizes.dim, sizes.ffn_dim
    return _matmul(rows, dim, dim, itemsize) * 6 + _matmul(rows, dim, ffn, itemsize) + _matmul(rows, ffn, dim, itemsize)


def _time_linear(sizes: WanSizes, itemsize: int) -> Work:
    dim = sizes.dim
    return (
        _matmul(1, sizes.freq_dim, dim, itemsize)
        + _matmul(1, dim, dim, itemsize)
        + _matmul(1, dim, MODULATIONS * dim, itemsize)
    )


def attended_tokens(layout: Layout, block: int) -> int:
    """Keys that block `block` attends to, itself included: `layout.context_tokens` once the cache is full."""
    history = layout.config.partition(block)
    full = len(history.sink) + len(history.recent) + 1
    mids = layout.config.attended_mids(block)
    return full * layout.tokens_per_block + mids * layout.compressed_tokens_per_block


@cache
def vae_flop(dim: int, layout: Layout) -> tuple[int, int]:
    """FLOP of decoding a block after the video's first, and of encoding its pooled frames (the compressor's LR branch).

    Counted by running the VAE on tensors without data.
    """
    size, config = layout.size, layout.config
    with torch.device("meta"):
        vae = WanVAE(dim).requires_grad_(False)
        latents = torch.empty(1, LATENT_CHANNELS, config.block_frames, size.latent_height, size.latent_width)
        frames = torch.empty(1, 3, VAE_TIME_STRIDE * config.block_frames, size.height, size.width)
    decoder = StreamingDecoder(vae)
    decoder.decode(latents)
    decode = _counted(lambda: decoder.decode(latents))
    return decode, _counted(lambda: lr_latents(frames, vae, layout.temporal_stride)) if config.top_k else 0


def _counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


# ---------------------------------------------------------------------- rates of this machine


@dataclass(frozen=True)
class Rates:
    """FLOP or bytes a second that this machine reaches on the model's own shapes.

    Attributes:
        gemm: the linear layers, in the model's dtype or in fp8.
        vae_gemm: large square matrix products in the VAE's dtype, which stand for its convolutions; 0 without a VAE.
        attention, cross_attention: SDPA on the context and on the prompt.
        copy: bytes read plus bytes written a second, device to device.
        host_copy: bytes a second from pinned host memory to the device; equal to `copy` on the CPU.
    """

    gemm: float
    vae_gemm: float
    attention: float
    cross_attention: float
    copy: float
    host_copy: float


def best_of(first: Rates, second: Rates) -> Rates:
    """The better of two measurements, rate by rate: a floor is what the machine can do, not what it did just then."""
    return Rates(*map(max, astuple(first), astuple(second)))


def measure_rates(
    sizes: WanSizes,
    layout: Layout,
    text: int,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None,
    repeats: int,
    fp8: bool = False,
    attend: Attention = fast_attention,
) -> Rates:
    """Measures this machine; takes seconds, and on a CPU uses only as many rows as show the rate.

    With `fp8`, `gemm` is the rate of fp8 products, without the rounding of what is multiplied. `attend` is the model's
    attention function.
    """
    tokens, context = layout.tokens_per_block, layout.context_tokens

    def rows(flop_per_row: int) -> int:
        return tokens if device.type == "cuda" else max(1, min(tokens, int(CPU_FLOP_PER_CALL / flop_per_row)))

    def times(rows: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        if not fp8:
            return lambda: F.linear(rows, weight)
        factors = *rounded(rows), *rounded(weight)
        return lambda: product(*factors, None)

    def gemm() -> float:
        count = rows(2 * sizes.dim * sizes.ffn_dim)
        up = torch.randn(sizes.ffn_dim, sizes.dim, device=device, dtype=dtype)
        square = torch.randn(sizes.dim, sizes.dim, device=device, dtype=dtype)
        wide = torch.randn(count, sizes.dim, device=device, dtype=dtype)
        tall = torch.randn(count, sizes.ffn_dim, device=device, dtype=dtype)
        down = up.T.contiguous()
        # The layer's own mixture: six square products, one up, one down.
        ms = 6 * best_ms(times(wide, square), device, repeats)
        ms += best_ms(times(wide, up), device, repeats)
        ms += best_ms(times(tall, down), device, repeats)
        return 1000 * _layer_linear(sizes, count, dtype.itemsize).flop / ms

    def large_gemm(dtype: torch.dtype) -> float:
        side = SQUARE[device.type]
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return 1000 * 2 * side**3 / best_ms(lambda: a @ b, device, repeats)

    def attention(keys: int) -> float:
        count = rows(4 * keys * sizes.dim)
        q, k, v = (
            torch.randn(1, length, sizes.heads, sizes.dim // sizes.heads, device=device, dtype=dtype)
            for length in (count, keys, keys)
        )
        ms = best_ms(lambda: attend(q, k, v), device, repeats)
        return 1000 * _attend(count, keys, sizes.dim, dtype.itemsize).flop / ms

    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * 1000 * source.nbytes / best_ms(lambda: target.copy_(source), device, repeats)
    return Rates(
        gemm=gemm(),
        vae_gemm=large_gemm(vae_dtype) if vae_dtype is not None else 0.0,
        attention=attention(context),
        cross_attention=attention(text),
        copy=copy,
        host_copy=_host_copy_rate(target, repeats) if device.type == "cuda" else copy,
    )


def _host_copy_rate(target: Tensor, repeats: int) -> float:
    host = torch.ones(target.shape, dtype=target.dtype, pin_memory=True)
    return 1000 * host.nbytes / best_ms(lambda: target.copy_(host, non_blocking=True), target.device, repeats)


# ---------------------------------------------------------------------- floors


def pass_ms(work: PassWork, rates: Rates) -> float:
    """Milliseconds of one pass at these rates."""
    kinds = (
        (work.linear, rates.gemm),
        (work.attention, rates.attention),
        (work.cross_attention, rates.cross_attention),
    )
    return sum(_floor_ms(kind, rate, rates.copy) for kind, rate in kinds)


def _floor_ms(work: Work, rate: float, copy: float) -> float:
    return 1000 * max(work.flop / rate, work.bytes / copy)


def stage_floors(
    sizes: WanSizes,
    layout: Layout,
    steps: int,
    text: int,
    itemsize: int,
    vae_dim: int | None,
    rates: Rates,
    block: int,
    slots_written: float,
    archive_on_host: bool,
) -> dict[str, float]:
    """Floors (ms) of the stages that have one, for one block at index `block`.

    Args:
        vae_dim: width of the VAE; None without one.
        slots_written: (layer, mid slot) pairs that a block has to fill, by the record.
        archive_on_host: whether they come over the bus.
    """
    tokens, context = layout.tokens_per_block, attended_tokens(layout, block)
    compressed = layout.compressed_tokens_per_block if layout.config.becomes_mid(block) else 0
    floors = {
        "denoise": steps * pass_ms(denoise_work(sizes, tokens, context, text, itemsize), rates),
        "clean_pass": pass_ms(clean_work(sizes, tokens, compressed, context, text, itemsize), rates),
    }
    slot_bytes = compressed * 2 * sizes.dim * itemsize
    # Out: read and written on the device, or once over the bus. In: every layer of the block that ends.
    moved = (slots_written + (sizes.layers if compressed else 0)) * slot_bytes
    floors["selection"] = 1000 * (moved / rates.host_copy if archive_on_host else 2 * moved / rates.copy)
    if vae_dim is not None:
        decode, encode = vae_flop(vae_dim, layout)
        floors["decode"] = 1000 * decode / rates.vae_gemm
        if compressed:
            patches = _matmul(compressed, LATENT_CHANNELS * PATCH * PATCH, sizes.dim, itemsize)
            floors["compression"] = 1000 * (encode / rates.vae_gemm + patches.flop / rates.gemm)
    return floors
