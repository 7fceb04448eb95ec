"""The record as a picture: partitions over time, tokens attended and bytes held."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..byte_units import byte_unit
from ..errors import PackForcingError
from ..generate.record import PARTITIONS, CacheRecord
from .facts import (
    attended_mids,
    counted,
    frames_made,
    layout_of,
    model_bytes_per_value,
    seconds_per_block,
    selected_by,
    token_counts,
)

BACKGROUND, PANEL, GRID = (22, 24, 29), (30, 33, 40), (58, 63, 74)
TEXT, FAINT = (232, 234, 238), (160, 166, 178)
# Okabe and Ito's palette, which people with any colour vision can tell apart, by partition; mids go from STORED to mid.
COLOURS = {
    "sink": (86, 180, 233),
    "mid": (230, 159, 0),
    "recent": (0, 158, 115),
    "current": (240, 228, 66),
    "aside": (0, 114, 178),
    "archive_device": (204, 121, 167),
    "archive_host": (122, 88, 150),
    "key_sums": (213, 94, 0),
}
STORED, FAINTEST_MID = (62, 66, 78), (112, 84, 34)
FULL = (255, 255, 255)
LABELS = {
    "sink": "sink",
    "mid": "mid, attended",
    "recent": "recent",
    "current": "current",
    "aside": "set aside",
    "archive_device": "archive, device",
    "archive_host": "archive, host",
    "key_sums": "key sums",
}

SMALLEST_WIDTH = 640
LEFT, RIGHT = 92, 28  # margins of the plots
TITLE_HEIGHT, HEADING, LEGEND_ROW, TICKS, GAP = 76, 26, 22, 24, 22
PANEL_HEIGHTS = (400, 190, 190)
FEWEST_BLOCKS = 12  # blocks that the axes show at least, so that the first block of a video is not one huge cell


@dataclass(frozen=True)
class _Box:
    """Pixels left..right-1, top..bottom-1."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


def picture(record: CacheRecord, width: int = 1280) -> Image.Image:
    """The run in three panels that share the x axis, the block being made; RGB, `width` pixels wide.

    From above: where every block of the history was (and how many layers selected it), the tokens attended against what
    a full cache would have held, and the bytes in use. Where there are more blocks than pixels, a pixel shows the most
    that any of its blocks was selected, and the mean of their tokens and bytes.

    Raises PackForcingError when `width` is below 640 pixels.
    """
    if width < SMALLEST_WIDTH:
        raise PackForcingError(f"The picture must be at least {SMALLEST_WIDTH} pixels wide, but width is {width}.")
    fonts = _Fonts()
    legends = _legends(record)
    rows = [_legend_rows(fonts, legend, width) for legend in legends]
    boxes = _panel_boxes(width, [1 + max(row for row, _ in places) for places in rows])
    image = Image.new("RGB", (width, boxes[-1].bottom + TICKS + 34), BACKGROUND)
    draw = ImageDraw.Draw(image)
    _title(draw, fonts, record, width)
    headings = (
        ("Partitions over time", ""),
        ("Tokens attended", _tokens_now(record)),
        ("Cache memory", _bytes_now(record)),
    )
    for box, heading, legend, places in zip(boxes, headings, legends, rows, strict=True):
        _draw_legend(draw, fonts, box, heading, legend, places)
        draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), fill=PANEL)
    _draw_partitions(image, draw, fonts, boxes[0], record)
    _draw_tokens(image, draw, fonts, boxes[1], record)
    _draw_bytes(image, draw, fonts, boxes[2], record)
    for box in boxes:
        _draw_x_ticks(draw, fonts, box, _axis_blocks(record))
    label = f"block being made (a block is {seconds_per_block(record):.3g} s of video)"
    fonts.write(draw, ((boxes[2].left + boxes[2].right) // 2, boxes[2].bottom + TICKS + 4), label, 14, FAINT, "centre")
    return image


def cell_box(record: CacheRecord, made: int, history: int, width: int = 1280) -> tuple[int, int, int, int]:
    """Pixels (left, top, right, bottom; the last two excluded) of history block `history` while `made` was made."""
    fonts = _Fonts()
    rows = [1 + max(row for row, _ in _legend_rows(fonts, legend, width)) for legend in _legends(record)]
    box = _panel_boxes(width, rows)[0]
    blocks = _axis_blocks(record)
    across, up = _edges(blocks, box.width), _edges(blocks, box.height)
    column, row = _bin_of(blocks, len(across) - 1, made), _bin_of(blocks, len(up) - 1, history)
    return (
        box.left + int(across[column]),
        box.bottom - int(up[row + 1]),
        box.left + int(across[column + 1]),
        box.bottom - int(up[row]),
    )


def mid_colour(share: float) -> tuple[int, int, int]:
    """The colour of a mid block that `share` of the layers attend; 0 is a stored block that none selected."""
    if share <= 0:
        return STORED
    return tuple(round(a + (b - a) * share) for a, b in zip(FAINTEST_MID, COLOURS["mid"], strict=True))


class _Fonts:
    """Pillow's own font at any size; the small bitmap font where Pillow is older than 10.1 or has no FreeType."""

    def __init__(self) -> None:
        self._fonts: dict[int, ImageFont.ImageFont | ImageFont.FreeTypeFont] = {}

    def __getitem__(self, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
        if size not in self._fonts:
            try:
                self._fonts[size] = ImageFont.load_default(size=size)
            except (TypeError, ImportError, OSError):
                self._fonts[size] = ImageFont.load_default()
        return self._fonts[size]

    def width(self, text: str, size: int) -> int:
        return int(np.ceil(self[size].getbbox(text)[2]))

    def height(self, size: int) -> int:
        """From the top of the line to the bottom of a letter with a tail."""
        return int(np.ceil(self[size].getbbox("Mg")[3]))

    def write(
        self, draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, fill: tuple, align: str = "left"
    ) -> None:
        """Write with the line's top at `at`; x is its left end, centre or right end."""
        shift = {"left": 0, "centre": 0.5, "right": 1}[align] * self.width(text, size)
        draw.text((round(at[0] - shift), at[1]), text, font=self[size], fill=fill)


# A legend entry: a label, and its colour; None is the ramp of the mids, "line" the full cache's line.
_Legend = list[tuple[str, object]]


def _legends(record: CacheRecord) -> tuple[_Legend, _Legend, _Legend]:
    mids = [("mid, attended by few to all layers", None), ("mid, stored only", STORED)] if record.config.top_k else []
    sink, recent, current, mid = ((LABELS[name], COLOURS[name]) for name in ("sink", "recent", "current", "mid"))
    used = [name for name in PARTITIONS if any(block.bytes.get(name) for block in record.blocks)] or PARTITIONS[:4]
    return (
        [sink, *mids, recent, current],
        [sink, recent, current, *([mid] if mids else []), ("full cache", "line")],
        [(LABELS[name], COLOURS[name]) for name in used],
    )


def _swatch_width(colour: object) -> int:
    return 60 if colour is None else 24 if colour == "line" else 14


def _legend_rows(fonts: _Fonts, legend: _Legend, width: int) -> list[tuple[int, int]]:
    """Row and x of each entry, wrapped at the right margin."""
    places, row, x = [], 0, LEFT
    for label, colour in legend:
        size = _swatch_width(colour) + 6 + fonts.width(label, 14) + 22
        if x > LEFT and x + size - 22 > width - RIGHT:
            row, x = row + 1, LEFT
        places.append((row, x))
        x += size
    return places


def _panel_boxes(width: int, legend_rows: list[int]) -> list[_Box]:
    boxes, y = [], TITLE_HEIGHT
    for height, rows in zip(PANEL_HEIGHTS, legend_rows, strict=True):
        top = y + HEADING + rows * LEGEND_ROW + 6
        boxes.append(_Box(LEFT, top, width - RIGHT, top + height))
        y = top + height + TICKS + GAP
    return boxes


def _title(draw: ImageDraw.ImageDraw, fonts: _Fonts, record: CacheRecord, width: int) -> None:
    config, size = record.config, record.size
    frames = frames_made(record, record.blocks)
    fonts.write(draw, (LEFT, 14), "PackForcing cache", 22, TEXT)
    facts = [
        f"{size.width}x{size.height}",
        f"{counted(len(record.blocks), 'block')}, {frames / record.fps:,.1f} s",
        f"sink {config.sink_frames}, recent {config.recent_frames} latent frames",
        f"top {config.top_k} mids by {config.selection}" if config.top_k else "no mids",
        f"{record.model.layers} layers",
        record.device,
    ]
    while len(facts) > 1 and fonts.width(" · ".join(facts), 14) > width - LEFT - RIGHT:
        facts.pop()
    fonts.write(draw, (LEFT, 46), " · ".join(facts), 14, FAINT)


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    fonts: _Fonts,
    box: _Box,
    heading: tuple[str, str],
    legend: _Legend,
    places: list[tuple[int, int]],
) -> None:
    """The panel's heading with a fact at its right, and the legend under it."""
    rows = 1 + max(row for row, _ in places)
    top = box.top - 6 - rows * LEGEND_ROW
    title, fact = heading
    fonts.write(draw, (LEFT, top - HEADING), title, 17, TEXT)
    while fact and fonts.width(fact, 14) > box.width - fonts.width(title, 17) - 20:
        fact = fact.rpartition("; ")[0]
    fonts.write(draw, (box.right, top - HEADING + 2), fact, 14, TEXT, "right")
    for (label, colour), (row, x) in zip(legend, places, strict=True):
        y = top + row * LEGEND_ROW + 2
        right = x + _swatch_width(colour)
        if colour is None:
            for pixel in range(x, right):
                draw.line((pixel, y, pixel, y + 12), fill=mid_colour((pixel - x + 1) / (right - x)))
        elif colour == "line":
            draw.line((x, y + 6, right, y + 6), fill=FULL, width=2)
        else:
            draw.rectangle((x, y, right - 1, y + 12), fill=colour)
        fonts.write(draw, (right + 6, y + 6 - fonts.height(14) // 2 - 1), label, 14, FAINT)


def _axis_blocks(record: CacheRecord) -> int:
    """Blocks that the x axis spans."""
    return max(FEWEST_BLOCKS, record.blocks[-1].block + 1 if record.blocks else 0)


def _bins(blocks: int, pixels: int) -> np.ndarray:
    """First block of each bin, and the end: a bin a block, or a bin a pixel where there are more blocks than pixels."""
    bins = min(blocks, pixels)
    return np.arange(bins + 1) * blocks // bins


def _edges(blocks: int, pixels: int) -> np.ndarray:
    """First pixel of each bin, and the end."""
    bins = min(blocks, pixels)
    return np.arange(bins + 1) * pixels // bins


def _bin_of(blocks: int, bins: int, block: int) -> int:
    return int(np.searchsorted(_bins(blocks, bins), block, side="right")) - 1


def _bin_of_pixel(blocks: int, pixels: int) -> np.ndarray:
    """The bin of each pixel."""
    return np.repeat(np.arange(min(blocks, pixels)), np.diff(_edges(blocks, pixels)))


def _nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5, 10, ... that divides `span` into at most `most` steps."""
    power = 10.0 ** np.floor(np.log10(max(span, 1e-12) / most))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if span <= most * power * factor * (1 + 1e-9))


def _draw_x_ticks(draw: ImageDraw.ImageDraw, fonts: _Fonts, box: _Box, blocks: int) -> None:
    step = max(1, int(_nice_step(blocks, max(4, box.width // 90))))
    for block in range(0, blocks, step):
        x = box.left + round((block + 0.5) * box.width / blocks)
        draw.line((x, box.bottom, x, box.bottom + 4), fill=FAINT)
        fonts.write(draw, (x, box.bottom + 6), f"{block:,}", 13, FAINT, "centre")


def _y_tick(draw: ImageDraw.ImageDraw, fonts: _Fonts, box: _Box, y: int, text: str) -> None:
    draw.line((box.left - 5, y, box.left - 1, y), fill=FAINT)
    fonts.write(draw, (box.left - 9, y - fonts.height(13) // 2 - 1), text, 13, FAINT, "right")


def _y_label(image: Image.Image, fonts: _Fonts, box: _Box, text: str) -> None:
    """Write `text` upwards at the left of the panel."""
    size = (fonts.width(text, 14) + 2, fonts.height(14) + 3)
    label = Image.new("RGB", size, BACKGROUND)
    fonts.write(ImageDraw.Draw(label), (1, 0), text, 14, FAINT)
    label = label.rotate(90, expand=True)
    image.paste(label, (8, (box.top + box.bottom - label.height) // 2))


def _partition_cells(record: CacheRecord, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Colours uint8 [rows, columns, 3] of the partition panel, row 0 the oldest block; the arguments are bin edges.

    A bin shows the most telling thing in it: current, then sink, recent, an attended mid, a stored one.
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


def _draw_partitions(
    image: Image.Image, draw: ImageDraw.ImageDraw, fonts: _Fonts, box: _Box, record: CacheRecord
) -> None:
    blocks = _axis_blocks(record)
    cells = _partition_cells(record, _bins(blocks, box.width), _bins(blocks, box.height))
    pixels = cells[_bin_of_pixel(blocks, box.height)[:, None], _bin_of_pixel(blocks, box.width)[None]]
    if box.height // blocks >= 5:  # room for a line between cells
        pixels[_edges(blocks, box.height)[1:-1]] = PANEL
        pixels[:, _edges(blocks, box.width)[1:-1]] = PANEL
    image.paste(Image.fromarray(np.ascontiguousarray(pixels[::-1])), (box.left, box.top))
    step = max(1, int(_nice_step(blocks, 8)))
    for block in range(0, blocks, step):
        _y_tick(draw, fonts, box, box.bottom - 1 - round((block + 0.5) * box.height / blocks), f"{block:,}")
    _y_label(image, fonts, box, "history block")
    if not record.blocks:
        middle = ((box.left + box.right) // 2, (box.top + box.bottom) // 2 - 10)
        fonts.write(draw, middle, "no block has been made yet", 17, FAINT, "centre")


def _pooled(record: CacheRecord, values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Mean of `values` [blocks made] over the made blocks in each bin; 0 where there is none."""
    sums, counts = np.zeros(bins[-1]), np.zeros(bins[-1])
    indices = [block.block for block in record.blocks]
    sums[indices], counts[indices] = values, 1
    return np.add.reduceat(sums, bins[:-1]) / np.maximum(1, np.add.reduceat(counts, bins[:-1]))


def _draw_stack(image: Image.Image, box: _Box, layers: list[tuple[np.ndarray, tuple]], blocks: int, top: float) -> None:
    """Stack `layers` of (values [bins], colour), the first at the bottom; `top` is the value at the panel's top."""
    column = _bin_of_pixel(blocks, box.width)
    pixels = np.array(image.crop((box.left, box.top, box.right, box.bottom)))
    level = np.arange(box.height)[::-1][:, None]
    floor = np.zeros(box.width)
    for values, colour in layers:
        ceiling = floor + values[column]
        inside = (level >= np.rint(floor / top * box.height)) & (level < np.rint(ceiling / top * box.height))
        pixels[inside] = colour
        floor = ceiling
    image.paste(Image.fromarray(pixels), (box.left, box.top))


def _draw_scale(draw: ImageDraw.ImageDraw, fonts: _Fonts, box: _Box, top: float, unit: float) -> None:
    """Horizontal lines and ticks; numbers are told in `unit`s."""
    step = _nice_step(top / unit, 5)
    for i in range(int(top / unit / step * (1 + 1e-9)) + 1):
        y = box.bottom - 1 - round(i * step * unit / top * box.height)
        if y >= box.top:
            draw.line((box.left, y, box.right - 1, y), fill=GRID)
            _y_tick(draw, fonts, box, y, f"{i * step:,.10g}")


def _draw_tokens(image: Image.Image, draw: ImageDraw.ImageDraw, fonts: _Fonts, box: _Box, record: CacheRecord) -> None:
    blocks, counts = _axis_blocks(record), token_counts(record)
    bins = _bins(blocks, box.width)
    names = ("sink", "recent", "current", "mid")
    context = sum(counts[name] for name in names)
    # A full cache outgrows any panel in which the context can still be seen, so the panel ends above the context.
    top = 1.45 * float(max(context, default=layout_of(record).tokens_per_block))
    unit = 1000.0
    _y_label(image, fonts, box, "thousand tokens")
    _draw_scale(draw, fonts, box, top, unit)
    _draw_stack(image, box, [(_pooled(record, counts[name], bins), COLOURS[name]) for name in names], blocks, top)
    points = [
        (box.left + (block.block + 0.5) * box.width / blocks, box.bottom - 1 - full / top * box.height)
        for block, full in zip(record.blocks, counts["full"], strict=True)
    ]
    if len(points) == 1:  # a single block gets a dash
        points = [(points[0][0] - 12, points[0][1]), (points[0][0] + 12, points[0][1])]
    line, leaves = _below(points, box.top)
    for colour, thickness in ((BACKGROUND, 5), (FULL, 2)):  # dark edges part the line from the yellow
        draw.line(line, fill=colour, width=thickness)
    if leaves:
        x = line[-1][0]
        draw.polygon([(x - 5, box.top + 9), (x + 5, box.top + 9), (x, box.top)], fill=FULL)


def _below(points: list[tuple[float, float]], top: float) -> tuple[list[tuple[float, float]], bool]:
    """The start of a rising line, cut where it crosses `top`, and whether it does."""
    kept = points[:1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 < top:
            return [*kept, (x0 + (x1 - x0) * (y0 - top) / (y0 - y1), top)], True
        kept.append((x1, y1))
    return kept, False


def _tokens_now(record: CacheRecord) -> str:
    if not record.blocks:
        return ""
    last = {name: int(values[-1]) for name, values in token_counts(record).items()}
    full = last.pop("full")
    now = sum(last.values())
    return f"now {now:,} tokens; a full cache would hold {full:,} ({full / now:.1f} times)"


def _bytes_now(record: CacheRecord) -> str:
    if not record.blocks:
        return ""
    now = record.blocks[-1].bytes
    host = now.get("archive_host", 0)
    unit, name = byte_unit(sum(now.values()))
    text = f"now {(sum(now.values()) - host) / unit:,.2f} {name} on the device"
    if host:
        text += f", {host / unit:,.2f} {name} in host memory"
    full = record.model.kv_bytes(int(token_counts(record)["full"][-1]), model_bytes_per_value(record))
    return text + f"; a full cache would hold {full / unit:,.1f} {name}"


def _draw_bytes(image: Image.Image, draw: ImageDraw.ImageDraw, fonts: _Fonts, box: _Box, record: CacheRecord) -> None:
    blocks = _axis_blocks(record)
    bins = _bins(blocks, box.width)
    values = {name: np.array([block.bytes.get(name, 0) for block in record.blocks], float) for name in PARTITIONS}
    most = float(max(sum(values.values()), default=0.0)) or 1e6
    unit, name = byte_unit(most)
    top = 1.15 * most
    _y_label(image, fonts, box, name)
    _draw_scale(draw, fonts, box, top, unit)
    _draw_stack(image, box, [(_pooled(record, values[n], bins), COLOURS[n]) for n in PARTITIONS], blocks, top)
