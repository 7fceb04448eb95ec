"""Weights of the VAE: from a Wan 2.1 VAE's state dict, with its checks, or random."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from ..checks import shown
from ..errors import PackForcingError
from ..files.weights import check_floating
from .vae_modules import WanVAE
from .vae_norms import RMSNorm


def load_vae(
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> WanVAE:
    """A VAE of any width over the tensors of a Wan 2.1 VAE's state dict.

    The tensors are shared, not copied, except those that `dtype` or `device` changes. The VAE is frozen: its
    parameters take no gradients until `requires_grad_`. Raises `PackForcingError` if the state dict is not exactly
    that of a Wan 2.1 VAE.
    """
    _check_is_wan21(state_dict)
    with torch.device("meta"):
        vae = WanVAE(dim=state_dict["decoder.head.0.gamma"].numel())
    _check_tensors(state_dict, vae.state_dict())
    # Frozen before the tensors come in: they belong to the caller, and may be inference tensors.
    vae.requires_grad_(False)
    vae.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state_dict.items()}, assign=True)
    return vae.eval()


_WANTED = "connect a Wan 2.1 VAE (for example wan_2.1_vae.safetensors)"

# A key that the Wan 2.1 VAE lacks -> the kind of file that has it.
_RELATIVES = {
    "decoder.upsamples.0.upsamples.0.residual.2.weight": "the Wan 2.2 VAE (48 latent channels)",
    "decoder.22.bias": "a TAEHV / lightTAE preview VAE",
    "decoder.up_blocks.0.resnets.0.conv1.weight": "a VAE with diffusers' key names",
    "decoder.conv_in.weight": "an image VAE (Stable Diffusion or Flux family)",
    "decoder.conv_in.conv.weight": "another video VAE (Hunyuan or LTX family)",
}


def _check_is_wan21(state_dict: Mapping[str, Tensor]) -> None:
    for key, kind in _RELATIVES.items():
        if key in state_dict:
            raise PackForcingError(f"PackForcing needs the Wan 2.1 VAE, but this is {kind}; {_WANTED}.")
    gamma = state_dict.get("decoder.head.0.gamma")
    if gamma is None:
        found = f"the first is {shown(next(iter(state_dict)))}" if state_dict else "it is empty"
        raise PackForcingError(
            f"This is not a Wan 2.1 VAE: among its {len(state_dict)} tensors there is no "
            f"'decoder.head.0.gamma' ({found}); {_WANTED}."
        )


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if missing := [name for name in expected if name not in found]:
        raise PackForcingError(
            f"This Wan 2.1 VAE is incomplete: {len(missing)} of its {len(expected)} tensors are missing, "
            f"{shown(missing[0])} first; download the file again, or {_WANTED}."
        )
    if unknown := [name for name in found if name not in expected]:
        raise PackForcingError(
            f"This is not a plain Wan 2.1 VAE: it has {len(unknown)} tensors too many, {shown(unknown[0])} first; "
            f"{_WANTED}."
        )
    check_floating(found, "The VAE")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise PackForcingError(
                f"This is not a Wan 2.1 VAE: {shown(name)} has the shape {list(found[name].shape)} where "
                f"{list(tensor.shape)} is expected; {_WANTED}."
            )


def init_vae(dim: int = 8, seed: int = 0) -> WanVAE:
    """A small VAE with random float32 weights that keep activations near unit size, for tests and demos.

    The same seed gives the same bits on every machine. So the numbers are uniform, from a CPU generator of its own, in
    module order: torch's normal numbers depend on the processor's vector unit.
    """
    with torch.device("meta"):
        vae = WanVAE(dim)
    vae.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, std: float) -> None:
        tensor.copy_((2 * torch.rand(tensor.shape, generator=generator) - 1) * (math.sqrt(3) * std))

    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, RMSNorm):
                layer.gamma.fill_(1)
            elif isinstance(layer, nn.Conv2d | nn.Conv3d):
                fill(layer.weight, std=layer.weight[0].numel() ** -0.5)
                assert layer.bias is not None, "every convolution of the VAE has a bias"
                fill(layer.bias, std=0.1)
    return vae
