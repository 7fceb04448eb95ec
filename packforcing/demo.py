"""The tiny, Wan-shaped demo models: the same graph and the same code as the real ones, on any machine.

Weights are random, from a fixed seed: they exercise every path, and show nothing of the method's quality.
"""

from __future__ import annotations

from torch import Tensor

from .tree import SIZES, random_state_dict
from .vae import init_vae

SEED = 2603_25730
VAE_DIM = 16


def demo_transformer() -> dict[str, Tensor]:
    """State dict of the demo diffusion transformer (4 layers, 256 wide), under Wan 2.1's names."""
    return random_state_dict(SIZES["tiny"], SEED)


def demo_vae() -> dict[str, Tensor]:
    """State dict of the demo VAE (16 wide), under the Wan 2.1 VAE's names."""
    return init_vae(dim=VAE_DIM, seed=SEED).state_dict()
