"""What the cache did, block by block: what it kept, selected and moved, and in how many bytes.

The inspector reads nothing else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import CacheConfig, FrameSize, ModelShape

# The owners of cache memory, in the order in which a picture stacks them.
PARTITIONS = ("sink", "recent", "current", "mid", "aside", "archive_device", "archive_host", "key_sums")
STAGES = ("refresh", "denoise", "decode", "wait", "compression", "clean_pass")


@dataclass
class BlockRecord:
    """What the cache did for one block.

    Attributes:
        block: index of the block, from 0.
        selected: for each layer the mid blocks that were attended, oldest first; all of these lists are equally long.
        mid_slots_written: how many (layer, slot) pairs had to be filled; the others already held the right block.
        recent_rotated: recent blocks whose keys were rotated to a new temporal position (counted once, not per layer).
        bytes: bytes in use by each of PARTITIONS after the block.
        seconds: time of each of STAGES; a stage that did not run is absent. "wait" is there when blocks are decoded
            beside the denoising of the next one: it is how long the loop waited for the frames, and all that decoding
            then cost the loop.
    """

    block: int
    selected: list[list[int]]
    mid_slots_written: int = 0
    recent_rotated: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRecord:
    """A stretch of the story."""

    start: int  # first block
    prompt: str  # its words; "" where they are not known


@dataclass
class CacheRecord:
    """The record of a run: its conditions, and one entry a block."""

    model: ModelShape
    config: CacheConfig
    size: FrameSize
    fps: float
    temporal_stride: int  # latent frames that a compressed token spans
    compressor: str  # its name, or "none"
    dtype: str  # of the transformer, such as "bfloat16"
    device: str
    rounding_error: float = 0.0  # of keys and values in the configuration's kv_dtype: root mean square, relative
    blocks: list[BlockRecord] = field(default_factory=list)
    prompts: list[PromptRecord] = field(default_factory=list)  # one a stretch; a run without a story has one, too
    prompt_switch: str = "keep"  # what happens to the history where the prompt changes (`story.SWITCHES`)
    update: str = ""  # how a denoising step is made (`schedule.UPDATES`); "" in records from before it was kept
    timesteps: list[float] = field(default_factory=list)  # what the model is told in each step of a block, of 1000
    first_timesteps: list[float] = field(default_factory=list)  # likewise in the video's first block

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)
