"""Block by block over the cache equals one dense pass under a mask; the whole method equals itself by the letter."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as once

import pytest
import torch
from torch import Tensor
from wan_reference import (
    DIM,
    FFN_DIM,
    HEADS,
    TEXT_DIM,
    TEXT_LENGTH,
    DenseWan,
    ExplicitWan,
    Method,
    assert_close,
    comfy_wan,
    frame_mask,
    random_weights,
    rotate,
    seeded,
)

from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.model.causal_wan import CausalWan, TextKV
from packforcing.model.wan_modules import WanModules, WanSizes, build_wan_modules

LAYERS = 2
SIGMA = 0.9375
SIZES = WanSizes(dim=DIM, ffn_dim=FFN_DIM, layers=LAYERS, heads=HEADS, text_dim=TEXT_DIM)


# --- everything kept: one dense pass under a block-causal mask ----------------------------------------

BLOCKS = 5
CELLS = 8, 12  # a latent frame's height and width
TOKENS_PER_FRAME = CELLS[0] * CELLS[1] // 4

# (sink blocks, recent blocks) that keep all 5 blocks at full resolution, each in its way
EVERYTHING_KEPT = {"recent": (0, 4), "more recent than there is": (0, 9), "sink": (5, 0), "both": (2, 2)}


@pytest.fixture(scope="module")
def model(comfy):
    return comfy_wan(comfy, LAYERS)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return seeded(2, TEXT_LENGTH, TEXT_DIM, seed=2)


def whole_cache(wan: CausalWan, frames: int, sinks: int, recents: int, top_k: int = 0) -> Cache:
    config = CacheConfig(block_frames=frames, sink_frames=sinks * frames, recent_frames=recents * frames, top_k=top_k)
    return Cache(Layout(config, FrameSize(8 * CELLS[1], 8 * CELLS[0]), temporal_stride=1), wan.shape, batch=2)


def sequences(frames: int) -> tuple[Tensor, Tensor]:
    """A clean and a noisy video of 5 blocks."""
    shape = (2, 16, BLOCKS * frames, *CELLS)
    return seeded(*shape, seed=3), seeded(*shape, seed=4)


def history(cache: Cache, layer: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The cached keys and values [B, L, H, D] of the first blocks, in chronological order."""
    slots = [cache.block_tokens(block) for block in range(blocks)]
    kv = cache.layers[layer].kv
    return tuple(torch.cat([x[:, s] for s in slots], dim=1) for x in (kv.keys, kv.values))


def block_causal(frames: int) -> Tensor:
    block = torch.arange(BLOCKS * frames) // frames
    return block[:, None] >= block[None]


@pytest.mark.parametrize("frames", [1, 3, 4])
@pytest.mark.parametrize("kept", EVERYTHING_KEPT.values(), ids=EVERYTHING_KEPT)
def test_clean_blocks_are_one_block_causal_pass(monkeypatch, model, text, frames, kept):
    """Outputs at t = 0, and the keys and values of each layer."""
    clean, _ = sequences(frames)
    wan = CausalWan(model, text_len=0)
    cache, prompt, outputs = whole_cache(wan, frames, *kept), wan.embed_text(text), []
    for block, x0 in enumerate(clean.split(frames, dim=2)):
        cache.begin(block)
        outputs.append(wan.denoise(x0, 0.0, prompt, cache))
        wan.clean_pass(x0, prompt, cache, None)
        cache.end()

    dense = DenseWan(model, frame_mask(block_causal(frames), TOKENS_PER_FRAME))
    times = torch.arange(BLOCKS * frames)
    assert_close(torch.cat(outputs, dim=2), dense(monkeypatch, clean, torch.zeros(len(times)), text, times))
    assert len(dense.layers) == LAYERS
    for layer, (keys, values) in enumerate(dense.layers):
        cached_keys, cached_values = history(cache, layer, BLOCKS)
        assert_close(cached_keys, keys)
        assert_close(cached_values, values)


def teacher_forcing(monkeypatch, model, text: Tensor, frames: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One dense pass over [clean | noisy]: a noisy block sees the clean blocks before it, and itself.

    Returns the noisy half's velocity, and keys and values of the clean half at each layer.
    """
    clean, noisy = sequences(frames)
    count = BLOCKS * frames
    block = torch.arange(count) // frames
    past, own = block[:, None] > block[None], block[:, None] == block[None]
    visible = torch.cat((torch.cat((past | own, torch.zeros_like(own)), 1), torch.cat((past, own), 1)))
    dense = DenseWan(model, frame_mask(visible, TOKENS_PER_FRAME))
    sigmas = torch.cat((torch.zeros(count), torch.full((count,), SIGMA)))
    times = torch.arange(count).repeat(2)
    out = dense(monkeypatch, torch.cat((clean, noisy), dim=2), sigmas, text, times)
    clean_tokens = count * TOKENS_PER_FRAME
    return out[:, :, count:], [(keys[:, :clean_tokens], values[:, :clean_tokens]) for keys, values in dense.layers]


def noisy_blocks(wan: CausalWan, cache: Cache, prompt: TextKV, compressed: Tensor | None = None) -> Tensor:
    """Denoises each noisy block over the clean blocks before it."""
    frames = cache.config.block_frames
    outputs = []
    for block, (x0, x) in enumerate(zip(*(s.split(frames, dim=2) for s in sequences(frames)), strict=True)):
        cache.begin(block)
        outputs.append(wan.denoise(x, SIGMA, prompt, cache))
        wan.clean_pass(x0, prompt, cache, compressed)
        cache.end()
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("frames", [1, 3, 4])
@pytest.mark.parametrize("kept", EVERYTHING_KEPT.values(), ids=EVERYTHING_KEPT)
def test_noisy_blocks_over_a_clean_past_are_one_teacher_forcing_pass(monkeypatch, model, text, frames, kept):
    wan = CausalWan(model, text_len=0)
    cache = whole_cache(wan, frames, *kept)
    outputs = noisy_blocks(wan, cache, wan.embed_text(text))
    expected, layers = teacher_forcing(monkeypatch, model, text, frames)
    assert_close(outputs, expected)
    for layer, (keys, values) in enumerate(layers):
        cached_keys, cached_values = history(cache, layer, BLOCKS)
        assert_close(cached_keys, keys)
        assert_close(cached_values, values)


@pytest.mark.parametrize("kept", [(0, 4), (2, 2)], ids=["recent", "both"])
def test_a_compressed_form_beside_the_clean_pass_changes_nothing_at_full_resolution(monkeypatch, model, text, kept):
    """Compressed tokens are made from the first block on, and none of them is attended while nothing has aged."""
    wan = CausalWan(model, text_len=0)
    cache = whole_cache(wan, 3, *kept, top_k=2)
    compressed = 5 * seeded(2, cache.layout.compressed_tokens_per_block, DIM, seed=5)
    outputs = noisy_blocks(wan, cache, wan.embed_text(text), compressed)
    expected, layers = teacher_forcing(monkeypatch, model, text, 3)
    assert_close(outputs, expected)
    for layer, (keys, values) in enumerate(layers):
        cached_keys, cached_values = history(cache, layer, BLOCKS)
        assert_close(cached_keys, keys)
        assert_close(cached_values, values)


def test_the_past_matters(model, text):
    """So that the comparisons above could fail: without its history a block comes out differently."""
    wan = CausalWan(model, text_len=0)
    with_past = noisy_blocks(wan, whole_cache(wan, 3, 0, 4), wan.embed_text(text))[:, :, -3:]
    alone = noisy_blocks(wan, whole_cache(wan, 3, 0, 0), wan.embed_text(text))[:, :, -3:]
    assert (with_past - alone).abs().max() > 0.05 * alone.abs().max()


# --- the whole method, by the letter ------------------------------------------------------------------

MADE = 7  # blocks: with one sink and one recent block, 5 of them are mid blocks at the end
EXACT = 1e-9  # float64

BASE = Method(rows=5, columns=9)  # 2 x 2 x 2 full tokens cover no more than rows 0-3 and columns 0-7
METHODS = {
    "sink, mid, recent": BASE,
    "no sink": replace(BASE, sink_blocks=0),
    "no recent": replace(BASE, recent_blocks=0),
    "only mids": replace(BASE, sink_blocks=0, recent_blocks=0, top_k=3),
    "two sinks, two recents": replace(BASE, sink_blocks=2, recent_blocks=2, top_k=1),
    "no mids": replace(BASE, top_k=0),
    "all mids attended": replace(BASE, top_k=16),
    "blocks of 4": replace(BASE, block_frames=4),
    "blocks of 3, stride 1": replace(BASE, block_frames=3, temporal_stride=1),
    "blocks of 3, stride 2": replace(BASE, block_frames=3, temporal_stride=2),
    "blocks of 1": replace(BASE, block_frames=1, temporal_stride=1, recent_blocks=2),
    "a quarter of the queries": replace(BASE, query_fraction=0.25),
    "all heads": replace(BASE, head_fraction=1.0),
    "positions in a range": replace(BASE, block_frames=4, position_range=15),
    "positions in a wide range": replace(BASE, block_frames=4, position_range=64),
    "positions with gaps": replace(BASE, rope_adjustment=False),
    "positions with gaps, two sinks and recents": replace(BASE, sink_blocks=2, recent_blocks=2, rope_adjustment=False),
}


@once
def float64_state() -> dict[str, Tensor]:
    with torch.device("meta"):
        like = WanModules(SIZES).state_dict()
    return {name: tensor.double() for name, tensor in random_weights(like, seed=7).items()}


def layout_of(method: Method, **config: str) -> Layout:
    frames = method.block_frames
    return Layout(
        CacheConfig(
            block_frames=frames,
            sink_frames=method.sink_blocks * frames,
            recent_frames=method.recent_blocks * frames,
            top_k=method.top_k,
            query_fraction=method.query_fraction,
            head_fraction=method.head_fraction,
            position_range=method.position_range,
            rope_adjustment=method.rope_adjustment,
            **config,
        ),
        FrameSize(16 * method.columns, 16 * method.rows),
        method.temporal_stride,
    )


def run_both(method: Method, made: int = MADE, **config: str) -> tuple[Cache, ExplicitWan, list[list[list[int]]]]:
    """Makes blocks with the library and by the letter, in float64, and compares every output on the way.

    Returns the cache, the reference, and the library's selections by block and layer.
    """
    state = float64_state()
    text = seeded(2, TEXT_LENGTH, TEXT_DIM, seed=2).double()
    wan = CausalWan(build_wan_modules(SIZES, state), dtype=torch.float64, text_len=0)
    cache = Cache(layout_of(method, **config), wan.shape, dtype=torch.float64, batch=2)
    prompt = wan.embed_text(text)
    reference = ExplicitWan(state, method, text)
    shape = (2, 16, method.block_frames, 2 * method.rows, 2 * method.columns)
    selections = []
    for block in range(made):
        cache.begin(block)
        for step, sigma in enumerate((1.0, 0.625)):
            x = seeded(*shape, seed=1000 + 10 * block + step).double()
            out = wan.denoise(x, sigma, prompt, cache)
            assert out.dtype == torch.float64
            assert_close(out, reference.denoise(x, sigma), EXACT)
        x0 = seeded(*shape, seed=2000 + block).double()
        compressed = None
        if method.top_k and block >= method.sink_blocks:
            compressed = seeded(2, method.compressed_tokens, DIM, seed=3000 + block).double()
        selections.append([list(chosen) for chosen in cache.selected])
        wan.clean_pass(x0, prompt, cache, compressed)
        reference.clean_pass(x0, compressed)
        cache.end()
    return cache, reference, selections


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_block_is_the_methods_by_the_letter(method):
    """Velocities at both steps, and each layer's selection, for 7 blocks: before, while and after mids are dropped."""
    cache, reference, selections = run_both(method)
    assert cache.layout.compressed_tokens_per_block == method.compressed_tokens
    assert selections == reference.chosen
    assert all(len(chosen) == min(method.top_k, len(method.mids(MADE - 1))) for chosen in selections[-1])


def test_the_comparison_reaches_what_it_is_for():
    """Its layers choose differently, blocks are left out, come back, and leave gaps."""
    _, reference, _ = run_both(BASE, made=8)
    by_layer = list(zip(*reference.chosen, strict=True))
    assert len(set(map(str, by_layer))) > 1, "layers differ"
    came_back = [
        m
        for chosen in by_layer
        for m in range(8)
        for b in range(6)
        if m in chosen[b] and m not in chosen[b + 1] and any(m in later for later in chosen[b + 2 :])
    ]
    assert came_back, "a mid block that was not selected comes back"


def test_the_archive_in_host_memory_is_the_method_too():
    cache, reference, selections = run_both(BASE, archive_device="host")
    assert selections == reference.chosen
    assert cache.archive.device_bytes == 0


def test_archived_keys_are_the_references_at_their_base_position():
    """Pristine: rotated in space, and in time to the block's own centres, whatever has been selected since."""
    cache, reference, _ = run_both(BASE)
    for block in range(BASE.sink_blocks, MADE):
        for layer in range(LAYERS):
            keys, values = cache.archive.read([block - BASE.sink_blocks], layer)
            expected_keys, expected_values = reference.compressed[block][layer]
            assert_close(keys, rotate(expected_keys, BASE.compressed_positions(0)), EXACT)
            assert_close(values, expected_values, EXACT)


def test_full_keys_and_values_in_the_slots_are_the_references():
    """Sinks stand at 0 for ever; the recent block stands right after the mid slots, however often it was moved."""
    method = replace(BASE, sink_blocks=2, recent_blocks=2)
    cache, reference, _ = run_both(method, made=9)
    cache.begin(9)
    starts = {0: 0.0, 1: 2.0, 7: 8.0, 8: 10.0}  # two sinks, two mid slots, two recents, 2 frames each
    for layer in range(LAYERS):
        for block, start in starts.items():
            keys, values = reference.full[block][layer]
            slot = cache.block_tokens(block)
            assert_close(cache.layers[layer].kv.keys[:, slot], rotate(keys, method.full_positions(start)), EXACT)
            assert_close(cache.layers[layer].kv.values[:, slot], values, EXACT)


def test_positions_stay_bounded_however_long_the_video_is():
    """Never beyond N_sink + N_top * B_f + N_recent + B_f, and constant once the slots are full."""
    cache = Cache(layout_of(BASE), SIZES.shape)
    ends = []
    for block in range(5):
        cache.begin(block)
        ends.append(cache.anchors.current + BASE.block_frames)
        cache.write_compressed(0, *torch.zeros(2, 1, BASE.compressed_tokens, HEADS, 128))
        cache.end()
    assert ends == [2, 4, 6, 8, 10]
    assert max(ends) == 2 * (BASE.sink_blocks + BASE.top_k + BASE.recent_blocks + 1)
