"""The latent convention of Wan 2.1: the VAE's own (raw) latents, and the diffusion model's normalised ones."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..config import LATENT_CHANNELS
from ..devices import to_device
from ..errors import PackForcingError

# Of each latent channel, over the videos that Wan 2.1 was trained on.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def normalise(raw: Tensor) -> Tensor:
    """The VAE's own latents [B, 16, T, h, w] -> the diffusion model's: mean 0 and variance 1 in each channel.

    Raises PackForcingError for another shape, as `denormalise` does.
    """
    mean, std = _latent_statistics(raw)
    return ((raw - mean) / std).to(raw.dtype)


def denormalise(z: Tensor) -> Tensor:
    """The inverse of `normalise`: the diffusion model's latents [B, 16, T, h, w] -> the VAE's own."""
    mean, std = _latent_statistics(z)
    return (z * std + mean).to(z.dtype)


def _latent_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [16, 1, 1, 1]; in float32, so that half-precision latents are rounded only once."""
    if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS:
        raise PackForcingError(
            f"Wan 2.1 latents have the shape [batch, {LATENT_CHANNELS}, frames, height, width], but these "
            f"are {list(latents.shape)}; pass video latents made for a Wan 2.1 model."
        )
    statistics = to_device(torch.tensor([LATENT_MEAN, LATENT_STD]), latents.device)
    mean, std = rearrange(statistics, "two c -> two c 1 1 1")
    return mean, std
