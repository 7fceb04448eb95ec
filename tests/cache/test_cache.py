"""The three-partition cache (docs/method.md, sections 3, 5 and 6) against one that forgets nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cache_reference import (
    CLEAN,
    DENOISE,
    EXACT,
    TINY,
    Everything,
    Place,
    Raw,
    Setup,
    Stream,
    assert_same_rows,
    attend,
    contexts,
    in_order,
    run_pass,
    same_bits,
    setup,
    setups,
    small_layout,
)
from hypothesis import example, given, settings
from torch import Tensor

from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape


def check_block(cache: Cache, everything: Everything, stream: Stream) -> list[list[Place]]:
    """One block's life: the first denoising step, the clean pass; each layer's context against the slow model's."""
    block, layers = cache.block, range(cache.model.layers)
    places = []
    everything.blocks.append([])
    for layer in layers:
        made = stream(block, layer, DENOISE)
        cache.score(layer, made.queries)
        cache.select(layer)
        cache.write(layer, made.raw.keys, made.raw.values)
        chosen = everything.choose(block, layer, made.queries)
        places.append(everything.places(block, chosen))
        everything.blocks[block].append(made.raw)
        assert cache.selected[layer] == chosen
        assert_same_rows(cache.context(layer), everything.rows(places[layer], layer))
    for layer in layers:
        made = stream(block, layer, CLEAN)
        cache.score(layer, made.queries)  # of other queries, and without effect
        cache.select(layer)
        cache.write(layer, made.raw.keys, made.raw.values)
        everything.blocks[block][layer] = made.raw
        check_full(cache, everything, places[layer], layer, made.queries)
        if cache.config.top_k:
            before = contexts(cache)
            cache.write_compressed(layer, made.raw.compressed_keys, made.raw.compressed_values)
            check_compressed(cache, everything, places[layer], layer, made.compressed_queries)
            assert same_bits(contexts(cache), before)  # full-resolution results do not depend on the compressor
    return places


def check_full(cache: Cache, everything: Everything, places: list[Place], layer: int, queries: Tensor) -> None:
    """Full queries see [sink | selected mid | recent | current]."""
    keys, values = cache.context(layer)
    expected = everything.rows(places, layer)
    assert keys.shape[1] <= cache.layout.context_tokens
    assert_same_rows((keys, values), expected)
    found = attend(cache.rotate_queries(queries)[:, ::7], keys, values)
    turned = everything.full_grid(places[-1].start).turn(queries)[:, ::7]
    torch.testing.assert_close(found, attend(turned, *expected), rtol=0, atol=EXACT)


def check_compressed(cache: Cache, everything: Everything, places: list[Place], layer: int, queries: Tensor) -> None:
    """Compressed queries see the context without the current block, and the compressed tokens themselves."""
    seen = cache.compressed_context(layer)
    current = places[-1]
    expected = everything.rows([*places[:-1], current._replace(compressed=True)], layer)
    assert_same_rows(seen, expected)
    found = attend(cache.rotate_compressed_queries(queries), *seen)
    turned = everything.compressed_grid(current.start).turn(queries)
    torch.testing.assert_close(found, attend(turned, *expected), rtol=0, atol=EXACT)


def changed_slots(before: list[list[Place]], after: list[list[Place]]) -> int:
    """(layer, slot) pairs that must be filled: those whose mid block, or its place, is another than before."""
    count = 0
    for old, new in zip(before, after, strict=True):
        held = [p for p in old if p.compressed]
        wanted = [p for p in new if p.compressed]
        count += sum(slot >= len(held) or held[slot] != place for slot, place in enumerate(wanted))
    return count


def moved_recent_blocks(before: list[Place], after: list[Place], recent: list[int]) -> int:
    stood = {p.block: p.start for p in before}
    return sum(p.block in recent and stood[p.block] != p.start for p in after)


@given(wanted=setups())
@example(wanted=setup(blocks=25, layers=2, batch=2, side=80))
@example(wanted=setup(selection="recency", archive_device="host"))
@example(wanted=setup(position_range=11))
@example(wanted=setup(blocks=25, layers=2, rope_adjustment=False))
@example(wanted=setup(selection="recency", recent_frames=2, rope_adjustment=False))
@example(wanted=setup(position_range=9, stride=1, side=128, head_fraction=1.0))
@example(wanted=setup(block_frames=3, sink_frames=3, recent_frames=3, stride=2, position_range=13))
@example(wanted=setup(block_frames=3, sink_frames=0, recent_frames=9, stride=1, query_fraction=0.1))
@example(wanted=setup(block_frames=4, sink_frames=8, recent_frames=0, position_range=16))
@example(wanted=setup(block_frames=1, sink_frames=0, recent_frames=0, top_k=4, stride=1, query_fraction=1.0))
@example(wanted=setup(top_k=0))
@example(wanted=setup(blocks=12, top_k=5, repeat_mids=True, layers=2))
@example(wanted=setup(blocks=12, top_k=4, repeat_mids=True, sink_frames=0, position_range=9))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_every_context_is_what_a_model_that_forgets_nothing_would_build(wanted: Setup) -> None:
    layout, model, batch, blocks, seed = wanted
    cache = Cache(layout, model, dtype=torch.float64, batch=batch)
    everything = Everything(layout, model)
    stream = Stream(layout, model, batch, torch.float64, seed)
    before: list[list[Place]] = [[] for _ in range(model.layers)]
    for block in range(blocks):
        cache.begin(block)
        places = check_block(cache, everything, stream)
        cache.end()
        assert cache.mid_slots_written == changed_slots(before, places)
        recent = everything.history(block)[2]
        assert cache.recent_rotated == moved_recent_blocks(before[0], places[0], recent)
        before = places


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize(("sink_frames", "recent_frames"), [(0, 0), (2, 4), (4, 2), (0, 6)])
def test_every_attended_block_is_in_exactly_one_place(top_k: int, sink_frames: int, recent_frames: int) -> None:
    layout = small_layout(top_k=top_k, sink_frames=sink_frames, recent_frames=recent_frames)
    cache, stream = Cache(layout, TINY), Stream(layout, TINY, dtype=torch.float32)
    full, compressed = layout.tokens_per_block, layout.compressed_tokens_per_block
    longest = 0
    for block in range(15):
        cache.begin(block)
        for layer in range(TINY.layers):
            made = stream(block, layer, CLEAN)
            cache.score(layer, made.queries)
            cache.select(layer)
            cache.write(layer, made.raw.keys, torch.full_like(made.raw.values, block))
            if top_k:
                cache.write_compressed(
                    layer, made.raw.compressed_keys, torch.full_like(made.raw.compressed_values, block)
                )
            values = cache.context(layer)[1][0, :, 0, 0]
            longest = max(longest, len(values))
            sink = range(min(sink_frames // 2, block))
            recent = range(max(len(sink), block - recent_frames // 2), block)
            expected = dict.fromkeys([*sink, *recent, block], full) | dict.fromkeys(cache.selected[layer], compressed)
            assert Counter(values.int().tolist()) == expected
            assert cache.selected[layer] == sorted(cache.selected[layer])
        cache.end()
    assert longest == layout.context_tokens


def test_blocks_come_one_after_the_other() -> None:
    cache = Cache(small_layout(), TINY)
    with pytest.raises(ValueError, match="block 1 cannot follow block -1"):
        cache.begin(1)
    cache.begin(0)
    with pytest.raises(ValueError, match="block 0 cannot follow block 0"):
        cache.begin(0)


def key_error(cache: Cache, everything: Everything) -> float:
    """Largest error of the context's keys against keys computed in float64 where they stand in the end."""
    places = everything.places(cache.block, cache.selected[0])
    found, found_values = in_order(*cache.context(0))
    expected, values = in_order(*everything.rows(places, 0))
    assert torch.equal(found_values, values)
    return (found - expected).abs().max().item()


def test_after_ten_thousand_blocks_keys_are_as_exact_as_after_ten() -> None:
    model = ModelShape(layers=1, dim=24, heads=2)
    config = CacheConfig(block_frames=1, sink_frames=1, recent_frames=3, top_k=2, archive_device="host")
    layout = Layout(config, FrameSize(64, 64), temporal_stride=1)
    cache, everything = Cache(layout, model), Everything(layout, model)
    # A recent key is turned when it is written, and once for each of the 3 slots it moves through. A turn rounds two
    # cosines, two products and a sum of numbers below 2, 4.5 * 2^-24 in all, in both channels of a pair.
    bound = 4 * 2**0.5 * 4.5 * 2**-24
    errors = {}
    for block in range(10_000):
        cache.begin(block)
        queries, keys, values = (2 * torch.rand(1, 16, 2, 12) - 1 for _ in range(3))
        raw = Raw(keys, values, keys[:, ::16].clone(), values[:, ::16] + 2)
        everything.blocks.append([raw])
        cache.score(0, queries)
        cache.select(0)
        cache.write(0, raw.keys, raw.values)
        cache.write_compressed(0, raw.compressed_keys, raw.compressed_values)
        if block in (10, 9_999):
            errors[block] = key_error(cache, everything)
        cache.end()
    assert len(cache.archive) == 9_999
    assert 0 < errors[10] < bound
    assert 0 < errors[9_999] < bound


def test_one_call_a_layer_is_its_steps() -> None:
    """`attend`, `attend_compressed` and `store`, as the transformer calls them, against the steps that they are."""
    layout = small_layout()
    stream = Stream(layout, TINY, dtype=torch.float32)
    steps, calls = Cache(layout, TINY), Cache(layout, TINY)
    for block in range(12):
        steps.begin(block)
        calls.begin(block)
        run_pass(steps, stream, DENOISE)
        for layer in range(TINY.layers):
            queries, _, raw = stream(block, layer, DENOISE)
            found = calls.attend(layer, queries, raw.keys, raw.values)
            assert same_bits(list(found), [steps.rotate_queries(queries), *steps.context(layer)])
        run_pass(steps, stream, CLEAN)
        for layer in range(TINY.layers):
            queries, few, raw = stream(block, layer, CLEAN)
            calls.store(layer, queries, raw.keys, raw.values)
            found = calls.attend_compressed(layer, few, raw.compressed_keys, raw.compressed_values)
            assert same_bits(list(found), [steps.rotate_compressed_queries(few), *steps.compressed_context(layer)])
        assert calls.selected == steps.selected
        assert same_bits(contexts(calls), contexts(steps))
        steps.end()
        calls.end()
