"""Recent blocks computed again: where they are written, what they attend to, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_reference import (
    CLEAN,
    DENOISE,
    TINY,
    Everything,
    Setup,
    Stream,
    assert_same_rows,
    run_blocks,
    run_pass,
    setup,
    setups,
    small_layout,
)
from hypothesis import example, given, settings

from packforcing.cache.cache import Cache
from packforcing.cache.deferred import DeferredCache

AGAIN = 7  # the step of the stream that a refreshed block's tokens are drawn from


def lived(wanted: Setup) -> tuple[Cache, Stream, Everything]:
    """A cache, and one that forgets nothing, where the block after the last one has begun."""
    layout, model, batch, blocks, seed = wanted
    cache = Cache(layout, model, dtype=torch.float64, batch=batch)
    stream, everything = Stream(layout, model, batch, torch.float64, seed), Everything(layout, model)
    for block in run_blocks(cache, stream, blocks):
        everything.blocks.append([stream(block, layer, CLEAN).raw for layer in range(model.layers)])
    cache.begin(blocks)
    return cache, stream, everything


@given(wanted=setups())
@example(wanted=setup(blocks=12, layers=2, recent_frames=6))
@example(wanted=setup(selection="recency", rope_adjustment=False))
@example(wanted=setup(position_range=12, side=128))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_a_refreshed_block_sees_sinks_mids_and_the_recent_blocks_up_to_itself(wanted: Setup) -> None:
    cache, stream, everything = lived(wanted)
    now, layers = cache.block, range(wanted.model.layers)
    sink, mid, recent = everything.history(now)
    for block in recent:
        cache.refresh(block)
        for layer in layers:
            queries, _, raw = stream(block, layer, AGAIN)
            everything.blocks[block][layer] = raw
            chosen = everything.choose(now, layer, queries) if cache.config.top_k else []
            places = {place.block: place for place in everything.places(now, chosen)}
            found = cache.attend(layer, queries, raw.keys, raw.values)
            seen = [
                place for b, place in places.items() if b in (*sink, *mid) or b in recent[: recent.index(block) + 1]
            ]
            assert cache.selected[layer] == chosen
            assert_same_rows((found.keys, found.values), everything.rows(seen, layer))
            turned = everything.full_grid(places[block].start).turn(queries)
            torch.testing.assert_close(found.queries, turned, rtol=0, atol=1e-12)

    cache.refreshed()
    assert cache.selected == [None] * len(layers)
    run_pass(cache, stream, DENOISE)
    everything.blocks.append([stream(now, layer, DENOISE).raw for layer in layers])
    for layer in layers:
        chosen = everything.choose(now, layer, stream(now, layer, DENOISE).queries) if cache.config.top_k else []
        assert cache.selected[layer] == chosen
        assert_same_rows(cache.context(layer), everything.rows(everything.places(now, chosen), layer))


@pytest.mark.parametrize("layers", [1, 2])
def test_in_fp8_a_refreshed_block_is_rounded_once_it_is_history(layers: int) -> None:
    """As every block: exact in its own passes, rounded for those after it."""
    layout = small_layout(kv_dtype="fp8_e4m3", top_k=0)
    cache, stream = Cache(layout, replace(TINY, layers=layers)), Stream(layout, TINY, dtype=torch.float32)
    for _ in run_blocks(cache, stream, 3):
        pass
    cache.begin(3)
    raws = {}
    for block in (1, 2):
        cache.refresh(block)
        raws[block] = stream(block, 0, AGAIN).raw
        found = cache.attend(0, stream(block, 0, AGAIN).queries, *raws[block][:2])
        tokens = layout.tokens_per_block
        assert torch.equal(found.values[:, -tokens:], raws[block].values)
        if block == 2:
            rounded = raws[1].values.to(torch.float8_e4m3fn).float()
            assert torch.equal(found.values[:, -2 * tokens : -tokens], rounded)
    cache.refreshed()
    current = stream(3, 0, DENOISE)
    found = cache.attend(0, current.queries, *current.raw[:2])
    rounded = raws[2].values.to(torch.float8_e4m3fn).float()
    assert torch.equal(found.values[:, cache.block_tokens(2)], rounded)
    assert torch.equal(found.values[:, cache.block_tokens(3)], current.raw.values)


@pytest.mark.parametrize("block", [0, 1, 4])
def test_only_a_recent_block_is_refreshed(block: int) -> None:
    cache, _, _ = lived(setup(blocks=4))  # block 0 is the sink, block 1 a mid block, block 4 the current one
    with pytest.raises(ValueError, match="is not in range"):
        cache.refresh(block)


def test_a_late_compressed_block_sees_what_was_there_before_the_refresh() -> None:
    """That was set aside when its block ended, so the refresh cannot reach it."""
    layout = small_layout()
    stream = Stream(layout, TINY)
    plain, late = Cache(layout, TINY, dtype=torch.float64), DeferredCache(layout, TINY, dtype=torch.float64)
    for cache in (plain, late):
        for block in range(5):
            cache.begin(block)
            run_pass(cache, stream, DENOISE)
            for layer in range(TINY.layers):
                raw = stream(block, layer, CLEAN).raw
                cache.write(layer, raw.keys, raw.values)
                due = block - (cache is late)
                if due > 0:
                    compressed = stream(due, layer, CLEAN).raw
                    cache.write_compressed(layer, compressed.compressed_keys, compressed.compressed_values)
            if block < 4:
                cache.end()
    expected = [x.clone() for layer in range(TINY.layers) for x in plain.compressed_context(layer)]
    late.end()
    late.begin(5)
    for block in (3, 4):
        late.refresh(block)
        run_pass(late, Stream(layout, TINY, seed=1), DENOISE)
    late.refreshed()
    run_pass(late, stream, DENOISE)
    found = []
    for layer in range(TINY.layers):
        raw = stream(4, layer, CLEAN).raw
        late.write_compressed(layer, raw.compressed_keys, raw.compressed_values)
        found += [x.clone() for x in late.compressed_context(layer)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
