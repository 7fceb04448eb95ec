"""Stretches and returns of records made by hand, against values counted by hand."""

from __future__ import annotations

import pytest
from records import empty_record

from packforcing.config import CacheConfig
from packforcing.generate.record import BlockRecord, CacheRecord, PromptRecord
from packforcing.inspector.returns import chance_share, prompt_key, returns, selected_share, stretches

HOUSE, TREE = "place two: a red house", "place one: a green tree"


def make_record(blocks: int, prompts: list[tuple[int, str]], selected: dict[int, list[list[int]]]) -> CacheRecord:
    """Two layers, sink 1 block, recent 1 block: mids of block i are 1 .. i - 2. `selected` is by block."""
    told = [PromptRecord(start, prompt) for start, prompt in prompts]
    record = empty_record(2, CacheConfig(sink_frames=4, recent_frames=4, top_k=2), prompts=told)
    record.blocks = [BlockRecord(i, selected.get(i, [[], []])) for i in range(blocks)]
    return record


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("place two: a red house", "place two", True),
        ("place two: a red house", "place two: a blue house", True),
        ("Place  Two :a red house", "place two", True),
        ("place two", "place three", False),
        ("it rains", "It  rains ", True),
        ("it rains: a lot", "it rains", False),  # a colon ends only the name of a place
        ("placemats: red", "placemats: blue", False),
    ],
)
def test_which_prompts_are_the_same(one, other, same):
    assert (prompt_key(one) == prompt_key(other)) == same


def test_stretches_end_where_the_next_one_begins():
    found = stretches(make_record(10, [(0, TREE), (3, HOUSE), (5, "rain"), (7, "place two"), (12, "snow")], {}))
    assert [one.blocks for one in found] == [range(0, 3), range(3, 5), range(5, 7), range(7, 10)]
    assert [one.prompt for one in found] == [TREE, HOUSE, "rain", "place two"]
    assert [one.number for one in found] == [0, 1, 2, 1]


def test_prompts_without_words_are_all_different():
    record = make_record(9, [(0, ""), (3, ""), (6, " ")], {})
    assert [one.number for one in stretches(record)] == [0, 1, 2]
    assert returns(record) == []


def test_a_return_is_counted():
    # Stretches: tree 0..2, house 3..5, rain 6..7, house 8..9. Block 8 chooses from mids 1..6, of which 3, 4, 5 show it.
    record = make_record(
        10, [(0, TREE), (3, HOUSE), (6, "rain"), (8, "place two")], {8: [[1, 4], [3, 4]], 9: [[6, 7], [6, 7]]}
    )
    (found,) = returns(record)
    assert found.block == 8
    assert [one.blocks for one in found.earlier] == [range(3, 6)]
    assert found.choices == (1, 2, 3, 4, 5, 6)
    assert found.earlier_mids == (3, 4, 5)
    assert found.taken == {3: 1, 4: 2}
    assert (found.layers, found.layers_taken) == (2, 2)
    assert found.share == 3 / 4
    assert found.chance == 3 / 6


def test_all_earlier_stretches_count_and_layers_may_miss():
    # a 0..1, b 2..3, a 4..5, b 6..7, a 8: from mids 1..6 those of a are 1, 4, 5.
    record = make_record(
        9,
        [(0, "a"), (2, "b"), (4, "a"), (6, "b"), (8, "a")],
        {4: [[1, 2], [1, 2]], 6: [[1, 4], [1, 4]], 8: [[2, 3], [5, 6]]},
    )
    at_4, at_6, at_8 = returns(record)
    assert [one.block for one in (at_4, at_6, at_8)] == [4, 6, 8]
    assert (at_4.share, at_4.chance) == (1 / 2, 1 / 2)  # block 0 is sink
    assert (at_6.taken, at_6.layers_taken, at_6.share, at_6.chance) == ({}, 0, 0, 2 / 4)
    assert [one.blocks for one in at_8.earlier] == [range(0, 2), range(4, 6)]
    assert (at_8.taken, at_8.layers_taken, at_8.share, at_8.chance) == ({5: 1}, 1, 1 / 4, 3 / 6)


def test_going_on_is_no_return():
    record = make_record(9, [(0, TREE), (3, HOUSE), (6, "place two")], {})
    assert [one.number for one in stretches(record)] == [0, 1, 1]
    assert returns(record) == []


def test_a_return_without_mid_blocks():
    record = make_record(3, [(0, "a"), (1, "b"), (2, "a")], {})
    (found,) = returns(record)
    assert (found.choices, found.taken, found.layers, found.share, found.chance) == ((), {}, 0, None, None)
    record.config = CacheConfig(sink_frames=0, recent_frames=0, top_k=0)
    (found,) = returns(record)
    assert (found.choices, found.chance) == ((), None)


def test_a_return_whose_first_block_is_not_in_the_record():
    record = make_record(9, [(0, "a"), (3, "b"), (6, "a")], {})
    assert len(returns(record)) == 1
    del record.blocks[6]
    assert returns(record) == []


@pytest.mark.parametrize("prompts", [[], [(0, "a")]])
def test_a_video_of_one_prompt_has_no_return(prompts):
    record = make_record(9, prompts, {})
    assert len(stretches(record)) == len(prompts)
    assert returns(record) == []


def test_a_record_without_blocks():
    record = make_record(0, [(0, "a"), (3, "b")], {})
    assert stretches(record) == []
    assert returns(record) == []


def test_shares_of_selections():
    block = BlockRecord(9, [[1, 2, 3], [3, 4, 5]])
    assert selected_share(block, {3, 9}) == 2 / 6
    assert selected_share(block, range(1, 6)) == 1
    assert selected_share(block, ()) == 0
    assert selected_share(BlockRecord(9, [[], []]), {3}) is None
    assert chance_share(range(1, 9), {3, 4, 20}) == 2 / 8
    assert chance_share((), {3}) is None
