"""A picture to draw on: text, boxes, axes whose unit is a block, stacked areas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..lettering import Fonts, fitted
from .colours import BACKGROUND, FAINT, GRID, Colour
from .style import Style


@dataclass(frozen=True)
class Box:
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


class Canvas:
    """An RGB picture of the given size in pixels, written on in the sizes of a style."""

    def __init__(self, width: int, height: int, fonts: Fonts, style: Style) -> None:
        self.image = Image.new("RGB", (width, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.fonts = fonts
        self.style = style

    def write(self, at: tuple[int, int], text: str, size: int, fill: Colour, align: str = "left") -> None:
        """Write with the line's top at `at`; x is its left end, centre or right end."""
        shift = {"left": 0, "centre": 0.5, "right": 1}[align] * self.fonts.width(text, size)
        self.draw.text((round(at[0] - shift), at[1]), text, font=self.fonts[size], fill=fill)

    def say(self, box: Box, text: str) -> None:
        """Write a sentence into the middle of a box, on as many lines as it needs."""
        size = self.style.words
        lines = fitted(text, self.fonts[size], box.width - 20, most_lines=max(1, box.height // (size + 6)))
        top = (box.top + box.bottom - len(lines) * (size + 6)) // 2
        for i, line in enumerate(lines):
            self.write(((box.left + box.right) // 2, top + i * (size + 6)), line, size, FAINT, "centre")


# --- axes ------------------------------------------------------------------------------------------------------


def bins(blocks: int, pixels: int) -> np.ndarray:
    """First block of each bin, and the end. A bin is a block, or a pixel where there are more blocks than pixels."""
    count = min(blocks, pixels)
    return np.arange(count + 1) * blocks // count


def edges(blocks: int, pixels: int) -> np.ndarray:
    """First pixel of each bin, and the end."""
    count = min(blocks, pixels)
    return np.arange(count + 1) * pixels // count


def bin_of(blocks: int, pixels: int, block: int) -> int:
    """The bin that a block is in."""
    return int(np.searchsorted(bins(blocks, pixels), block, side="right")) - 1


def span(part: range, blocks: int, pixels: int) -> tuple[int, int]:
    """First pixel of the blocks `part` on an axis of `blocks` blocks, and the one after their last."""
    at = edges(blocks, pixels)
    return int(at[bin_of(blocks, pixels, part.start)]), int(at[bin_of(blocks, pixels, part.stop - 1) + 1])


def bin_of_pixel(blocks: int, pixels: int) -> np.ndarray:
    """The bin of each pixel."""
    return np.repeat(np.arange(min(blocks, pixels)), np.diff(edges(blocks, pixels)))


def nice_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 5, 10, ... that divides `span` into at most `most` steps."""
    power = 10.0 ** np.floor(np.log10(max(span, 1e-12) / most))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if span <= most * power * factor * (1 + 1e-9))


def draw_x_axis(canvas: Canvas, box: Box, blocks: int, label: str) -> None:
    """Ticks below the panel, with the numbers of some of its `blocks`, and what they count."""
    size = canvas.style.label
    step = max(1, int(nice_step(blocks, max(3, box.width // (5 * size)))))
    for block in range(0, blocks, step):
        x = box.left + round((block + 0.5) * box.width / blocks)
        canvas.draw.line((x, box.bottom, x, box.bottom + 4), fill=FAINT)
        canvas.write((x, box.bottom + 6), f"{block:,}", size, FAINT, "centre")
    canvas.write(((box.left + box.right) // 2, box.bottom + size + 12), label, size, FAINT, "centre")


def y_tick(canvas: Canvas, box: Box, y: int, text: str) -> None:
    """A tick with a text at the left of the panel."""
    size = canvas.style.label
    canvas.draw.line((box.left - 5, y, box.left - 1, y), fill=FAINT)
    canvas.write((box.left - 9, y - canvas.fonts.height(size) // 2 - 1), text, size, FAINT, "right")


def y_label(canvas: Canvas, box: Box, text: str) -> None:
    """Write `text` upwards at the left of the panel."""
    fonts, size = canvas.fonts, canvas.style.label
    label = Canvas(fonts.width(text, size) + 2, fonts.height(size) + 3, fonts, canvas.style)
    label.write((1, 0), text, size, FAINT)
    upright = label.image.rotate(90, expand=True)
    top = (box.top + box.bottom - upright.height) // 2
    canvas.image.paste(upright, (box.left - canvas.style.left + 4, max(0, top)))


def draw_scale(canvas: Canvas, box: Box, top: float, unit: float, bottom: float = 0.0) -> None:
    """Horizontal lines and ticks from `bottom` to `top`; numbers are told in `unit`s."""
    most = max(2, box.height // (2 * canvas.style.label))
    step = nice_step((top - bottom) / unit, most)
    for i in range(int(np.ceil(bottom / unit / step * (1 - 1e-9))), int(top / unit / step * (1 + 1e-9)) + 1):
        y = height_of(box, i * step * unit, top, bottom)
        if y >= box.top:
            canvas.draw.line((box.left, y, box.right - 1, y), fill=GRID)
            y_tick(canvas, box, y, f"{i * step:,.10g}")


def height_of(box: Box, value: float, top: float, bottom: float = 0.0) -> int:
    """The pixel row of a value on an axis from `bottom` to `top`."""
    return box.bottom - 1 - round((value - bottom) / (top - bottom) * box.height)


# --- areas -----------------------------------------------------------------------------------------------------


def draw_stack(canvas: Canvas, box: Box, layers: Sequence[tuple[np.ndarray, Colour]], blocks: int, top: float) -> None:
    """Stack `layers` of (values [bins], colour), with the first at the bottom; `top` is the panel's highest value."""
    column = bin_of_pixel(blocks, box.width)
    pixels = np.array(canvas.image.crop((box.left, box.top, box.right, box.bottom)))
    level = np.arange(box.height)[::-1][:, None]
    floor = np.zeros(box.width)
    for values, colour in layers:
        ceiling = floor + values[column]
        inside = (level >= np.rint(floor / top * box.height)) & (level < np.rint(ceiling / top * box.height))
        pixels[inside] = colour
        floor = ceiling
    canvas.image.paste(Image.fromarray(pixels), (box.left, box.top))
