"""A small Wan 2.1 module tree of the library's own: for the command line, for training and for benchmarks.

It has sub-modules with the checkpoint's names, and no forward pass. `causal_wan.CausalWan` runs over this tree exactly
as it runs over ComfyUI's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..config import PATCH
from ..known_models import SIZES as SIZES
from ..known_models import WanSizes as WanSizes

T = TypeVar("T")

EPS = 1e-6
MODULATIONS = 6  # shift, scale and gate, for self-attention and for the feed-forward layer


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=EPS)
        self.norm_k = nn.RMSNorm(dim, eps=EPS)


def _modulation(count: int, dim: int) -> nn.Parameter:
    """Of variance 1 / dim. Uniform: normal numbers on the meta device import torch's compiler, which takes a second."""
    return nn.Parameter(torch.empty(1, count, dim).uniform_(-1, 1).mul_((3 / dim) ** 0.5))


class Block(nn.Module):
    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.norm1 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.self_attn = Attention(dim, sizes.heads)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.cross_attn = Attention(dim, sizes.heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, sizes.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(sizes.ffn_dim, dim)
        )
        self.modulation = _modulation(MODULATIONS, dim)


class Head(nn.Module):
    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.dim, eps=EPS, elementwise_affine=False)
        self.head = nn.Linear(sizes.dim, PATCH * PATCH * sizes.channels)
        self.modulation = _modulation(2, sizes.dim)


class WanModules(nn.Module):
    """The sub-modules of a Wan 2.1 text-to-video transformer, under the names of the checkpoint's keys."""

    def __init__(self, sizes: WanSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.freq_dim = sizes.freq_dim
        patch = (1, PATCH, PATCH)
        self.patch_embedding = nn.Conv3d(sizes.channels, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(sizes.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(sizes.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, MODULATIONS * dim))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.head = Head(sizes)

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function that reads the tree's weights: a forward pass, as far as PyTorch's FSDP is concerned."""
        return function()


def build_wan_modules(sizes: WanSizes, state_dict: dict[str, Tensor]) -> WanModules:
    """A tree that shares the tensors of a state dict, which must have exactly the tree's keys and shapes."""
    with torch.device("meta"):
        modules = WanModules(sizes)
    modules.load_state_dict(state_dict, assign=True)
    return modules.requires_grad_(False).eval()


def random_state_dict(
    sizes: WanSizes, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights of a sensible scale from a seed: nothing learnt. They are drawn in float32, and each is kept as `dtype`.

    Drawn on the CPU they have the same bits on every machine; `device` draws (other ones) there, for large sizes.
    """
    with torch.device("meta"):
        modules = WanModules(sizes)
    generator = torch.Generator(device).manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, like in modules.state_dict().items():
        # Uniform: torch's normal numbers depend on the processor's vector unit in their last bits.
        noise = (2 * torch.rand(like.shape, generator=generator, device=device) - 1) * 3**0.5
        if name.endswith("modulation"):
            state[name] = noise / like.shape[-1] ** 0.5
        elif like.ndim > 1:  # Linear and Conv3d: keeps the variance of what passes through
            state[name] = noise / like[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            state[name] = torch.ones(like.shape, device=device)
        else:
            state[name] = 0.02 * noise
        state[name] = state[name].to(dtype)
    return state
