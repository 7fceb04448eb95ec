"""Self-forcing: the generator makes a video by itself, over the cache of inference, and gradients flow through it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from ..cache.gradients import GradientCache
from ..config import LATENT_CHANNELS, Layout
from ..devices import to_device
from ..generate.schedule import denoising_step, even_schedule, predicted_x0
from ..model.causal_wan import TextKV
from ..model.compressor import Compressor, HRBranch
from ..model.vae import StreamingDecoder, WanVAE
from .forcing_batch import Batch, ForcingOptions
from .networks import Networks, frozen


class NoiseSource:
    """Noise of the videos of a batch, block after block: [B, 16, T, h, w], each sample's from its own seed."""

    def __init__(self, seeds: Sequence[int], layout: Layout, device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = layout.size
        self._shape = (LATENT_CHANNELS, layout.config.block_frames, size.latent_height, size.latent_width)
        self._device = device

    def next(self) -> Tensor:
        return to_device(torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]), self._device)


class SelfRollout:
    """Makes the generator's videos, under a partition of the history (`layout`)."""

    def __init__(self, networks: Networks, hr: HRBranch, vae: WanVAE, layout: Layout, options: ForcingOptions) -> None:
        self.networks = networks
        self.hr = hr
        self.vae = vae
        self.layout = layout
        self.options = options

    def video(self, batch: Batch) -> Tensor:
        """Videos [B, 16, T, h, w]. If gradients are on, the blocks in `batch.gradient` have one.

        A block's gradient is that of its last denoising pass. The history is a constant for the generator.
        """
        networks, layout = self.networks, self.layout
        with_gradient = torch.is_grad_enabled()
        noise = NoiseSource(batch.seeds, layout, networks.device)
        cache = GradientCache(layout, networks.shape, networks.device, networks.cache_dtype, batch=len(batch.seeds))
        decoder = StreamingDecoder(self.vae)
        text = networks.call("generator", lambda: networks.wans["generator"].embed_text(batch.context))
        constant_text = TextKV(tuple((keys.detach(), values.detach()) for keys, values in text.layers))
        steps = even_schedule(self.options.steps, self.options.shift).steps(1)
        blocks = []
        for i in range(self.options.blocks):
            cache.begin(i)
            x = noise.next()
            with torch.no_grad():
                for step in steps[: batch.exit_step]:
                    velocity = networks.denoise("generator", x, step.sigma, constant_text, cache)
                    x = denoising_step(x, velocity, step, "few-step", noise.next)
            sigma = steps[batch.exit_step].sigma
            with torch.set_grad_enabled(with_gradient and i in batch.gradient):
                x0 = predicted_x0(x, networks.denoise("generator", x, sigma, text, cache), sigma)
            blocks.append(x0)
            if i + 1 == self.options.blocks:
                break
            self._clean_pass(i, x0.detach(), constant_text, cache, decoder, with_gradient)
            cache.end()
        return torch.cat(blocks, dim=2)

    def _clean_pass(
        self, block: int, x0: Tensor, text: TextKV, cache: GradientCache, decoder: StreamingDecoder, with_gradient: bool
    ) -> None:
        """The clean pass over a finished block [B, 16, T, h, w]; only HR gets a gradient through it."""
        wan = self.networks.wans["generator"]
        with torch.no_grad():
            frames = decoder.decode(x0)
        compressed = self._compressed(x0, frames) if self.layout.config.becomes_mid(block) else None
        with frozen(self.networks.modules["generator"], with_gradient):
            self.networks.call("generator", partial(wan.clean_pass, x0, text, cache, compressed))

    def _compressed(self, latents: Tensor, frames: Tensor) -> Tensor:
        """The compressor's tokens [B, N_c, d] of a finished block, with a gradient for HR only."""
        wan = self.networks.wans["generator"]
        lr_only = Compressor(self.layout.temporal_stride)
        with torch.no_grad():
            lr = self.networks.call(
                "generator", lambda: lr_only(latents, frames, self.layout, self.vae, wan.patch_tokens)
            )
        return lr + rearrange(self.hr(latents), "b d t h w -> b (t h w) d")
