"""The archive: the compressed keys and values of every block that is, or will become, a mid block.

What is needed to score a block (its key sums) stays on the device. The keys and values themselves are needed only once
the block is selected. So they may lie in host memory, or in a file, and memory is bounded for any length of video
(docs/method.md, section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import CacheConfig
from ..errors import PackForcingError
from .archive_file import ArchiveFile, Folder

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

    def append(self, pieces: Tensor) -> int:
        """Stores a copy of [n, ...], and returns the first one's number; from a device into pinned memory, in the order
        of the device's stream. If there is no memory for it, nothing is stored."""
        if not self._slabs:
            self._per_slab = pieces_in_a_slab(pieces[0].nbytes, len(pieces))
        first, end = self._count, self._count + len(pieces)
        while len(self._slabs) * self._per_slab < end:
            shape = (self._per_slab, *pieces.shape[1:])
            self._slabs.append(torch.empty(shape, dtype=pieces.dtype, pin_memory=self._pinned))
        while self._count < end:
            slab, offset = divmod(self._count, self._per_slab)
            now, pieces = pieces[: self._per_slab - offset], pieces[self._per_slab - offset :]
            self._slabs[slab][offset : offset + len(now)].copy_(now, non_blocking=self._pinned)
            self._count += len(now)
        return first

    def __getitem__(self, number: int) -> Tensor:
        slab, offset = divmod(number, self._per_slab)
        return self._slabs[slab][offset]


@dataclass(frozen=True)
class Place:
    """Where a block's entry lies, when not on the device."""

    pieces: Slabs | ArchiveFile  # a layer's part of an entry each
    first: int  # the number of the first layer's

    def __getitem__(self, layer: int) -> Tensor:
        """The part [2, B, N_c, H, D] of one layer."""
        return self.pieces[self.first + layer]


class Archive:
    """Compressed blocks in chronological order, numbered from 0 by `append`.

    A block's entry is [layers, 2, B, N_c, H, D]: pristine keys at their base positions, and values. An `append` that
    fails has changed nothing.

    Args:
        folder: where a file for entries would lie; None is the system's folder for temporary files.

    Attributes:
        device_bytes, host_bytes, disk_bytes: where the entries lie.
    """

    def __init__(self, config: CacheConfig, device: torch.device, folder: Folder = None) -> None:
        self.device = device
        self._folder = folder
        self._budget = config.archive_budget if config.top_k else 0.0
        self._places: list[Tensor | Place] = []  # an entry on the device lies here
        self._layers = 0
        on_disk = config.archive_device == "disk" and config.top_k > 0
        self._pieces = ArchiveFile(folder, self._pinned) if on_disk else Slabs(self._pinned)  # for those that do not
        self._key_sums: Tensor | None = None
        self.device_bytes = self.host_bytes = self.disk_bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    @property
    def key_sum_bytes(self) -> int:
        """Bytes of the key sums in use."""
        return 0 if self._key_sums is None else self._key_sums[: len(self)].nbytes

    @property
    def allocated_key_sum_bytes(self) -> int:
        """Bytes of the key sums, the room to grow included."""
        return 0 if self._key_sums is None else self._key_sums.nbytes

    def bytes(self) -> dict[str, int]:
        """Bytes of the entries, by where they lie (`record.ARCHIVES`)."""
        return {
            "archive_device": self.device_bytes, "archive_host": self.host_bytes, "archive_disk": self.disk_bytes
        }  # fmt: skip

    def append(self, entry: Tensor, key_sums: Tensor) -> None:
        """Stores a copy of a block's entry, and of its key sums [layers, B, N_opt, D]."""
        self._keep_key_sums(key_sums)
        self._layers = len(entry)
        on_device = self.device_bytes + entry.nbytes <= self._budget
        place = entry.clone() if on_device else Place(self._pieces, self._pieces.append(entry))
        self._places.append(place)
        self._count(place, entry.nbytes)

    def _count(self, place: Tensor | Place, size: int) -> None:
        """Counts bytes that lie there; less than 0 that do not any more."""
        if isinstance(place, Tensor):
            self.device_bytes += size
        elif _on_disk(place):
            self.disk_bytes += size
        else:
            self.host_bytes += size

    def _keep_key_sums(self, key_sums: Tensor) -> None:
        count = len(self)
        if self._key_sums is None:
            self._key_sums = key_sums.new_empty((16, *key_sums.shape))
        elif count == len(self._key_sums):  # doubled, so that growing costs a constant amount a block
            self._key_sums = torch.cat((self._key_sums, torch.empty_like(self._key_sums)))
        self._key_sums[count] = key_sums

    def leave_device(self) -> bool:
        """Moves all entries off the device, and keeps none there from now on. Returns whether that is a change."""
        there = [block for block, place in enumerate(self._places) if isinstance(place, Tensor)]
        changes, self._budget = self._budget > 0 or bool(there), 0.0
        self._move(there)
        return changes

    def leave_memory(self) -> bool:
        """Moves all entries into a file, and keeps them all there from now on. Returns whether that is a change.

        Raises PackForcingError when the file cannot be written.
        """
        there = [block for block, place in enumerate(self._places) if not _on_disk(place)]
        if isinstance(self._pieces, ArchiveFile) and self._budget == 0 and not there:
            return False
        before, self._budget = self._pieces, 0.0
        if not isinstance(before, ArchiveFile):
            self._pieces = ArchiveFile(self._folder, self._pinned)
        try:
            self._move(there)
        except PackForcingError:
            self._pieces = before  # for the blocks to come
            raise
        return True

    def _move(self, blocks: Sequence[int]) -> None:
        """Stores entries where new ones are stored now."""
        if self._pinned:
            torch.cuda.synchronize(self.device)  # host memory is written by the device, in its own time
        for block in blocks:
            before = self._places[block]
            # From memory layer by layer, since that is short.
            parts = [before] if isinstance(before, Tensor) else [before[layer][None] for layer in range(self._layers)]
            first, *_ = [self._pieces.append(part) for part in parts]
            now = Place(self._pieces, first)
            self._places[block] = now
            size = sum(part.nbytes for part in parts)
            self._count(before, -size)
            self._count(now, size)

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
        return self._places[block][layer]


def _on_disk(place: Tensor | Place) -> bool:
    return isinstance(place, Place) and isinstance(place.pieces, ArchiveFile)
