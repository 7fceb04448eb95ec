"""How many bytes a model's weights take on the device, by count, before any are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..known_models import KnownModel
from .read_ahead import PROMPT_PARTS, SLOTS
from .vae import WanVAE
from .wan_modules import WanModules


@dataclass(frozen=True)
class LayerCount:
    """Numbers in one layer's weights: matrices, which fp8 keeps in a byte each, and the rest."""

    matrices: int
    rest: int

    def bytes(self, itemsize: int, fp8: bool) -> int:
        return self.matrices * (1 if fp8 else itemsize) + self.rest * itemsize


@dataclass(frozen=True)
class WeightCount:
    """Numbers in the weights of a transformer and of its VAE."""

    layers: int
    layer: LayerCount
    in_passes: LayerCount  # what a pass needs of a layer: all but the prompt's keys and values
    for_prompt: LayerCount  # those
    around: int  # embeddings and head
    vae: int

    def bytes(self, itemsize: int, vae_itemsize: int, fp8: bool = False, streamed: bool = False) -> int:
        """Bytes of the device.

        Args:
            itemsize: bytes of a value of the transformer's type.
            vae_itemsize: the same of the VAE's.
            fp8: whether the layers' matrices are in fp8; its scales are not counted.
            streamed: whether the layers lie in host memory, and only the slots of `read_ahead` on the device.
        """
        layers = self.layers * self.layer.bytes(itemsize, fp8)
        if streamed:
            layers = SLOTS * sum(part.bytes(itemsize, fp8) for part in (self.in_passes, self.for_prompt))
        return layers + self.around * itemsize + self.vae * vae_itemsize

    def pass_bytes(self, itemsize: int, fp8: bool) -> int:
        """Bytes of all layers that cross the bus in a pass when they are streamed."""
        return self.layers * self.in_passes.bytes(itemsize, fp8)


@cache
def weight_count(model: KnownModel) -> WeightCount:
    """Counted on modules without data."""
    with torch.device("meta"):
        modules, vae = WanModules(model.sizes), WanVAE(model.vae_dim)
    parts = dict(modules.blocks[0].named_modules())
    whole = list(parts.values())
    prompt = [parts[name] for name in PROMPT_PARTS]
    passes = [part for name, part in parts.items() if name and name not in PROMPT_PARTS]
    layers = _numbers(modules.blocks.state_dict().values())
    return WeightCount(
        layers=model.sizes.layers,
        layer=_layer_count(whole),
        in_passes=_layer_count(passes),
        for_prompt=_layer_count(prompt),
        around=_numbers(modules.state_dict().values()) - layers,
        vae=_numbers(vae.state_dict().values()),
    )


def _layer_count(parts: Iterable[nn.Module]) -> LayerCount:
    parts = list(parts)
    own = _numbers(tensor for part in parts for tensor in part.parameters(recurse=False))
    matrices = _numbers(part.weight for part in parts if isinstance(part, nn.Linear))
    return LayerCount(matrices, own - matrices)


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
