"""The arithmetic of docs/method.md, sections 2 and 3."""

from __future__ import annotations

import re
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing.config import MODELS, CacheConfig, FrameSize, Layout, Length, default_temporal_stride, video_frames
from packforcing.errors import PackForcingError
from packforcing.generate.plan import plan

WAN = MODELS["wan2.1-1.3b"]
SIZE = FrameSize(832, 480)


def assert_one_sentence(error: PackForcingError, found: str) -> None:
    """A user's mistake is told in one sentence, which names what was found."""
    message = str(error)
    assert found in message
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message


# ---------------------------------------------------------------------- the numbers that must come out


def test_the_paper_at_832x480_for_two_minutes() -> None:
    p = plan(WAN, CacheConfig(), SIZE, seconds=120, fps=16)
    assert p.tokens_per_frame == 1_560
    assert p.tokens_per_block == 6_240
    assert p.compressed_tokens_per_block == 182
    assert (p.sink_tokens, p.mid_tokens, p.recent_tokens) == (12_480, 2_912, 6_240)
    assert p.context_tokens == 27_872
    assert p.cached_tokens == 21_632
    assert p.cache_bytes == 21_632 * 30 * 2 * 1536 * 2 == 3_987_210_240  # "3.99 GB"
    assert p.context_bytes == 27_872 * 30 * 2 * 1536 * 2 == 5_137_367_040  # "5.1 GB"
    assert p.max_position == 80


def test_the_full_cache_that_the_bounded_one_replaces() -> None:
    p = plan(WAN, CacheConfig(), SIZE, seconds=120, fps=16)
    assert p.blocks == 120
    assert p.latent_frames == 480
    assert p.video_frames == 1_917  # the first block gives 13 frames, the others 16
    assert p.full_tokens == 748_800
    assert p.full_cache_bytes == 748_800 * 30 * 2 * 1536 * 2 == 138_018_816_000  # "138 GB"


def test_an_archived_block_takes_33_megabytes() -> None:
    assert plan(WAN, CacheConfig(), SIZE, seconds=120).archive_bytes_per_block == 182 * 30 * 2 * 1536 * 2 == 33_546_240


def test_while_the_last_block_is_made_the_archive_holds_every_block_between_it_and_the_sinks() -> None:
    # Blocks are born in both resolutions, so the recent ones lie in the archive already.
    for recent_frames in (0, 4, 12):
        p = plan(WAN, CacheConfig(recent_frames=recent_frames), SIZE, seconds=120)
        assert p.archive_blocks == 120 - 1 - 2
        assert p.archive_bytes == 117 * 33_546_240
    assert plan(WAN, CacheConfig(), SIZE, seconds=2).archive_blocks == 0
    assert plan(WAN, CacheConfig(top_k=0), SIZE, seconds=120).archive_blocks == 0


def test_blocks_of_three_frames_keep_every_frame_when_compressed() -> None:
    config = CacheConfig(block_frames=3, sink_frames=6, recent_frames=3)
    p = plan(WAN, config, SIZE, seconds=120)
    assert p.tokens_per_block == 4_680
    assert p.compressed_tokens_per_block == 3 * 7 * 13 == 273
    assert (p.sink_tokens, p.mid_tokens, p.recent_tokens) == (9_360, 4_368, 4_680)
    assert (p.cached_tokens, p.context_tokens) == (18_408, 23_088)
    assert p.blocks == 160
    assert p.full_tokens == 748_800


def test_blocks_of_one_frame() -> None:
    p = plan(WAN, CacheConfig(block_frames=1), SIZE, seconds=120)
    assert p.tokens_per_block == 1_560
    assert p.compressed_tokens_per_block == 7 * 13 == 91
    assert (p.sink_tokens, p.mid_tokens, p.recent_tokens) == (12_480, 1_456, 6_240)
    assert (p.cached_tokens, p.context_tokens) == (20_176, 21_736)
    assert p.blocks == 480


def test_the_temporal_stride_is_two_where_it_divides_a_block() -> None:
    assert [default_temporal_stride(frames) for frames in (1, 2, 3, 4, 5)] == [1, 2, 1, 2, 1]
    three = CacheConfig(block_frames=3, sink_frames=6, recent_frames=3)
    assert plan(WAN, three, SIZE, 10, temporal_stride=2).compressed_tokens_per_block == 1 * 7 * 13
    assert plan(WAN, CacheConfig(), SIZE, 10, temporal_stride=1).compressed_tokens_per_block == 4 * 7 * 13


@pytest.mark.parametrize(
    ("width", "height", "frame", "compressed"),
    [
        (848, 496, 31 * 53, 2 * 7 * 13),
        (1280, 720, 45 * 80, 2 * 11 * 20),
        (480, 832, 52 * 30, 2 * 13 * 7),
        (80, 64, 4 * 5, 2 * 1 * 1),
        (64, 112, 7 * 4, 2 * 1 * 1),
    ],
)
def test_sizes_that_four_does_not_divide_are_floored(width: int, height: int, frame: int, compressed: int) -> None:
    p = plan(WAN, CacheConfig(), FrameSize(width, height), seconds=10)
    assert p.tokens_per_frame == frame
    assert p.tokens_per_block == 4 * frame
    assert p.compressed_tokens_per_block == compressed


def test_the_token_grid_and_the_latent_grid() -> None:
    assert (SIZE.latent_height, SIZE.latent_width) == (60, 104)
    assert (SIZE.rows, SIZE.columns) == (30, 52)
    assert (SIZE.compressed_rows, SIZE.compressed_columns) == (7, 13)


def test_the_position_range_is_the_highest_position_of_a_squeezed_context() -> None:
    assert plan(WAN, CacheConfig(position_range=21), SIZE, 120).max_position == 21
    assert plan(WAN, CacheConfig(position_range=200), SIZE, 120).max_position == 80


def test_without_rope_adjustment_positions_grow_with_the_video() -> None:
    assert plan(WAN, CacheConfig(rope_adjustment=False), SIZE, 120).max_position == 480


# ---------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("seconds", "fps", "block_frames", "blocks"),
    [(1, 16, 4, 1), (1.01, 16, 4, 2), (0.001, 16, 4, 1), (0.1, 160, 4, 1), (60, 24, 4, 90), (5, 16, 3, 7)],
)
def test_a_duration_is_rounded_up_to_whole_blocks(seconds: float, fps: float, block_frames: int, blocks: int) -> None:
    assert Length(seconds, fps, block_frames).blocks == blocks


@given(millis=st.integers(1, 3_600_000), fps=st.integers(1, 120), block_frames=st.integers(1, 5))
@settings(deadline=None, derandomize=True)
def test_any_duration_takes_the_fewest_blocks_that_cover_it(millis: int, fps: int, block_frames: int) -> None:
    length = Length(millis / 1000, fps, block_frames)
    assert length.blocks == ceil(Fraction(millis * fps, 1000 * 4 * block_frames))
    assert length.latent_frames == length.blocks * block_frames
    assert length.video_frames == 1 + 4 * (length.latent_frames - 1)


def test_the_first_latent_frame_is_one_video_frame_and_the_others_four() -> None:
    assert [video_frames(n) for n in (0, 1, 2, 4, 8)] == [0, 1, 5, 13, 29]


# ---------------------------------------------------------------------- partitions


@st.composite
def configs(draw: st.DrawFn) -> CacheConfig:
    frames = draw(st.integers(1, 4))
    return CacheConfig(
        block_frames=frames,
        sink_frames=frames * draw(st.integers(0, 4)),
        recent_frames=frames * draw(st.integers(0, 4)),
        top_k=draw(st.integers(0, 20)),
    )


@given(config=configs(), block=st.integers(0, 60))
@settings(deadline=None, derandomize=True)
def test_every_block_of_the_history_is_in_exactly_one_partition(config: CacheConfig, block: int) -> None:
    history = config.partition(block)
    assert [*history.sink, *history.mid, *history.recent] == list(range(block))


@given(config=configs(), block=st.integers(0, 60))
@settings(deadline=None, derandomize=True)
def test_sinks_are_the_first_blocks_and_recent_blocks_the_last(config: CacheConfig, block: int) -> None:
    sinks, recents = config.sink_frames // config.block_frames, config.recent_frames // config.block_frames
    history = config.partition(block)
    everything = list(range(block))
    after_sinks = everything[sinks:]
    assert list(history.sink) == everything[:sinks]
    assert list(history.recent) == (after_sinks[-recents:] if recents else [])
    assert config.attended_mids(block) == min(config.top_k, max(0, block - sinks - recents))


@given(config=configs(), block=st.integers(0, 30))
@settings(deadline=None, derandomize=True)
def test_a_block_becomes_mid_unless_it_is_a_sink_or_there_are_no_mids(config: CacheConfig, block: int) -> None:
    later = block + config.recent_blocks + 1
    assert config.becomes_mid(block) == (config.top_k > 0 and block in config.partition(later).mid)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"block_frames": 0}, "0"),
        ({"block_frames": -4}, "-4"),
        ({"sink_frames": 6}, "6"),
        ({"sink_frames": -4}, "-4"),
        ({"recent_frames": 5}, "5"),
        ({"recent_frames": -1}, "-1"),
        ({"block_frames": 3}, "8"),
        ({"top_k": -1}, "-1"),
        ({"selection": "newest"}, "'newest'"),
        ({"archive_device": "tape"}, "'tape'"),
        ({"archive_budget_gb": -0.5}, "-0.5"),
        ({"archive_budget_gb": float("nan")}, "nan"),
        ({"archive_budget_gb": float("inf")}, "inf: set archive_device to device"),
        ({"query_fraction": 0.0}, "0.0"),
        ({"query_fraction": 1.5}, "1.5"),
        ({"query_fraction": float("nan")}, "nan"),
        ({"head_fraction": -0.25}, "-0.25"),
        ({"position_range": 16}, "16"),
        ({"position_range": -20}, "-20"),
        ({"position_range": 15, "top_k": 0}, "15"),
        ({"position_range": 24, "rope_adjustment": False}, "24"),
    ],
)
def test_a_wrong_cache_configuration_is_told_in_one_sentence(arguments: dict[str, object], found: str) -> None:
    with pytest.raises(PackForcingError) as error:
        CacheConfig(**arguments)
    assert_one_sentence(error.value, f"is {found}")


def test_the_position_range_needs_one_frame_for_the_mids() -> None:
    assert CacheConfig(position_range=17).position_range == 17
    assert CacheConfig(position_range=16, top_k=0).position_range == 16


def test_partitions_that_are_not_whole_blocks_name_the_nearest_that_are() -> None:
    with pytest.raises(PackForcingError, match="whole blocks of 4 latent frames, but it is 6: set it to 4 or 8"):
        CacheConfig(sink_frames=6)


@pytest.mark.parametrize(
    ("width", "height", "side", "found", "nearest"),
    [
        (840, 480, "width", 840, 832),
        (832, 479, "height", 479, 480),
        (0, 480, "width", 0, 16),
        (832, -16, "height", -16, 16),
        (8, 480, "width", 8, 16),
    ],
)
def test_a_side_that_is_no_multiple_of_16_is_told_in_one_sentence(
    width: int, height: int, side: str, found: int, nearest: int
) -> None:
    with pytest.raises(PackForcingError, match=f"{side} must be .* set it to {nearest},") as error:
        FrameSize(width, height)
    assert_one_sentence(error.value, f"is {found}")


@pytest.mark.parametrize("seconds", [0, -1.5, float("nan"), float("inf"), float("-inf")])
def test_a_length_that_is_no_length_is_told_in_one_sentence(seconds: float) -> None:
    with pytest.raises(PackForcingError, match="length") as error:
        plan(WAN, CacheConfig(), SIZE, seconds=seconds)
    assert_one_sentence(error.value, f"is {seconds}")


@pytest.mark.parametrize("fps", [0, -16, float("nan"), float("inf"), 1e-300, 1e300])
def test_a_frame_rate_that_is_no_rate_is_told_in_one_sentence(fps: float) -> None:
    with pytest.raises(PackForcingError, match="frame rate") as error:
        plan(WAN, CacheConfig(), SIZE, seconds=5, fps=fps)
    assert_one_sentence(error.value, f"is {fps}")


@pytest.mark.parametrize("size", [FrameSize(48, 480), FrameSize(832, 48)])
def test_a_frame_without_a_compressed_token_is_told_in_one_sentence(size: FrameSize) -> None:
    with pytest.raises(PackForcingError) as error:
        Layout(CacheConfig(), size, temporal_stride=2)
    assert_one_sentence(error.value, f"is {size.width}x{size.height}")
    assert Layout(CacheConfig(top_k=0), size, temporal_stride=2).mid_tokens == 0


def test_a_compressor_that_does_not_fit_the_block_is_told_in_one_sentence() -> None:
    with pytest.raises(PackForcingError) as error:
        Layout(CacheConfig(block_frames=1), SIZE, temporal_stride=2)
    assert_one_sentence(error.value, "has 1")
    with pytest.raises(PackForcingError) as error:
        Layout(CacheConfig(), SIZE, temporal_stride=4)
    assert_one_sentence(error.value, "is 4")


NO_WHOLE_NUMBERS = [2.5, float("inf"), float("nan"), "4", [4], None, True]
NO_NUMBERS = ["1", [1.0], None, True]


@pytest.mark.parametrize("value", NO_WHOLE_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["block_frames", "sink_frames", "recent_frames", "top_k", "position_range"])
def test_a_count_that_is_no_whole_number_is_told(name: str, value: object):
    with pytest.raises(PackForcingError, match=rf"^{name} must be a whole number, but it is {re.escape(repr(value))}"):
        CacheConfig(**{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_told(value: object):
    for name in ("query_fraction", "head_fraction", "archive_budget_gb"):
        with pytest.raises(PackForcingError, match=rf"^{name} must be a number, but it is "):
            CacheConfig(**{name: value})
    with pytest.raises(PackForcingError, match=r"^The frame rate must be a number"):
        Length(1.0, value, 4)
    with pytest.raises(PackForcingError, match=r"^The video's length in seconds must be a number"):
        Length(value, 16.0, 4)


@pytest.mark.parametrize("value", NO_WHOLE_NUMBERS, ids=repr)
def test_a_side_that_is_no_whole_number_is_told(value: object):
    with pytest.raises(PackForcingError, match=r"^The width must be a whole number"):
        FrameSize(value, 64)
    with pytest.raises(PackForcingError, match=r"^The height must be a whole number"):
        FrameSize(64, value)


def test_numpys_whole_numbers_are_whole_numbers():
    assert CacheConfig(top_k=np.int64(3)).top_k == 3
    assert FrameSize(np.int32(64), 64).columns == 4


@pytest.mark.parametrize("side", [16_400, 16_000_000, 1_600_000_000, 10**30])
def test_a_side_beyond_all_screens_is_told_at_once(side: int):
    with pytest.raises(PackForcingError, match=f"^The width can be at most 16,384 pixels, but it is {side:,}"):
        FrameSize(side, 64)
    assert FrameSize(16_384, 16_384).tokens_per_frame == 1024**2


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(PackForcingError) as error:
        CacheConfig(top_k="x" * 100_000)
    assert len(str(error.value)) < 120
