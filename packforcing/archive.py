"""The archive: the compressed keys and values of every block that is, or will become, a mid block.

What is needed to score a block (its key sums) stays on the device; the keys and values themselves are needed only once
the block is selected, so they may lie in host memory, and device memory is bounded for any length of video (method 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import CacheConfig


class Archive:
    """Compressed blocks in chronological order, numbered from 0 by `append`.

    A block's entry is [layers, 2, B, N_c, H, D]: pristine keys at their base positions, and values.
    """

    def __init__(self, config: CacheConfig, device: torch.device) -> None:
        self.device = device
        self._budget = config.archive_budget
        self._entries: list[Tensor] = []
        self._on_device: list[bool] = []
        self._key_sums: Tensor | None = None
        self.device_bytes = 0
        self.host_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def key_sum_bytes(self) -> int:
        """Bytes of the key sums in use."""
        return 0 if self._key_sums is None else self._key_sums[: len(self)].nbytes

    @property
    def allocated_key_sum_bytes(self) -> int:
        """Bytes of the key sums, the room to grow included."""
        return 0 if self._key_sums is None else self._key_sums.nbytes

    def append(self, entry: Tensor, key_sums: Tensor) -> None:
        """Stores a copy of a block's entry, and of its key sums [layers, B, N_opt, D]."""
        keep_on_device = self.device_bytes + entry.nbytes <= self._budget
        if keep_on_device:
            stored = entry.clone()
            self.device_bytes += entry.nbytes
        else:
            # Pinned, so that copies in both directions are asynchronous and stay in the order of the device's stream.
            pinned = self.device.type == "cuda"
            stored = torch.empty(entry.shape, dtype=entry.dtype, device="cpu", pin_memory=pinned)
            stored.copy_(entry, non_blocking=pinned)
            self.host_bytes += entry.nbytes
        self._entries.append(stored)
        self._on_device.append(keep_on_device)
        self._append_key_sums(key_sums)

    def _append_key_sums(self, key_sums: Tensor) -> None:
        count = len(self) - 1
        if self._key_sums is None:
            self._key_sums = key_sums.new_empty((16, *key_sums.shape))
        elif count == len(self._key_sums):  # doubled, so that growing costs a constant amount a block
            self._key_sums = torch.cat((self._key_sums, torch.empty_like(self._key_sums)))
        self._key_sums[count] = key_sums

    def key_sums(self, layer: int, blocks: int) -> Tensor:
        """Key sums [blocks, B, N_opt, D] of the first `blocks` entries at one layer."""
        if self._key_sums is None:
            raise IndexError("the archive is empty")
        return self._key_sums[:blocks, layer]

    def read(self, blocks: Sequence[int], layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, len(blocks) * N_c, H, D] of some blocks at one layer, in this order, on the device."""
        entries = [self._entries[block][layer].to(self.device, non_blocking=True) for block in blocks]
        keys, values = (torch.cat(tensors, dim=1) for tensors in zip(*entries, strict=True))
        return keys, values
