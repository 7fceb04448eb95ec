"""Which mid blocks are chosen, kept in their slots, and come back, over the blocks of a video."""

from __future__ import annotations

import pytest
import torch
from cache_reference import CLEAN, DENOISE, TINY, Raw, Stream, contexts, run_blocks, same_bits, small_layout
from torch import Tensor

from packforcing.cache.cache import Cache
from packforcing.cache.selection import runs
from packforcing.config import ModelShape


def test_the_first_steps_choice_holds_for_the_other_steps_and_the_clean_pass() -> None:
    layout = small_layout()
    stream = Stream(layout, TINY, dtype=torch.float32)
    cache, other = Cache(layout, TINY), Cache(layout, TINY)
    for twin in (cache, other):
        for _ in run_blocks(twin, stream, 12):
            pass
        twin.begin(12)
    for layer in range(TINY.layers):
        queries = stream(12, layer, DENOISE).queries
        cache.score(layer, queries)
        cache.select(layer)
        other.score(layer, -queries)
        other.select(layer)
        assert cache.selected[layer] != other.selected[layer]  # so another choice there would be
        chosen, held = list(cache.selected[layer]), contexts(cache)
        cache.score(layer, -queries)
        cache.select(layer)
        assert cache.selected[layer] == chosen
        assert same_bits(contexts(cache), held)


ONE_HOT = ModelShape(layers=1, dim=48, heads=2)  # head 0 is scored; its first 8 channels carry time


def answering(stream: Stream, block: int) -> Raw:
    """Block `block` answers to channel `block` of head 0, which content scores leave unrotated; the rest is random."""
    raw = stream(block, 0, CLEAN).raw
    raw.compressed_keys[:, :, 0] = 0
    raw.compressed_keys[:, :, 0, block] = 1
    return raw


def run_asking(wanted: dict[int, list[int]], blocks: int, **changes: object) -> tuple[Cache, list[Tensor]]:
    """Runs blocks whose queries ask for the mid blocks in `wanted`; stops in the last one, before it ends.

    The second result is a copy of the archive as each block entered it.
    """
    layout = small_layout(recent_frames=2, top_k=2, **changes)
    stream, cache = Stream(layout, ONE_HOT, dtype=torch.float32), Cache(layout, ONE_HOT)
    pristine: list[Tensor] = []
    for block in range(blocks):
        if block:
            cache.end()
            pristine += [x.clone() for x in cache.archive.read([len(cache.archive) - 1], 0)] if block > 1 else []
        cache.begin(block)
        raw = answering(stream, block)
        queries = torch.zeros_like(raw.keys)
        queries[:, :, 0, wanted.get(block, [])] = 1
        cache.score(0, queries)
        cache.select(0)
        assert cache.selected[0] == wanted.get(block, cache.selected[0])
        cache.write(0, raw.keys, raw.values)
        cache.write_compressed(0, raw.compressed_keys, raw.compressed_values)
    return cache, pristine


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([], []), ([3], [(3, 3)]), ([0, 1, 2], [(0, 2)]), ([0, 2, 3, 7], [(0, 0), (2, 3), (7, 7)])],
)
def test_neighbouring_slots_are_written_together(numbers: list[int], expected: list[tuple[int, int]]) -> None:
    assert runs(numbers) == expected


def test_an_unselected_block_comes_back_as_if_it_had_never_been_elsewhere() -> None:
    # Block 3 stands in the second slot, then in the first, leaves, and returns; in the other run it is chosen once.
    wandering, pristine = run_asking({5: [2, 3], 6: [3, 4], 7: [4, 5], 8: [4, 5], 9: [3, 6]}, blocks=10)
    direct, _ = run_asking({5: [1, 2], 6: [1, 2], 7: [4, 5], 8: [4, 5], 9: [3, 6]}, blocks=10)
    assert same_bits(contexts(wandering), contexts(direct))
    kept = [x for block in range(len(wandering.archive)) for x in wandering.archive.read([block], 0)]
    assert same_bits(kept, pristine)


@pytest.mark.parametrize(
    ("wanted", "written"),
    [([4, 5], 0), ([4, 6], 1), ([3, 5], 1), ([3, 4], 2), ([5, 6], 2)],
)
def test_mid_slots_that_do_not_change_are_not_written(wanted: list[int], written: int) -> None:
    cache, _ = run_asking({5: [2, 3], 6: [3, 4], 7: [4, 5], 8: [4, 5]}, blocks=9)
    assert cache.mid_slots_written == 0
    cache.end()
    compressed = cache.layout.compressed_tokens_per_block
    values = cache.context(0)[1]
    slots = values[:, values.shape[1] - 2 * compressed :].split(compressed, dim=1)  # mid slots end the valid prefix
    for slot in slots:
        slot.fill_(float("nan"))  # whoever writes a slot wipes this out
    cache.begin(9)
    queries = torch.zeros(1, cache.layout.tokens_per_block, 2, 24)
    queries[:, :, 0, wanted] = 1
    cache.score(0, queries)
    cache.select(0)
    assert cache.selected[0] == wanted
    assert cache.mid_slots_written == written
    kept = [a == b for a, b in zip(wanted, [4, 5], strict=True)]
    assert [bool(slot.isnan().all()) for slot in slots] == kept
    assert [bool(slot.isnan().any()) for slot in slots] == kept
