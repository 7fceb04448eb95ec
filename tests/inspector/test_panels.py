"""The panels of layers, affinity and time, pixel by pixel; and letters that can be read at the size of a node."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from records import empty_record

from packforcing.cache.layer_cache import Affinity
from packforcing.config import CacheConfig
from packforcing.generate.record import BlockRecord, CacheRecord, PromptRecord
from packforcing.inspector import COLOURS, STORED, overview, overview_boxes, panel_boxes, picture
from packforcing.inspector.canvas import Box, Canvas
from packforcing.inspector.colours import FAINTEST_MID, PANEL, PROMPTS, STAGE_COLOURS, share_colour
from packforcing.inspector.contents import rows_of_panels

LAYERS = 4
ALL = ["partitions", "layers", "affinity", "times", "tokens", "memory"]
NODE_PIXELS = 400  # width of a node in the graph


def make_record(blocks: int = 20, top_k: int = 1, **config: object) -> CacheRecord:
    """Sink 2 blocks, recent 1: at first all layers choose block 2; from block 10 on layer 0 chooses block 5."""
    record = empty_record(LAYERS, CacheConfig(top_k=top_k, **config))
    for i in range(blocks):
        mids = record.config.partition(i).mid if top_k else ()
        selected = [[] for _ in range(LAYERS)]
        affinity = [None] * LAYERS
        if mids:
            selected = [[5 if i >= 10 and layer == 0 else 2] for layer in range(LAYERS)]
        if len(mids) > 1:
            affinity = [Affinity(array("f", [3.0]), 1.0, 1.0)] * LAYERS
        seconds = {"denoise": 0.6, "clean_pass": 0.2, "decode": 0.1}
        record.blocks.append(BlockRecord(i, selected, bytes={"sink": 10**8}, seconds=seconds, affinity=affinity))
    return record


def at(image, box: Box, column: float, row: float) -> tuple[int, int, int]:
    """The colour at fractions of a panel, from its left and its bottom."""
    return image.getpixel((box.left + int(column * box.width), box.bottom - 1 - int(row * box.height)))


def colours_of(image, box: Box) -> set[tuple[int, int, int]]:
    pixels = np.array(image.crop((box.left, box.top, box.right, box.bottom))).reshape(-1, 3)
    return set(map(tuple, np.unique(pixels, axis=0).tolist()))


# --- layers --------------------------------------------------------------------------------------------------------


def test_a_layer_s_cell_has_the_colour_of_its_share():
    record = make_record()
    image, box = picture(record), panel_boxes(record)["layers"]
    for layer in range(LAYERS):
        for mid in range(20):
            # Block m is a mid block while m + 2, ... are made, 19 the last of them.
            chances = [b for b in range(20) if b >= 4 and 2 <= mid <= b - 2]
            times = sum(mid in record.blocks[b].selected[layer] for b in chances)
            expected = share_colour(times / len(chances)) if chances else PANEL
            found = at(image, box, (mid + 0.5) / 20, (layer + 0.5) / LAYERS)
            assert np.abs(np.subtract(found, expected)).max() <= 1, (layer, mid)
    assert at(image, box, 3.5 / 20, 0.5 / LAYERS) == STORED
    assert at(image, box, 0.5 / 20, 0.5 / LAYERS) == PANEL


def test_prompts_stand_over_the_mid_blocks_made_under_them():
    record = make_record()
    record.prompts = [PromptRecord(0, "a"), PromptRecord(10, "b")]
    image, box = picture(record), panel_boxes(record)["layers"]
    for block in range(20):
        colour = image.getpixel((box.left + int((block + 0.5) * box.width / 20), box.top - 6))
        assert colour == PROMPTS[block // 10]


# --- affinity ------------------------------------------------------------------------------------------------------


def test_affinity_stands_at_its_age_and_height():
    record = make_record()  # every scored choice is 2 deviations above the mean; the axis is 0..2, and 8% beyond
    image, box = picture(record), panel_boxes(record)["affinity"]
    height = (2 + 0.16) / (2 * 1.16)
    # Scored from block 5 on: block 2 at the ages 3..17, block 5 at 5..14. The axis has the ages 0..17.
    for age in range(18):
        found = at(image, box, (age + 0.5) / 18, height)
        assert (found == COLOURS["mid"]) == (age >= 3), age
    assert at(image, box, 0.9, 0.34) == PANEL


@pytest.mark.parametrize("percent", [10, 90])
def test_the_band_reaches_its_percentiles(percent):
    record = make_record()
    for block in record.blocks[5:]:  # the four layers' scores: 0, 1, 2 and 3 deviations above the mean
        block.affinity = [Affinity(array("f", [1.0 + layer]), 1.0, 1.0) for layer in range(LAYERS)]
        block.selected = [[2]] * LAYERS
    image, box = picture(record), panel_boxes(record)["affinity"]
    edge = np.percentile([0, 1, 2, 3], percent)
    top, bottom = np.percentile([0, 1, 2, 3], 90) * 1.08, -np.percentile([0, 1, 2, 3], 90) * 0.08
    row = (edge - bottom) / (top - bottom)
    inside, outside = (row + 0.03, row - 0.03) if percent == 10 else (row - 0.03, row + 0.03)
    assert at(image, box, 10.5 / 18, inside) == FAINTEST_MID
    assert at(image, box, 10.5 / 18, outside) == PANEL


# --- time ----------------------------------------------------------------------------------------------------------


def column_heights(record: CacheRecord, block: int) -> dict[str, int]:
    image, box = np.array(picture(record)), panel_boxes(record)["times"]
    column = image[box.top : box.bottom, box.left + int((block + 0.5) * box.width / 20)]
    return {stage: int((column == colour).all(axis=1).sum()) for stage, colour in STAGE_COLOURS.items()}


def test_stages_are_stacked_in_proportion():
    heights = column_heights(make_record(), 12)
    assert heights["denoise"] / heights["clean_pass"] == pytest.approx(3, rel=0.05)
    assert heights["denoise"] / heights["decode"] == pytest.approx(6, rel=0.07)


def test_decoding_beside_the_loop_is_a_line():
    record = make_record()
    for block in record.blocks:
        block.seconds["wait"] = 0.05
    heights = column_heights(record, 12)
    assert heights["decode"] == 0
    assert heights["denoise"] / heights["clean_pass"] == pytest.approx(3, rel=0.06)


def test_a_slow_first_block_does_not_flatten_the_others():
    record = make_record()
    before = column_heights(record, 12)["denoise"]
    record.blocks[0].seconds["denoise"] = 100.0
    assert column_heights(record, 12)["denoise"] > before / 3


# --- which panels there are, and how large their letters are --------------------------------------------------------


def test_which_panels_there_are():
    assert list(panel_boxes(make_record())) == ALL
    assert list(panel_boxes(make_record(), 700)) == ALL
    assert list(panel_boxes(make_record(top_k=0))) == ["partitions", "times", "tokens", "memory"]
    assert list(overview_boxes(make_record())) == ["partitions", "layers"]
    assert list(overview_boxes(make_record(top_k=0))) == ["partitions", "times"]


@pytest.mark.parametrize("width", [640, 1200, 1600])
def test_panels_do_not_overlap_and_are_in_the_picture(width):
    record = make_record()
    boxes, image = list(panel_boxes(record, width).values()), picture(record, width)
    for i, box in enumerate(boxes):
        assert 0 < box.left < box.right < image.width
        assert 0 < box.top < box.bottom < image.height
        for other in boxes[:i]:
            assert other.right < box.left or other.bottom < box.top


def test_the_overview_shows_both_panels():
    record = make_record()
    image, boxes = overview(record), overview_boxes(record)
    assert {COLOURS["sink"], COLOURS["recent"], COLOURS["current"]} <= colours_of(image, boxes["partitions"])
    assert {STORED, PANEL} <= colours_of(image, boxes["layers"])
    assert at(image, boxes["layers"], 2.5 / 20, 3.5 / LAYERS) == COLOURS["mid"]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Texts that are written, and the height of a digit in their size, in pixels of the picture."""
    texts: list[tuple[str, float]] = []
    write = Canvas.write

    def noted(canvas: Canvas, at, text, size, *rest) -> None:
        _, top, _, bottom = canvas.fonts[size].getbbox("0")
        texts.append((text, bottom - top))
        write(canvas, at, text, size, *rest)

    monkeypatch.setattr(Canvas, "write", noted)
    return texts


def test_every_letter_of_the_overview_can_be_read_on_a_node(written):
    record = make_record()
    record.prompts = [PromptRecord(0, "a"), PromptRecord(10, "b")]
    image = overview(record)
    assert {"Partitions over time", "Chosen mid blocks by layer", "sink", "0:00", "10"} <= {text for text, _ in written}
    assert min(height for _, height in written) * NODE_PIXELS / image.width >= 8


def test_every_letter_of_the_picture_can_be_read_at_60_percent(written):
    picture(make_record())
    assert min(height for _, height in written) * 0.6 >= 8


@pytest.mark.parametrize("blocks", [0, 1, 5, 20, 300])
@pytest.mark.parametrize("top_k", [0, 1])
def test_no_text_leaves_the_picture(blocks, top_k, monkeypatch):
    record, outside = make_record(blocks, top_k), []
    write = Canvas.write

    def noted(canvas: Canvas, at, text, size, fill, align="left") -> None:
        width = canvas.fonts.width(text, size)
        left = at[0] - {"left": 0, "centre": 0.5, "right": 1}[align] * width
        if not (left >= 0 and left + width <= canvas.image.width and at[1] + size <= canvas.image.height + 3):
            outside.append(text)
        write(canvas, at, text, size, fill, align)

    monkeypatch.setattr(Canvas, "write", noted)
    overview(record)
    picture(record)
    picture(record, 640)
    assert outside == []
    assert len(rows_of_panels(record)) >= 3
