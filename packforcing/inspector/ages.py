"""Of the mid blocks that were chosen: how old they were, by which layers, and by what affinity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..generate.record import BlockRecord, CacheRecord
from .facts import selected_by


@dataclass(frozen=True)
class Choices:
    """Every mid block that a layer attended, once for each block being made; arrays of equal length, oldest first."""

    made: np.ndarray  # int64: the block being made
    layer: np.ndarray  # int64
    mid: np.ndarray  # int64: the mid block
    # float64: standard deviations above the mean affinity of all mid blocks that the layer could choose from, so that
    # layers can be compared; NaN where the layer scored nothing.
    affinity: np.ndarray

    @property
    def age(self) -> np.ndarray:
        """Blocks from the mid block to the block being made."""
        return np.asarray(self.made - self.mid)


@dataclass(frozen=True)
class Ages:
    """By age in blocks, counted over all layers; arrays [ages]."""

    age: np.ndarray  # int64: from the youngest age that a mid block can have
    chosen: np.ndarray  # int64: times that a layer chose a mid block of this age
    stored: np.ndarray  # int64: times that it could have
    affinity: np.ndarray  # float64: mean of `Choices.affinity`; NaN where none was scored


def choices(record: CacheRecord) -> Choices:
    """Reads them out of the record."""
    parts = [_choices_of(block) for block in record.blocks]
    if not parts:
        nothing = np.empty(0, np.int64)
        return Choices(nothing, nothing, nothing, np.empty(0))
    made, layer, mid, affinity = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    # With `repeat_mids` a layer attends a block more than once, in slots that follow each other.
    first = np.ones(len(made), dtype=bool)
    first[1:] = (np.diff(made) != 0) | (np.diff(layer) != 0) | (np.diff(mid) != 0)
    return Choices(made[first], layer[first], mid[first], affinity[first])


def _choices_of(block: BlockRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    selected = selected_by(block)
    depth, count = selected.shape
    affinity = np.full(selected.shape, np.nan)
    for layer, scored in enumerate(block.affinity):
        if scored is not None:
            above = np.asarray(scored.chosen, dtype=float) - scored.mean
            affinity[layer] = above / scored.deviation if scored.deviation else 0.0
    layers = np.repeat(np.arange(depth), count)
    return np.full(selected.size, block.block), layers, selected.ravel(), affinity.ravel()


def layer_shares(record: CacheRecord, chosen: Choices) -> np.ndarray:
    """Of the times that a layer could choose a mid block, the share in which it did: float64 [layers, blocks].

    NaN for blocks that are no mid blocks (yet). A row has a column for each block up to the newest one.
    """
    blocks = record.blocks[-1].block + 1 if record.blocks else 0
    layers = max((len(block.selected) for block in record.blocks), default=0)
    times = np.zeros((layers, blocks))
    np.add.at(times, (chosen.layer, chosen.mid), 1)
    chances = np.zeros(blocks + 1)
    for block in record.blocks if record.config.top_k else ():
        mids = record.config.partition(block.block).mid
        if mids and block.selected:
            chances[mids.start] += 1
            chances[mids.stop] -= 1
    chances = np.cumsum(chances)[:blocks]
    return np.where(chances > 0, times / np.maximum(chances, 1), np.nan)


def ages(record: CacheRecord, chosen: Choices) -> Ages:
    """Counts what was chosen, and what could have been, by age."""
    config = record.config
    last = record.blocks[-1].block if record.blocks else 0
    stored = np.zeros(last + 2, np.int64)
    for block in record.blocks if config.top_k else ():
        mids = config.partition(block.block).mid
        if mids:
            stored[block.block - mids.stop + 1] += len(block.selected)
            stored[block.block - mids.start + 1] -= len(block.selected)
    age = np.arange(config.recent_blocks + 1, max(config.recent_blocks + 1, last - config.sink_blocks + 1))
    times = np.bincount(chosen.age, minlength=last + 2)
    scored = np.isfinite(chosen.affinity)
    sums = np.bincount(chosen.age[scored], chosen.affinity[scored], minlength=last + 2)
    counts = np.bincount(chosen.age[scored], minlength=last + 2)
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return Ages(age, times[age], np.cumsum(stored)[age], mean[age])
