"""The demo models: tiny, Wan-shaped, trained on the synthetic world, so that every path runs on any machine.

Their weights lie in `packforcing/weights/`. The header of each file says which command made it (docs/demo-models.md).
The models draw what is in their world (moving coloured shapes, and landscapes that a camera pans over), and nothing
else.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..devices import fast_dtype
from ..files.compressor_file import load_compressor
from ..files.weights import read_state_dict
from ..generate.sampling import Sampling
from ..model.compressor import CompressorChoice
from ..model.latent_preview import LatentPreview, from_tensors

WEIGHTS = Path(__file__).parents[1] / "weights"
SAMPLING = Sampling(steps=8, shift=3.0, update="euler")  # the transformer is not step-distilled
COMPRESSOR_NAME = "demo (trained dual branch)"


def demo_transformer() -> dict[str, Tensor]:
    """State dict of the demo diffusion transformer (4 layers, 256 wide), float32, under Wan 2.1's names."""
    state, _ = read_state_dict(WEIGHTS / "demo_transformer.safetensors")
    return {name: tensor.float() for name, tensor in state.items()}


def demo_vae(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """State dict of the demo VAE (8 wide), under the Wan 2.1 VAE's names, in the type that is fast on a device.

    The price of bfloat16 is 0.2 of 255 levels in a frame.
    """
    state, _ = read_state_dict(WEIGHTS / "demo_vae.safetensors")
    return {name: tensor.to(fast_dtype(device)) for name, tensor in state.items()}


def demo_compressor() -> CompressorChoice:
    """The demo's trained dual-branch compressor. It fits the demo transformer only."""
    return CompressorChoice(COMPRESSOR_NAME, *load_compressor(WEIGHTS / "demo_compressor.safetensors"))


def demo_preview() -> LatentPreview:
    """The map from the demo VAE's latents to a preview's colours."""
    state, _ = read_state_dict(WEIGHTS / "demo_preview.safetensors")
    return from_tensors(state)
