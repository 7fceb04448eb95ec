"""The same video with each block decoded beside the denoising of the next: what that gains, and what it takes.

Stages that run side by side slow each other down, so only whole blocks are timed here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..generate.long_video import LongVideo
from .clock import held_bytes, peak_bytes, reset_peak
from .stages import MeasuredBlock, first_full, spread, steady

BLOCKS_WITH_FULL_CACHE = 20  # medians of so many show a gain of a few percent


def blocks_to_make(video: LongVideo, wanted: int) -> int:
    """Of the `wanted` blocks of a benchmark, how many this part of it makes."""
    return min(wanted, first_full(video.layout.config) + BLOCKS_WITH_FULL_CACHE)


def run_overlapped(
    video: LongVideo, count: int, write: Callable[[Tensor], None] | None, progress: Callable[[int, int], None]
) -> tuple[list[MeasuredBlock], int | None]:
    """Makes `count` blocks and measures each: the time from one to the next, and how long of it the loop waited.

    Arguments are those of `stages.run_video`. Gives the blocks, whose one stage is "wait" (for frames), and the peak of
    memory in bytes (None: unknown).
    """
    device = video.wan.device
    reset_peak(device)
    measured: list[MeasuredBlock] = []
    start = time.perf_counter()
    for block in video.blocks(count):
        if write is not None and block.frames is not None:
            write(block.frames)
        now = time.perf_counter()
        waited = {"wait": 1000 * video.record.blocks[block.index].seconds["wait"]}
        measured.append(MeasuredBlock(block.index, 1000 * (now - start), waited, held_bytes(device)))
        progress(block.index + 1, count)
        start = time.perf_counter()
    return measured, peak_bytes(device, [block.memory_bytes for block in measured])


def overlap_report(
    video: LongVideo, overlapped: Sequence[MeasuredBlock], peak: int | None, apart: Sequence[MeasuredBlock], frames: int
) -> dict[str, Any]:
    """The JSON's part about the overlapped video; it compares blocks of the same indices.

    Args:
        apart: all blocks of the video whose stages ran one after the other.
        frames: video frames of a block.
    """
    blocks = steady(overlapped, video.layout.config)
    compared = {block.index for block in blocks}
    times = [block.ms for block in blocks]
    median = statistics.median(times)
    before = statistics.median(block.ms for block in apart if block.index in compared)
    return {
        "block_ms": median,
        "spread_ms": spread(times),
        "apart_ms": before,
        "speedup": before / median,
        "fps_end_to_end": 1000 * frames / median,
        "wait_ms": statistics.median(block.stages["wait"] for block in blocks),
        "blocks_compared": len(blocks),
        "peak_memory_bytes": peak,
    }
