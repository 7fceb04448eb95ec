"""Distribution matching distillation (DMD): the losses of critic and generator on the generator's own videos.

Critic and teacher both predict the clean video from the same noisy one. The critic has learnt what the generator makes,
the teacher what real videos are like. The difference of the two predictions says in which direction a video must change
to become more like a real one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.gradients import GradientCache
from ..config import CacheConfig, Layout
from ..devices import to_device
from .blocks import levels_like
from .forcing_batch import Batch
from .networks import Networks


class DMDLosses:
    """The losses on whole videos, each of which critic and teacher see as one block.

    Args:
        networks: critic and teacher among them.
        layout: of the whole video as one block, see `one_block`.
        empty: the encoded empty prompt [L, 4096], which guidance leads away from.
        guidance: classifier-free guidance of the teacher; 1 is off.
    """

    def __init__(self, networks: Networks, layout: Layout, empty: Tensor, guidance: float) -> None:
        self.networks = networks
        self.layout = layout
        self.empty = empty
        self.guidance = guidance

    def velocity(self, name: str, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """A network's velocity of whole noisy videos [B, 16, T, h, w], whose frames all see each other."""
        networks = self.networks
        wan = networks.wans[name]
        cache = GradientCache(self.layout, networks.shape, networks.device, networks.cache_dtype, batch=len(x))
        cache.begin(0)
        return networks.call(name, lambda: wan.denoise(x, sigma, wan.embed_text(context), cache))

    def critic_loss(self, video: Tensor, batch: Batch) -> Tensor:
        """Flow matching on the generator's videos [B, 16, T, h, w], which are constants here."""
        noise = video_noise(batch, video)
        x = torch.lerp(video, noise, levels_like(batch.sigma, video))
        return F.mse_loss(self.velocity("critic", x, batch.sigma, batch.context), noise - video)

    def generator_losses(self, video: Tensor, batch: Batch) -> dict[str, Tensor]:
        """A loss whose gradient at the video is the normalised difference of the critic's x0 and the teacher's."""
        with self.networks.constant("critic"):
            noise = video_noise(batch, video)
            levels = levels_like(batch.sigma, video)
            x = torch.lerp(video, noise, levels)
            fake = x - levels * self.velocity("critic", x, batch.sigma, batch.context)
            real = x - levels * self._guided_velocity(x, batch)
            size = (video - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
            gradient = torch.nan_to_num((fake - real) / size.clamp_min(1e-6))
            target = video - gradient
        return {"loss": 0.5 * F.mse_loss(video, target), "gap": (fake - real).abs().mean(), "std": video.detach().std()}

    def _guided_velocity(self, x: Tensor, batch: Batch) -> Tensor:
        """The teacher's velocity [B, 16, T, h, w], with classifier-free guidance."""
        conditional = self.velocity("teacher", x, batch.sigma, batch.context)
        if self.guidance == 1:
            return conditional
        empty = to_device(self.empty, self.networks.device).expand(len(x), -1, -1)
        unconditional = self.velocity("teacher", x, batch.sigma, empty)
        return unconditional + self.guidance * (conditional - unconditional)


def one_block(layout: Layout, blocks: int) -> Layout:
    """The layout of a video of so many blocks as a single block, without any history."""
    config = CacheConfig(blocks * layout.config.block_frames, sink_frames=0, recent_frames=0, top_k=0)
    return Layout(config, layout.size, layout.temporal_stride)


def video_noise(batch: Batch, video: Tensor) -> Tensor:
    """Noise [B, 16, T, h, w] for whole videos; each sample has a seed of its own, and another than its rollout's."""
    noises = [
        torch.randn(video.shape[1:], generator=torch.Generator().manual_seed((seed + 1) % 2**63))
        for seed in batch.seeds
    ]
    return to_device(torch.stack(noises), video.device, video.dtype)
