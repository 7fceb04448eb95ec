"""Sizes of what is written and drawn, in pixels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """Sizes of letters, and the distances that follow from them."""

    title: int
    heading: int
    label: int  # of ticks and legends
    words: int  # of sentences and prompts
    prompt_lines: int  # of a prompt over the time axis, at most

    @property
    def left(self) -> int:
        """Left margin of a plot: its label, and numbers of five digits."""
        return round(5.4 * self.label)

    @property
    def right(self) -> int:
        """Right margin of a plot, in which a story's strip stands."""
        return 28

    @property
    def title_height(self) -> int:
        return 14 + self.title + 10 + self.words + 18

    @property
    def heading_row(self) -> int:
        return self.heading + 8

    @property
    def fact_row(self) -> int:
        return self.words + 8

    @property
    def legend_row(self) -> int:
        return self.label + 8

    @property
    def swatch(self) -> int:
        """Side of a legend's colour."""
        return round(0.8 * self.label)

    @property
    def axis(self) -> int:
        """Height below a plot: its ticks and its label."""
        return 2 * self.label + 18


# The whole record, to be opened: still easy to read at 60%. And a picture for the node in the graph, at half its size.
FULL = Style(title=32, heading=26, label=20, words=20, prompt_lines=2)
NODE = Style(title=30, heading=27, label=25, words=24, prompt_lines=1)
