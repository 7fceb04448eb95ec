"""Which heads of a transformer this process has, where several share one out (`model.tensor_parallel`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor

from ..config import ModelShape
from .selection import scored_heads


@dataclass(frozen=True)
class HeadShare:
    """An equal part of the heads, in the order of the processes' numbers. By itself it is all of them."""

    rank: int = 0  # number of this process
    count: int = 1  # of all processes

    def of(self, model: ModelShape) -> ModelShape:
        """The part of a model of that shape: as many layers, fewer heads."""
        return replace(model, dim=model.dim // self.count, heads=model.heads // self.count)

    def scored(self, model: ModelShape, fraction: float) -> int:
        """How many of the heads that the affinity sums over are here: they are the first heads of all."""
        here = model.heads // self.count
        return min(here, max(0, scored_heads(model.heads, fraction) - self.rank * here))

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts, in place; to the bit the same in all of them."""
        if self.count > 1:
            dist.all_reduce(part)
        return part


WHOLE = HeadShare()
