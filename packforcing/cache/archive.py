"""The archive: the compressed keys and values of every block that is, or will become, a mid block.

What is needed to score a block (its key sums) stays on the device. The keys and values themselves are needed only once
the block is selected. So they may lie in host memory, and device memory is bounded for any length of video
(docs/method.md, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import CacheConfig

SLAB_BYTES = 2**28  # of host memory that is allocated at once, at most


def pieces_in_a_slab(piece_bytes: int, pieces: int) -> int:
    """How many pieces to allocate together, where they come `pieces` at a time: 16 times that, up to SLAB_BYTES."""
    return max(1, min(SLAB_BYTES // piece_bytes, 16 * pieces))


class Slabs:
    """Host memory for pieces of one shape, numbered from 0, allocated many at a time.

    PyTorch rounds every allocation of pinned memory up to a power of two (its issue 150517), so blocks of 80 MB (1.3B
    at 1280x720) would take 134 MB each; and small ones between a pass's temporary tensors would leave holes there.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._slabs: list[Tensor] = []
        self._count = 0

    def append(self, pieces: Tensor) -> None:
        """Stores a copy of [n, ...]; from a device into pinned memory, in the order of the device's stream."""
        if not self._slabs:
            self._per_slab = pieces_in_a_slab(pieces[0].nbytes, len(pieces))
        while len(pieces):
            offset = self._count % self._per_slab
            if offset == 0:
                shape = (self._per_slab, *pieces.shape[1:])
                self._slabs.append(torch.empty(shape, dtype=pieces.dtype, pin_memory=self._pinned))
            now, pieces = pieces[: self._per_slab - offset], pieces[self._per_slab - offset :]
            self._slabs[-1][offset : offset + len(now)].copy_(now, non_blocking=self._pinned)
            self._count += len(now)

    def __getitem__(self, number: int) -> Tensor:
        slab, offset = divmod(number, self._per_slab)
        return self._slabs[slab][offset]


class Archive:
    """Compressed blocks in chronological order, numbered from 0 by `append`.

    A block's entry is [layers, 2, B, N_c, H, D]: pristine keys at their base positions, and values.
    """

    def __init__(self, config: CacheConfig, device: torch.device) -> None:
        self.device = device
        self._budget = config.archive_budget
        self._device_entries: list[Tensor] = []  # the first ones, as far as the budget goes
        self._host_pieces = Slabs(pinned=device.type == "cuda")  # a layer's part of an entry each
        self._count = 0
        self._layers = 0
        self._key_sums: Tensor | None = None
        self.device_bytes = 0
        self.host_bytes = 0

    def __len__(self) -> int:
        return self._count

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
        if self.device_bytes + entry.nbytes <= self._budget:
            self._device_entries.append(entry.clone())
            self.device_bytes += entry.nbytes
        else:
            self._layers = len(entry)
            self._host_pieces.append(entry)
            self.host_bytes += entry.nbytes
        self._count += 1
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
        entries = [self._entry(block, layer).to(self.device, non_blocking=True) for block in blocks]
        keys, values = (torch.cat(tensors, dim=1) for tensors in zip(*entries, strict=True))
        return keys, values

    def _entry(self, block: int, layer: int) -> Tensor:
        """Keys and values [2, B, N_c, H, D] of one block at one layer, where they lie."""
        if block < len(self._device_entries):
            return self._device_entries[block][layer]
        return self._host_pieces[(block - len(self._device_entries)) * self._layers + layer]
