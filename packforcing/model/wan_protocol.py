"""What the causal forward pass asks of a Wan 2.1 module tree: its sub-modules' names, which are the checkpoint's keys.

ComfyUI's `WanModel` and the library's `wan_modules.WanModules` both have them. d is the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..config import LATENT_CHANNELS
from ..errors import PackForcingError

Layer = Callable[[Tensor], Tensor]


class AttentionModules(Protocol):
    """Self-attention, or cross-attention to the prompt."""

    num_heads: int
    q: Layer
    k: Layer
    v: Layer
    o: Layer
    norm_q: Layer
    norm_k: Layer


class BlockModules(Protocol):
    """One transformer layer."""

    modulation: Tensor  # [1, 6, d]: shift, scale and gate, for self-attention and for the feed-forward layer
    norm1: Layer
    self_attn: AttentionModules
    norm3: Layer
    cross_attn: AttentionModules
    norm2: Layer
    ffn: Layer


class HeadModules(Protocol):
    modulation: Tensor  # [1, 2, d]: shift and scale
    norm: Layer
    head: Layer


class PatchEmbedding(Protocol):
    """A 3D convolution with the patch as its kernel and stride."""

    in_channels: int
    out_channels: int
    weight: Tensor

    def __call__(self, latents: Tensor) -> Tensor: ...


class TextEmbedding(Protocol):
    """Linear layer, activation, linear layer."""

    def __call__(self, context: Tensor) -> Tensor: ...

    def __getitem__(self, number: int) -> Any: ...


class Wan(Protocol):
    """A Wan 2.1 text-to-video transformer."""

    freq_dim: int
    patch_embedding: PatchEmbedding
    text_embedding: TextEmbedding
    time_embedding: Layer
    time_projection: Layer
    blocks: Sequence[BlockModules]
    head: HeadModules

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Tensor]: ...


NEEDED = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head")


def as_wan(modules: Any) -> Wan:
    """The module tree itself. Raises PackForcingError when it is not a Wan 2.1 text-to-video transformer's."""
    missing = [name for name in NEEDED if not hasattr(modules, name)]
    if missing:
        raise PackForcingError(
            f"The model is not a Wan 2.1 transformer: {type(modules).__name__} has no {missing[0]}; connect a causal "
            "Wan 2.1 text-to-video model (Self-Forcing, Causal-Forcing, CausVid)."
        )
    channels = modules.patch_embedding.in_channels
    has_image_branch = getattr(modules, "img_emb", None) is not None
    if has_image_branch or channels != LATENT_CHANNELS:
        raise PackForcingError(
            f"The model is not a Wan 2.1 text-to-video model: its input has {channels} channels"
            f"{' and an image branch' if has_image_branch else f' instead of {LATENT_CHANNELS}'}; connect a causal Wan "
            "2.1 text-to-video model."
        )
    return cast(Wan, modules)
