"""Compressed blocks one block late: what they attend to, and what is archived, is the same to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cache_reference import (
    CLEAN,
    DENOISE,
    TINY,
    Setup,
    Stream,
    contexts,
    run_blocks,
    run_pass,
    same_bits,
    setup,
    setups,
    small_layout,
)
from hypothesis import example, given, settings
from torch import Tensor

from packforcing.cache.cache import Cache
from packforcing.cache.deferred import DeferredCache


def live_late(cache: DeferredCache, stream: Stream, blocks: int) -> Iterator[list[Tensor]]:
    """As `run_blocks`, the compressed form of each block in the clean pass of the next; yields what it attends to, and
    what its queries become."""
    for block in range(blocks):
        cache.begin(block)
        run_pass(cache, stream, DENOISE)
        due = block > 0 and cache.config.becomes_mid(block - 1)
        seen = []
        for layer in range(cache.model.layers):
            raw = stream(block, layer, CLEAN).raw
            cache.write(layer, raw.keys, raw.values)
            if due:
                late = stream(block - 1, layer, CLEAN)
                before = contexts(cache)
                cache.write_compressed(layer, late.raw.compressed_keys, late.raw.compressed_values)
                seen += [*cache.compressed_context(layer), cache.rotate_compressed_queries(late.compressed_queries)]
                assert same_bits(contexts(cache), before)
        yield seen
        cache.end()


@given(wanted=setups().filter(lambda wanted: wanted.layout.config.can_defer))
@example(wanted=setup(blocks=25, layers=2, batch=2, side=80))
@example(wanted=setup(selection="recency", recent_frames=2, rope_adjustment=False))
@example(wanted=setup(position_range=9, stride=1, side=128))
@example(wanted=setup(block_frames=3, sink_frames=0, recent_frames=9, stride=1))
@example(wanted=setup(kv_dtype="fp8_e4m3"))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_late_compressed_blocks_see_the_same_and_are_the_same(wanted: Setup) -> None:
    """To the bit: all contexts, the compressed ones a block later, and so what is archived and selected."""
    layout, model, batch, blocks, seed = wanted
    made = {"dtype": torch.float64, "batch": batch}
    stream = Stream(layout, model, batch, torch.float64, seed)
    cache, late = Cache(layout, model, **made), DeferredCache(layout, model, **made)
    due: list[Tensor] = []
    for block, seen in zip(run_blocks(cache, stream, blocks), live_late(late, stream, blocks), strict=True):
        assert late.selected == cache.selected
        assert same_bits(contexts(late), contexts(cache))
        assert same_bits(seen, due)
        due = []
        for layer in range(model.layers) if layout.config.becomes_mid(block) else ():
            # The layers have been gone through; what they saw is still there, but for the exact compressed tokens.
            passed = stream(block, layer, CLEAN)
            cache.write_compressed(layer, passed.raw.compressed_keys, passed.raw.compressed_values)
            due += [*cache.compressed_context(layer), cache.rotate_compressed_queries(passed.compressed_queries)]
    assert len(cache.archive) == len(late.archive) + layout.config.becomes_mid(blocks - 1)


@pytest.mark.parametrize("changes", [{"top_k": 0}, {"recent_frames": 0}], ids=str)
def test_compressed_blocks_that_are_needed_at_once_cannot_be_late(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="recent ones before them"):
        DeferredCache(small_layout(**changes), TINY)
