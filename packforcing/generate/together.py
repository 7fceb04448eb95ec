"""One video by several processes: what only the main one makes, and the others are given.

The transformer's work is shared (`model.tensor_parallel`). The VAE is the main process's alone: it decodes, beside the
denoising of all, and makes the compressed form of a block from its pixels. The others get the finished tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import LATENT_CHANNELS, FrameSize, Layout
from ..model.causal_wan import CausalWan
from ..model.compressor import Compressor
from ..model.vae import WanVAE
from ..processes import from_main, is_main
from .prepare import PlannedRun
from .start import Start


class SharedCompressor(Compressor):
    """A compressor of which the main process runs the networks and sends the tokens to the others.

    Args:
        own: the compressor; in the other processes only its name and its kind count.
        wan: the model of the run.
    """

    def __init__(self, own: Compressor, wan: CausalWan) -> None:
        super().__init__(own.temporal_stride, name=own.name)
        self.direct = own.direct
        self.needs_vae = own.needs_vae and is_main()
        self.decoded_elsewhere = not is_main()
        self.own = own if is_main() else None
        self._dim, self._dtype, self._device = wan.shape.dim, wan.dtype, wan.device

    def forward(
        self,
        latents: Tensor,
        frames: Tensor | None,
        layout: Layout,
        vae: WanVAE | None,
        patch_tokens: Callable[[Tensor], Tensor],
        frames_per_pass: int | None = None,
    ) -> Tensor:
        """Hidden tokens [B, N_c, d] of a block, in every process; only the main one needs its frames and the VAE."""
        if self.own is not None:
            tokens = self.own(latents, frames, layout, vae, patch_tokens, frames_per_pass).to(self._dtype).contiguous()
        else:
            shape = (len(latents), layout.compressed_tokens_per_block, self._dim)
            tokens = torch.empty(shape, dtype=self._dtype, device=self._device)
        dist.broadcast(tokens, src=0)
        return tokens


def shared_start(start: Start | None, size: FrameSize, device: torch.device) -> Start | None:
    """A start whose latents the main process encodes or reads, and sends to the others."""
    if start is None:
        return None
    own = start.latents

    def latents(vae: WanVAE | None) -> Tensor:
        shape = (1, LATENT_CHANNELS, start.frames, size.latent_height, size.latent_width)
        found = own(vae).to(device, torch.float32).contiguous() if is_main() else torch.empty(shape, device=device)
        dist.broadcast(found, src=0)
        return found

    return replace(start, latents=latents)


def as_main_decodes(planned: PlannedRun) -> PlannedRun:
    """A planned run, where the blocks reach the compressor as late as the main process has decoded them."""
    overlap = from_main(lambda: planned.settings.overlap)
    return replace(planned, settings=replace(planned.settings, overlap=overlap))
