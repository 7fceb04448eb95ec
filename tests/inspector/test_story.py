"""A story in the picture, pixel by pixel, and in the report, line by line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont
from records import empty_record

from packforcing import lettering
from packforcing.config import CacheConfig
from packforcing.generate.record import BlockRecord, CacheRecord, PromptRecord
from packforcing.generate.story import parse_story, start_block
from packforcing.inspector import COLOURS, STORED, cell_box, mid_colour, numbers, picture, report, story_of
from packforcing.inspector.canvas import Fonts
from packforcing.inspector.colours import BACKGROUND, PROMPTS, prompt_colour
from packforcing.inspector.facts import clock
from packforcing.inspector.returns import StretchBlocks, runs
from packforcing.inspector.story_panel import bar_words
from packforcing.inspector.story_report import number_list
from packforcing.inspector.style import FULL
from packforcing.lettering import fitted, readable, shortened, text_width

LAYERS, WHITE = 3, (255, 255, 255)
LONG = "a breathtaking aerial view of a lonely lighthouse on a rocky coast at dusk, waves crashing, " * 3
# Where the stretches begin, the prompts, and the number of each prompt by its first appearance.
STORIES = {
    "two": ([0, 20], ["a fox", "it rains"], [0, 1]),
    "five": (
        [0, 8, 16, 26, 33],
        ["place one: a green tree", "place two: a red house", "place three", "place two", "Place One"],
        [0, 1, 2, 1, 0],
    ),
    "long": ([0, 3, 6], [LONG, "", LONG], [0, 1, 0]),
    "twelve": (list(range(0, 36, 3)), [f"scene {i % 5}" for i in range(12)], [i % 5 for i in range(12)]),
}


def make_record(blocks: int, starts: list[int], prompts: list[str], choose=None, top_k: int = 3) -> CacheRecord:
    """Sink 2 blocks, recent 1. A layer attends the oldest mid blocks, or what `choose(block, layer)` says."""
    told = [PromptRecord(start, prompt) for start, prompt in zip(starts, prompts, strict=True)]
    record = empty_record(LAYERS, CacheConfig(top_k=top_k), prompts=told)
    for i in range(blocks):
        oldest = list(record.config.partition(i).mid[: record.config.attended_mids(i)])
        record.blocks.append(
            BlockRecord(i, [(choose and choose(i, layer)) or oldest for layer in range(LAYERS)], bytes={"sink": 10**8})
        )
    return record


def pixels(record: CacheRecord, width: int = 1600) -> bytes:
    return picture(record, width).tobytes()


def panel(record: CacheRecord, last: int, width: int = 1600) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the panel of partitions, whose axes end with block `last`."""
    left, _, _, bottom = cell_box(record, 0, 0, width)
    _, top, right, _ = cell_box(record, last, last, width)
    return left, top, right, bottom


# --- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [640, 1600])
def test_one_prompt_changes_nothing(width):
    without = make_record(40, [], [])
    assert pixels(make_record(40, [0], [LONG]), width) == pixels(without, width)
    assert pixels(make_record(40, [0, 40], ["a", "b"]), width) == pixels(without, width), "the second one has not begun"
    assert pixels(make_record(40, [0, 39], ["a", "b"]), width) != pixels(without, width)
    assert report(make_record(40, [0], [LONG])) == report(without)


@pytest.mark.parametrize("width", [640, 1600])
@pytest.mark.parametrize("story", STORIES)
def test_bars_and_strip_have_each_prompt_s_colour(story, width):
    starts, prompts, numbers = STORIES[story]
    record = make_record(40, starts, prompts)
    image = picture(record, width)
    left, top, right, bottom = panel(record, 39, width)
    for block in range(40):
        number = numbers[max(i for i, start in enumerate(starts) if start <= block)]
        x = left + round((block + 0.5) * (right - left) / 40)
        y = bottom - round((block + 0.5) * (bottom - top) / 40)
        assert image.getpixel((x, top - 7)) == PROMPTS[number], f"bar over block {block}"
        assert image.getpixel((right + 10, y)) == PROMPTS[number], f"strip beside block {block}"


def test_a_bar_ends_with_the_newest_block():
    record = make_record(8, [0, 3], ["a", "b"])  # the axis shows 12 blocks
    image = picture(record)
    left, top, _, _ = panel(record, 11)
    cell = (panel(record, 11)[2] - left) / 12
    assert image.getpixel((round(left + 7.9 * cell), top - 7)) == PROMPTS[1]
    assert image.getpixel((round(left + 8.1 * cell), top - 7)) == BACKGROUND


def test_cells_stand_where_cell_box_says_with_a_story():
    starts, prompts, _ = STORIES["two"]
    record = make_record(40, starts, prompts)
    image = picture(record)
    for history, expected in [(0, COLOURS["sink"]), (3, mid_colour(1)), (20, STORED), (29, COLOURS["recent"])]:
        left, top, right, bottom = cell_box(record, 30, history)
        assert image.getpixel(((left + right - 1) // 2, (top + bottom - 1) // 2)) == expected


def white(image: Image.Image, box: tuple[int, int, int, int]) -> int:
    return int((np.array(image.crop(box)) == WHITE).all(axis=2).sum())


def test_a_frame_is_around_what_a_return_took_up():
    # a 0..7, b 8..15, a 16..: block 16 may take up 2..7. Of what the layers take up there, 3, 4 and 6 are of a.
    taken = {(16, 0): [3, 4, 10], (16, 1): [3, 10, 11], (16, 2): [6, 12, 13], (17, 0): [2, 5, 7]}
    record = make_record(24, [0, 8, 16], ["a", "b", "a"], lambda block, layer: taken.get((block, layer)))
    image = picture(record)
    box = panel(record, 23)
    left, _, right, bottom = cell_box(record, 16, 3)
    top = cell_box(record, 16, 4)[1]
    frames = [(left, top, right, bottom), cell_box(record, 16, 6)]
    expected = 0
    for x0, y0, x1, y1 in frames:
        inner = (x0 + 2, y0 + 2, x1 - 2, y1 - 2)
        assert white(image, (x0, y0, x1, y1)) == (x1 - x0) * (y1 - y0) - (inner[2] - inner[0]) * (inner[3] - inner[1])
        assert white(image, inner) == 0
        expected += white(image, (x0, y0, x1, y1))
    assert white(image, box) == expected, "and nothing else is framed"


def test_the_legend_tells_of_frames_only_where_there_are_some():
    def white_above(record: CacheRecord) -> int:
        left, top, right, _ = panel(record, 23)
        return white(picture(record), (left, 80, right, top))

    assert white_above(make_record(24, [0, 8, 16], ["a", "b", "a"])) == 4 * (FULL.swatch - 2) * 2
    assert white_above(make_record(24, [0, 8, 16], ["a", "b", "c"])) == 0
    assert white_above(make_record(24, [0, 2, 16], ["a", "b", "a"])) == 0, "a is in the sink"


def test_a_return_among_hundreds_of_blocks_is_seen():
    record = make_record(
        600, [0, 200, 400], ["a", "b", "a"], lambda block, _: [100, 101, 300] if block == 400 else None
    )
    left, top, right, bottom = cell_box(record, 400, 100)
    assert right - left < 3
    assert bottom - top < 3
    around = (left - 5, top - 5, right + 5, bottom + 5)
    image = picture(record)
    assert white(image, around) >= 20
    assert white(image, around) == white(image, panel(record, 599))


def test_frames_that_would_overlap_are_one():
    record = make_record(
        600, [0, 200, 400], ["a", "b", "a"], lambda block, _: [100, 103, 106] if block == 400 else None
    )
    white = (np.array(picture(record).crop(panel(record, 599))) == WHITE).all(axis=2)
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    assert white.sum() == height * width - (height - 4) * (width - 4)


def test_hundreds_of_prompts_have_their_colours():
    colours = [prompt_colour(i) for i in range(18)]
    assert len(set(colours)) == 18
    assert [prompt_colour(i + 18) for i in range(18)] == colours
    record = make_record(400, list(range(0, 400, 2)), [f"prompt {i}" for i in range(200)])
    assert picture(record, 640).size[0] == 640


def test_a_record_that_starts_late_has_its_story():
    record = make_record(40, [0, 10, 20, 30], ["a", "b", "a", "b"])
    del record.blocks[:25]
    assert picture(record).mode == "RGB"
    assert "4 stretches of 2 prompts, 1 return" in report(record)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [LONG, "rain", "一只红色的狐狸在雪地里奔跑" * 5, "x" * 200, "a " + "y" * 300, "a b " * 50]
)
@pytest.mark.parametrize("width", [5, 30, 90, 300, 1160])
def test_words_stay_in_their_bar(text, width):
    font = Fonts()[13]
    lines = fitted(text.strip(), font, width, most_lines=2)
    assert len(lines) <= 2
    assert all(text_width(line, font) <= width for line in lines)
    if lines:
        told = "".join(lines).removesuffix("…").replace(" ", "")
        assert text.replace(" ", "").startswith(told)
        assert lines[-1].endswith("…") == (told != text.replace(" ", ""))


def test_words_are_shortened_only_where_they_must():
    font = Fonts()[13]
    width = text_width("place two: a red", font)
    assert fitted("place two: a red house", font, width, most_lines=2) == ["place two: a red", "house"]
    assert fitted("place two: a red house", font, width + 100, most_lines=2) == ["place two: a red house"]
    assert shortened("rain", font, text_width("rain", font)) == "rain"
    assert shortened("rain", font, text_width("rain", font) - 1) == ""
    cut = shortened("it rains cats and dogs", font, width)
    assert cut.endswith("…")
    assert text_width(cut, font) <= width < text_width("it rains cats and dogs"[: len(cut)] + "…", font)


def test_a_bar_without_words_has_a_number():
    fonts, stretch = Fonts(), StretchBlocks(range(3), "", 6)
    assert bar_words(stretch, fonts, 200, FULL)[0] == ["prompt 7"]
    assert bar_words(stretch, fonts, 12, FULL)[0] == ["7"]
    assert bar_words(stretch, fonts, 2, FULL)[0] == []
    assert bar_words(StretchBlocks(range(3), "rain", 1), fonts, 200, FULL)[0] == ["rain"]
    assert bar_words(StretchBlocks(range(3), "rainbow", 1), fonts, 15, FULL)[0] == ["2"]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a fox\n\truns\x00 on", "a fox runs on"),
        ("une forêt près d'Évian", "une foret pres d'Evian"),
        ("a fox 🦊 runs", "a fox runs"),
        ("狐狸", ""),
        ("", ""),
    ],
)
def test_without_a_system_font_what_pillow_can_draw_is_told(prompt, told, monkeypatch):
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ())
    assert readable(prompt, Fonts(), 13)[0] == told


def test_other_letters_use_a_font_that_has_them(monkeypatch):
    """Pillow's bitmap font stands for a system's font: it has Latin-1, which Pillow's other one has not."""
    bitmap = ImageFont.load_default_imagefont()
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ("missing.ttf", "bitmap.ttf"))
    monkeypatch.setattr(lettering, "_system_font", lambda name, size: bitmap if name == "bitmap.ttf" else None)
    fonts = Fonts()
    assert readable("café", fonts, 13) == ("café", bitmap)
    assert readable("cafe", fonts, 13) == ("cafe", fonts[13])
    assert readable("café 狐狸", fonts, 13)[0] == ""


def test_an_old_pillow_s_font_will_do(monkeypatch):
    small = ImageFont.load_default_imagefont()
    monkeypatch.setattr(ImageFont, "load_default", lambda: small)  # Pillow before 10.1 takes no size
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ())
    assert readable("狐狸 runs", Fonts(), 13)[0] == ""
    assert shortened("it rains cats", small, text_width("it rains", small)) == "it ra..."
    assert picture(make_record(20, [0, 5, 10, 15], [LONG, "une forêt", "狐狸", LONG])).mode == "RGB"


# --- the report -------------------------------------------------------------------------------------------------------


def story_lines(record: CacheRecord) -> list[str]:
    """The report's section about the story."""
    return next(part for part in report(record).split("\n\n") if part.startswith("Story")).splitlines()


def test_a_return_is_told():
    # Block 16 has the mids 2..14. Six of them are of a: 2..7. The layers take up 9 mids, of which 3, 4, 3 are of a.
    taken = {(16, 0): [3, 4, 10], (16, 1): [3, 10, 11], (16, 2): [11, 12, 13]}
    record = make_record(24, [0, 8, 16], ["a", "b", "a"], lambda block, layer: taken.get((block, layer)))
    assert story_lines(record) == [
        "Story: 3 stretches of 2 prompts, 1 return; the history at a switch: keep",
        "  0:16  'a' returns: 2 of 3 layers took up blocks 3, 4 (0:03 to 0:05): 33% of mids, 46% by chance",
        "  (of the mids taken up, those that show the returning prompt; by chance: of all that could be)",
    ]


@pytest.mark.parametrize(
    ("starts", "top_k", "choice", "told"),
    [
        ([0, 8, 16], 3, [10, 11, 12], "no layer took up a block of its past: 0% of mids, 46% by chance"),
        (
            [0, 8, 16],
            3,
            [2, 3, 10],
            "3 of 3 layers took up blocks 2, 3 (0:02 to 0:04): 67% of mids, 46% by chance",
        ),
        ([0, 8, 16], 3, [5, 10, 11], "3 of 3 layers took up block 5 (0:05 to 0:06): 33% of mids, 46% by chance"),
        ([0, 8, 16], 13, None, "all 13 mid blocks are attended, 6 of them show it"),
        ([0, 2, 16], 3, None, "its past is in sink only"),
        ([0, 15, 16], 3, None, "all 13 mid blocks show it"),
        ([0, 8, 16], 0, None, "its past is in sink only"),
    ],
)
def test_what_is_told_of_a_return(starts, top_k, choice, told):
    record = make_record(24, starts, ["a", "b", "a"], lambda block, _: choice if block == 16 else None, top_k)
    assert story_lines(record)[1] == f"  0:16  'a' returns: {told}"


def test_a_past_that_is_nowhere_or_recent_is_told():
    record = make_record(9, [0, 3, 6, 8], ["a", "b", "c", "b"], top_k=0)
    assert story_lines(record)[1].endswith("'b' returns: its past is no longer in the cache")
    record.config = CacheConfig(top_k=0, recent_frames=12)
    assert story_lines(record)[1].endswith("'b' returns: its past is in recent only")


def test_the_mean_is_over_returns_with_a_choice():
    # a 0..3, b 4..5, a 6..9, b 10..13, a 14..: at block 6 there are the mids 2, 3, 4, all attended.
    taken = {10: [4, 5, 6], 14: [2, 4, 5]}
    record = make_record(16, [0, 4, 6, 10, 14], list("ababa"), lambda block, _: taken.get(block))
    lines = story_lines(record)
    assert lines[0].startswith("Story: 5 stretches of 2 prompts, 3 returns")
    assert lines[1].endswith("all 3 mid blocks are attended, 2 of them show it")
    # Block 10: 4 and 5 of the mids 2..8. Block 14: of the mids 2..12 are 2, 3 and 6..9 of a.
    share, chance = (2 / 3 + 1 / 3) / 2, (2 / 7 + 6 / 11) / 2
    told = f"{share:.0%} of the mids taken up show the returning prompt, {chance:.0%} by chance"
    assert lines[-1] == f"  mean of 2 of 3, where layers had a choice: {told}"
    assert len(lines) == 5


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("blocks", [5, 40, 4000])
def test_the_report_of_a_story_stays_short(story, blocks):
    starts, prompts, _ = STORIES[story]
    record = make_record(40, [start * blocks // 40 for start in starts] if blocks > 40 else starts, prompts)
    record.blocks = record.blocks[:blocks]
    for block in record.blocks:  # every line that a report can have
        block.seconds = dict.fromkeys(("refresh", "denoise", "decode", "wait", "compression", "clean_pass"), 1.0)
        block.bytes["aside"] = 1
    text = report(record)
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 110


def test_numbers_are_told_in_runs():
    assert number_list([2, 3]) == "2, 3"
    assert number_list([4]) == "4"
    assert number_list([2, 3, 4, 9]) == "2 to 4, 9"
    assert number_list([2, 4, 6, 8, 9]) == "2, 4 and 3 more"
    assert runs([1, 2, 4]) == [range(1, 3), range(4, 5)]
    assert runs([]) == []


def test_the_clock():
    record = make_record(1, [], [])  # a block is 16 frames, the first 13: one second
    assert [clock(record, block) for block in (0, 1, 32, 60, 61, 3600)] == [
        "0:00",
        "0:01",
        "0:32",
        "1:00",
        "1:01",
        "1:00:00",
    ]
    record.config = CacheConfig(block_frames=1, sink_frames=2, recent_frames=1)
    assert [clock(record, block) for block in (0, 1, 2, 241)] == ["0:00.0", "0:00.1", "0:00.3", "1:00.1"]


# --- the story as text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [1.0, 7.3, 16.0, 23.976, 120.0])
@pytest.mark.parametrize("block_frames", [1, 3, 4])
def test_a_records_story_is_read_again_block_for_block(fps, block_frames):
    starts = [0, 1, 2, 7, 100, 9_999]
    record = make_record(0, starts, [f"scene {start}: # a {{b|c}} // d" for start in starts])
    record.fps, record.config = fps, CacheConfig(block_frames, block_frames, block_frames, top_k=0)
    record.temporal_stride = 1
    told = parse_story(story_of(record))
    assert [start_block(prompt.seconds, fps, block_frames) for prompt in told] == starts
    assert [prompt.prompt for prompt in told] == [prompt.prompt for prompt in record.prompts]
    assert numbers(record)["summary"]["story"] == story_of(record)


def test_words_that_a_record_does_not_know_are_left_to_the_reader():
    lines = story_of(make_record(9, [0, 4], ["", "it rains"])).splitlines()
    assert lines == ["# 0:00 (words not known: write them here)", "0:03.812 it rains"]


def test_the_report_says_over_how_many_blocks_prompts_blend():
    record = make_record(9, [0, 4], ["a", "b"])
    record.prompt_switch = "blend"
    assert "at a switch: blend\n" in report(record)  # a record from before that was kept
    record.blend_blocks = 3
    assert "at a switch: blend over 3 blocks\n" in report(record)
