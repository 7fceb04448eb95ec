"""What a story adds to the picture: its prompts along the time axis, and what its returns took up."""

from __future__ import annotations

from collections.abc import Iterable

from ..generate.record import CacheRecord
from ..lettering import Font, Fonts, fitted, readable, text_width
from .canvas import Box, Canvas, span
from .colours import FAINT, PROMPT_TEXT, RETURN, Colour, prompt_colour
from .facts import clock, counted
from .returns import StretchBlocks, returns, runs, stretches
from .style import Style

GAP = 5  # room below the prompts' bars
STRIP_LEFT, STRIP_RIGHT = 6, 16  # of the strip beside the panel, from the panel's right edge
SMALLEST_MARK = 7  # pixels


def band_height(style: Style) -> int:
    """Height of what stands above the panel: the times, the prompts' bars, and the room below them."""
    return _line(style) + _bar_height(style) + GAP


def _line(style: Style) -> int:
    return style.words + 4


def _bar_height(style: Style) -> int:
    return style.prompt_lines * _line(style) + 6


def story_fact(record: CacheRecord) -> str:
    """What the panel's heading says of the story; "" where there is none."""
    if not has_story(record):
        return ""
    counts = f"{len(stretches(record)):,} stretches, {counted(len(returns(record)), 'return')}"
    return f"{counts}; strip at the right: the prompt that a history block was made under"


def has_story(record: CacheRecord) -> bool:
    """Whether more than one prompt has ruled."""
    return len(stretches(record)) > 1


def draw_story(canvas: Canvas, box: Box, record: CacheRecord, blocks: int) -> None:
    """Draw the story around and into the panel of partitions, which spans `blocks` blocks both ways.

    Above it is a bar for each stretch; at its right, a strip that tells under which prompt each block of the history
    was made; in it, a frame around the mid blocks of earlier stretches that the first block of a return took up.
    """
    story = stretches(record)
    _draw_times(canvas, box, record, story, blocks)
    for stretch in story:
        left, right = span(stretch.blocks, blocks, box.width)
        bar = Box(box.left + left, box.top - GAP - _bar_height(canvas.style), box.left + right, box.top - GAP)
        _draw_bar(canvas, bar, stretch)
        low, high = span(stretch.blocks, blocks, box.height)
        strip = Box(box.right + STRIP_LEFT, box.bottom - high, box.right + STRIP_RIGHT, box.bottom - low)
        _fill(canvas, strip, prompt_colour(stretch.number))
    for found in returns(record):
        across = _widened(span(range(found.block, found.block + 1), blocks, box.width))
        for up in _joined(_widened(span(run, blocks, box.height)) for run in runs(found.taken)):
            _frame(canvas, box, across, up)


def bar_words(stretch: StretchBlocks, fonts: Fonts, width: int, style: Style) -> tuple[list[str], Font]:
    """What stands in a bar that has room for `width` pixels, line by line, and its font."""
    number = f"{stretch.number + 1}"
    text, font = readable(stretch.prompt, fonts, style.words)
    lines = fitted(text or f"prompt {number}", font, width, most_lines=style.prompt_lines)
    if not lines and text_width(number, font) <= width:
        lines = [number]
    return lines, font


def _draw_times(canvas: Canvas, box: Box, record: CacheRecord, story: list[StretchBlocks], blocks: int) -> None:
    """The times at which the stretches begin, but for those that have no room beside the one before."""
    end, words = 0, canvas.style.words
    for stretch in story:
        x = box.left + span(stretch.blocks, blocks, box.width)[0]
        text = clock(record, stretch.blocks.start)
        width = canvas.fonts.width(text, words)
        if x >= end and x + width <= box.right:
            canvas.write((x, box.top - band_height(canvas.style)), text, words, FAINT)
            end = x + width + 10


def _draw_bar(canvas: Canvas, bar: Box, stretch: StretchBlocks) -> None:
    _fill(canvas, bar, prompt_colour(stretch.number))
    lines, font = bar_words(stretch, canvas.fonts, bar.width - 9, canvas.style)
    line = _line(canvas.style)
    y = (bar.top + bar.bottom - line * len(lines)) // 2
    for i, text in enumerate(lines):
        canvas.draw.text((bar.left + 4, y + i * line), text, font=font, fill=PROMPT_TEXT)


def _fill(canvas: Canvas, box: Box, colour: Colour) -> None:
    """Fill a bar, but for a line at its end that parts it from the next one."""
    right = box.right - 2 if box.width > box.height else box.right - 1
    canvas.draw.rectangle((box.left, box.top, max(box.left, right), box.bottom - 1), fill=colour)


def _widened(pixels: tuple[int, int]) -> tuple[int, int]:
    """At least `SMALLEST_MARK` pixels around the same middle."""
    more = max(0, SMALLEST_MARK - (pixels[1] - pixels[0]))
    return pixels[0] - more // 2, pixels[1] + more - more // 2


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rising spans, those that overlap as one: frames around blocks of a pixel or less would hide each other."""
    found: list[tuple[int, int]] = []
    for low, high in spans:
        if found and low < found[-1][1]:
            found[-1] = (found[-1][0], high)
        else:
            found.append((low, high))
    return found


def _frame(canvas: Canvas, box: Box, across: tuple[int, int], up: tuple[int, int]) -> None:
    """A white frame with dark edges around cells of the panel."""
    left, top = box.left + across[0], box.bottom - up[1]
    right, bottom = box.left + across[1] - 1, box.bottom - up[0] - 1
    canvas.draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=PROMPT_TEXT)
    canvas.draw.rectangle((left, top, right, bottom), outline=RETURN, width=2)
