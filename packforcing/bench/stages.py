"""A long video, stage by stage and block by block: the sampler's own loop, watched.

A *measured block* is what lies between two finished blocks: the compression and clean pass of the block before, then
the denoising, decoding and writing of this one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import CacheConfig
from ..generate.long_video import LongVideo
from ..generate.record import CacheRecord
from ..model.vae import WanVAE
from ..model.wan_protocol import Wan
from .clock import Clock, held_bytes, peak_bytes, reset_peak

STAGES = ("denoise", "selection", "decode", "write", "compression", "clean_pass")
PASSES = ("denoise", "selection", "clean_pass")  # the transformer's work
COMPARED = 10  # blocks at either end of the run whose medians are compared


@dataclass(frozen=True)
class MeasuredBlock:
    """One block's wall-clock time, the stages in it (both in ms), and the memory held in it (bytes, None: unknown)."""

    index: int
    ms: float
    stages: dict[str, float]
    memory_bytes: int | None


@dataclass(frozen=True)
class Run:
    """All measured blocks, the record of the cache, and the peak of memory (bytes; None: unknown)."""

    blocks: list[MeasuredBlock]
    record: CacheRecord
    peak_bytes: int | None


def run_video(
    video: LongVideo, count: int, write: Callable[[Tensor], None] | None, progress: Callable[[int, int], None]
) -> Run:
    """Makes `count` blocks and measures each.

    Args:
        write: takes a block's frames; None skips the stage.
        progress: called as progress(done, count).
    """
    device = video.wan.device
    clock = Clock(device)
    video.cache.timer = clock.part  # selection and the archive's traffic happen inside the passes
    reset_peak(device)
    measured: list[MeasuredBlock] = []
    start = time.perf_counter()
    for block in video.blocks(count):
        if write is not None:
            with clock.part("write"):
                assert block.frames is not None, "only a video that is decoded is written"
                write(block.frames)
        parts = clock.take()
        now = time.perf_counter()
        stages = _stages(video, block.index, parts, written=write is not None)
        measured.append(MeasuredBlock(block.index, 1000 * (now - start), stages, held_bytes(device)))
        progress(block.index + 1, count)
        start = time.perf_counter()
    return Run(measured, video.record, peak_bytes(device, [block.memory_bytes for block in measured]))


def _stages(video: LongVideo, index: int, parts: dict[str, float], written: bool) -> dict[str, float]:
    """Milliseconds of each stage of a measured block; a stage that did not run is absent."""
    record = video.record
    stages = {
        "denoise": 1000 * record.blocks[index].seconds["denoise"] - parts["selection"],
        "selection": parts["selection"] + parts["archive"],
    }
    if "decode" in record.blocks[index].seconds and isinstance(video.vae, WanVAE):
        stages["decode"] = 1000 * record.blocks[index].seconds["decode"]
    if written:
        stages["write"] = parts["write"]
    if index > 0:
        before = record.blocks[index - 1].seconds
        stages["clean_pass"] = 1000 * before["clean_pass"] - parts["archive"]
        if "compression" in before:
            stages["compression"] = 1000 * before["compression"]
    return stages


# ---------------------------------------------------------------------- what follows from them


def first_full(config: CacheConfig) -> int:
    """The first block whose three partitions are all in full use."""
    return config.sink_blocks + config.recent_blocks + config.top_k


def steady(blocks: Sequence[MeasuredBlock], config: CacheConfig) -> list[MeasuredBlock]:
    """The blocks that stand for a long video: those with a full cache, or, in a short run, all after the first two.

    (The first has no clean pass before it and warms up; the second warms up what the first did not have.)
    """
    full = [block for block in blocks if block.index >= first_full(config)]
    return full if len(full) > 2 else list(blocks[2:]) or list(blocks)


@dataclass(frozen=True)
class StageTime:
    """Median and spread (the distance of the quartiles) in ms, and the share of the block."""

    median_ms: float
    spread_ms: float
    share: float


def stage_times(blocks: Sequence[MeasuredBlock]) -> dict[str, StageTime]:
    """Each stage that ran, over `blocks`."""
    times = {name: [block.stages[name] for block in blocks if name in block.stages] for name in STAGES}
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    total = sum(medians.values())
    return {name: StageTime(median, spread(times[name]), median / total) for name, median in medians.items()}


def spread(values: Sequence[float]) -> float:
    """The distance between the quartiles; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def growth(values: Sequence[float]) -> float | None:
    """Median of the last ten values over that of the first ten; fewer, but equally many, in a short run.

    `values` are those of the blocks with a full cache; None when there are fewer than two.
    """
    compared = min(COMPARED, len(values) // 2)
    if compared == 0:
        return None
    return statistics.median(values[-compared:]) / statistics.median(values[:compared])


def memory_by_owner(video: LongVideo, peak_bytes: int | None) -> dict[str, int | None]:
    """Who holds the memory, in bytes, at the end of the run.

    `rest` is what the peak holds beside them: activations, the VAE's streaming state and, on the CPU, the process
    itself. The host archive is part of the peak on the CPU only.
    """
    cache, archive = video.cache, video.cache.archive
    texts = [pair for stretch in video.story.stretches for pair in stretch.text.layers]
    held = {
        "weights": _parameter_bytes(video.wan.modules),
        "text": sum(keys.nbytes + values.nbytes for keys, values in texts),
        "vae": _parameter_bytes(video.vae) if isinstance(video.vae, WanVAE) else 0,
        "kv_buffers": cache.allocated_bytes - archive.device_bytes - archive.allocated_key_sum_bytes,
        "archive_device": archive.device_bytes,
        "key_sums": archive.allocated_key_sum_bytes,
    }
    in_peak = sum(held.values()) + (archive.host_bytes if video.wan.device.type == "cpu" else 0)
    rest = None if peak_bytes is None else peak_bytes - in_peak
    return {**held, "archive_host": archive.host_bytes, "rest": rest}


def _parameter_bytes(module: torch.nn.Module | Wan) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
