"""What the sampler tells while it runs: the moving preview of a block, and the line with speed and time left."""

from __future__ import annotations

import importlib
import io
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from packforcing.demo.models import demo_preview


def grey_frames(count: int, height: int, width: int) -> torch.Tensor:
    """Frames [1, 3, count, height, width] from black to white."""
    return torch.linspace(-1, 1, count).view(1, 1, count, 1, 1).expand(1, 3, count, height, width)


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (4, 4), (13, 13), (16, 8), (64, 8)])
def test_a_preview_moves_through_its_block(progress: ModuleType, count: int, shown: int):
    kind, still, largest = progress.moving_preview(grey_frames(count, 32, 64))
    file = io.BytesIO()
    still.save(file, format=kind, quality=95, compress_level=1)  # as ComfyUI's server does
    assert (kind, largest) == ("JPEG", None)
    with Image.open(file) as picture:
        assert (picture.format, picture.size, getattr(picture, "n_frames", 1)) == ("WEBP", (64, 32), shown)
        greys = []
        for frame in range(shown):
            picture.seek(frame)
            greys.append(float(np.asarray(picture.convert("L")).mean()))
    assert greys == sorted(greys)
    assert greys[0] < 5


def test_a_large_preview_is_made_small(progress: ModuleType):
    _, still, _ = progress.moving_preview(grey_frames(2, 480, 832))
    assert still.size == (384, 222)


def test_speed_and_time_left_are_those_of_the_last_blocks(progress: ModuleType, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(progress.adapter, "show_on_node", told.append)
    seconds = iter([0.0, *(10.0 + 2 * block for block in range(20))])
    run = progress.Progress(
        blocks=120, given=0, steps=4, refreshed=0, estimate=demo_preview(), clock=lambda: next(seconds)
    )
    for _ in range(20):
        run.show(torch.zeros(1, 16, 4, 4, 4), grey_frames(16, 32, 32))
    assert told[0] == "block 1 of 120, 1.6 frames/s, 19:50 left"  # with all that a first block waits for
    assert told[-1] == "block 20 of 120, 8.0 frames/s, 3:20 left"


def test_without_a_vae_the_preview_is_estimated(progress: ModuleType, monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(progress.adapter, "show_on_node", told.append)
    seconds = iter([0.0, 2.0])
    run = progress.Progress(
        blocks=2,
        given=0,
        steps=4,
        refreshed=0,
        estimate=demo_preview(),
        notes=["shift is not used."],
        clock=lambda: next(seconds),
    )
    run.show(torch.zeros(1, 16, 4, 4, 4), None)
    assert told == ["block 1 of 2, 8.0 frames/s, 0:02 left\nshift is not used."]


def test_a_preview_without_frames_moves_as_the_latents_do(progress: ModuleType):
    """By a map of its own for the demo, whose VAE has other latents than Wan's."""
    latents = torch.randn(1, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    stills = []
    models = progress.adapter.MODELS
    for name in ("tiny", "wan2.1-1.3b"):
        kind, still, _ = progress.preview(latents, None, progress.adapter.latent_preview(models[name]))
        file = io.BytesIO()
        still.save(file, format=kind)
        with Image.open(file) as picture:
            assert picture.n_frames == 4
        stills.append(np.asarray(still))
    assert not np.array_equal(*stills)


def test_wans_preview_is_comfyuis_latent_to_rgb(progress: ModuleType, comfy: ModuleType):
    """Against the previewer that ComfyUI shows in other samplers."""
    previewer = importlib.import_module("latent_preview").Latent2RGBPreviewer
    wan = importlib.import_module("comfy.latent_formats").Wan21()
    latents = torch.randn(1, 16, 1, 6, 8, generator=torch.Generator().manual_seed(1))
    theirs = previewer(wan.latent_rgb_factors, wan.latent_rgb_factors_bias).decode_latent_to_preview(latents)
    ours = progress.adapter.latent_preview(progress.adapter.MODELS["wan2.1-1.3b"]).frames(latents)[0, :, 0]
    found = ((ours + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(found - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (200, "3:20"), (3800, "1:03:20")])
def test_a_duration_is_read_as_on_a_clock(progress: ModuleType, seconds: float, text: str):
    assert progress.time_of(round(seconds)) == text
