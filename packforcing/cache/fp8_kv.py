"""Keys and values kept in fp8: a byte a number. What the current block wrote stays exact in its own passes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..fp8 import FP8, saturated
from .head_share import WHOLE, HeadShare
from .kv_buffer import KVBuffer
from .rope import Rotation, rotate


@dataclass
class ExactTokens:
    """What the current block wrote into the layer written last, before it was rounded; shared by all layers.

    One layer's is enough, since a layer is read right after it was written.
    """

    block: int = -1  # the current block
    layer: Fp8Buffer | None = None  # the layer written last
    written: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # first token -> keys, values [B, L, H, D]

    def begin(self, block: int) -> None:
        """Forgets the block before."""
        self.block, self.layer, self.written = block, None, {}

    def keep(self, layer: Fp8Buffer, start: int, keys: Tensor, values: Tensor) -> None:
        if self.layer is not layer:
            self.layer, self.written = layer, {}
        self.written[start] = keys, values


class Fp8Buffer(KVBuffer):
    """`KVBuffer` in fp8. Reads are copies in the type that the model runs in."""

    def __init__(
        self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, exact: ExactTokens
    ) -> None:
        super().__init__(shape, device, FP8)
        self._dtype = dtype
        self._exact = exact
        # Squares of what rounding took from the first block's keys and values, and of what it took it from.
        self.squares = torch.zeros(2, device=device)

    def write(self, tokens: slice, keys: Tensor, values: Tensor, by: Rotation) -> None:
        keys = rotate(keys, by)
        self.copy(tokens, saturated(keys), saturated(values))
        self._exact.keep(self, tokens.start, keys, values)
        if self._exact.block == 0 and tokens.start == 0:  # the first block lies at the buffer's start
            self._measure_rounding(tokens, keys, values)

    def rotate(self, tokens: slice, by: Rotation) -> None:
        temporal = self.keys[:, tokens, :, : by.channels]
        temporal.copy_(saturated(rotate(temporal.to(self._dtype), by)))

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[:, :length].to(self._dtype), self.values[:, :length].to(self._dtype)
        for start, (exact_keys, exact_values) in self._exact.written.items() if self._exact.layer is self else ():
            if start < length:
                end = start + exact_keys.shape[1]
                keys[:, start:end] = exact_keys.to(self._dtype)
                values[:, start:end] = exact_values.to(self._dtype)
        return keys, values

    def _measure_rounding(self, tokens: slice, *exact: Tensor) -> None:
        kept = self.keys[:, tokens], self.values[:, tokens]
        pairs = [(k.float(), e.float()) for k, e in zip(kept, exact, strict=True)]
        self.squares[0] = torch.stack([(k - e).square().sum() for k, e in pairs]).sum()
        self.squares[1] = torch.stack([e.square().sum() for _, e in pairs]).sum()


def rounding_error(buffers: list[Fp8Buffer], share: HeadShare = WHOLE) -> float:
    """What rounding takes from keys and values, relative to them: root mean square over the first block.

    Over all processes' heads, where several share them. 0 without buffers.
    """
    if not buffers:
        return 0.0
    lost, whole = share.summed(torch.stack([buffer.squares for buffer in buffers]).sum(dim=0)).tolist()
    return (lost / whole) ** 0.5 if whole else 0.0
