"""What a cache holds of one layer, and what it gives to that layer's attention."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .kv_buffer import KVBuffer


class Attended(NamedTuple):
    """What one attention takes: queries [B, Lq, H, D], and the keys and values [B, Lk, H, D] that they attend to."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class MidSlot(NamedTuple):
    """What a mid slot holds: a block, where its first frame stands, and the distance of its latent frames."""

    block: int
    anchor: float
    scale: float


class Affinity(NamedTuple):
    """By what a layer chose its mid blocks. For records only; scores of different layers cannot be compared."""

    chosen: array[float]  # scores of `LayerCache.selected`
    mean: float  # of the scores of all mid blocks that were stored
    deviation: float  # their standard deviation


@dataclass
class LayerCache:
    """One layer's part of the cache."""

    kv: KVBuffer
    mid_slots: list[MidSlot | None]  # top_k of them
    selected: list[int] | None = None  # mid blocks that the current block attends to; None: not chosen yet
    affinity: Affinity | None = None  # None: nothing was scored, since there was no choice or it is by recency
    anchors: dict[int, float] = field(default_factory=dict)  # full-resolution slot -> position at which its keys stand
