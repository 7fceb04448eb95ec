"""The measurements of a benchmark, one after the other: rates, a long video, the overlapped video, other caches."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..generate.autotune import tuned_attention
from .baselines import comparison, contest
from .floors import stage_floors
from .overlap import blocks_to_make, overlap_report, run_overlapped
from .prepare import Prepared, new_video, plan_decoding, prepare
from .rates import Rates, best_of, measure_rates
from .settings import FPS, Settings
from .stages import MeasuredBlock, Run, StageTime, memory_by_owner, run_video, stage_times, steady
from .text import estimate_line, say, show_progress

RANDOM_WEIGHTS = "weights are random: time and memory are those of a trained model of these sizes, the picture is noise"
NO_VAE = "--no-vae: nothing is decoded or written, and compression is a stand-in that pools latents"
NO_FILE = "no file was written: av is not installed"
NO_OVERLAP = "decoding beside the denoising was not measured: it would not fit into memory"
SHARED_BUFFER = (
    "the unbounded cache did not fit: its layers shared one buffer, so its times are those of a device "
    "with room for the complete cache (kv_bytes)"
)


@dataclass(frozen=True)
class Measurement:
    """All that a benchmark has found."""

    prepared: Prepared
    run: Run  # of the video whose stages are timed
    memory: dict[str, int | None]  # bytes by owner, at the end of that run
    rates: Rates
    floors: dict[str, float]  # ms by stage
    overlap: dict[str, Any] | None  # the JSON's part; None when it was not measured
    baselines: list[dict[str, Any]]  # the JSON's part
    notes: list[str]  # sentences that the reader must know

    @property
    def settings(self) -> Settings:
        return self.prepared.settings

    @property
    def steady_blocks(self) -> list[MeasuredBlock]:
        """The blocks that medians are over."""
        return steady(self.run.blocks, self.settings.layout.config)

    @property
    def stages(self) -> dict[str, StageTime]:
        return stage_times(self.steady_blocks)


def measure(settings: Settings) -> Measurement:
    """Takes all measurements. Raises PackForcingError, before anything is computed, when the run does not fit."""
    notes = [RANDOM_WEIGHTS] if settings.model.vae else [RANDOM_WEIGHTS, NO_VAE]
    decoding = plan_decoding(settings)

    say("measuring this machine's rates")
    attention = tuned_attention(settings.model.sizes.shape, settings.layout, settings.device, settings.model.dtype)
    rates_now = partial(measure_rates, settings.workload, settings.repeats, attention)
    before = rates_now()
    estimate = stage_floors(settings.workload, before, settings.blocks, slots_written=0, archive_on_host=False)
    say(estimate_line(settings, sum(estimate.values())))

    say("making random weights")
    prepared = prepare(settings, decoding, attention)
    run, memory = run_apart(prepared, notes)
    rates = best_of(before, rates_now())
    return Measurement(
        prepared=prepared,
        run=run,
        memory=memory,
        rates=rates,
        floors=floors_of(settings, run, rates, archive_on_host=bool(memory["archive_host"])),
        overlap=overlapped(prepared, run, notes),
        baselines=other_caches(prepared, run, notes),
        notes=notes,
    )


def run_apart(prepared: Prepared, notes: list[str]) -> tuple[Run, dict[str, int | None]]:
    """Makes the video, one stage after the other: its run, and its memory in bytes by owner."""
    settings, video = prepared.settings, new_video(prepared)
    with frame_writer(settings, notes) as write:
        run = run_video(video, settings.blocks, write, show_progress)
    return run, memory_by_owner(video, run.peak_bytes)


def floors_of(settings: Settings, run: Run, rates: Rates, archive_on_host: bool) -> dict[str, float]:
    """Floors (ms by stage) of the blocks that medians are over."""
    blocks = steady(run.blocks, settings.layout.config)
    written = [run.record.blocks[block.index].mid_slots_written for block in blocks]
    return stage_floors(settings.workload, rates, blocks[-1].index, sum(written) / len(written), archive_on_host)


def overlapped(prepared: Prepared, apart: Run, notes: list[str]) -> dict[str, Any] | None:
    """The JSON's part about decoding beside the denoising. `apart` is the run without; None when it does not fit."""
    settings = prepared.settings
    if not prepared.decoding.overlap:
        if settings.overlap:
            notes.append(NO_OVERLAP)
        return None
    video = new_video(prepared, overlap=True)
    say("the same with each block decoded beside the denoising of the next")
    with frame_writer(settings, notes) as write:
        blocks, peak = run_overlapped(video, blocks_to_make(video, settings.blocks), write, show_progress)
    return overlap_report(video, blocks, peak, apart.blocks, settings.frames_per_block)


def other_caches(prepared: Prepared, run: Run, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON's part about other caches; `run` says how long compression takes."""
    settings = prepared.settings
    if not settings.baseline_blocks:
        return []
    stages = stage_times(steady(run.blocks, settings.layout.config))
    compression = stages["compression"].median_ms if settings.model.vae and "compression" in stages else 0.0
    contests = {
        index: contest(
            prepared.models.wan,
            prepared.text,
            settings.layout,
            settings.sampling,
            index,
            settings.repeats,
            compression,
            say,
        )
        for index in settings.baseline_blocks
    }
    compared: list[dict[str, Any]] = comparison(contests, settings.frames_per_block)
    if any(at["layers_share_a_buffer"] for entry in compared for at in entry["blocks"]):
        notes.append(SHARED_BUFFER)
    return compared


@contextmanager
def frame_writer(settings: Settings, notes: list[str]) -> Iterator[Callable[[Tensor], None] | None]:
    """What takes a block's frames: a video file in a folder that is removed afterwards.

    None where nothing is decoded, and, with a note, where av is not installed.
    """
    if not settings.model.vae:
        yield None
        return
    if importlib.util.find_spec("av") is None:
        notes.append(NO_FILE)
        yield None
        return
    from ..files.video import VideoWriter  # needs av, which a bare checkout on a rented GPU may lack

    size = settings.layout.size
    with (
        tempfile.TemporaryDirectory() as folder,
        VideoWriter(Path(folder) / "bench.mp4", FPS, size.width, size.height) as writer,
    ):
        yield writer.write
