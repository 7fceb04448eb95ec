"""Each published flavour's schedule against Self-Forcing's own sampler, and how flavours are known and told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from self_forcing_reference import SelfForcing
from toy_videos import CELLS, assert_same, latents_of, weights
from wan_reference import TEXT_DIM, TEXT_LENGTH, ExplicitWan, Method, seeded

from packforcing.config import CacheConfig
from packforcing.demo.models import SAMPLING as DEMO_SAMPLING
from packforcing.errors import PackForcingError
from packforcing.flavours import FLAVOUR_NAMES, FLAVOURS, flavour_named, flavour_of
from packforcing.generate.sampling import Sampling, departures, noise_generator, sampling_of
from packforcing.generate.schedule import schedule_of_sigmas
from packforcing.inspector import report
from packforcing.presets import PRESET_NAMES, PRESETS, preset_named

# The lists of the published configurations once more, as they are written there.
CONFIGURATIONS = {
    "self-forcing": SelfForcing([1000, 750, 500, 250]),
    "causal-forcing": SelfForcing([1000, 750, 500, 250]),
    "causal-forcing-framewise": SelfForcing([1000, 750, 500, 250]),
    "causal-forcing-2step": SelfForcing([1000, 500], [1000, 750, 500, 250]),
    "causal-forcing-1step": SelfForcing([1000], [1000, 750, 500, 250]),
    "causal-forcing-long": SelfForcing([1000, 750, 500, 250]),
    "causvid": SelfForcing([1000, 757, 522], timestep_shift=8.0, warp_denoising_step=False),
    "causvid-warp": SelfForcing([1000, 750, 500, 250], timestep_shift=8.0),
    "longlive": SelfForcing([1000, 750, 500, 250]),
    "rolling-forcing": SelfForcing([1000, 800, 600, 400, 200]),
    "reward-forcing": SelfForcing([1000, 750, 500, 250]),
    "krea-realtime": SelfForcing([1000, 937, 833, 625], warp_denoising_step=False),
    "packforcing": SelfForcing([1000, 750, 500, 250]),
    "packforcing-unofficial": SelfForcing([1000, 750, 500, 250]),
}
BLOCKS = 5


def test_every_distilled_flavour_has_its_configuration_here():
    assert set(CONFIGURATIONS) == {flavour.name for flavour in FLAVOURS if flavour.update == "few-step"}


def video_of(sampler: SelfForcing, frames: int) -> torch.Tensor:
    """The reference's latents [1, 16, T, h, w] with noise of seed 5, over the whole history."""
    method = Method(rows=4, columns=8, block_frames=frames, recent_blocks=BLOCKS, temporal_stride=1, top_k=0)
    model = ExplicitWan(weights(), method, seeded(1, TEXT_LENGTH, TEXT_DIM, seed=2))

    def noise(chunk: int):
        generator = noise_generator(5, chunk)
        return lambda: torch.randn((1, 16, frames, *CELLS), generator=generator)

    chunks = sampler.chunks(
        BLOCKS, lambda x, t: model.denoise(x, t / 1000), lambda x0: model.clean_pass(x0, None), noise
    )
    return torch.cat(list(chunks), dim=2)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_flavours_video_is_that_of_self_forcings_own_sampler(make, name):
    flavour = flavour_named(name)
    frames = flavour.block_frames
    config = CacheConfig(frames, sink_frames=frames, recent_frames=BLOCKS * frames, top_k=0)
    found = latents_of(list(make(config, sampling_of(flavour, 5), vae=None).blocks(BLOCKS)))
    expected = video_of(CONFIGURATIONS[name], frames)
    for block in range(BLOCKS):
        at = slice(block * frames, (block + 1) * frames)
        error = (found[:, :, at] - expected[:, :, at]).norm() / expected[:, :, at].norm()
        assert error < 1e-6, f"block {block} is {error:.1e} off"


@pytest.mark.parametrize("name", ["causvid", "krea-realtime"])
def test_the_comparison_can_fail(make, name):
    """Other rules for the same list are far off: warped, or with the timestep itself as the noise level."""
    flavour = flavour_named(name)
    frames = flavour.block_frames
    config = CacheConfig(frames, sink_frames=frames, recent_frames=BLOCKS * frames, top_k=0)
    expected = video_of(CONFIGURATIONS[name], frames)
    plain = schedule_of_sigmas([t / 1000 for t in flavour.timesteps])
    for schedule in (sampling_of(replace(flavour, warp=True)).schedule, plain):
        sampling = replace(sampling_of(flavour, 5), schedule=schedule)
        found = latents_of(list(make(config, sampling, vae=None).blocks(BLOCKS)))
        assert (found - expected).norm() / expected.norm() > 1e-4


# --- what a first block of another length must not break ----------------------------------------------------

OWN_FIRST = sampling_of(flavour_named("causal-forcing-2step"), 11)


def test_a_longer_run_begins_with_the_shorter_one_and_a_replay_goes_on(make):
    whole = list(make(sampling=OWN_FIRST).blocks(8))
    assert_same(list(make(sampling=OWN_FIRST).blocks(3)), whole[:3])
    for count in (1, 6):
        video = make(sampling=OWN_FIRST)
        assert_same(list(video.replay(latents_of(whole[:count]))) + list(video.blocks(8 - count)), whole)


def test_passes_are_counted_and_recorded(make):
    seen = []
    video = make(sampling=OWN_FIRST, on_step=lambda block, step: seen.append((block, step)))
    list(video.blocks(3))
    assert seen == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert len(seen) == 3 * (2 + 1) - 1 + OWN_FIRST.more_in_first  # the last block has no clean pass
    assert video.record.timesteps == pytest.approx([1000, 2500 / 3])
    assert video.record.first_timesteps == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert "few-step, t = 1000, 833.33; first block 1000, 937.5, 833.33, 625" in report(video.record)


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("checkpoints/self_forcing_dmd.pt", "self-forcing"),
        ("self_forcing_sid_v2.pt", "self-forcing"),
        ("self_forcing_gan.safetensors", "self-forcing"),
        ("Wan2_1-T2V-1_3B-Self-Forcing-DMD-FP16.safetensors", "self-forcing"),
        ("chunkwise/causal_forcing.pt", "causal-forcing"),
        ("Causal-Forcing/chunkwise/causal_forcing.pt", "causal-forcing"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("causal_forcing_framewise.safetensors", "causal-forcing-framewise"),
        ("causal-forcing++/framewise-2step.pt", "causal-forcing-2step"),
        ("causal-forcing++/framewise-1step.pt", "causal-forcing-1step"),
        ("chunkwise/longvideo.pt", "causal-forcing-long"),
        ("CausVid/autoregressive_checkpoint/model.pt", "causvid"),
        ("autoregressive_checkpoint_warp_4step_cfg2/model.pt", "causvid-warp"),
        ("models/longlive_base.pt", "longlive"),
        ("checkpoints/rolling_forcing_dmd.pt", "rolling-forcing"),
        ("rewardforcing.pt", "reward-forcing"),
        ("krea-realtime-video-14b.safetensors", "krea-realtime"),
        ("my-packforcing-1.3b.safetensors", "packforcing"),
        ("packforcing-unofficial.pt", "packforcing-unofficial"),
        ("ComfyUI-PackForcing/models/rolling_forcing_dmd.pt", "rolling-forcing"),
        ("tiny", "demo"),
    ],
)
def test_a_flavour_is_known_by_its_files_name(path, name):
    assert flavour_of(path).name == name


@pytest.mark.parametrize(
    "path",
    [
        "model.pt",
        "causal_forcing.pt",  # chunk-wise or frame-wise: the folder told
        "checkpoints/ode_init.pt",
        "chunkwise/causal_ode.pt",
        "self_forcing_10s.pt",
        "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors",
        "bidirectional_checkpoint1/model.pt",
        "longlive_models/models/lora.pt",
        "LongLive-2.0-5B/model_bf16.pt",
        "self_forcing_dmd_14b.safetensors",
        "self_forcing_dmd_vace.safetensors",
        "packforcing/wan2.1_t2v_1.3B_bf16.safetensors",
        "packforcing_compressor.safetensors",
        "rolling_forcing_longlive_merge.safetensors",  # two
        "tiny.safetensors",
    ],
)
def test_what_is_not_sure_is_not_guessed(path):
    assert flavour_of(path) is None


def test_a_name_that_is_none_is_told():
    with pytest.raises(PackForcingError, match="no flavour 'self': choose one of self-forcing, causal-forcing, "):
        flavour_named("self")
    with pytest.raises(PackForcingError, match="no preset 'fast': choose one of training-free, deep-sink, "):
        preset_named("fast")


def test_the_demo_flavour_is_the_demos_sampling():
    assert sampling_of(flavour_named("demo")) == DEMO_SAMPLING


# --- what departs from training ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLAVOUR_NAMES)
def test_a_flavour_with_its_own_preset_departs_in_nothing(name):
    flavour = flavour_named(name)
    assert departures(flavour, sampling_of(flavour), preset_named(flavour.preset).config) == []


def test_what_departs_is_told():
    causvid, two_step = flavour_named("causvid"), flavour_named("causal-forcing-2step")
    assert departures(causvid, Sampling(update="euler"), CacheConfig()) == [
        "block_frames is 4, and it was trained with 3",
        "the timesteps are 1000, 937.5, 833.33, 625, and it was trained with 1000, 757, 522",
        "update is euler, and it was trained for few-step",
    ]
    [phrase] = departures(two_step, Sampling(steps=2), preset_named("frame-wise").config)
    assert "1000, 833.33 in the first block, and it was trained with 1000, 937.5, 833.33, 625" in phrase
    # One timestep is no difference: Krea's 937 is 937.5 elsewhere.
    assert departures(flavour_named("krea-realtime"), Sampling(), preset_named("training-free").config) == []


# --- presets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESET_NAMES if name not in ("packforcing", "demo")])
def test_a_preset_keeps_its_context_within_what_was_trained(name):
    """For every flavour that it is for, and with mid blocks at their true distances."""
    config = preset_named(name).config
    span = config.sink_frames + config.top_k * config.block_frames + config.recent_frames + config.block_frames
    assert config.position_range in (0, span)
    for flavour in FLAVOURS:
        if flavour.preset == name:
            assert config.block_frames == flavour.block_frames
            assert span <= flavour.trained_frames
            assert not flavour.window_frames or span <= flavour.window_frames


def test_presets_that_follow_deep_forcing_have_its_share_of_sinks():
    for name in ("training-free", "deep-sink", "frame-wise"):
        assert 0.4 <= preset_named(name).config.sink_frames / 21 <= 0.6


def test_each_flavour_has_a_preset_and_the_page_tells_them_all():
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text()
    assert all(flavour.preset in PRESET_NAMES for flavour in FLAVOURS)
    for flavour in FLAVOURS:
        rows = [line for line in page.splitlines() if line.startswith(f"| `{flavour.name}` | {flavour.block_frames} |")]
        assert any(row.endswith(f"| `{flavour.preset}` | {flavour.source} |") for row in rows)
    for preset in PRESETS:
        c = preset.config
        sizes = (c.block_frames, c.sink_frames, c.recent_frames, c.top_k, c.position_range)
        assert f"| `{preset.name}` | {' | '.join(map(str, sizes))} |" in page
