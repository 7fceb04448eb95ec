"""The scale of a VAE's latents: how it is measured, and how it becomes what Wan's convention wants.

A diffusion model wants a latent space of a known scale. Wan's convention is fixed: `vae.normalise` subtracts 16
constant means and divides by 16 constant deviations. So after training, one affine map for each channel is put into the
1x1x1 convolutions on both sides of the latents (`absorb_scale`). The pictures stay exactly the same. Normalised latents
then have mean 0. Their standard deviation is 1 where a channel shows in the pictures, and less where it hardly does
(`LatentStatistics.loudness`).

A channel that the KL term has emptied is not scaled up but made constant: it is 0 after `normalise`, and the decoder
does not read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.vae import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, WanVAE

QUIETEST = 0.15  # standard deviation of a normalised latent channel that hardly shows


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of the raw mean latents over a set of clips, by channel; float64."""

    mean: Tensor  # [16]
    std: Tensor  # [16]
    noise: Tensor  # [16], root mean posterior variance: how loud the encoder's own noise is
    visible: Tensor  # [16], root mean square change of the pixels when a channel is disturbed by a share of its std

    @property
    def informative(self) -> Tensor:
        """Which channels [16] vary by more than a tenth of their own noise; the others carry nothing."""
        return self.std > 0.1 * self.noise

    @property
    def loudness(self) -> Tensor:
        """Standard deviations [16] that normalised latents get: by how much a channel shows in the pictures.

        Three channels carry the colours of 8x8 patches. Thirteen carry the fine detail of edges, which moves pixels ten
        times less. If all had the same deviation, four fifths of a diffusion model's loss would be detail. And the
        model would have to decide on detail at the same noise levels as on what the picture shows.
        """
        return (2 * self.visible / self.visible.max()).clamp(QUIETEST, 1)


@torch.no_grad()
def visibility(vae: WanVAE, mean: Tensor, std: Tensor, share: float = 0.3) -> Tensor:
    """Mean square change [16] of the decoded pixels when one channel is disturbed by noise.

    Args:
        vae: decodes.
        mean: latents [1, 16, T, h, w].
        std: standard deviation of each channel, [16].
        share: the noise's standard deviation, as a part of the channel's.
    """
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
    pixels = vae.decode(mean)
    changes = []
    for channel in range(LATENT_CHANNELS):
        disturbed = mean.clone()
        disturbed[:, channel] += share * float(std[channel]) * noise[:, channel]
        changes.append((vae.decode(disturbed) - pixels).double().square().mean().cpu())
    return torch.stack(changes)


@torch.no_grad()
def latent_statistics(vae: WanVAE, clips: Iterable[Tensor], disturbed: int = 2) -> LatentStatistics:
    """Statistics over clips [1, 3, F, H, W]; visibility is measured on the first `disturbed` of them."""
    sums = torch.zeros(3, LATENT_CHANNELS, dtype=torch.float64)
    count = 0
    kept = []
    for number, clip in enumerate(clips):
        encoded = vae.encode(clip.to(vae.device, vae.dtype))
        if number < disturbed:
            kept.append(encoded[0])
        mean, log_variance = (m.double().cpu() for m in encoded)
        axes = (0, 2, 3, 4)
        sums += torch.stack([mean.sum(axes), mean.square().sum(axes), log_variance.exp().sum(axes)])
        count += mean[:, 0].numel()
    mean, square, variance = sums / count
    std = (square - mean.square()).clamp_min(0).sqrt()
    visible = torch.stack([visibility(vae, latents, std) for latents in kept]).mean(dim=0).sqrt()
    return LatentStatistics(mean, std, variance.sqrt(), visible)


@torch.no_grad()
def absorb_scale(vae: WanVAE, statistics: LatentStatistics) -> None:
    """Gives the raw latents Wan's mean, and Wan's std times their loudness. The pictures stay as they are.

    On both sides of the latents is a 1x1x1 convolution, and nothing between. So the map m -> a m + b goes into the
    encoder's convolution, and its inverse into the decoder's. An uninformative channel becomes constant, Wan's mean.
    What its mean gave to the pictures goes into the decoder's bias.
    """
    wan_mean = torch.tensor(LATENT_MEAN, dtype=torch.float64)
    wan_std = torch.tensor(LATENT_STD, dtype=torch.float64)
    alive = statistics.informative
    scale = torch.where(
        alive, wan_std * statistics.loudness / statistics.std.clamp_min(1e-12), torch.zeros_like(wan_std)
    )
    # What the decoder must multiply a channel by, and what it must take for the channel's mean.
    inverse = torch.where(alive, 1 / scale.clamp_min(1e-12), torch.zeros_like(scale))

    outer, inner = vae.conv1, vae.conv2
    weight, bias = outer.weight.double().cpu(), _bias(outer).double().cpu()
    weight[:LATENT_CHANNELS] *= scale.view(-1, 1, 1, 1, 1)
    bias[:LATENT_CHANNELS] = wan_mean + scale * (bias[:LATENT_CHANNELS] - statistics.mean)
    # Log variances follow the scale; an emptied channel's own say nothing, and stay.
    bias[LATENT_CHANNELS:] += torch.where(alive, 2 * scale.clamp_min(1e-12).log(), torch.zeros_like(scale))
    outer.weight.copy_(weight)
    _bias(outer).copy_(bias)

    weight, bias = inner.weight.double().cpu(), _bias(inner).double().cpu()
    columns = weight[:, :, 0, 0, 0]
    # conv2(m) with m = mean + inverse * (m' - wan_mean)
    bias += columns @ (statistics.mean - inverse * wan_mean)
    weight *= inverse.view(1, -1, 1, 1, 1)
    inner.weight.copy_(weight)
    _bias(inner).copy_(bias)


def _bias(layer: nn.Conv3d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
