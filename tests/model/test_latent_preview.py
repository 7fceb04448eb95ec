"""Previews from latents: the map's arithmetic, how near the demo's comes to the true colours, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from packforcing.cli.main import main
from packforcing.demo.models import WEIGHTS, demo_preview, demo_vae
from packforcing.files.weights import read_state_dict
from packforcing.model.latent_preview import LatentPreview, fitted, from_tensors, levels_off, mean_colours
from packforcing.model.vae import encode_clip, load_vae
from packforcing.training import preview as preview_command
from packforcing.training.vae import held_out_clips

# Of ComfyUI's preview for Wan 2.1's VAE, the largest factors only: enough to see that they are for another VAE.
WAN_FACTORS = {2: (0.3568, 0.2548, 0.1747), 6: (-0.3477, -0.4059, -0.2925), 14: (0.3477, 0.2275, 0.2950)}


def test_a_map_is_a_matrix_for_each_latent_pixel_and_its_colours_are_bounded():
    weight = torch.zeros(3, 16)
    weight[0, 2], weight[2, 5] = 1.0, -2.0
    preview = LatentPreview(((weight, torch.tensor([0.0, 0.5, 0.0])),))
    latents = torch.randn(2, 16, 3, 4, 5, dtype=torch.bfloat16)
    frames = preview.frames(latents)
    assert (frames.shape, frames.dtype) == ((2, 3, 3, 4, 5), torch.float32)
    assert torch.equal(frames[:, 0], latents[:, 2].float().clamp(-1, 1))
    assert torch.equal(frames[:, 1], torch.full((2, 3, 4, 5), 0.5))
    assert torch.equal(frames[:, 2], (-2 * latents[:, 5].float()).clamp(-1, 1))


def test_mean_colours_are_those_of_8x8_pixels_of_four_frames():
    frames = torch.randn(1, 3, 9, 16, 24)
    means = mean_colours(frames)
    assert means.shape == (1, 3, 2, 2, 3)
    assert torch.allclose(means[0, 1, 1, 1, 2], frames[0, 1, 5:9, 8:16, 16:24].mean(), atol=1e-6)


def test_a_fit_finds_a_map_that_is_there():
    """Colours that are a bent function of the latents: a linear map alone cannot make them."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 9, 16, 16, generator=generator)
    colours = torch.stack((latents[:, 0].abs(), latents[:, 1], -latents[:, 2]), dim=1) / 3
    frames = colours.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)[:, :, 3:].clamp(-1, 1)
    preview = fitted([latents], [frames], hidden=16, steps=400)
    assert levels_off(preview, latents, frames) < 4
    assert levels_off(from_tensors({"0.weight": torch.zeros(3, 16), "0.bias": torch.zeros(3)}), latents, frames) > 20


def test_the_demos_previews_have_the_colours_of_its_videos():
    vae = load_vae(demo_vae(), torch.float32)
    (clip,) = held_out_clips(1, 9)
    latents = encode_clip(vae, clip)
    off = levels_off(demo_preview(), latents, clip)
    assert off < 10
    factors = torch.zeros(3, 16)
    for channel, colour in WAN_FACTORS.items():
        factors[:, channel] = torch.tensor(colour)
    assert off < 0.25 * levels_off(LatentPreview(((factors, torch.zeros(3)),)), latents, clip)


def test_the_command_writes_such_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preview_command, "CLIP_FRAMES", 5)  # quick
    monkeypatch.setattr(preview_command, "HELD_OUT", 1)
    file = tmp_path / "preview.safetensors"
    assert main(["train", "preview", "--clips", "1", "--steps", "2", "--output", str(file)]) == 0
    assert "levels off on held-out clips" in capsys.readouterr().out
    (mine, _), (shipped, metadata) = (read_state_dict(each) for each in (file, WEIGHTS / "demo_preview.safetensors"))
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: t.shape for name, t in shipped.items()}
    assert metadata["command"].startswith("python -m packforcing train preview")
    assert main(["train", "preview", "--output", "/no/such/folder/x.safetensors"]) == 1
    assert "the folder /no/such/folder does not exist" in capsys.readouterr().err
