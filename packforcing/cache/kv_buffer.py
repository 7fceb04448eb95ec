"""One layer's keys and values: buffers that are allocated once, written in place, and read as a prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from .rope import EAGER_ROTARY, RotaryOps, Rotation, rotate


class KVBuffer:
    """Keys and values of one layer, [B, capacity, H, D] each, in the type that the model runs in.

    Args:
        shape: (B, capacity, H, D).
        rotary: how keys are rotated and written, compiled or not.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        rotary: RotaryOps = EAGER_ROTARY,
    ) -> None:
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self._rotary = rotary

    def write(self, tokens: slice, keys: Tensor, values: Tensor, by: Rotation) -> None:
        """Writes keys, rotated here, and values [B, L, H, D]."""
        self._rotary.place(self.keys[:, tokens], self.values[:, tokens], keys, values, by)

    def copy(self, tokens: slice, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values [B, L, H, D] as they are."""
        self.keys[:, tokens] = keys
        self.values[:, tokens] = values

    def rotate(self, tokens: slice, by: Rotation) -> None:
        """Rotates keys in place by a temporal rotation."""
        temporal = self.keys[:, tokens, :, : by.channels]  # the other channels stay as they are
        temporal.copy_(rotate(temporal, by))

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` tokens, as the model takes them: views of the buffers."""
        return self.keys[:, :length], self.values[:, :length]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
