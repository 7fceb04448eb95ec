"""The panel of time: how long each stage of a block took."""

from __future__ import annotations

import numpy as np

from ..generate.record import STAGES, CacheRecord
from .canvas import Box, Canvas, bin_of_pixel, bins, draw_scale, draw_stack, height_of, y_label
from .colours import BACKGROUND, FULL, OTHER_STAGE, STAGE_COLOURS, Colour
from .facts import frames_made, loop_seconds
from .panels import axis_blocks, pooled

STACKED = ("denoise", "clean_pass", "compression", "refresh", "decode", "wait", "preview")
OUTLIER = 2.0  # times the usual block: the axis ends there, or a slow first block would flatten all others


def decoded_beside(record: CacheRecord) -> bool:
    """Whether blocks were decoded beside the denoising of the next one: then that time is none of the loop's."""
    return any("wait" in block.seconds for block in record.blocks)


def stacked_stages(record: CacheRecord) -> list[tuple[str, Colour]]:
    """The stages that ran in the loop, with their colours, in the order in which they are stacked."""
    ran = {stage for block in record.blocks for stage in block.seconds}
    if decoded_beside(record):
        ran.discard("decode")
    known = [(stage, STAGE_COLOURS[stage]) for stage in STACKED if stage in ran]
    return known + [(stage, OTHER_STAGE) for stage in sorted(ran - set(STAGES))]


def draw_times(canvas: Canvas, box: Box, record: CacheRecord) -> None:
    """The seconds of each block, stacked by stage, and a line for decoding where that ran beside the loop."""
    blocks = axis_blocks(record)
    starts = bins(blocks, box.width)
    stages = {
        stage: pooled(record, np.array([block.seconds.get(stage, 0.0) for block in record.blocks]), starts)
        for stage in (*STAGES, *(stage for stage, _ in stacked_stages(record)))
    }
    layers = [(stages[stage], colour) for stage, colour in stacked_stages(record)]
    if not layers:
        y_label(canvas, box, "seconds")
        if record.blocks:
            canvas.say(box, "not measured")
        return
    beside = stages["decode"] if decoded_beside(record) else np.zeros(0)
    whole = np.sum([values for values, _ in layers], axis=0)
    top = _top(np.maximum(whole, beside) if beside.size else whole)
    unit, name = (1.0, "seconds") if top >= 0.2 else (1e-3, "milliseconds")
    y_label(canvas, box, name)
    draw_scale(canvas, box, top, unit)
    draw_stack(canvas, box, layers, blocks, top)
    if beside.size:
        _draw_line(canvas, box, beside[bin_of_pixel(blocks, box.width)], top)


def _top(seconds: np.ndarray) -> float:
    """The highest value of the axis: above the slowest block, unless that is an outlier."""
    measured = seconds[seconds > 0]
    if not measured.size:
        return 1.0
    return 1.15 * min(float(measured.max()), OUTLIER * float(np.median(measured)))


def _draw_line(canvas: Canvas, box: Box, values: np.ndarray, top: float) -> None:
    """A line through the values [pixels] that are not 0; dark edges part it from what is below."""
    points = [(box.left + x, max(box.top, height_of(box, float(values[x]), top))) for x in np.flatnonzero(values)]
    if len(points) > 1:
        for colour, thickness in ((BACKGROUND, 5), (FULL, 2)):
            canvas.draw.line(points, fill=colour, width=thickness)


def times_fact(record: CacheRecord) -> str:
    """The mean time of a block and the speed as a sentence; "" where nothing was measured."""
    timed = [block for block in record.blocks if block.seconds]
    whole = sum(map(loop_seconds, timed))
    if not whole:
        return ""
    slowest = max(timed, key=loop_seconds)
    return (
        f"{whole / len(timed):.3g} s a block, {frames_made(record, timed) / whole:,.1f} frames a second; "
        f"slowest: block {slowest.block:,}, {loop_seconds(slowest):.3g} s"
    )
