"""The inspector's numbers against counts made another way, and its colours at the cells' centres."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from PIL import Image, ImageFont
from records import empty_record

from packforcing.config import CacheConfig, Layout
from packforcing.errors import PackForcingError
from packforcing.generate.record import PARTITIONS, BlockRecord, CacheRecord
from packforcing.inspector import (
    COLOURS,
    STORED,
    cell_box,
    mid_colour,
    panel_boxes,
    picture,
    report,
    selection_facts,
    token_counts,
)
from packforcing.inspector.panels import axis_blocks
from packforcing.inspector.picture import cell_in

LAYERS = 5


def make_record(blocks: int, top_k: int = 4, seed: int = 0, first: int = 0, **config) -> CacheRecord:
    """A run of blocks first..blocks-1 whose layers choose mid blocks at random."""
    random = np.random.default_rng(seed)
    run = {"compressor": "training-free", "dtype": "bfloat16", "device": "cuda:0"}
    record = empty_record(LAYERS, CacheConfig(top_k=top_k, **config), **run)
    for index in range(first, blocks):
        mid = record.config.partition(index).mid
        count = record.config.attended_mids(index)
        chosen = [sorted(random.choice(mid, count, replace=False).tolist()) if count else [] for _ in range(LAYERS)]
        record.blocks.append(
            BlockRecord(
                block=index,
                selected=chosen,
                mid_slots_written=int(random.integers(0, LAYERS * count + 1)),
                recent_rotated=int(index < 9),
                bytes={name: (i + 1) * 10**8 + index * 10**6 for i, name in enumerate(PARTITIONS)},
                seconds={"denoise": 0.5, "decode": 0.2, "compression": 0.05, "clean_pass": 0.25},
            )
        )
    return record


def row(text: str, name: str) -> str:
    """What the report says after `name`."""
    return re.search(rf"^  {re.escape(name)} +(.*)$", text, re.MULTILINE).group(1)


UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}


def size(text: str, name: str) -> float:
    """The bytes that the report says after `name`; they are told to two decimals of their unit."""
    number, unit = re.search(r"([\d,.]+) (GB|MB|kB|bytes)", row(text, name)).groups()
    return float(number.replace(",", "")) * UNITS[unit]


def to_two_decimals(bytes_: float) -> object:
    unit = max(unit for unit in UNITS.values() if unit <= bytes_)
    return pytest.approx(bytes_, abs=0.005 * unit)


def test_tokens_of_the_paper_s_setting():
    counts = token_counts(make_record(120, top_k=16))
    assert [int(counts[name][-1]) for name in ("sink", "mid", "recent", "current")] == [12480, 2912, 6240, 6240]
    assert counts["full"][-1] == 120 * 6240
    assert [int(counts[name][0]) for name in ("sink", "mid", "recent", "current", "full")] == [0, 0, 0, 6240, 6240]


def test_the_report_tells_tokens_and_bytes():
    record = make_record(120, top_k=16)
    text = report(record)
    assert "120 blocks, 1,917 frames, 119.8 s at 16 fps" in text
    assert row(text, "context").split()[0] == "27,872"
    assert "constant since block 19" in row(text, "context")
    assert row(text, "full cache would be").split()[0] == "748,800"
    assert "26.9 times the context" in row(text, "full cache would be")
    last = record.blocks[-1].bytes
    assert size(text, "archive, host") == to_two_decimals(last["archive_host"])
    context = sum(last[name] for name in ("sink", "recent", "current", "mid"))
    assert size(text, "context") == to_two_decimals(context)
    assert size(text, "archive, disk") == to_two_decimals(last["archive_disk"])
    elsewhere = last["archive_host"] + last["archive_disk"]
    assert size(text, "all on the device") == to_two_decimals(sum(last.values()) - elsewhere)


def test_a_context_that_still_grows_is_told():
    assert "still growing, to 27,872 tokens" in report(make_record(10, top_k=16))
    assert "constant since block 19" in report(make_record(20, top_k=16))


@pytest.mark.parametrize("blocks", [12, 40])
def test_selection_facts_equal_plain_counts(blocks):
    record = make_record(blocks)
    facts = selection_facts(record)
    chosen = [(b.block, layer, m) for b in record.blocks for layer, mids in enumerate(b.selected) for m in mids]
    stored = [(b.block, m) for b in record.blocks for m in record.config.partition(b.block).mid]

    assert facts.mean_age == pytest.approx(np.mean([block - m for block, _, m in chosen]))
    assert facts.mean_stored_age == pytest.approx(np.mean([block - m for block, m in stored]))

    times = {m: sum(mid == m for *_, mid in chosen) for m in range(blocks)}
    chances = {m: LAYERS * sum(mid == m for _, mid in stored) for m in range(blocks)}
    best = sorted(times, key=lambda m: (-times[m], m))[: len(facts.most_attended)]
    assert [(m, n) for m, n, _ in facts.most_attended] == [(m, times[m]) for m in best]
    assert [share for *_, share in facts.most_attended] == pytest.approx([times[m] / chances[m] for m in best])

    returns, returned = 0, set()
    for layer, mid in itertools.product(range(LAYERS), range(blocks)):
        seen = [mid in block.selected[layer] for block in record.blocks]
        runs = [value for value, _ in itertools.groupby(seen)].count(True)
        returns += max(0, runs - 1)
        returned |= {mid} if runs > 1 else set()
    assert (facts.returns, facts.returned_blocks) == (returns, len(returned))
    assert facts.seen_blocks == sum(count > 0 for count in times.values())

    shares, random = [], []
    for block in record.blocks:
        count, choice = len(block.selected[0]), len(record.config.partition(block.block).mid)
        if 0 < count < choice:
            pairs = itertools.permutations(map(set, block.selected), 2)
            shares.append(np.mean([len(a & b) / count for a, b in pairs]))
            random.append(count / choice)
    assert facts.agreement == pytest.approx(np.mean(shares))
    assert facts.chance_agreement == pytest.approx(np.mean(random))


def test_layers_that_agree_and_blocks_that_come_back():
    record = make_record(0, top_k=1)
    for index, mid in [(4, 2), (5, 2), (6, 3), (7, 3), (8, 2)]:
        record.blocks.append(BlockRecord(index, [[mid]] * LAYERS))
    facts = selection_facts(record)
    assert facts.agreement == 1
    assert (facts.returns, facts.returned_blocks, facts.seen_blocks) == (LAYERS, 1, 2)
    assert facts.most_attended[0] == (2, 3 * LAYERS, 3 / 5)
    assert facts.most_attended[1] == (3, 2 * LAYERS, 2 / 4)


def test_the_report_tells_moves_and_times():
    record = make_record(30)
    text = report(record)
    written = sum(block.mid_slots_written for block in record.blocks)
    possible = sum(len(mids) for block in record.blocks for mids in block.selected)
    assert f"{written:,} of {possible:,}" in row(text, "mid slots written")
    assert row(text, "recent rotations").startswith("9, 0.30 a block")
    frames = 30 * 16 - 3
    for name, seconds in (("without decoding", 30 * 0.8), ("with all stages", 30)):
        rate, unit = row(text, name).split(maxsplit=1)
        assert float(rate) == pytest.approx(frames / seconds, abs=0.006)
        assert unit == "frames a second"
    assert row(text, "denoise").split() == ["0.500", "0.500", "0.500", "50%"]
    assert row(text, "decode").split()[-1] == "20%"


def test_what_was_decoded_beside_other_work_does_not_count_twice():
    record = make_record(30)
    for block in record.blocks:
        block.seconds["wait"] = 0.1
    text = report(record)
    rate, _ = row(text, "with all stages").split(maxsplit=1)
    assert float(rate) == pytest.approx((30 * 16 - 3) / (30 * 0.9), abs=0.006)
    assert "without decoding" not in text
    assert "decoded beside the next one" in text
    assert row(text, "wait").split() == ["0.100", "0.100", "0.100", "11%"]
    assert size(text, "set aside") == record.blocks[-1].bytes["aside"]


def test_a_stage_that_never_ran_is_absent():
    record = make_record(3)
    for block in record.blocks:
        del block.seconds["decode"]
        block.bytes["aside"] = 0
    assert "decode  " not in report(record)
    assert "set aside" not in report(record)
    for block in record.blocks:
        block.seconds = {}
    assert "not measured" in report(record)


@pytest.mark.parametrize("blocks", [0, 1, 2, 5, 1500])
def test_the_report_stays_short(blocks):
    text = report(make_record(blocks))
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("selected", [[], [[]] * LAYERS])
@pytest.mark.parametrize("top_k", [0, 4])
def test_records_without_a_selection(selected, top_k):
    record = make_record(4, top_k=top_k)
    for block in record.blocks:
        block.selected, block.bytes = selected, {}
    assert ("none has been attended yet" if top_k else "off") in report(record)
    assert picture(record, 640).mode == "RGB"


def test_a_record_that_starts_late():
    record = make_record(40, first=25)
    assert "15 blocks, 240 frames" in report(record)
    image = picture(record)
    assert centre_colour(image, cell_box(record, 30, 0)) == COLOURS["sink"]
    assert centre_colour(image, cell_box(record, 10, 0)) not in (*COLOURS.values(), STORED)


def test_reading_a_record_does_not_change_it():
    record = make_record(12)
    before = record.as_dict()
    report(record)
    picture(record, 640)
    assert record.as_dict() == before


def centre_colour(image: Image.Image, box: tuple[int, int, int, int]) -> tuple[int, int, int]:
    left, top, right, bottom = box
    return image.getpixel(((left + right - 1) // 2, (top + bottom - 1) // 2))


@pytest.mark.parametrize(("blocks", "width"), [(1, 1600), (10, 1600), (33, 1280), (120, 1600), (33, 640)])
def test_a_cell_has_its_partition_s_colour(blocks, width):
    record = make_record(blocks)
    image, box = picture(record, width), panel_boxes(record, width)["partitions"]
    assert image.size[0] == width
    for made in range(0, blocks, max(1, blocks // 12)):
        partition = record.config.partition(made)
        for history in range(blocks):
            share = np.mean([history in mids for mids in record.blocks[made].selected])
            if history in partition.sink:
                expected = COLOURS["sink"]
            elif history in partition.mid:
                expected = mid_colour(float(share))
            elif history in partition.recent:
                expected = COLOURS["recent"]
            elif history == made:
                expected = COLOURS["current"]
            else:
                expected = None
            found = centre_colour(image, cell_in(box, axis_blocks(record), made, history))
            if expected is None:
                assert found not in (*COLOURS.values(), STORED)
            else:
                assert np.abs(np.subtract(found, expected)).max() <= 1, (made, history, found, expected)


def test_a_brighter_mid_means_more_layers():
    brightness = [sum(mid_colour(share)) for share in (0, 0.2, 0.5, 1)]
    assert brightness == sorted(brightness)
    assert mid_colour(1) == COLOURS["mid"]
    assert mid_colour(0) == STORED


def test_a_single_selection_among_thousands_is_seen():
    record = make_record(0, top_k=1)
    record.blocks = [BlockRecord(i, [[]] * LAYERS) for i in range(3)]
    record.blocks += [BlockRecord(i, [[2]] * LAYERS) for i in range(4, 3000)]
    record.blocks[2000] = BlockRecord(record.blocks[2000].block, [[777]] * LAYERS)
    image = picture(record)
    made = record.blocks[2000].block
    assert centre_colour(image, cell_box(record, made, 777)) == COLOURS["mid"]
    assert centre_colour(image, cell_box(record, made, 900)) == STORED
    assert centre_colour(image, cell_box(record, made, 0)) == COLOURS["sink"]
    assert centre_colour(image, cell_box(record, made, made)) == COLOURS["current"]


def test_the_token_panel_is_stacked_in_proportion():
    record = make_record(60, top_k=16)
    box = panel_boxes(record)["tokens"]
    column = np.array(picture(record))[box.top : box.bottom, box.left + round(50.5 * box.width / 60)]
    tokens = {name: int((column == COLOURS[name]).all(axis=1).sum()) for name in ("sink", "recent", "current", "mid")}
    layout = Layout(record.config, record.size, 2)
    assert tokens["sink"] / tokens["recent"] == pytest.approx(layout.sink_tokens / layout.recent_tokens, rel=0.06)
    assert tokens["mid"] / tokens["sink"] == pytest.approx(layout.mid_tokens / layout.sink_tokens, rel=0.1)
    assert tokens["current"] == pytest.approx(tokens["recent"], abs=2)


def test_without_mids_nothing_is_shown_as_stored():
    record = make_record(30, top_k=0)
    image = np.array(picture(record))
    assert not (image == STORED).all(axis=2).any()
    assert not (image == COLOURS["mid"]).all(axis=2)[: cell_box(record, 0, 0)[3]].any()


def test_an_old_pillow_s_font_will_do(monkeypatch):
    small = ImageFont.load_default_imagefont()

    def load_default():  # Pillow before 10.1 takes no size
        return small

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    record = make_record(20)
    image = picture(record)
    assert centre_colour(image, cell_box(record, 10, 10)) == COLOURS["current"]


def test_a_picture_too_narrow_to_read_is_refused():
    with pytest.raises(PackForcingError, match="at least 640 pixels wide, but width is 200"):
        picture(make_record(3), 200)


@pytest.mark.parametrize(
    ("dtype", "gigabytes"), [("bfloat16", 1), ("float32", 2), ("torch.float16", 1), ("float8_e4m3fn", 0.5)]
)
def test_the_full_cache_has_the_run_s_precision(dtype, gigabytes):
    record = make_record(100)
    record.dtype = dtype
    bytes_of_one = record.model.kv_bytes(100 * 6240) * gigabytes
    assert size(report(record), "full cache would be") == to_two_decimals(bytes_of_one)
