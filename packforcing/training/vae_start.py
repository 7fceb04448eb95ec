"""The weights that training of a VAE begins with: it starts out with the mean colours of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.vae import LATENT_CHANNELS, Downsample, Upsample, WanVAE

COLOURS = range(3)  # channels that carry red, green and blue
ONE = 3  # the channel that carries a constant 1


@torch.no_grad()
def start_from_averages(vae: WanVAE) -> None:
    """Make a random VAE one whose latents begin with the mean colour of each 8x8 patch, frame by frame.

    From random weights, a deep, narrow, normalised network takes thousands of steps to learn as much as "the sky is
    blue". So three things are set:

    - The residual branches begin small.
    - The path around them carries red, green, blue and a constant 1 in channels 0 to 3. The other channels are random.
    - The norm and SiLU before each of the two last convolutions would lose a colour's size and sign. So they are given
      x, -x and the 1: silu(x) - silu(-x) = x, and beside the 1 a norm still tells dark from bright.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            _start_layer(name, layer)
    for layer in (vae.encoder.conv1, vae.decoder.conv1):
        _carry_colours(layer)
        layer.weight[ONE] = 0
        _bias(layer)[ONE] = 1

    narrowest = [layer for layer in vae.encoder.downsamples if isinstance(layer, Downsample)][-1].resample[1]
    widest = [layer for layer in vae.decoder.upsamples if isinstance(layer, Upsample)][-1].resample[1]
    encoder_last, decoder_last = vae.encoder.head[2], vae.decoder.head[2]
    for before, last in ((narrowest, encoder_last), (widest, decoder_last)):
        before_weight = _conv(before).weight
        before_weight[4:7] = -before_weight[:3]
        _carry_colours(_conv(last), minus=4)
    for layer in (vae.conv1, vae.conv2):
        layer.weight[:, :, 0, 0, 0] = torch.eye(layer.in_channels)
    moments = _conv(encoder_last).weight
    moments[3:LATENT_CHANNELS] *= 2
    moments[LATENT_CHANNELS:] *= 0.1
    _bias(vae.conv1)[LATENT_CHANNELS:] = -6  # a posterior's noise much smaller than what it is added to


def _start_layer(name: str, layer: nn.Conv2d | nn.Conv3d) -> None:
    """Sets one convolution, by its name in the VAE."""
    slope = torch.tensor([0.25, 0.5, 0.25])
    weight, identity = layer.weight, torch.eye(layer.in_channels, device=layer.weight.device)
    _bias(layer).zero_()
    if name.endswith("time_conv"):  # repeats frames, or takes every second one
        weight.zero_()
        weight[:, :, -1, 0, 0] = identity.repeat(layer.out_channels // layer.in_channels, 1)
    elif layer.kernel_size == (3, 3, 3):  # sees the present frame only
        weight[:, :, :-1] = 0
        weight *= 3**0.5
    if name.endswith(("residual.6", "proj")):
        weight *= 0.1
    elif name.endswith("shortcut"):
        weight[: layer.in_channels, :, 0, 0, 0] = identity
    elif name.endswith("resample.1"):
        weight[: ONE + 1] = 0
        for channel in (*COLOURS, ONE):
            if "downsamples" in name:
                weight[channel, channel, :2, :2] = 1 / 4
            else:  # from one cell to the next without a step
                weight[channel, channel] = slope[:, None] * slope


def _carry_colours(layer: nn.Conv2d | nn.Conv3d, minus: int | None = None) -> None:
    """Let a layer's first channels be its input's, less those that start at `minus`."""
    for channel in COLOURS:
        layer.weight[channel] = 0
        layer.weight[channel, channel, -1, 1, 1] = 1
        if minus is not None:
            layer.weight[channel, minus + channel, -1, 1, 1] = -1


def _conv(layer: nn.Module) -> nn.Conv2d | nn.Conv3d:
    """The same layer, for the type checker."""
    assert isinstance(layer, nn.Conv2d | nn.Conv3d)
    return layer


def _bias(layer: nn.Conv2d | nn.Conv3d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
