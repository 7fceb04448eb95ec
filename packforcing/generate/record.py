"""What the cache did, block by block: kept, selected, moved, and how many bytes. The inspector reads nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import CacheConfig, FrameSize, ModelShape

# The owners of cache memory, in the order in which a picture stacks them.
PARTITIONS = ("sink", "recent", "current", "mid", "aside", "archive_device", "archive_host", "key_sums")
STAGES = ("denoise", "decode", "wait", "compression", "clean_pass")


@dataclass
class BlockRecord:
    """One block's dealings with the cache.

    Attributes:
        block: index of the block, from 0.
        selected: for each layer the mid blocks attended, oldest first; all layers' lists have the same length.
        mid_slots_written: (layer, slot) pairs that had to be filled for this block; the others already held what
            they should.
        recent_rotated: recent blocks whose keys were rotated to a new temporal position (counted once, not per layer).
        bytes: bytes in use by each of PARTITIONS after the block.
        seconds: time of each of STAGES (a stage that did not run is absent). Where blocks were decoded beside the
            denoising of the next one, there is "wait": how long the loop waited for the frames; "decode" then costs
            nothing else.
    """

    block: int
    selected: list[list[int]]
    mid_slots_written: int = 0
    recent_rotated: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class CacheRecord:
    """The record of a run: its conditions, and one entry a block."""

    model: ModelShape
    config: CacheConfig
    size: FrameSize
    fps: float
    temporal_stride: int
    compressor: str
    dtype: str
    device: str
    rounding_error: float = 0.0  # what the configuration's kv_dtype takes from keys and values, relative to them
    blocks: list[BlockRecord] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)
