"""Frames estimated from latents, pixel by pixel, by one or two small matrices: for previews, which wait for no VAE.

The map takes the 16 numbers of a latent pixel to the mean colour of what it stands for: 8x8 pixels of four frames. So a
latent frame becomes one small frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import LATENT_CHANNELS, VAE_SPACE_STRIDE, VAE_TIME_STRIDE

COLOURS = 3
BATCH = 4096  # latent pixels a step
RATE = 3e-3


@dataclass(frozen=True)
class LatentPreview:
    """A map from normalised latents to colours in [-1, 1]: linear layers with ReLU between, float32.

    Attributes:
        layers: weight [out, in] and bias [out] of each; the first takes 16 numbers, the last gives 3.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    def colours(self, pixels: Tensor) -> Tensor:
        """Latent pixels [..., 16] -> colours [..., 3], not clamped."""
        for number, (weight, bias) in enumerate(self.layers):
            pixels = F.linear(F.relu(pixels) if number else pixels, weight.to(pixels.device), bias.to(pixels.device))
        return pixels

    def frames(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, T, h, w] -> frames [B, 3, T, h, w] in [-1, 1], float32 on the latents' device."""
        found = self.colours(latents.float().movedim(1, -1))
        return found.movedim(-1, 1).clamp(-1, 1)


def mean_colours(frames: Tensor) -> Tensor:
    """A clip's frames [B, 3, 1 + 4k, H, W], averaged over what a latent pixel stands for: [B, 3, k, H/8, W/8].

    The first frame, for which a latent frame stands alone, is left out.
    """
    return F.avg_pool3d(frames[:, :, 1:].float(), (VAE_TIME_STRIDE, VAE_SPACE_STRIDE, VAE_SPACE_STRIDE))


def fitted(
    latents: Sequence[Tensor], frames: Sequence[Tensor], hidden: int, steps: int, seed: int = 0
) -> LatentPreview:
    """A map with one hidden layer and a small mean distance from the true colours, by Adam.

    Args:
        latents: of clips, normalised, [B, 16, 1 + k, h, w].
        frames: their frames [B, 3, 1 + 4k, 8h, 8w] in [-1, 1].
        hidden: width of the hidden layer.
    """
    given = torch.cat([rearrange(x[:, :, 1:], "b c t h w -> (b t h w) c") for x in latents]).float()
    wanted = torch.cat([rearrange(mean_colours(x), "b c t h w -> (b t h w) c") for x in frames])
    generator = torch.Generator().manual_seed(seed)
    sizes = ((hidden, LATENT_CHANNELS), (COLOURS, hidden))
    layers = tuple(
        (
            (torch.randn(size, generator=generator) / size[1] ** 0.5).requires_grad_(),
            torch.zeros(size[0]).requires_grad_(),
        )
        for size in sizes
    )
    preview = LatentPreview(layers)
    optimizer = torch.optim.Adam([tensor for layer in layers for tensor in layer], RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        some = torch.randint(len(given), (BATCH,), generator=generator)
        optimizer.zero_grad()
        (preview.colours(given[some]) - wanted[some]).abs().mean().backward()
        optimizer.step()
        schedule.step()
    return LatentPreview(tuple((weight.detach(), bias.detach()) for weight, bias in layers))


def levels_off(preview: LatentPreview, latents: Tensor, frames: Tensor) -> float:
    """Mean distance of a preview from a clip's true mean colours, in levels of 255. Shapes are those of `fitted`."""
    return 127.5 * (preview.frames(latents[:, :, 1:]) - mean_colours(frames)).abs().mean().item()


# ---------------------------------------------------------------------- its file


def as_tensors(preview: LatentPreview) -> dict[str, Tensor]:
    """The tensors of a file, under the names that `from_tensors` reads."""
    named = [{f"{i}.weight": weight, f"{i}.bias": bias} for i, (weight, bias) in enumerate(preview.layers)]
    return {name: tensor for layer in named for name, tensor in layer.items()}


def from_tensors(tensors: dict[str, Tensor]) -> LatentPreview:
    count = len(tensors) // 2
    return LatentPreview(tuple((tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in range(count)))
