"""The record as a picture: all of it, to be opened, or an overview that can be read on a node in the graph."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ..errors import PackForcingError
from ..generate.record import CacheRecord
from ..lettering import Fonts
from .canvas import Box, Canvas, bin_of, draw_x_axis, edges
from .colours import FAINT, PANEL, TEXT
from .contents import Panel, overview_panels, rows_of_panels
from .facts import counted, frames_made, tokens_saved
from .legend import draw_legend, legend_places
from .panels import axis_blocks
from .story_panel import draw_story, has_story
from .style import FULL, NODE, Style

SMALLEST_WIDTH = 640
WIDTH, NODE_WIDTH = 1600, 800
TWO_COLUMNS = 1200  # width from which on small panels stand side by side
GAP = 26  # between rows of panels


def picture(record: CacheRecord, width: int = WIDTH) -> Image.Image:
    """The run as an RGB picture, `width` pixels wide, to be opened.

    Its panels are: where every block of the history was, and how many layers selected it; which layer chose which mid
    block; the affinity of chosen mid blocks by age; the time of each stage; the tokens attended, and those that a full
    cache would have held; the bytes in use. Without mid blocks the second and the third are left out. Where there are
    more blocks than pixels, a pixel shows the most that any of its blocks was selected, and the mean of times, tokens
    and bytes. A story of two or more stretches adds its prompts, and frames around what its returns took up.

    Raises PackForcingError when `width` is below 640 pixels.
    """
    if width < SMALLEST_WIDTH:
        raise PackForcingError(f"The picture must be at least {SMALLEST_WIDTH} pixels wide, but width is {width}.")
    return _drawn(record, _rows(record, width), width, FULL)


def overview(record: CacheRecord) -> Image.Image:
    """The run in two panels with large letters, 800 pixels wide: for a node in the graph, at half its size.

    They are where every block was, and which layer chose which mid block; without mid blocks the time of each stage.
    """
    return _drawn(record, [[panel] for panel in overview_panels(record)], NODE_WIDTH, NODE)


def panel_boxes(record: CacheRecord, width: int = WIDTH) -> dict[str, Box]:
    """Where the panels of `picture` are, by name."""
    return {each.panel.name: each.box for each in _placed(_rows(record, width), width, FULL)[0]}


def overview_boxes(record: CacheRecord) -> dict[str, Box]:
    """Where the panels of `overview` are, by name."""
    rows = [[panel] for panel in overview_panels(record)]
    return {each.panel.name: each.box for each in _placed(rows, NODE_WIDTH, NODE)[0]}


def cell_box(record: CacheRecord, made: int, history: int, width: int = WIDTH) -> tuple[int, int, int, int]:
    """Pixels (left, top, right, bottom; the last two excluded) of history block `history` while `made` was made."""
    return cell_in(panel_boxes(record, width)["partitions"], axis_blocks(record), made, history)


def cell_in(box: Box, blocks: int, made: int, history: int) -> tuple[int, int, int, int]:
    """`cell_box` in a panel of partitions whose axes span `blocks` blocks."""
    across, up = edges(blocks, box.width), edges(blocks, box.height)
    column, row = bin_of(blocks, box.width, made), bin_of(blocks, box.height, history)
    return (
        box.left + int(across[column]),
        box.bottom - int(up[row + 1]),
        box.left + int(across[column + 1]),
        box.bottom - int(up[row]),
    )


# --- the layout ------------------------------------------------------------------------------------------------


def _rows(record: CacheRecord, width: int) -> list[list[Panel]]:
    rows = rows_of_panels(record)
    return rows if width >= TWO_COLUMNS else [[panel] for row in rows for panel in row]


@dataclass(frozen=True)
class _Placed:
    """A panel, and where it is."""

    panel: Panel
    top: int  # of its heading
    box: Box  # of its plot


def _placed(rows: list[list[Panel]], width: int, style: Style) -> tuple[list[_Placed], int]:
    """Where each panel is, and the height of the picture. Plots of a row begin and end at the same height."""
    fonts, y = Fonts(), style.title_height
    placed: list[_Placed] = []
    for row in rows:
        edge = [round(i * width / len(row)) for i in range(len(row) + 1)]
        columns = [(edge[i] + style.left, edge[i + 1] - style.right) for i in range(len(row))]
        top = y + max(_head(fonts, style, panel, *column) for panel, column in zip(row, columns, strict=True))
        bottom = top + max(panel.height for panel in row)
        for panel, (left, right) in zip(row, columns, strict=True):
            placed.append(_Placed(panel, y, Box(left, top, right, bottom)))
        y = bottom + style.axis + GAP
    return placed, y


def _head(fonts: Fonts, style: Style, panel: Panel, left: int, right: int) -> int:
    """Height of what stands above a panel: its heading, its fact, its legend, and more."""
    rows = 1 + max(row for row, _ in legend_places(fonts, style, panel.legend, left, right))
    return style.heading_row + style.fact_row * (panel.fact is not None) + rows * style.legend_row + 8 + panel.above


# --- drawing ---------------------------------------------------------------------------------------------------


def _drawn(record: CacheRecord, rows: list[list[Panel]], width: int, style: Style) -> Image.Image:
    placed, height = _placed(rows, width, style)
    canvas = Canvas(width, height, Fonts(), style)
    _draw_title(canvas, record, width)
    for each in placed:
        panel, box = each.panel, each.box
        _draw_head(canvas, each, record)
        canvas.draw.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), fill=PANEL)
        panel.draw(canvas, box, record)
        if panel.name == "partitions" and has_story(record):
            draw_story(canvas, box, record, axis_blocks(record))
        draw_x_axis(canvas, box, panel.x_blocks, panel.x_label)
    return canvas.image


def _draw_head(canvas: Canvas, placed: _Placed, record: CacheRecord) -> None:
    """The panel's heading, under it as much of its fact as there is room for, and its legend."""
    style, panel, box, y = canvas.style, placed.panel, placed.box, placed.top
    canvas.write((box.left, y), panel.heading, style.heading, TEXT)
    y += style.heading_row
    if panel.fact is not None:
        fact = panel.fact(record)
        while "; " in fact and canvas.fonts.width(fact, style.words) > box.width:
            fact = fact.rpartition("; ")[0]
        canvas.write((box.left, y), fact, style.words, FAINT)
        y += style.fact_row
    draw_legend(canvas, y, panel.legend, legend_places(canvas.fonts, style, panel.legend, box.left, box.right))


def _draw_title(canvas: Canvas, record: CacheRecord, width: int) -> None:
    """The title, and under it as many facts about the run as there is room for."""
    style, config, size = canvas.style, record.config, record.size
    seconds = frames_made(record, record.blocks) / record.fps
    canvas.write((style.left, 14), "PackForcing cache", style.title, TEXT)
    facts = [
        f"{counted(len(record.blocks), 'block')}, {seconds:,.1f} s",
        *tokens_saved(record),
        f"{size.width}x{size.height}",
        f"sink {config.sink_frames}, recent {config.recent_frames} latent frames",
        f"top {config.top_k} mids by {config.selection}" if config.top_k else "no mids",
        f"{record.model.layers} layers",
        record.dtype if config.kv_dtype == "model" else config.kv_dtype,
        record.device,
    ]
    room = width - style.left - style.right
    while len(facts) > 1 and canvas.fonts.width(" · ".join(facts), style.words) > room:
        facts.pop()
    canvas.write((style.left, 14 + style.title + 10), " · ".join(facts), style.words, FAINT)
