"""benchmarks/details.py: a linear map finds what a compressed form holds, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmark import imported

from packforcing.config import LATENT_CHANNELS
from packforcing.demo.models import demo_vae
from packforcing.model.compressor import HRBranch
from packforcing.model.vae import load_vae
from packforcing.training.clips import ClipSet, LatentClips, prepare

details = imported("details")


def test_what_a_form_holds_is_found_and_what_it_lacks_is_not():
    """Latents that are a linear map of one form, without their details of another, and nothing of a third."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(600, 32, generator=generator)
    latents = (whole @ torch.randn(32, 2 * 8 * 8, generator=generator) + 1).view(600, 2, 1, 8, 8)
    fine = details.details(latents)
    forms = {
        "whole": whole,
        "large": torch.nn.functional.avg_pool3d(latents, (1, 4, 4)).flatten(1),
        "none": torch.randn(600, 8, generator=generator),
    }
    found = details.measured(details.Blocks(latents, forms, torch.ones(2), held_out=60))
    variance = latents[-60:].var(dim=0).mean().item()
    assert found["whole"]["error"] < 1e-4 * variance
    assert found["whole"]["details_kept"] > 0.999
    assert found["none"]["error"] == pytest.approx(found["nothing"]["error"], rel=0.1)
    assert abs(found["none"]["details_kept"]) < 0.1
    assert 0.1 * variance < found["large"]["error"] < 0.9 * variance
    assert fine.unflatten(3, (2, 4)).unflatten(5, (2, 4)).mean(dim=(4, 6)).abs().max() < 1e-5


def test_blocks_of_clips_have_the_forms_of_the_compressor(tmp_path: Path):
    clips = ClipSet(10, latent_frames=4, size=64)
    prepare(tmp_path, clips, load_vae(demo_vae(), torch.float32))
    hr = HRBranch((LATENT_CHANNELS, 8, 8, 8, 8, 24), temporal_stride=2).requires_grad_(False)
    for parameter in hr.parameters():  # a new branch gives zeros
        parameter.normal_(std=0.1)
    encoded = LatentClips(tmp_path, clips)
    blocks = details.blocks_of(encoded, hr)
    assert blocks.latents.shape == (10, 16, 4, 8, 8)
    latents, lr, _ = encoded[3]
    torch.testing.assert_close(blocks.latents[3], latents)
    torch.testing.assert_close(blocks.forms["LR"][3], lr.flatten())
    tokens = hr(latents[None]).flatten()
    torch.testing.assert_close(blocks.forms["HR"][3] / blocks.forms["HR"][3].std(), tokens / tokens.std())
    assert {name: form.shape for name, form in blocks.forms.items()} == {
        "LR": (10, 16 * 2 * 2 * 2),
        "HR": (10, 24 * 2),
        "LR and HR": (10, 16 * 2 * 2 * 2 + 24 * 2),
    }
    assert blocks.held_out == 1
