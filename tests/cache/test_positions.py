"""Temporal RoPE adjustment in the anchored form of docs/method.md, section 6."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing.cache.positions import Anchors, anchors, mid_anchors
from packforcing.config import CacheConfig

ANY_BLOCK = st.one_of(st.integers(0, 40), st.integers(0, 100_000))
ULP = 1e-13  # positions are below 200: a rounding or two


@st.composite
def configs(draw: st.DrawFn, squeezed: bool | None = False) -> CacheConfig:
    """Any partitions; `squeezed` gives every one a position range, None leaves it open."""
    frames = draw(st.integers(1, 4))
    sink, recent, top_k = (draw(st.integers(0, high)) for high in (4, 4, 40))
    smallest = frames * (sink + recent + 1) + (1 if top_k else 0)
    squeezed = draw(st.booleans()) if squeezed is None else squeezed
    return CacheConfig(
        block_frames=frames,
        sink_frames=frames * sink,
        recent_frames=frames * recent,
        top_k=top_k,
        position_range=draw(st.integers(smallest, smallest + 170)) if squeezed else 0,
    )


def everything(a: Anchors) -> list[float]:
    """Positions of all attended blocks, oldest first."""
    return [*a.sink, *a.mid, *a.recent, a.current]


def frame_positions(config: CacheConfig, a: Anchors) -> list[float]:
    """Positions of all attended latent frames, oldest first."""
    scales = [1.0] * len(a.sink) + [a.mid_scale] * len(a.mid) + [1.0] * (len(a.recent) + 1)
    return [
        start + scale * f
        for start, scale in zip(everything(a), scales, strict=True)
        for f in range(config.block_frames)
    ]


# ---------------------------------------------------------------------- the paper's spacing


@given(config=configs(), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True)
def test_the_context_has_no_gaps(config: CacheConfig, block: int) -> None:
    frames = frame_positions(config, anchors(config, block))
    assert frames == list(range(len(frames)))


@given(config=configs(squeezed=None), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True)
def test_every_attended_block_has_one_anchor(config: CacheConfig, block: int) -> None:
    a, history = anchors(config, block), config.partition(block)
    assert len(a.sink) == len(history.sink)
    assert len(a.mid) == min(config.top_k, len(history.mid))
    assert len(a.recent) == len(history.recent)


@given(config=configs(), data=st.data())
@settings(deadline=None, derandomize=True)
def test_while_nothing_has_been_dropped_local_positions_are_absolute(config: CacheConfig, data: st.DataObject) -> None:
    block = data.draw(st.integers(0, config.sink_blocks + config.top_k + config.recent_blocks))
    assert everything(anchors(config, block)) == [i * config.block_frames for i in range(block + 1)]


@given(config=configs(squeezed=None), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True)
def test_positions_never_exceed_the_context_however_long_the_video(config: CacheConfig, block: int) -> None:
    bound = config.sink_frames + config.top_k * config.block_frames + config.recent_frames + config.block_frames
    frames = frame_positions(config, anchors(config, block))
    assert min(frames) == 0
    assert max(frames) <= bound - 1


def test_the_default_context_spans_80_frames_for_ever() -> None:
    a = anchors(CacheConfig(), 100_000)
    assert a == anchors(CacheConfig(), 2 + 16 + 1)
    assert a.sink == (0.0, 4.0)
    assert a.mid == tuple(8.0 + 4 * j for j in range(16))
    assert a.recent == (72.0,)
    assert a.current + 4 == 80.0


def test_repeated_mids_span_as_much_from_the_first_one_on() -> None:
    config = CacheConfig(sink_frames=4, repeat_mids=True)
    assert anchors(config, 2) == anchors(CacheConfig(sink_frames=4), 2)
    assert anchors(config, 3) == anchors(CacheConfig(sink_frames=4), 100)


@given(config=configs(squeezed=None), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True)
def test_sinks_stand_where_they_were_made(config: CacheConfig, block: int) -> None:
    sinks = min(block, config.sink_blocks)
    assert anchors(config, block).sink == tuple(float(i * config.block_frames) for i in range(sinks))


@given(config=configs(), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True)
def test_the_papers_form_has_the_same_differences(config: CacheConfig, block: int) -> None:
    """Paper: the current and the recent blocks at their natural positions, the history rotated up to them."""
    a, frames = anchors(config, block), config.block_frames
    current = block * frames
    recent = [current - (len(a.recent) - j) * frames for j in range(len(a.recent))]
    history = len(a.sink) + len(a.mid)
    rotated = [current - (len(a.recent) + history - j) * frames for j in range(history)]
    papers = [*rotated, *recent, current]
    assert [p - papers[-1] for p in papers] == [p - a.current for p in everything(a)]


# ---------------------------------------------------------------------- position_range


@given(config=configs(squeezed=True), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_position_range_holds_the_whole_context(config: CacheConfig, block: int) -> None:
    a = anchors(config, block)
    assert all(0 <= p < config.position_range for p in frame_positions(config, a))
    assert a.current + config.block_frames <= config.position_range


@given(config=configs(squeezed=True), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_position_range_leaves_sink_recent_and_current_blocks_whole(config: CacheConfig, block: int) -> None:
    a, frames = anchors(config, block), config.block_frames
    near = [*a.recent, a.current]
    assert [p - a.current for p in near] == [(j - len(a.recent)) * frames for j in range(len(near))]
    assert [q - p for p, q in pairwise(a.sink)] == [frames] * (len(a.sink) - 1 if a.sink else 0)


@given(config=configs(squeezed=True), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_position_range_spaces_the_mids_evenly_between_sinks_and_recent_blocks(
    config: CacheConfig, block: int
) -> None:
    a, frames = anchors(config, block), config.block_frames
    if not a.mid:
        return
    following = a.recent[0] if a.recent else a.current
    room = config.position_range - config.sink_frames - config.recent_frames - frames
    span = min(len(a.mid) * frames, room)
    assert a.mid[0] == config.sink_frames
    assert following == config.sink_frames + span
    spacing = [q - p for p, q in pairwise([*a.mid, following])]
    assert spacing == pytest.approx([span / len(a.mid)] * len(a.mid), abs=ULP)
    assert a.mid_scale == pytest.approx(span / (len(a.mid) * frames), abs=ULP)


@given(config=configs(), block=ANY_BLOCK)
@settings(deadline=None, derandomize=True)
def test_a_position_range_that_is_wide_enough_changes_nothing(config: CacheConfig, block: int) -> None:
    natural = anchors(config, block)
    wide = CacheConfig(
        block_frames=config.block_frames,
        sink_frames=config.sink_frames,
        recent_frames=config.recent_frames,
        top_k=config.top_k,
        position_range=config.sink_frames + (config.top_k + 1) * config.block_frames + config.recent_frames,
    )
    assert anchors(wide, block) == natural


def test_no_position_range_rounds_the_recent_blocks_off_their_whole_frames() -> None:
    """Squeezed mids stand at fractions; what follows them must not inherit their rounding."""
    for top_k in range(1, 40):
        for room in range(1, top_k + 2):
            config = CacheConfig(block_frames=1, sink_frames=1, recent_frames=1, top_k=top_k, position_range=3 + room)
            a = anchors(config, 1_000)
            assert a.recent == (float(1 + min(room, top_k)),)
            assert a.current == a.recent[0] + 1


def test_the_range_of_training_by_hand() -> None:
    """16 mid blocks in the 20 frames of training: 8 sink + 4 for all mids + 4 recent + 4 current."""
    a = anchors(CacheConfig(position_range=20), 1_000)
    assert a.mid == tuple(8 + j / 4 for j in range(16))
    assert a.mid_scale == 1 / 16
    assert (a.recent, a.current) == ((12.0,), 16.0)


# ---------------------------------------------------------------------- without adjustment


def test_without_adjustment_every_block_stands_where_it_was_made() -> None:
    config = CacheConfig(rope_adjustment=False)
    a = anchors(config, 1_000)
    assert (a.sink, a.mid, a.recent, a.current) == ((0.0, 4.0), (), (3996.0,), 4000.0)
    assert mid_anchors(config, a, [2, 40, 998]) == (8.0, 160.0, 3992.0)


@given(block=ANY_BLOCK)
@settings(deadline=None, derandomize=True)
def test_with_adjustment_the_choice_of_mids_moves_nothing(block: int) -> None:
    a, mids = anchors(CacheConfig(), block), CacheConfig().partition(block).mid
    assert mid_anchors(CacheConfig(), a, list(mids)[-16:]) == mid_anchors(CacheConfig(), a, list(mids)[:16]) == a.mid
