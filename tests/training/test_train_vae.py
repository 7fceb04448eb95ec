"""`train vae`: latents at the scale the diffusion model expects, the same pictures, a file that loads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from packforcing.errors import PackForcingError
from packforcing.files.weights import read_state_dict
from packforcing.model.vae import LATENT_CHANNELS, WanVAE, encode_clip, init_vae, load_vae, normalise
from packforcing.training import latent_scale
from packforcing.training import vae as train_vae
from packforcing.training.checkpoints import Checkpoints
from packforcing.training.latent_scale import LatentStatistics
from packforcing.training.log import read_log
from packforcing.training.run_config import MicroBatch
from packforcing.training.vae import ClipShape, VAETrainer
from packforcing.world.drawing import render
from packforcing.world.scenes import sample_scene

EMPTY = [2, 9]  # latent channels of the fixture that say nothing


@pytest.fixture(scope="module")
def clips() -> list[Tensor]:
    shape = ClipShape(frames=5, crop=16, size=64, clips=2)
    return [train_vae.sample_clips(shape, seed)[0] for seed in range(2)]


@pytest.fixture
def vae() -> WanVAE:
    """A random VAE with two empty channels: almost constant, as a KL term leaves them."""
    vae = init_vae(dim=8, seed=1).requires_grad_(False)
    vae.conv1.weight[EMPTY] *= 1e-4
    vae.conv1.bias[EMPTY] = torch.tensor([0.3, -0.2])
    vae.conv1.weight[LATENT_CHANNELS:] *= 0.1
    return vae


def statistics(vae: WanVAE, clips: list[Tensor]) -> LatentStatistics:
    return latent_scale.latent_statistics(vae, clips)


def options(folder: Path, *extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train_vae.add_arguments(parser)
    small = ["--steps", "3", "--image-steps", "1", "--batch", "1", "--evaluate-every", "0", "--device", "cpu"]
    small += ["--calibration-clips", "2"]
    return parser.parse_args(["--folder", str(folder), *small, *extra])


def test_statistics_are_those_of_all_clips_together(vae: WanVAE, clips: list[Tensor]) -> None:
    means = torch.cat([vae.encode(clip)[0] for clip in clips]).transpose(0, 1).flatten(1)
    found = statistics(vae, clips)
    torch.testing.assert_close(found.mean.float(), means.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.std.float(), means.std(1, correction=0), rtol=1e-3, atol=1e-5)
    assert [channel for channel in range(LATENT_CHANNELS) if not found.informative[channel]] == EMPTY


def test_absorbing_the_scale_leaves_the_pictures(vae: WanVAE, clips: list[Tensor]) -> None:
    before = [vae.decode(vae.encode(clip)[0]) for clip in clips]
    latent_scale.absorb_scale(vae, statistics(vae, clips))
    for clip, frames in zip(clips, before, strict=True):
        torch.testing.assert_close(vae.decode(vae.encode(clip)[0]), frames, rtol=1e-3, atol=1e-3)


def test_absorbed_latents_have_mean_0_and_are_as_loud_as_they_show(vae: WanVAE, clips: list[Tensor]) -> None:
    vae.conv2.weight[:, 5] *= 1e-3
    before = statistics(vae, clips)
    latent_scale.absorb_scale(vae, before)
    latents = torch.cat([encode_clip(vae, clip) for clip in clips]).transpose(0, 1).flatten(1)
    wanted = before.loudness.float()
    assert wanted[5] == pytest.approx(0.15)
    assert wanted.max() == 1
    wanted[EMPTY] = 0
    torch.testing.assert_close(latents.mean(1), torch.zeros(LATENT_CHANNELS), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(1, correction=0), wanted, rtol=0, atol=1e-3)


def test_visibility_is_what_a_channel_does_to_the_pixels(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = torch.zeros(3, LATENT_CHANNELS)
    effects[0, 2], effects[1, 7] = 1.0, 0.1  # of a decoder that is a matrix
    monkeypatch.setattr(vae, "decode", lambda z: torch.einsum("pc,bcthw->bpthw", effects, z))
    std = torch.full((LATENT_CHANNELS,), 2.0)
    found = latent_scale.visibility(vae, torch.randn(1, LATENT_CHANNELS, 8, 32, 32), std, share=0.5).sqrt()
    expected = 0.5 * 2.0 * effects.norm(dim=0) / 3**0.5
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0)  # 8,192 random numbers a channel
    loudness = LatentStatistics(std, std, std, found).loudness
    assert loudness[[2, 7, 0]].tolist() == pytest.approx([1, 0.2, 0.15], rel=0.1)


def test_an_empty_channel_does_not_reach_the_decoder(vae: WanVAE, clips: list[Tensor]) -> None:
    latent_scale.absorb_scale(vae, statistics(vae, clips))
    latents = vae.encode(clips[0])[0]
    frames = vae.decode(latents)
    latents[:, EMPTY] += torch.randn_like(latents[:, EMPTY])
    assert torch.equal(vae.decode(latents), frames)


def test_the_posteriors_noise_follows_the_scale(vae: WanVAE, clips: list[Tensor]) -> None:
    """So that training can go on from an exported file: signal to noise is what it was."""
    before = statistics(vae, clips)
    latent_scale.absorb_scale(vae, before)
    after = statistics(vae, clips)
    alive = before.informative
    torch.testing.assert_close((after.std / after.noise)[alive], (before.std / before.noise)[alive], rtol=1e-3, atol=0)


def test_at_the_start_each_frame_is_on_its_own() -> None:
    """A clip of a still picture is that picture's reconstruction, over and over."""
    vae = VAETrainer(seed=3).vae.requires_grad_(False)
    still = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    frames = vae.decode(vae.encode(still.expand(-1, -1, 9, -1, -1))[0])
    torch.testing.assert_close(frames, vae.decode(vae.encode(still)[0]).expand_as(frames), rtol=1e-4, atol=1e-4)


def test_a_batch_is_a_function_of_the_samples_seeds() -> None:
    trainer = VAETrainer(image_steps=0)
    both = trainer.batch(MicroBatch(5, "vae", range(0, 2), seed=1))
    apart = [trainer.batch(MicroBatch(5, "vae", range(i, i + 1), seed=1)) for i in range(2)]
    for whole, parts in zip(both, zip(*apart, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(*(pixels[:1] for pixels, _ in apart))


def test_every_clip_shape_trains() -> None:
    for shape in train_vae.IMAGES + train_vae.CLIPS:
        pixels, noise = train_vae.sample_clips(shape, 0)
        assert pixels.shape == (shape.clips, 3, shape.frames, shape.crop, shape.crop)
        assert noise.shape == (shape.clips, 16, 1 + shape.frames // 4, shape.crop // 8, shape.crop // 8)
        assert -1 <= pixels.min() < pixels.max() <= 1
    with pytest.raises(PackForcingError, match="1 \\+ 4k"):
        ClipShape(frames=4, crop=32, size=64, clips=1)


def test_the_loss_falls_on_one_batch() -> None:
    trainer = VAETrainer()
    batch = train_vae.sample_clips(ClipShape(frames=5, crop=16, size=32, clips=2), 0)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainer.losses("vae", batch)["loss"]
        loss.backward()
        trainer.learners["vae"].update(rate=1.0, clip=1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_command_trains_exports_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ClipShape(frames=5, crop=16, size=32, clips=1)
    monkeypatch.setattr(train_vae, "IMAGES", (small,))
    monkeypatch.setattr(train_vae, "CLIPS", (small,))
    # The real ones take whole frames; the scale that they find is the subject of other tests.
    monkeypatch.setattr(train_vae, "FRAME", 16)
    monkeypatch.setattr(train_vae, "held_out_clips", lambda count, frames: [torch.zeros(1, 3, 5, 16, 16)])
    assert train_vae.run(options(tmp_path, "--max-minutes", "1e-9")).step == 1
    assert train_vae.run(options(tmp_path)).finished
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1, 3]
    assert Checkpoints(tmp_path / "checkpoints").load_newest()["step"] == 3

    file = tmp_path / "vae.safetensors"
    report = json.loads(capsys.readouterr().out.split("}\n{")[-1].join(["{", ""]))
    assert report["bytes"] == file.stat().st_size <= 3_000_000
    state, metadata = read_state_dict(file)
    assert {"command", "hardware", "minutes", "steps", "psnr", "latent_std"} <= metadata.keys()
    assert (tmp_path / "reconstructions.png").exists()

    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    vae = load_vae(state, torch.float32)
    assert normalise(vae.encode(torch.zeros(1, 3, 5, 16, 16))[0]).shape == (1, 16, 2, 2, 2)


def test_the_shipped_vae_reconstructs_a_held_out_scene() -> None:
    """What docs/demo-models.md says of it: 28.6 dB for the worst of 12 clips."""
    shipped = Path(train_vae.__file__).parent.parent / "weights" / "demo_vae.safetensors"
    weights, metadata = read_state_dict(shipped)
    assert metadata["command"].startswith("python -m packforcing train vae")
    vae = load_vae(weights, torch.float32)
    clip = render(sample_scene(1, held_out=True), frames=5)[None]
    with torch.no_grad():
        made = vae.decode(vae.encode(clip)[0]).clamp(-1, 1)
    assert 10 * torch.log10(4 / (made - clip).square().mean()) > 28
