"""Preparing a run: what fits is found before any work, and what is prepared is what the video then uses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.errors import PackForcingError
from packforcing.generate.long_video import VideoModels, VideoSettings
from packforcing.generate.memory_budget import DecoderMemory, MemoryDemand
from packforcing.generate.prepare import DeviceMemory, memory_demand, planned_run, tune_models
from packforcing.generate.sampling import Sampling
from packforcing.known_models import SIZES
from packforcing.model.attention import fast_attention, sdpa
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import Compressor
from packforcing.model.vae import init_vae
from packforcing.model.wan_modules import build_wan_modules, random_state_dict

LAYOUT = Layout(CacheConfig(), FrameSize(128, 128), 2)
BLOCKS = 30


@pytest.fixture(scope="module")
def models() -> VideoModels:
    wan = CausalWan(build_wan_modules(SIZES["tiny"], random_state_dict(SIZES["tiny"], 0)), sdpa)
    return VideoModels(wan, init_vae(8).requires_grad_(False), Compressor(2))


def settings(overlap: bool = True) -> VideoSettings:
    return VideoSettings(LAYOUT, Sampling(steps=1), overlap=overlap)


def test_the_demand_is_that_of_the_models(models: VideoModels) -> None:
    with_vae = MemoryDemand(SIZES["tiny"].shape, 4, LAYOUT, BLOCKS, DecoderMemory(dim=8, itemsize=4))
    assert memory_demand(models, LAYOUT, BLOCKS) == with_vae
    assert memory_demand(replace(models, vae=None), LAYOUT, BLOCKS) == replace(with_vae, vae=None)


def test_every_prompt_of_a_story_takes_memory(models: VideoModels) -> None:
    """As much as its keys and values are, at Wan's 512 tokens."""
    text = models.wan.embed_text(torch.zeros(1, 512, 4096))
    held = sum(keys.nbytes + values.nbytes for keys, values in text.layers)
    one, three = (planned_run(models, settings(), BLOCKS, DeviceMemory("cpu", None), prompts=n) for n in (1, 3))
    assert three.needed_bytes - one.needed_bytes == 2 * held


def test_a_run_decodes_in_the_fastest_way_that_fits(models: VideoModels) -> None:
    demand = memory_demand(models, LAYOUT, BLOCKS)
    whole = demand.bytes(4, overlap=True)
    weights = 1000
    for available, wanted, frames, overlap in (
        (None, True, 4, True),
        (None, False, 4, False),
        (whole + weights, True, 4, True),
        (whole + weights, False, 4, False),
        (demand.bytes(4) + weights, True, 4, False),
        (demand.bytes(4) + weights - 1, True, 2, False),
        (demand.least, True, 1, False),
    ):
        run = planned_run(models, settings(wanted), BLOCKS, DeviceMemory("cpu", available, weights))
        assert run.settings == replace(settings(), decode_frames=frames, overlap=overlap)
        assert run.needed_bytes == demand.bytes(frames, overlap)


def test_convolutions_may_copy_where_that_fits_too(models: VideoModels) -> None:
    demand = memory_demand(models, LAYOUT, BLOCKS)
    copying = replace(demand, vae=DecoderMemory(dim=8, itemsize=4, copies=True)).bytes(4)
    assert copying > demand.bytes(4)
    for available, fits in ((None, True), (copying + 1000, True), (copying + 999, False)):
        memory = DeviceMemory("cuda", available, movable=1000)
        assert planned_run(models, settings(False), BLOCKS, memory).has_room_to_copy is fits
    tight = DeviceMemory("cuda", demand.least)
    assert planned_run(models, settings(), BLOCKS, tight).has_room_to_copy is False
    assert planned_run(replace(models, vae=None), settings(), BLOCKS, tight).has_room_to_copy is True


def test_a_run_that_does_not_fit_is_refused_by_the_name_of_its_device(models: VideoModels) -> None:
    with pytest.raises(PackForcingError, match=r"^A video of 128x128 needs about .* but cuda:3 has 1.00 kB for it: "):
        planned_run(models, settings(), BLOCKS, DeviceMemory("cuda:3", 1000))


def test_a_run_that_the_machine_cannot_hold_is_refused(models: VideoModels) -> None:
    demand = memory_demand(models, LAYOUT, BLOCKS)
    planned_run(models, settings(), BLOCKS, DeviceMemory("cuda", None, host=demand.host_bytes))
    planned_run(models, settings(), BLOCKS, DeviceMemory("cpu", None, host=demand.host_bytes + demand.least))
    for device in ("cuda", "cpu"):
        with pytest.raises(PackForcingError, match=r"of the machine's own memory, .* but .* are free: "):
            planned_run(models, settings(), BLOCKS, DeviceMemory(device, None, host=demand.host_bytes - 1))


def test_the_video_is_made_as_planned(models: VideoModels) -> None:
    demand = memory_demand(models, LAYOUT, BLOCKS)
    run = planned_run(models, settings(), BLOCKS, DeviceMemory("cpu", demand.least))
    steps = []
    video = run.video(models.wan.embed_text(torch.zeros(1, 4, 4096)), lambda *step: steps.append(step))
    assert (video.wan, video.vae, video.compressor) == (models.wan, models.vae, models.compressor)
    assert video.decoder is not None
    assert video.decoder.frames_per_pass == 1
    (block,) = video.blocks(1)
    assert block.decoded.shape == (1, 3, 13, 128, 128)
    assert steps == [(0, 0)]


def test_tuning_leaves_alone_what_it_is_told_to(models: VideoModels) -> None:
    models.wan.attention = sdpa
    assert tune_models(models, LAYOUT, attention=False) is True  # what is fastest in float32 on a CPU
    assert models.wan.attention is sdpa
    assert tune_models(replace(models, vae=None), LAYOUT) is None
    assert models.wan.attention is fast_attention
