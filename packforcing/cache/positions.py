"""Where the blocks that one block attends to stand in time: anchored RoPE adjustment (docs/method.md, section 6).

Sinks stand at 0 for ever, the selected mid blocks follow without gaps, then the recent blocks and the current one.
Attention sees only differences of positions, so this equals rotating the history towards the current block (paper
section 3.5), but nothing is rotated over and over, and no position grows with the length of the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import CacheConfig


@dataclass(frozen=True)
class Anchors:
    """Positions, in latent frames, of the first frame of each attended block, oldest first.

    Without `CacheConfig.rope_adjustment`, `mid` is empty: each mid block stands where it was made (`mid_anchors`).
    `mid_scale` is the distance of neighbouring latent frames inside the mid blocks: 1, or less when
    `CacheConfig.position_range` squeezes them.
    """

    sink: tuple[float, ...]
    mid: tuple[float, ...]
    recent: tuple[float, ...]
    current: float
    mid_scale: float = 1.0


def anchors(config: CacheConfig, block: int) -> Anchors:
    """Where the history of block `block`, and the block itself, stand in time.

    Which mid blocks are selected does not matter, only how many: slots are filled in chronological order. (Without
    RoPE adjustment it does, and `mid_anchors` says where they stand.)
    """
    frames = config.block_frames
    history = config.partition(block)
    if not config.rope_adjustment:
        sink, recent = (tuple(float(b * frames) for b in blocks) for blocks in (history.sink, history.recent))
        return Anchors(sink, (), recent, current=float(block * frames))
    mids = config.attended_mids(block)
    mid_start = len(history.sink) * frames
    mid_span = mids * frames
    if config.position_range:
        mid_span = min(mid_span, config.position_range - config.sink_frames - config.recent_frames - frames)
    mid_scale = mid_span / (mids * frames) if mids else 1.0
    recent_start = float(mid_start + mid_span)  # a whole number, free of the scale's rounding
    current = recent_start + len(history.recent) * frames
    return Anchors(
        sink=tuple(float(i * frames) for i in range(len(history.sink))),
        mid=tuple(mid_start + j * frames * mid_scale for j in range(mids)),
        recent=tuple(recent_start + j * frames for j in range(len(history.recent))),
        current=current,
        mid_scale=mid_scale,
    )


def mid_anchors(config: CacheConfig, laid_out: Anchors, chosen: Sequence[int]) -> tuple[float, ...]:
    """Positions of the chosen mid blocks' first frames, oldest first: the slots', or, without RoPE adjustment, where
    the blocks were made."""
    return laid_out.mid if config.rope_adjustment else tuple(float(b * config.block_frames) for b in chosen)
