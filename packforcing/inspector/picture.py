"""The record as a picture: partitions over time, tokens attended and bytes held."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from PIL import Image

from ..errors import PackForcingError
from ..generate.record import PARTITIONS, CacheRecord
from ..lettering import Fonts
from .canvas import Box, Canvas, bin_of, draw_x_ticks, edges
from .colours import COLOURS, FAINT, FULL, LABELS, PANEL, RETURN, STORED, TEXT, Colour, mid_colour
from .facts import counted, frames_made, seconds_per_block
from .panels import axis_blocks, bytes_now, draw_bytes, draw_partitions, draw_tokens, tokens_now
from .returns import returns
from .story_panel import BAND_HEIGHT, draw_story, has_story, story_fact

SMALLEST_WIDTH = 640
LEFT, RIGHT = 92, 28  # margins of the plots
TITLE_HEIGHT, HEADING, LEGEND_ROW, TICKS, GAP = 76, 26, 22, 24, 22
PANEL_HEIGHTS = (400, 190, 190)
RETURN_LABEL = "taken up from the past of a prompt that returns"


def picture(record: CacheRecord, width: int = 1280) -> Image.Image:
    """The run as an RGB picture, `width` pixels wide: three panels that share the x axis, the block being made.

    From above they are: where every block of the history was, and how many layers selected it; the tokens attended, and
    those that a full cache would have held; the bytes in use. Where there are more blocks than pixels, a pixel shows
    the most that any of its blocks was selected, and the mean of their tokens and bytes. A story of two or more
    stretches adds its prompts above the first panel, and frames in it around what its returns took up.

    Raises PackForcingError when `width` is below 640 pixels.
    """
    if width < SMALLEST_WIDTH:
        raise PackForcingError(f"The picture must be at least {SMALLEST_WIDTH} pixels wide, but width is {width}.")
    fonts = Fonts()
    legends = _legends(record)
    rows = [_legend_rows(fonts, legend, width) for legend in legends]
    boxes = _panel_boxes(record, width, [1 + max(row for row, _ in places) for places in rows])
    canvas = Canvas(width, boxes[-1].bottom + TICKS + 34, fonts)
    _draw_title(canvas, record, width)
    headings = (
        ("Partitions over time", story_fact(record)),
        ("Tokens attended", tokens_now(record)),
        ("Cache memory", bytes_now(record)),
    )
    for box, above, heading, legend, places in zip(boxes, _above(record), headings, legends, rows, strict=True):
        _draw_legend(canvas, replace(box, top=box.top - above), heading, legend, places)
        canvas.draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), fill=PANEL)
    for draw_panel, box in zip((draw_partitions, draw_tokens, draw_bytes), boxes, strict=True):
        draw_panel(canvas, box, record)
    if has_story(record):
        draw_story(canvas, boxes[0], record, axis_blocks(record))
    for box in boxes:
        draw_x_ticks(canvas, box, axis_blocks(record))
    label = f"block being made (a block is {seconds_per_block(record):.3g} s of video)"
    canvas.write(((boxes[2].left + boxes[2].right) // 2, boxes[2].bottom + TICKS + 4), label, 14, FAINT, "centre")
    return canvas.image


def cell_box(record: CacheRecord, made: int, history: int, width: int = 1280) -> tuple[int, int, int, int]:
    """Pixels (left, top, right, bottom; the last two excluded) of history block `history` while `made` was made."""
    fonts = Fonts()
    rows = [1 + max(row for row, _ in _legend_rows(fonts, legend, width)) for legend in _legends(record)]
    box = _panel_boxes(record, width, rows)[0]
    blocks = axis_blocks(record)
    across, up = edges(blocks, box.width), edges(blocks, box.height)
    column, row = bin_of(blocks, box.width, made), bin_of(blocks, box.height, history)
    return (
        box.left + int(across[column]),
        box.bottom - int(up[row + 1]),
        box.left + int(across[column + 1]),
        box.bottom - int(up[row]),
    )


# --- legends ---------------------------------------------------------------------------------------------------


class _Swatch(Enum):
    """What stands before a label where it is not a plain colour."""

    RAMP = "the colours of mid blocks, from few layers to all"
    LINE = "the line of a full cache"
    FRAME = "the frame around what a return took up"


@dataclass(frozen=True)
class _Entry:
    """One entry of a legend."""

    label: str
    swatch: Colour | _Swatch

    @property
    def swatch_width(self) -> int:
        if self.swatch is _Swatch.RAMP:
            return 60
        return 24 if self.swatch is _Swatch.LINE else 14


def _legends(record: CacheRecord) -> tuple[list[_Entry], list[_Entry], list[_Entry]]:
    """The legends of the three panels."""
    sink, recent, current, mid = (_Entry(LABELS[name], COLOURS[name]) for name in ("sink", "recent", "current", "mid"))
    in_history, attended = [sink], [sink, recent, current]
    if record.config.top_k:
        in_history += [_Entry("mid, attended by few to all layers", _Swatch.RAMP), _Entry("mid, stored only", STORED)]
        attended.append(mid)
    shows = [_Entry(RETURN_LABEL, _Swatch.FRAME)] if any(found.taken for found in returns(record)) else []
    used = [name for name in PARTITIONS if any(block.bytes.get(name) for block in record.blocks)] or PARTITIONS[:4]
    return (
        [*in_history, recent, current, *shows],
        [*attended, _Entry("full cache", _Swatch.LINE)],
        [_Entry(LABELS[name], COLOURS[name]) for name in used],
    )


def _legend_rows(fonts: Fonts, legend: list[_Entry], width: int) -> list[tuple[int, int]]:
    """Row and x of each entry, wrapped at the right margin."""
    places, row, x = [], 0, LEFT
    for entry in legend:
        size = entry.swatch_width + 6 + fonts.width(entry.label, 14) + 22
        if x > LEFT and x + size - 22 > width - RIGHT:
            row, x = row + 1, LEFT
        places.append((row, x))
        x += size
    return places


def _draw_legend(
    canvas: Canvas, box: Box, heading: tuple[str, str], legend: list[_Entry], places: list[tuple[int, int]]
) -> None:
    """The panel's heading with a fact at its right, and under it the legend, whose entries are at `places`."""
    rows = 1 + max(row for row, _ in places)
    top = box.top - 6 - rows * LEGEND_ROW
    title, fact = heading
    canvas.write((LEFT, top - HEADING), title, 17, TEXT)
    while fact and canvas.fonts.width(fact, 14) > box.width - canvas.fonts.width(title, 17) - 20:
        fact = fact.rpartition("; ")[0]
    canvas.write((box.right, top - HEADING + 2), fact, 14, TEXT, "right")
    for entry, (row, x) in zip(legend, places, strict=True):
        y = top + row * LEGEND_ROW + 2
        right = x + entry.swatch_width
        if entry.swatch is _Swatch.RAMP:
            for pixel in range(x, right):
                canvas.draw.line((pixel, y, pixel, y + 12), fill=mid_colour((pixel - x + 1) / (right - x)))
        elif entry.swatch is _Swatch.FRAME:
            canvas.draw.rectangle((x, y, right - 1, y + 12), outline=RETURN, width=2)
        elif entry.swatch is _Swatch.LINE:
            canvas.draw.line((x, y + 6, right, y + 6), fill=FULL, width=2)
        else:
            canvas.draw.rectangle((x, y, right - 1, y + 12), fill=entry.swatch)
        canvas.write((right + 6, y + 6 - canvas.fonts.height(14) // 2 - 1), entry.label, 14, FAINT)


# --- the layout ------------------------------------------------------------------------------------------------


def _above(record: CacheRecord) -> tuple[int, ...]:
    """Heights of what stands between each panel and its legend."""
    return (BAND_HEIGHT if has_story(record) else 0, 0, 0)


def _panel_boxes(record: CacheRecord, width: int, legend_rows: list[int]) -> list[Box]:
    """Where the panels are, given how many rows each one's legend has."""
    boxes, y = [], TITLE_HEIGHT
    for height, above, rows in zip(PANEL_HEIGHTS, _above(record), legend_rows, strict=True):
        top = y + HEADING + rows * LEGEND_ROW + 6 + above
        boxes.append(Box(LEFT, top, width - RIGHT, top + height))
        y = top + height + TICKS + GAP
    return boxes


def _draw_title(canvas: Canvas, record: CacheRecord, width: int) -> None:
    """The title, and under it as many facts about the run as there is room for."""
    config, size = record.config, record.size
    frames = frames_made(record, record.blocks)
    canvas.write((LEFT, 14), "PackForcing cache", 22, TEXT)
    facts = [
        f"{size.width}x{size.height}",
        f"{counted(len(record.blocks), 'block')}, {frames / record.fps:,.1f} s",
        f"sink {config.sink_frames}, recent {config.recent_frames} latent frames",
        f"top {config.top_k} mids by {config.selection}" if config.top_k else "no mids",
        f"{record.model.layers} layers",
        record.device,
    ]
    while len(facts) > 1 and canvas.fonts.width(" · ".join(facts), 14) > width - LEFT - RIGHT:
        facts.pop()
    canvas.write((LEFT, 46), " · ".join(facts), 14, FAINT)
