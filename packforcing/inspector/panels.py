"""The panels of what the cache held: where blocks were, the tokens attended, and the bytes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from PIL import Image

from ..byte_units import byte_unit
from ..generate.record import PARTITIONS, CacheRecord
from .canvas import Box, Canvas, bin_of_pixel, bins, draw_scale, draw_stack, edges, nice_step, y_label, y_tick
from .colours import BACKGROUND, COLOURS, FAINTEST_MID, FULL, PANEL, STORED
from .facts import attended_mids, layout_of, model_bytes_per_value, selected_by, token_counts

FEWEST_BLOCKS = 12  # blocks that the axes show at least, so that the first block of a video is not one huge cell


def axis_blocks(record: CacheRecord) -> int:
    """Blocks that the x axis spans."""
    return max(FEWEST_BLOCKS, record.blocks[-1].block + 1 if record.blocks else 0)


# --- partitions over time --------------------------------------------------------------------------------------


def _partition_cells(record: CacheRecord, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Colours of the panel's bins, uint8 [rows, columns, 3]; row 0 is the oldest block of the history.

    `columns` and `rows` have the first block of each bin, and the end. A bin shows the most telling thing in it: the
    current block, else a sink, a recent block, a mid block that is attended, or one that is only stored.
    """
    config, blocks = record.config, columns[-1]
    sink, recent = config.sink_blocks, config.recent_blocks
    share = np.zeros((len(rows) - 1, len(columns) - 1), dtype=np.float32)
    was_made = np.zeros(blocks, dtype=bool)
    column_of = np.repeat(np.arange(len(columns) - 1), np.diff(columns))
    row_of = np.repeat(np.arange(len(rows) - 1), np.diff(rows))
    for block in record.blocks:
        was_made[block.block] = True
        if attended_mids(block):
            mids, times = np.unique(selected_by(block), return_counts=True)
            np.maximum.at(share, (row_of[mids], column_of[block.block]), times / len(block.selected))

    # Blocks made in a column: from..to; history in a row: low..high (both inclusive).
    start, stop = columns[:-1][None], columns[1:][None] - 1
    low, high = rows[:-1][:, None], rows[1:][:, None] - 1

    def overlaps(first: np.ndarray | int, last: np.ndarray | int) -> np.ndarray:
        return np.maximum(low, first) <= np.minimum(high, last)

    stored, attended = np.array(STORED), np.array(COLOURS["mid"])
    cells = np.empty((*share.shape, 3))
    cells[:] = PANEL
    if config.top_k:  # without mids nothing between sink and recent is kept
        cells[overlaps(sink, stop - recent - 1)] = stored
    faintest = np.array(FAINTEST_MID)
    cells[share > 0] = faintest + (attended - faintest) * share[share > 0][:, None]
    cells[overlaps(np.maximum(sink, start - recent), stop - 1)] = COLOURS["recent"]
    cells[overlaps(0, np.minimum(sink, stop) - 1)] = COLOURS["sink"]
    cells[overlaps(start, stop)] = COLOURS["current"]
    cells[:, ~np.logical_or.reduceat(was_made, columns[:-1])] = PANEL
    return np.rint(cells).astype(np.uint8)


def draw_partitions(canvas: Canvas, box: Box, record: CacheRecord) -> None:
    """Across, the block being made; upwards, the blocks of its history, each in the colour of its partition."""
    blocks = axis_blocks(record)
    cells = _partition_cells(record, bins(blocks, box.width), bins(blocks, box.height))
    pixels = cells[bin_of_pixel(blocks, box.height)[:, None], bin_of_pixel(blocks, box.width)[None]]
    if box.height // blocks >= 5:  # room for a line between cells
        pixels[edges(blocks, box.height)[1:-1]] = PANEL
        pixels[:, edges(blocks, box.width)[1:-1]] = PANEL
    canvas.image.paste(Image.fromarray(np.ascontiguousarray(pixels[::-1])), (box.left, box.top))
    step = max(1, int(nice_step(blocks, max(2, box.height // (2 * canvas.style.label)))))
    for block in range(0, blocks, step):
        y_tick(canvas, box, box.bottom - 1 - round((block + 0.5) * box.height / blocks), f"{block:,}")
    y_label(canvas, box, "history block")
    if not record.blocks:
        canvas.say(box, "no block has been made yet")


# --- tokens attended -------------------------------------------------------------------------------------------


def draw_tokens(canvas: Canvas, box: Box, record: CacheRecord) -> None:
    """The tokens that each block attended, stacked by partition, and a line for those of a full cache."""
    blocks, counts = axis_blocks(record), token_counts(record)
    starts = bins(blocks, box.width)
    names = ("sink", "recent", "current", "mid")
    context = np.sum([counts[name] for name in names], axis=0)
    # A full cache outgrows any panel in which the context can still be seen, so the panel ends above the context.
    top = 1.45 * float(max(context.tolist(), default=layout_of(record).tokens_per_block))
    unit = 1000.0
    y_label(canvas, box, "thousand tokens")
    draw_scale(canvas, box, top, unit)
    draw_stack(canvas, box, [(pooled(record, counts[name], starts), COLOURS[name]) for name in names], blocks, top)
    points = [
        (box.left + (block.block + 0.5) * box.width / blocks, box.bottom - 1 - full / top * box.height)
        for block, full in zip(record.blocks, counts["full"], strict=True)
    ]
    if len(points) == 1:  # a single block gets a dash
        points = [(points[0][0] - 12, points[0][1]), (points[0][0] + 12, points[0][1])]
    line, leaves = _below(points, box.top)
    for colour, thickness in ((BACKGROUND, 5), (FULL, 2)):  # dark edges part the line from the yellow
        canvas.draw.line(line, fill=colour, width=thickness)
    if leaves:
        x = line[-1][0]
        canvas.draw.polygon([(x - 5, box.top + 9), (x + 5, box.top + 9), (x, box.top)], fill=FULL)


def _below(points: list[tuple[float, float]], top: float) -> tuple[list[tuple[float, float]], bool]:
    """The start of a rising line, cut where it crosses `top`, and whether it does."""
    kept = points[:1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 < top:
            return [*kept, (x0 + (x1 - x0) * (y0 - top) / (y0 - y1), top)], True
        kept.append((x1, y1))
    return kept, False


def tokens_now(record: CacheRecord) -> str:
    """The tokens of the last block as a sentence; "" before the first."""
    if not record.blocks:
        return ""
    last = {name: int(values[-1]) for name, values in token_counts(record).items()}
    full = last.pop("full")
    now = sum(last.values())
    return f"now {now:,} tokens; a full cache would hold {full:,} ({full / now:.1f} times)"


# --- cache memory ----------------------------------------------------------------------------------------------


def draw_bytes(canvas: Canvas, box: Box, record: CacheRecord) -> None:
    """The bytes that were in use while each block was made, stacked by what held them."""
    blocks = axis_blocks(record)
    starts = bins(blocks, box.width)
    values = {name: np.array([block.bytes.get(name, 0) for block in record.blocks], float) for name in PARTITIONS}
    most = max(np.sum(list(values.values()), axis=0).tolist(), default=0.0) or 1e6
    unit, name = byte_unit(most)
    top = 1.15 * most
    y_label(canvas, box, name)
    draw_scale(canvas, box, top, unit)
    draw_stack(canvas, box, [(pooled(record, values[n], starts), COLOURS[n]) for n in PARTITIONS], blocks, top)


def bytes_now(record: CacheRecord) -> str:
    """The bytes after the last block as a sentence; "" before the first."""
    if not record.blocks:
        return ""
    now = record.blocks[-1].bytes
    host, disk = now.get("archive_host", 0), now.get("archive_disk", 0)
    unit, name = byte_unit(sum(now.values()))
    text = f"now {(sum(now.values()) - host - disk) / unit:,.2f} {name} on the device"
    if host:
        text += f", {host / unit:,.2f} {name} in host memory"
    if disk:
        text += f", {disk / unit:,.2f} {name} on the disk"
    full = record.model.kv_bytes(int(token_counts(record)["full"][-1]), model_bytes_per_value(record))
    return text + f"; a full cache would hold {full / unit:,.1f} {name}"


def pooled(record: CacheRecord, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Mean of `values` [blocks made] over the made blocks in each bin; 0 where there is none.

    `starts` has the first block of each bin, and the end.
    """
    sums, counts = np.zeros(starts[-1]), np.zeros(starts[-1])
    indices = [block.block for block in record.blocks]
    sums[indices], counts[indices] = values, 1
    return np.add.reduceat(sums, starts[:-1]) / np.maximum(1, np.add.reduceat(counts, starts[:-1]))
