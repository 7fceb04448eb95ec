"""The panels about the mid blocks that were chosen: by layer and block, and their affinity by age."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..generate.record import CacheRecord
from .ages import Choices, choices, layer_shares
from .canvas import Box, Canvas, bin_of_pixel, bins, draw_scale, edges, height_of, nice_step, span, y_label, y_tick
from .colours import COLOURS, FAINT, FAINTEST_MID, PANEL, STORED, prompt_colour
from .facts import seconds_per_block, selection_facts
from .panels import FEWEST_BLOCKS, axis_blocks
from .returns import stretches

STRIP = 8  # height of the strip of prompts above the heat map
MOST_AGES = 80  # bins of ages
LOWEST, HIGHEST = 10, 90  # percentiles between which the band lies
NOTHING_CHOSEN = "no mid block has been chosen yet"


# --- by layer and block ------------------------------------------------------------------------------------------


def draw_layers(canvas: Canvas, box: Box, record: CacheRecord) -> None:
    """Across, the mid blocks; upwards, the layers; the colour is in how many of its chances a layer chose a block."""
    shares = layer_shares(record, choices(record))
    layers = len(shares)
    y_label(canvas, box, "layer")
    if not np.isfinite(shares).any():
        canvas.say(box, NOTHING_CHOSEN)
        return
    blocks = axis_blocks(record)
    cells = _layer_cells(shares, bins(blocks, box.width))
    pixels = cells[bin_of_pixel(layers, box.height)[:, None], bin_of_pixel(blocks, box.width)[None]]
    if box.height // layers >= 5:  # room for a line between layers
        pixels[edges(layers, box.height)[1:-1]] = PANEL
    canvas.image.paste(Image.fromarray(np.ascontiguousarray(pixels[::-1])), (box.left, box.top))
    step = max(1, int(nice_step(layers, max(2, box.height // (2 * canvas.style.label)))))
    for layer in range(0, layers, step):
        y_tick(canvas, box, box.bottom - 1 - round((layer + 0.5) * box.height / layers), f"{layer}")
    story = stretches(record)
    for stretch in story if len(story) > 1 else ():
        left, right = span(stretch.blocks, blocks, box.width)
        strip = (box.left + left, box.top - STRIP - 2, box.left + right - 1, box.top - 3)
        canvas.draw.rectangle(strip, fill=prompt_colour(stretch.number))


def _layer_cells(shares: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Colours, uint8 [layers, columns, 3]; a column shows the highest share of its blocks. See `layer_shares`.

    `columns` has the first block of each column, and the end.
    """
    padded = np.full((len(shares), columns[-1]), -1.0)  # -1: no mid block
    padded[:, : shares.shape[1]] = np.nan_to_num(shares, nan=-1.0)
    highest = np.maximum.reduceat(padded, columns[:-1], axis=1)
    cells = np.empty((*highest.shape, 3))
    cells[:] = PANEL
    cells[highest == 0] = STORED
    faintest, attended = np.array(FAINTEST_MID), np.array(COLOURS["mid"])
    cells[highest > 0] = faintest + (attended - faintest) * np.sqrt(highest[highest > 0])[:, None]
    return np.rint(cells).astype(np.uint8)


def layers_fact(record: CacheRecord) -> str:
    """How far the layers agree, as a sentence; "" where none had a choice."""
    facts = selection_facts(record)
    if facts.agreement is None:
        return ""
    return f"two layers share {facts.agreement:.0%} of their mid blocks ({facts.chance_agreement:.0%} by chance)"


# --- affinity by age ---------------------------------------------------------------------------------------------


def affinity_by_age(chosen: Choices) -> tuple[np.ndarray, np.ndarray]:
    """First age of each bin and the end, int64 [bins + 1], and three percentiles of affinity, float64 [3, bins].

    They are the 10th, the 50th and the 90th; NaN where a bin has nothing.
    """
    scored = np.isfinite(chosen.affinity)
    age, affinity = chosen.age[scored], chosen.affinity[scored]
    last = int(age.max(initial=0))
    starts = bins(last + 1, MOST_AGES)
    order = np.argsort(age, kind="stable")
    groups = np.split(affinity[order], np.searchsorted(age[order], starts[1:-1]))
    levels = [np.percentile(g, (LOWEST, 50, HIGHEST)) if g.size else (np.nan,) * 3 for g in groups]
    return starts, np.array(levels).T


def draw_affinity(canvas: Canvas, box: Box, record: CacheRecord) -> None:
    """Across, the age of the mid blocks that were chosen; upwards, how far their affinity is above that of all."""
    chosen = choices(record)
    y_label(canvas, box, "std. deviations")
    if not np.isfinite(chosen.affinity).any():
        canvas.say(box, _why_no_affinity(record, chosen))
        return
    starts, (low, middle, high) = affinity_by_age(chosen)
    bottom = min(0.0, float(np.nanmin(low)))
    top = max(1.0, float(np.nanmax(high)))
    bottom, top = bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom)
    draw_scale(canvas, box, top, 1.0, bottom)
    zero = height_of(box, 0.0, top, bottom)
    canvas.draw.line((box.left, zero, box.right - 1, zero), fill=FAINT, width=2)
    edge = box.left + np.rint(starts * box.width / ages_axis(record)).astype(int)
    for i in np.flatnonzero(np.isfinite(middle)):
        x0, x1 = int(edge[i]), int(edge[i + 1]) - 1
        upper, lower = (height_of(box, float(each[i]), top, bottom) for each in (high, low))
        canvas.draw.rectangle((x0, upper, x1, lower), fill=FAINTEST_MID)
        y = height_of(box, float(middle[i]), top, bottom)
        canvas.draw.rectangle((x0, y - 1, x1, y + 2), fill=COLOURS["mid"])


def ages_axis(record: CacheRecord) -> int:
    """Ages that the x axis spans, from 0: up to the oldest that a mid block can have."""
    last = record.blocks[-1].block if record.blocks else 0
    return max(FEWEST_BLOCKS, last - record.config.sink_blocks + 1)


def _why_no_affinity(record: CacheRecord, chosen: Choices) -> str:
    if record.config.selection != "affinity":
        return f"selection by {record.config.selection} measures no affinity"
    if not chosen.mid.size:
        return NOTHING_CHOSEN
    if any(block.affinity for block in record.blocks):
        return "every stored mid block was attended, so there was nothing to choose by affinity yet"
    return "this record has no affinity: an earlier version made it"


def ages_fact(record: CacheRecord) -> str:
    """How old the chosen mid blocks were, as a sentence; "" before the first."""
    facts = selection_facts(record)
    if facts.mean_age is None:
        return ""
    age = f"mean age {facts.mean_age:,.1f} blocks ({facts.mean_age * seconds_per_block(record):,.1f} s)"
    return age + (f"; of all stored {facts.mean_stored_age:,.1f}" if facts.mean_stored_age is not None else "")
