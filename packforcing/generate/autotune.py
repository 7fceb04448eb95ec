"""Which attention kernel, and which memory format of the VAE, is fastest. A GPU tries them once, before a run.

On a CPU the answers are known (docs/performance.md), and nothing is tried.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..config import LATENT_CHANNELS, FrameSize, Layout, ModelShape
from ..model.attention import BACKENDS, Attention, fast_attention, sdpa, sdpa_by
from ..model.vae import StreamingDecoder, WanVAE
from ..model.vae_convolutions import takes_onednn

TRIES = 3
WORTH = 1.05  # another way must be this many times as fast as the usual one; less is the noise of three tries


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes: the shortest of a few tries after one to warm up. The device is idle before each."""
    taken = []
    for _ in range(1 + TRIES):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def fastest(ways: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """Name of the fastest of several ways. The first one is the usual way: it must work, and it wins unless another is
    clearly faster.

    A way that fails on this device (no such kernel, not enough memory) is passed over.
    """
    usual, *others = ways
    best, shortest = usual, seconds(ways[usual], device) / WORTH
    for name in others:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's reasons why it has no such kernel
                taken = seconds(ways[name], device)
        except RuntimeError:
            continue
        if taken < shortest:
            best, shortest = name, taken
    return best


class TunedAttention:
    """Attention with the fastest kernel for one shape: a block's queries over a full context.

    Nearly all of a long video's time goes there. The first blocks and the prompt have other shapes, and PyTorch chooses
    their kernels.

    Attributes:
        backend: name of that kernel, one of BACKENDS or "default".
    """

    def __init__(self, backend: str, queries: int, keys: int) -> None:
        self.backend = backend
        self._shape = queries, keys
        self._tuned = sdpa if backend == "default" else sdpa_by(backend)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tuned = (queries.shape[1], keys.shape[1]) == self._shape
        return (self._tuned if tuned else sdpa)(queries, keys, values)


def tuned_attention(model: ModelShape, layout: Layout, device: torch.device, dtype: torch.dtype) -> Attention:
    """The attention function for a run: on a GPU the one that `tried_attention` finds."""
    return tried_attention(model, layout, device, dtype) if device.type == "cuda" else fast_attention


def tried_attention(model: ModelShape, layout: Layout, device: torch.device, dtype: torch.dtype) -> TunedAttention:
    """The fastest of PyTorch's kernels for a run's shapes; takes a second."""
    lengths = layout.tokens_per_block, layout.context_tokens
    q, k, v = (
        torch.randn(1, length, model.heads, model.head_dim, device=device, dtype=dtype)
        for length in (lengths[0], lengths[1], lengths[1])
    )
    ways = {"default": partial(sdpa, q, k, v)} | {name: partial(sdpa_by(name), q, k, v) for name in BACKENDS}
    return TunedAttention(fastest(ways, device), *lengths)


def tune_vae_layout(vae: WanVAE, size: FrameSize, room_to_copy: bool = True) -> bool:
    """Brings a VAE into the memory format in which its device decodes faster. Returns whether that is channels last.

    On a GPU both are tried, but without `room_to_copy`: in the plain format cuDNN copies what a convolution reads and
    writes. Elsewhere, and if the plain one is not clearly faster, it is the usual one.
    """
    if vae.device.type == "cuda" and room_to_copy:
        return try_vae_layouts(vae, size)
    return use_usual_vae_layout(vae)


def use_usual_vae_layout(vae: WanVAE) -> bool:
    """Brings a VAE into the memory format that is usual on its device. Returns whether that is channels last.

    It is on a GPU, and on a CPU in float32, for oneDNN (docs/performance.md).
    """
    last = vae.device.type == "cuda" or takes_onednn(vae.conv2.weight)
    vae.to_layout(last)
    return last


def try_vae_layouts(vae: WanVAE, size: FrameSize) -> bool:
    """The faster format on a GPU: decodes frames of a size in both, which takes a second."""

    def decode(channels_last: bool) -> None:
        vae.to_layout(channels_last)
        decoder = StreamingDecoder(vae)
        for _ in range(2):  # a video's first latent frame is another amount of work than those after it
            decoder.decode(latents)

    latents = torch.randn(1, LATENT_CHANNELS, 1, size.latent_height, size.latent_width, device=vae.device)
    last = fastest({"last": partial(decode, True), "plain": partial(decode, False)}, vae.device) == "last"
    vae.to_layout(last)
    return last
