"""What a block takes, by count: floating-point operations and bytes, as formulas of the sizes.

See docs/method.md, section 9. Tests compare these counts with PyTorch's own FLOP counter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import LATENT_CHANNELS, PATCH, VAE_TIME_STRIDE, Layout
from ..model.compressor import lr_latents
from ..model.vae import StreamingDecoder, WanVAE
from ..model.wan_modules import MODULATIONS, WanSizes


@dataclass(frozen=True)
class Workload:
    """What is made, in which types, and where: all that counts and rates depend on."""

    sizes: WanSizes  # of the transformer
    layout: Layout
    steps: int  # denoising steps a block
    text_tokens: int  # tokens of the prompt
    device: torch.device
    dtype: torch.dtype  # the transformer's
    vae_dim: int | None = None  # width of the VAE; None without one
    fp8: bool = False  # whether linear layers multiply in fp8
    streamed_bytes: int = 0  # of weights that each pass reads from host memory


@dataclass(frozen=True)
class Work:
    """An amount of work."""

    flop: int = 0  # floating-point operations; a multiplication and an addition are two
    bytes: int = 0  # that must be moved

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.flop * times, self.bytes * times)


@dataclass(frozen=True)
class PassWork:
    """One pass of the transformer, by kind."""

    linear: Work  # linear layers
    attention: Work  # self-attention
    cross_attention: Work  # attention to the prompt


# ---------------------------------------------------------------------- passes of the transformer


def denoise_work(sizes: WanSizes, tokens: int, context: int, text: int, itemsize: int) -> PassWork:
    """A denoising pass of one block.

    Args:
        tokens: the block's tokens N.
        context: keys that they attend to, their own included.
        text: tokens of the prompt, whose keys and values are made once a run.
        itemsize: bytes of a value.
    """
    layer = layer_linear(sizes, tokens, itemsize)
    patch = LATENT_CHANNELS * PATCH * PATCH
    return PassWork(
        layer * sizes.layers
        + matmul(tokens, patch, sizes.dim, itemsize)
        + matmul(tokens, sizes.dim, patch, itemsize)
        + _time_linear(sizes, itemsize),
        attend(tokens, context, sizes.dim, itemsize) * sizes.layers,
        attend(tokens, text, sizes.dim, itemsize) * sizes.layers,
    )


def clean_work(sizes: WanSizes, tokens: int, compressed: int, context: int, text: int, itemsize: int) -> PassWork:
    """The clean pass of one block.

    The compressed tokens share the linear layers with the block's tokens, and attend to each other in place of the
    block. The last layer makes queries, keys and values only.

    Args:
        compressed: compressed tokens N_c that go along; 0 without.
        tokens, context, text, itemsize: those of `denoise_work`.
    """
    dim, rows, whole = sizes.dim, tokens + compressed, sizes.layers - 1
    attention = attend(tokens, context, dim, itemsize)
    if compressed:
        attention += attend(compressed, context - tokens + compressed, dim, itemsize)
    return PassWork(
        layer_linear(sizes, rows, itemsize) * whole
        + matmul(rows, dim, dim, itemsize) * 3
        + matmul(tokens, LATENT_CHANNELS * PATCH * PATCH, dim, itemsize)
        + _time_linear(sizes, itemsize),
        attention * whole,
        attend(rows, text, dim, itemsize) * whole,
    )


def matmul(rows: int, inner: int, columns: int, itemsize: int) -> Work:
    """The product of a matrix [rows, inner] and a matrix [inner, columns]."""
    return Work(2 * rows * inner * columns, itemsize * (rows * inner + inner * columns + rows * columns))


def attend(queries: int, keys: int, dim: int, itemsize: int) -> Work:
    """Attention of all heads, which are `dim` wide together: scores and weighted sums.

    It reads queries, keys and values, and writes as much as there are queries.
    """
    return Work(4 * queries * keys * dim, itemsize * dim * 2 * (queries + keys))


def layer_linear(sizes: WanSizes, rows: int, itemsize: int) -> Work:
    """The linear layers of one layer: q, k, v, o of self-attention, q, o of cross-attention, and two feed-forward."""
    dim, ffn = sizes.dim, sizes.ffn_dim
    return matmul(rows, dim, dim, itemsize) * 6 + matmul(rows, dim, ffn, itemsize) + matmul(rows, ffn, dim, itemsize)


def _time_linear(sizes: WanSizes, itemsize: int) -> Work:
    """The embedding of the noise level, once a pass."""
    dim = sizes.dim
    return (
        matmul(1, sizes.freq_dim, dim, itemsize)
        + matmul(1, dim, dim, itemsize)
        + matmul(1, dim, MODULATIONS * dim, itemsize)
    )


def attended_tokens(layout: Layout, block: int) -> int:
    """Keys that block `block` attends to, its own included: `layout.context_tokens` once the cache is full."""
    history = layout.config.partition(block)
    full = len(history.sink) + len(history.recent) + 1
    mids = layout.config.attended_mids(block)
    return full * layout.tokens_per_block + mids * layout.compressed_tokens_per_block


# ---------------------------------------------------------------------- the VAE


@cache
def vae_flop(dim: int, layout: Layout) -> tuple[int, int]:
    """FLOP of decoding a block, and of encoding its pooled frames (the compressor's LR branch; 0 without mid blocks).

    The block is not the first of a video, which has fewer frames. Counted by running a VAE of width `dim` on tensors
    without data.
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
