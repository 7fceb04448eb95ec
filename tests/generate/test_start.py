"""Starts that end within a block: what is given stays, and the model makes the rest of the block after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_videos import (
    CELLS,
    CONFIG,
    FRAMES,
    NO_MIDS,
    SAMPLING,
    SHAPE,
    SIZE,
    StopHere,
    assert_same,
    collect,
    latents_of,
    prompt,
    stop_at,
)
from wan_reference import assert_close, seeded

from packforcing.cache.cache import Cache
from packforcing.config import Layout
from packforcing.generate.long_video import Block
from packforcing.generate.sampling import noise_generator
from packforcing.generate.schedule import denoising_step, level_pairs


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def by_single_frames(wan, given: torch.Tensor, frames: int, seed: int) -> torch.Tensor:
    """The frames after those given, by a cache of one-frame blocks that holds the given ones as its history: one pass
    over `frames` frames at once, at their places in time."""
    config = replace(NO_MIDS, block_frames=1, sink_frames=8, recent_frames=0)
    cache = Cache(Layout(config, SIZE, 1), SHAPE)
    text = prompt(wan)
    for index, frame in enumerate(given.split(1, dim=2)):
        cache.begin(index)
        wan.clean_pass(frame, text, cache, None)
        cache.end()
    cache.begin(given.shape[2])
    generator = noise_generator(seed, 0)

    def noise() -> torch.Tensor:
        return torch.randn((1, 16, given.shape[2] + frames, *CELLS), generator=generator)[:, :, given.shape[2] :]

    x = noise()
    for sigma, following in level_pairs(SAMPLING.steps, SAMPLING.shift):
        x = denoising_step(x, wan.denoise(x, sigma, text, cache), sigma, following, "few-step", noise)
    return x


@pytest.mark.parametrize("changes", [{}, {"kv_dtype": "fp8_e4m3"}], ids=str)
def test_the_rest_of_a_block_is_made_after_what_is_given_as_after_history(make, wan, changes):
    """The same as in blocks of one frame, where the given frame is an ordinary block of the history."""
    given = seeded(1, 16, 1, *CELLS, seed=4)
    [block] = make(replace(CONFIG, **changes)).replay(given)
    assert torch.equal(block.latents[:, :, :1], given)
    expected = by_single_frames(wan, given, FRAMES - 1, SAMPLING.seed)
    # In fp8 the given frame's keys and values are rounded, as all history is.
    assert_close(block.latents[:, :, 1:], expected, 1e-5 if not changes else 0.1)
    [other] = make(replace(CONFIG, **changes)).replay(seeded(1, 16, 1, *CELLS, seed=5))
    assert not torch.allclose(other.latents[:, :, 1:], block.latents[:, :, 1:], atol=1e-2)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("frames", [1, 3, 5, 13])
def test_a_start_of_any_length_is_kept_and_what_follows_is_that_of_whole_blocks(make, frames, overlap):
    """Once the block is complete, nothing remembers that it was completed: a replay of it goes on the same way."""
    given = seeded(1, 16, frames, *CELLS, seed=4)
    video = make(overlap=overlap)
    blocks = list(video.replay(given))
    assert len(blocks) == -(-frames // FRAMES)
    assert torch.equal(latents_of(blocks)[:, :, :frames], given)
    blocks += list(video.blocks(9 - len(blocks)))
    again = make()
    replayed = list(again.replay(latents_of(blocks[: -(-frames // FRAMES)])))
    assert_same(replayed + list(again.blocks(9 - len(replayed))), blocks)


def test_a_run_stopped_while_it_completes_a_block_can_complete_it_again(make):
    given = seeded(1, 16, 11, *CELLS, seed=4)
    whole = list(make().replay(given))
    video = make(on_step=stop_at(5, 1))
    found: list[Block] = []
    with pytest.raises(StopHere):
        collect(found, video.replay(given))
    assert_same(found, whole[:5])
    video.on_step = lambda block, step: None
    assert_same(found + list(video.replay(given[:, :, 10:])), whole)
