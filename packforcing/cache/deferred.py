"""A cache whose compressed blocks come one block late, so that nothing waits for a block's pixels.

The compressor needs a block's pixels, and its clean pass needs the compressor. Here the clean pass of block i carries
the compressed form of block i - 1, whose pixels were decoded beside the denoising of block i. That form attends to the
same as in `Cache`: the context of block i - 1, of which everything that block i overwrites has been set aside. It
enters the archive in time, since block i - 1 is still recent while block i + 1 is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Cache
from .rope import Rotation, rotate


class DeferredCache(Cache):
    """`Cache`, except that between `begin(i)` and `end()` the compressed form is that of block i - 1.

    Arguments are those of `Cache`. Raises ValueError where a compressed block is needed sooner.
    """

    def _allocate(self) -> None:
        if not self.config.can_defer:
            raise ValueError(
                "compressed blocks are deferred only where there are mid blocks, and recent ones before them"
            )
        super()._allocate()
        # By layer: recent blocks and mid slots as the block before attended to them, as they are kept.
        self._aside = [self.new_buffer(self.layout.aside_tokens) for _ in self.layers]
        self._aside_tokens = 0  # of them in use
        self._due = False  # whether the compressed form of the block before is still to come
        self._before: Rotation  # of the place where the block before stood
        self._fresh: tuple[Tensor, Tensor]  # the compressed keys (rotated) and values of the layer at hand

    def end(self) -> None:
        if self._due:
            self.archive_compressed()
            self._due = False  # at once: what fails from here on is done again
        self._due = self.config.becomes_mid(self.block)
        if self._due:
            self._set_aside()

    def _set_aside(self) -> None:
        """Copies recent blocks and mid slots; sinks stay as they are."""
        parts = [*(self.block_tokens(block) for block in self.partition.recent), self.mid_tokens]
        for layer, aside in zip(self.layers, self._aside, strict=True):
            end = 0
            for part in parts:
                start, end = end, end + part.stop - part.start
                aside.copy(slice(start, end), layer.kv.keys[:, part], layer.kv.values[:, part])
        self._aside_tokens = sum(part.stop - part.start for part in parts)
        self._before = self.rotations.compressed

    def rotate_compressed_queries(self, queries: Tensor) -> Tensor:
        return rotate(queries, self._before)

    def write_compressed(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._keep_compressed(layer, keys, values)
        self._fresh = rotate(keys, self._before), values

    def compressed_context(self, layer: int) -> tuple[Tensor, Tensor]:
        sinks = self.config.sink_blocks * self.layout.tokens_per_block  # all are there once a block is due
        kv, aside, (keys, values) = self.layers[layer].kv, self._aside[layer], self._fresh
        return self._joined(kv.keys[:, :sinks], aside.keys, keys), self._joined(
            kv.values[:, :sinks], aside.values, values
        )

    def _joined(self, sinks: Tensor, aside: Tensor, fresh: Tensor) -> Tensor:
        return torch.cat((sinks.to(self.dtype), aside[:, : self._aside_tokens].to(self.dtype), fresh), dim=1)

    def bytes(self) -> dict[str, int]:
        token = self.batch * self.model.kv_bytes(1, self.kept_dtype.itemsize)
        return {**super().bytes(), "aside": self._aside_tokens * token}

    @property
    def allocated_bytes(self) -> int:
        return super().allocated_bytes + sum(aside.nbytes for aside in self._aside)
