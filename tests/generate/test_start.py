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
from packforcing.errors import PackForcingError
from packforcing.generate.long_video import Block
from packforcing.generate.sampling import noise_generator
from packforcing.generate.schedule import denoising_step
from packforcing.generate.start import (
    Start,
    check_start,
    fitted,
    pixel_start,
    retimed,
    retimed_count,
    started_blocks,
)
from packforcing.model.vae import StreamingDecoder, encode_clip, init_vae


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
    for step in SAMPLING.steps_of(0):
        x = denoising_step(x, wan.denoise(x, step.sigma, text, cache), step, "few-step", noise)
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


# --- pixels -----------------------------------------------------------------------------------------------------------


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), [(64, 128), (100, 90), (50, 300), (480, 832), (33, 64)], ids=str)
def test_pictures_are_fitted_as_comfyui_does_it(comfy, height, width):
    from comfy.utils import common_upscale

    [picture] = pictures(1, height, width)
    expected = common_upscale(picture.movedim(-1, 0)[None], SIZE.width, SIZE.height, "bilinear", "center")[0] * 2 - 1
    torch.testing.assert_close(fitted(picture, SIZE), expected, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 5, 6, 8, 21])
def test_a_start_of_pixels_is_the_vaes_encoding_of_its_last_frames(caplog, count):
    """Encoded a latent frame at a time; what does not fill a latent frame is left out at the start, and is told."""
    vae, frames = init_vae(4, seed=1).requires_grad_(False), pictures(count, 64, 128)
    start = pixel_start("The start video", lambda: frames, count, SIZE)
    left_out = (count - 1) % 4
    whole = encode_clip(vae, (frames[left_out:] * 2 - 1).permute(3, 0, 1, 2)[None])
    assert start.frames == whole.shape[2]
    torch.testing.assert_close(start.latents(vae), whole, rtol=1e-4, atol=1e-5)
    assert ("the first" in caplog.text) == (left_out > 0)


def test_a_picture_begins_the_video_and_is_its_first_latent_frame(make):
    vae = init_vae(4, seed=1).requires_grad_(False)
    [picture] = pictures(1, 64, 128)
    video = make(vae=vae)
    blocks = list(started_blocks(video, pixel_start("The start image", lambda: [picture], 1, SIZE), 3))
    assert [block.index for block in blocks] == [0, 1, 2]
    encoded = encode_clip(vae, (picture * 2 - 1).permute(2, 0, 1)[None, :, None])
    torch.testing.assert_close(blocks[0].latents[:, :, :1], encoded, rtol=1e-4, atol=1e-5)
    alone = StreamingDecoder(vae).decode(encoded)
    torch.testing.assert_close(blocks[0].decoded[:, :, :1], alone, rtol=1e-4, atol=1e-4)


def test_pixels_without_a_vae_or_that_break_off_are_refused():
    frames = pictures(5, 64, 128)
    with pytest.raises(PackForcingError, match="The start video must be encoded, but there is no VAE"):
        pixel_start("The start video", lambda: frames, 5, SIZE).latents(None)
    with pytest.raises(PackForcingError, match="was to have 9 frames but breaks off before"):
        pixel_start("The start video", lambda: frames, 9, SIZE).latents(init_vae(4).requires_grad_(False))
    with pytest.raises(PackForcingError, match="The start video has no frame"):
        pixel_start("The start video", lambda: [], 0, SIZE)


@pytest.mark.parametrize(("rate", "fps"), [(16.0, 16.0), (24.0, 16.0), (12.0, 16.0), (30000 / 1001, 16.0), (5.0, 25.0)])
def test_frames_at_another_rate_keep_their_speed(rate, fps):
    """Each frame is that of the source which is shown at its middle, and the length in seconds stays."""
    for count in (1, 7, 50):
        found = list(retimed(torch.arange(count), rate, fps))
        assert len(found) == retimed_count(count, rate, fps)
        assert [int(frame) for frame in found] == [int((i + 0.5) / fps * rate + 1e-9) for i in range(len(found))]
        assert abs(len(found) / fps - count / rate) <= max(1 / fps, 1 / rate)


@pytest.mark.parametrize(("frames", "blocks"), [(6, 3), (5, 2)])
def test_a_start_that_leaves_nothing_to_make_is_refused(frames, blocks):
    start = Start("The start video", frames, lambda vae: torch.zeros(()))
    check_start(start, FRAMES, blocks + 1)
    with pytest.raises(PackForcingError, match=r"The start video has 3 blocks already, but the video is to have"):
        check_start(start, FRAMES, blocks)
