"""What the pictures consist of: their panels, each with its heading, its legend and its axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..generate.record import PARTITIONS, CacheRecord
from .canvas import Box, Canvas
from .choice_panels import STRIP, ages_axis, ages_fact, draw_affinity, draw_layers, layers_fact
from .colours import COLOURS, FAINTEST_MID, LABELS, STORED
from .facts import seconds_per_block
from .legend import Entry, Swatch
from .panels import axis_blocks, bytes_now, draw_bytes, draw_partitions, draw_tokens, tokens_now
from .returns import returns
from .story_panel import band_height, has_story, story_fact
from .style import FULL, NODE, Style
from .time_panel import decoded_beside, draw_times, stacked_stages, times_fact

RETURN_LABEL = "taken up from the past of a prompt that returns"
STAGE_LABELS = {"clean_pass": "clean pass", "wait": "wait for decoding"}

# In the overview.
SHORT = {
    "mid, attended by few to all layers": "mid: few to all layers",
    "mid, stored only": "stored",
    RETURN_LABEL: "past taken up again",
}


@dataclass(frozen=True)
class Panel:
    """A part of a picture."""

    name: str
    heading: str
    # A sentence below the heading, or ""; parts after "; " are left out where there is no room. None: no line for it.
    fact: Callable[[CacheRecord], str] | None
    legend: tuple[Entry, ...]
    height: int  # of the plot, pixels
    x_blocks: int  # that the x axis spans, from 0
    x_label: str
    draw: Callable[[Canvas, Box, CacheRecord], None]
    above: int = 0  # height of what stands between legend and plot


def rows_of_panels(record: CacheRecord) -> list[list[Panel]]:
    """The panels of the whole picture, row by row from above."""
    if not record.config.top_k:
        return [[partitions(record, FULL)], [times(record), tokens(record)], [memory(record)]]
    return [
        [partitions(record, FULL)],
        [layers(record)],
        [affinity(record), times(record)],
        [tokens(record), memory(record)],
    ]


def overview_panels(record: CacheRecord) -> list[Panel]:
    """The panels of the overview, from above. They tell less than those of the whole picture."""
    second = layers(record) if record.config.top_k else times(record)
    first = partitions(record, NODE)
    legend = tuple(replace(entry, label=SHORT.get(entry.label, entry.label)) for entry in first.legend)
    return [
        replace(first, height=270, fact=None, legend=legend, x_label="block being made"),
        replace(second, height=150, fact=None, x_label=second.x_label.partition(" (")[0]),
    ]


def _made(record: CacheRecord) -> str:
    return f"block being made (a block is {seconds_per_block(record):.3g} s of video)"


def partitions(record: CacheRecord, style: Style) -> Panel:
    """Where every block of the history was."""
    sink, recent, current = (Entry(LABELS[name], COLOURS[name]) for name in ("sink", "recent", "current"))
    mids = (Entry("mid, attended by few to all layers", Swatch.LAYERS), Entry("mid, stored only", STORED))
    shows = (Entry(RETURN_LABEL, Swatch.FRAME),) if any(found.taken for found in returns(record)) else ()
    return Panel(
        name="partitions",
        heading="Partitions over time",
        fact=story_fact if has_story(record) else None,
        legend=(sink, *(mids if record.config.top_k else ()), recent, current, *shows),
        height=420,
        x_blocks=axis_blocks(record),
        x_label=_made(record),
        draw=draw_partitions,
        above=band_height(style) if has_story(record) else 0,
    )


def layers(record: CacheRecord) -> Panel:
    """Which layer chose which mid block."""
    return Panel(
        name="layers",
        heading="Chosen mid blocks by layer",
        fact=layers_fact,
        legend=(Entry("chosen rarely to always", Swatch.CHANCES), Entry("never", STORED)),
        height=240,
        x_blocks=axis_blocks(record),
        x_label="mid block (colour: chosen in how many of its chances)",
        draw=draw_layers,
        above=STRIP + 4 if has_story(record) else 0,
    )


def affinity(record: CacheRecord) -> Panel:
    """The affinity of chosen mid blocks by their age."""
    return Panel(
        name="affinity",
        heading="Affinity over age of chosen mids",
        fact=ages_fact,
        legend=(
            Entry("median", Swatch.MID_LINE),
            Entry("80% of them", FAINTEST_MID),
            Entry("mean of all stored", Swatch.GREY_LINE),
        ),
        height=220,
        x_blocks=ages_axis(record),
        x_label="age in blocks",
        draw=draw_affinity,
    )


def times(record: CacheRecord) -> Panel:
    """The time of each stage."""
    stages = [Entry(STAGE_LABELS.get(stage, stage), colour) for stage, colour in stacked_stages(record)]
    beside = [Entry("decoding, beside the loop", Swatch.LINE)] if decoded_beside(record) else []
    return Panel(
        name="times",
        heading="Time by stage",
        fact=times_fact,
        legend=(*stages, *beside) or (Entry("not measured", Swatch.GREY_LINE),),
        height=220,
        x_blocks=axis_blocks(record),
        x_label="block being made",
        draw=draw_times,
    )


def tokens(record: CacheRecord) -> Panel:
    """The tokens attended."""
    names = ("sink", "recent", "current", *(("mid",) if record.config.top_k else ()))
    return Panel(
        name="tokens",
        heading="Tokens attended",
        fact=tokens_now,
        legend=(*(Entry(LABELS[name], COLOURS[name]) for name in names), Entry("full cache", Swatch.LINE)),
        height=220,
        x_blocks=axis_blocks(record),
        x_label="block being made",
        draw=draw_tokens,
    )


def memory(record: CacheRecord) -> Panel:
    """The bytes that the cache held."""
    used = [name for name in PARTITIONS if any(block.bytes.get(name) for block in record.blocks)] or PARTITIONS[:4]
    return Panel(
        name="memory",
        heading="Cache memory",
        fact=bytes_now,
        legend=tuple(Entry(LABELS[name], COLOURS[name]) for name in used),
        height=220,
        x_blocks=axis_blocks(record),
        x_label="block being made",
        draw=draw_bytes,
    )
