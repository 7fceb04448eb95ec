"""A cache whose reduced blocks come one block late, so that nothing waits for a block's pixels.

The compressor needs a block's pixels, and its clean pass needs the compressor. Here the clean pass of block i carries
the reduced form of block i - 1, whose pixels were decoded beside the denoising of block i. That form attends to the
same as in `Cache`: the context of block i - 1, of which everything that block i overwrites has been set aside. It
enters the archive in time, since block i - 1 is still recent while block i + 1 is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Cache
from .config import Layout, ModelShape
from .rope import EAGER, Turns, rotate


class LateCache(Cache):
    """`Cache`, except that between `begin(i)` and `end()` the reduced methods mean block i - 1's reduced form.

    For generating only: what carries a gradient would lose it. Arguments are those of `Cache`.
    """

    def __init__(
        self,
        layout: Layout,
        model: ModelShape,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        turns: Turns = EAGER,
    ) -> None:
        if not layout.config.can_be_late:
            raise ValueError("reduced blocks come late only where there are mid blocks, and recent ones before them")
        super().__init__(layout, model, device, dtype, batch, turns)
        self._aside_keys = [self._empty(layout.aside_tokens) for _ in range(model.layers)]
        self._aside_values = [self._empty(layout.aside_tokens) for _ in range(model.layers)]
        self._aside_tokens = 0  # of them in use
        self._due = False  # whether the reduced form of the block before is still to come
        self._fresh: tuple[Tensor, Tensor] | None = None  # the reduced keys (rotated) and values of the layer at hand

    def end(self) -> None:
        if self._due:
            self._archive_reduced()
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
        self._late_rotation = self._reduced_rotation  # of the place where the block stands that just ended

    def rotate_reduced_queries(self, queries: Tensor) -> Tensor:
        return rotate(queries, self._late_rotation)

    def write_reduced(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._keep_reduced(layer, keys, values)
        self._fresh = rotate(keys, self._late_rotation), values

    def reduced_context(self, layer: int) -> tuple[Tensor, Tensor]:
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
