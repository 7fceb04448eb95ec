"""A panel's legend: what each colour and line in it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ..lettering import Fonts
from .canvas import Canvas
from .colours import COLOURS, FAINT, FULL, RETURN, Colour, mid_colour, share_colour
from .style import Style

GAP = 22  # between entries


class Swatch(Enum):
    """What stands before a label where it is not a plain colour."""

    LAYERS = "the colours of mid blocks, from few layers to all"
    CHANCES = "the colours of a layer's mid blocks, from rarely chosen to always"
    LINE = "a white line"
    GREY_LINE = "the line of a mean"
    MID_LINE = "the line of a median"
    FRAME = "the frame around what a return took up"


LINES = {Swatch.LINE: FULL, Swatch.GREY_LINE: FAINT, Swatch.MID_LINE: COLOURS["mid"]}
RAMPS: dict[Swatch, Callable[[float], Colour]] = {Swatch.LAYERS: mid_colour, Swatch.CHANCES: share_colour}


@dataclass(frozen=True)
class Entry:
    """One entry of a legend."""

    label: str
    swatch: Colour | Swatch

    def swatch_width(self, style: Style) -> int:
        if isinstance(self.swatch, Swatch) and self.swatch is not Swatch.FRAME:
            return (4 if self.swatch in RAMPS else 2) * style.swatch
        return style.swatch


def legend_places(
    fonts: Fonts, style: Style, legend: tuple[Entry, ...], left: int, right: int
) -> list[tuple[int, int]]:
    """Row and x of each entry, wrapped at `right`."""
    places, row, x = [], 0, left
    for entry in legend:
        width = entry.swatch_width(style) + 6 + fonts.width(entry.label, style.label)
        if x > left and x + width > right:
            row, x = row + 1, left
        places.append((row, x))
        x += width + GAP
    return places


def draw_legend(canvas: Canvas, top: int, legend: tuple[Entry, ...], places: list[tuple[int, int]]) -> None:
    """Draw the entries at their places, the first row's top at `top`."""
    style = canvas.style
    for entry, (row, x) in zip(legend, places, strict=True):
        y = top + row * style.legend_row + 2
        right, bottom = x + entry.swatch_width(style), y + style.swatch
        if not isinstance(entry.swatch, Swatch):
            canvas.draw.rectangle((x, y, right - 1, bottom - 1), fill=entry.swatch)
        elif entry.swatch in RAMPS:
            for pixel in range(x, right):
                colour = RAMPS[entry.swatch]((pixel - x + 1) / (right - x))
                canvas.draw.line((pixel, y, pixel, bottom - 1), fill=colour)
        elif entry.swatch in LINES:
            canvas.draw.line((x, (y + bottom) // 2, right, (y + bottom) // 2), fill=LINES[entry.swatch], width=3)
        else:
            canvas.draw.rectangle((x, y, right - 1, bottom - 1), outline=RETURN, width=2)
        at = (right + 6, (y + bottom) // 2 - canvas.fonts.height(style.label) // 2 - 1)
        canvas.write(at, entry.label, style.label, FAINT)
