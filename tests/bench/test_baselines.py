"""The caches that ours is compared with compute the same thing: only then is their time worth comparing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_reference import Grid
from torch import Tensor

from packforcing.bench import baselines
from packforcing.bench.baselines import (
    CONCATENATING,
    OURS,
    ROLLING,
    UNBOUNDED,
    WINDOW_FRAMES,
    ConcatenatingCache,
    RollingCache,
    UnboundedCache,
    block_input,
    comparison,
    contest,
    fill,
    make_block,
)
from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape
from packforcing.generate.sampling import Sampling
from packforcing.model.attention import fast_attention
from packforcing.model.causal_wan import CausalWan, TextKV
from packforcing.model.wan_modules import WanSizes, build_wan_modules, random_state_dict

SMALL = WanSizes(dim=64, ffn_dim=96, layers=3, heads=2, text_dim=32, freq_dim=16)
CONFIG = CacheConfig(block_frames=2, sink_frames=2, recent_frames=2, top_k=2)
LAYOUT = Layout(CONFIG, FrameSize(128, 64), 2)
SAMPLING = Sampling(seed=3, steps=2)
CPU, F64 = torch.device("cpu"), torch.float64
BLOCKS = 8  # the cache is full from block 4 on, and chooses from block 5 on


@pytest.fixture
def wan() -> CausalWan:
    return CausalWan(build_wan_modules(SMALL, random_state_dict(SMALL, seed=1)).double(), dtype=F64, text_len=0)


@pytest.fixture
def text(wan: CausalWan) -> TextKV:
    return wan.embed_text(torch.randn(1, 5, SMALL.text_dim, dtype=F64))


def video(wan: CausalWan, text: TextKV, cache: Cache, blocks: int = BLOCKS) -> Tensor:
    """All latents [1, 16, blocks * T, h, w] of a video made over a cache."""
    made = [make_block(wan, text, cache, SAMPLING, block_input(wan, LAYOUT, SAMPLING, i)) for i in range(blocks)]
    return torch.cat(made, dim=2)


def test_concatenating_gives_what_our_buffers_give(wan: CausalWan, text: TextKV):
    ours, theirs = Cache(LAYOUT, SMALL.shape, CPU, F64), ConcatenatingCache(LAYOUT, SMALL.shape, CPU, F64)
    assert torch.allclose(video(wan, text, ours), video(wan, text, theirs), atol=1e-10)
    assert ours.selected == theirs.selected
    for block in range(len(ours.archive)):
        for mine, other in zip(ours.archive.read([block], 2), theirs.archive.read([block], 2), strict=True):
            assert torch.allclose(mine, other, atol=1e-10)


def test_unbounded_is_our_cache_while_nothing_has_left_it(wan: CausalWan, text: TextKV):
    everything = replace(CONFIG, sink_frames=2 * CONFIG.block_frames, recent_frames=4 * CONFIG.block_frames)
    ours = Cache(replace(LAYOUT, config=everything), SMALL.shape, CPU, F64)
    unbounded = UnboundedCache(LAYOUT, SMALL.shape, 7, CPU, F64)
    assert not unbounded.shared
    assert torch.allclose(video(wan, text, ours, 7), video(wan, text, unbounded, 7), atol=1e-10)
    keys, _ = unbounded.context(0)
    assert keys.shape[1] == 7 * LAYOUT.tokens_per_block


def test_an_unbounded_cache_that_does_not_fit_shares_one_buffer(
    wan: CausalWan, text: TextKV, monkeypatch: pytest.MonkeyPatch
):
    complete = UnboundedCache(LAYOUT, SMALL.shape, 6, CPU, F64)
    monkeypatch.setattr(baselines, "free_bytes", lambda device: 2 * complete.complete_bytes - 1)
    shared = UnboundedCache(LAYOUT, SMALL.shape, 6, CPU, F64)
    assert shared.shared
    assert len(shared.layers) == SMALL.layers
    assert {layer.kv.keys.data_ptr() for layer in shared.layers} == {shared.layers[0].kv.keys.data_ptr()}
    assert video(wan, text, shared, 3).isfinite().all()


# --- Self-Forcing's rolling window ----------------------------------------------------------------------------------


def windowed(layout: Layout, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The dense reference: attention [L, H, D] over a whole video at once, with a mask for what the window holds.

    Args:
        queries, keys, values: of all tokens of a video, [L, H, D], not rotated.
    """
    size, frames = layout.size, layout.config.block_frames
    total = len(keys) // size.tokens_per_frame
    whole = Grid(tuple(map(float, range(total))), tuple(range(size.rows)), tuple(range(size.columns)))
    q, k = (whole.turn(x[None])[0] for x in (queries, keys))
    frame = torch.arange(len(keys)) // size.tokens_per_frame
    end = (frame // frames + 1) * frames  # of the block that a query belongs to
    seen = (frame[None] < end[:, None]) & (frame[None] >= end[:, None] - WINDOW_FRAMES)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_the_rolling_window_is_dense_attention_with_a_window(frames: int):
    """Blocks of 4 do not divide 21 frames: the oldest block is held in part."""
    config = CacheConfig(block_frames=frames, sink_frames=0, recent_frames=frames, top_k=0)
    layout = Layout(config, FrameSize(64, 64), 1)
    shape = ModelShape(layers=2, dim=24, heads=2)
    cache = RollingCache(layout, shape, CPU, F64)
    blocks, tokens = 30 // frames, layout.tokens_per_block
    video = torch.randn(3, shape.layers, blocks * tokens, 2, 12, dtype=F64)
    found = torch.empty(shape.layers, blocks * tokens, 2, 12, dtype=F64)
    for block in range(blocks):
        cache.begin(block)
        of_block = slice(block * tokens, (block + 1) * tokens)
        for last in (False, True):  # two passes: the second overwrites what the first wrote
            for layer in range(shape.layers):
                q, k, v = video[:, layer, of_block] if last else torch.randn(3, tokens, 2, 12, dtype=F64)
                attended = cache.attend(layer, q[None], k[None], v[None])
                found[layer, of_block] = fast_attention(*attended)[0]
        cache.end()
    for layer in range(shape.layers):
        assert torch.allclose(found[layer], windowed(layout, *video[:, layer]), atol=1e-10)
    assert cache.layers[0].kv.keys.shape[1] == WINDOW_FRAMES * layout.size.tokens_per_frame


def test_the_rolling_window_makes_the_video_of_our_cache_without_mid_blocks(wan: CausalWan, text: TextKV):
    """Where blocks divide the window and positions are absolute, ours keeps the same keys, in a ring."""
    frames = 7
    config = CacheConfig(block_frames=frames, sink_frames=0, recent_frames=14, top_k=0, rope_adjustment=False)
    layout = replace(LAYOUT, config=config, temporal_stride=1, size=FrameSize(64, 64))
    caches = Cache(layout, SMALL.shape, CPU, F64), RollingCache(layout, SMALL.shape, CPU, F64)
    for block in range(5):
        given = block_input(wan, layout, SAMPLING, block)
        ours, theirs = (make_block(wan, text, cache, SAMPLING, given) for cache in caches)
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("block", [1, 4, 7])
def test_a_filled_cache_is_where_a_made_one_is(wan: CausalWan, text: TextKV, block: int):
    made, filled = Cache(LAYOUT, SMALL.shape, CPU, F64), Cache(LAYOUT, SMALL.shape, CPU, F64)
    video(wan, text, made, block)
    fill(filled, block)
    assert (filled.block, filled.anchors, len(filled.archive)) == (made.block, made.anchors, len(made.archive))
    given = block_input(wan, LAYOUT, SAMPLING, block)
    assert make_block(wan, text, filled, SAMPLING, given).isfinite().all()
    make_block(wan, text, made, SAMPLING, given)
    assert filled.context(0)[0].shape == made.context(0)[0].shape
    assert filled.context(0)[0].isfinite().all()
    assert filled.bytes() == made.bytes()


def test_a_contest_times_each_cache_on_the_same_blocks(wan: CausalWan, text: TextKV):
    lines: list[str] = []
    without = contest(wan, text, LAYOUT, SAMPLING, 6, 2, 0.0, lines.append)
    assert lines[:4] == [f"block 5: {name}" for name in (OURS, UNBOUNDED, ROLLING, CONCATENATING)]
    assert len(lines) == 4 * 3
    assert all(at.median_ms > 0 for at in without.values())
    assert without[UNBOUNDED].kv_bytes == SMALL.shape.kv_bytes(8 * LAYOUT.tokens_per_block, 8)
    assert without[ROLLING].kv_bytes == SMALL.shape.kv_bytes(21 * LAYOUT.size.tokens_per_frame, 8)
    assert without[OURS].kv_bytes == SMALL.shape.kv_bytes(LAYOUT.context_tokens, 8)


def test_only_caches_with_mid_blocks_pay_for_compression(wan: CausalWan, text: TextKV):
    hour = 3.6e6  # more than any block takes
    paid = contest(wan, text, LAYOUT, SAMPLING, 6, 1, hour, lambda line: None)
    assert {name for name, at in paid.items() if at.median_ms > hour} == {OURS, CONCATENATING}

    entries = comparison({6: paid}, frames=8)
    assert [entry["name"] for entry in entries] == [UNBOUNDED, ROLLING, CONCATENATING]
    assert entries[0]["speedup"] == paid[UNBOUNDED].median_ms / paid[OURS].median_ms
    assert entries[0]["blocks"][0]["speedup"] == entries[0]["speedup"]
    assert entries[2]["fps_denoise"] == 1000 * 8 / paid[CONCATENATING].median_ms
