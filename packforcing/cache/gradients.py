"""A cache for training: what carries a gradient is written like the rest, and also kept with its graph."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Cache
from .kv_buffer import KVBuffer
from .rope import Rotation, rotate


class GradientBuffer(KVBuffer):
    """`KVBuffer` whose `read` carries the gradients of what was written into it.

    Attributes:
        live: first token -> the keys (rotated) and values [B, L, H, D] there that carry a gradient.
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shape, device, dtype)
        self.live: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, tokens: slice, keys: Tensor, values: Tensor, by: Rotation) -> None:
        self.live.pop(tokens.start, None)
        if not (keys.requires_grad or values.requires_grad):
            super().write(tokens, keys, values, by)
            return
        keys = rotate(keys, by)
        self.copy(tokens, keys.detach(), values.detach())
        self.live[tokens.start] = keys, values

    def rotate(self, tokens: slice, by: Rotation) -> None:
        super().rotate(tokens, by)
        if tokens.start in self.live:
            keys, values = self.live[tokens.start]
            self.live[tokens.start] = rotate(keys, by), values

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        """Views of the buffers; copies when some of the tokens carry a gradient."""
        buffers = super().read(length)
        live = sorted((start, pair) for start, pair in self.live.items() if start < length)
        if not live:
            return buffers
        keys: list[Tensor] = []
        values: list[Tensor] = []
        end = 0
        for start, (live_keys, live_values) in live:
            keys += [buffers[0][:, end:start], live_keys.to(buffers[0].dtype)]
            values += [buffers[1][:, end:start], live_values.to(buffers[1].dtype)]
            end = start + live_keys.shape[1]
        return torch.cat([*keys, buffers[0][:, end:]], dim=1), torch.cat([*values, buffers[1][:, end:]], dim=1)


class GradientCache(Cache):
    """`Cache`, through which gradients reach earlier blocks, until `detach`.

    Arguments are those of `Cache`. Raises ValueError for a kv_dtype other than the model's.
    """

    def _allocate(self) -> None:
        if self.kept_dtype != self.dtype:
            raise ValueError("gradients need keys and values in the model's own type")
        super()._allocate()
        # (block, layer) -> keys at base positions and values of its compressed form, where they carry a gradient
        self._live_compressed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def new_buffer(self, tokens: int) -> GradientBuffer:
        shape = (self.batch, tokens, self.model.heads, self.model.head_dim)
        return GradientBuffer(shape, self.device, self.dtype)

    def live(self, layer: int) -> dict[int, tuple[Tensor, Tensor]]:
        """What carries a gradient in one layer's buffer, see `GradientBuffer`."""
        kv = self.layers[layer].kv
        assert isinstance(kv, GradientBuffer)
        return kv.live

    def end(self) -> None:
        super().end()
        if self.config.becomes_mid(self.block):
            for layer in range(len(self.layers)):  # the compressed block's room is free again
                self.live(layer).pop(self._valid, None)

    def _keep_compressed(self, layer: int, keys: Tensor, values: Tensor) -> None:
        super()._keep_compressed(layer, keys.detach(), values.detach())
        if keys.requires_grad or values.requires_grad:
            self._live_compressed[self.block, layer] = rotate(keys, self.rotations.compressed_base), values

    def _fill_mid_slots(self, layer: int, chosen: list[int]) -> None:
        before = list(self.layers[layer].mid_slots)
        super()._fill_mid_slots(layer, chosen)
        for slot, content in enumerate(self.layers[layer].mid_slots):
            if content is None or content == before[slot]:
                continue
            start = self._mid_start + slot * self.layout.compressed_tokens_per_block
            self.live(layer).pop(start, None)
            if (content.block, layer) in self._live_compressed:
                keys, values = self._live_compressed[content.block, layer]
                by = self.rotations.to_mid_slots([content.anchor], content.scale)
                self.live(layer)[start] = rotate(keys, by), values

    def detach(self) -> None:
        """Ends the gradients of all that was written: the history is a constant from here on."""
        for layer in range(len(self.layers)):
            self.live(layer).clear()
        self._live_compressed.clear()
