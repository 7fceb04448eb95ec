"""A cache whose compressed blocks come one block late, so that nothing waits for a block's pixels.

The compressor needs a block's pixels, and its clean pass needs the compressor. Here the clean pass of block i carries
the compressed form of block i - 1, whose pixels were decoded beside the denoising of block i. That form attends to the
same as in `Cache`: the context of block i - 1, of which everything that block i overwrites has been set aside. It
enters the archive in time, since block i - 1 is still recent while block i + 1 is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Layout, ModelShape
from .cache import Cache
from .rope import EAGER_ROTARY, RotaryOps, rotate


class DeferredCache(Cache):
    """`Cache`, except that between `begin(i)` and `end()` the compressed methods mean block i - 1's compressed form.

    For generating only: what carries a gradient would lose it. Arguments are those of `Cache`.
    """

    def __init__(
        self,
        layout: Layout,
        model: ModelShape,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        rotary: RotaryOps = EAGER_ROTARY,
    ) -> None:
        if not layout.config.can_defer:
            raise ValueError("compressed blocks come late only where there are mid blocks, and recent ones before them")
        super().__init__(layout, model, device, dtype, batch, rotary)
        self._aside_keys = [self._empty(layout.aside_tokens) for _ in range(model.layers)]
        self._aside_values = [self._empty(layout.aside_tokens) for _ in range(model.layers)]
        self._aside_tokens = 0  # of them in use
        self._due = False  # whether the compressed form of the block before is still to come
        self._fresh: tuple[Tensor, Tensor] | None = (
            None  # the compressed keys (rotated) and values of the layer at hand
        )

    def end(self) -> None:
        if self._due:
            self._archive_compressed()
        self._due = self.config.becomes_mid(self.block)
        if self._due:
            self._set_aside()

    def _set_aside(self) -> None:
        """Copies recent blocks and mid slots; sinks stay as they are."""
        parts = [self._slot_tokens(block) for block in self.partition.recent]
        parts.append(slice(self._valid - self._mid_tokens, self._valid))
        for buffers, asides in ((self.keys, self._aside_keys), (self.values, self._aside_values)):
            for buffer, aside in zip(buffers, asides, strict=True):
                end = 0
                for part in parts:
                    start, end = end, end + part.stop - part.start
                    aside[:, start:end] = buffer[:, part]
        self._aside_tokens = end
        self._deferred_rotation = self._compressed_rotation  # of the place where the block stands that just ended

    def rotate_compressed_queries(self, queries: Tensor) -> Tensor:
        return rotate(queries, self._deferred_rotation)

    def write_compressed(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._keep_compressed(layer, keys, values)
        self._fresh = rotate(keys, self._deferred_rotation), values

    def compressed_context(self, layer: int) -> tuple[Tensor, Tensor]:
        sinks = self.config.sink_blocks * self.layout.tokens_per_block  # all are there once a block is due
        keys, values = (
            torch.cat((buffer[:, :sinks].to(self.dtype), aside[:, : self._aside_tokens].to(self.dtype), fresh), dim=1)
            for buffer, aside, fresh in zip(
                (self.keys[layer], self.values[layer]),
                (self._aside_keys[layer], self._aside_values[layer]),
                self._fresh,
                strict=True,
            )
        )
        return keys, values

    def bytes(self) -> dict[str, int]:
        token = self.batch * self.model.kv_bytes(1, self.kept_dtype.itemsize)
        return {**super().bytes(), "aside": self._aside_tokens * token}

    @property
    def allocated_bytes(self) -> int:
        return super().allocated_bytes + sum(tensor.nbytes for tensor in (*self._aside_keys, *self._aside_values))
