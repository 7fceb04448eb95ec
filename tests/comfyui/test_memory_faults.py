"""The sampler when memory runs out, in this process: it goes on, or leaves everything as the next prompt needs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from failing_memory import fail_passes, held_bytes

SIZES = {"block_frames": 1, "sink_frames": 1, "recent_frames": 1, "top_k": 2}
STEPS = 2


@pytest.fixture(scope="module")
def sample(pack: ModuleType) -> Callable[[], Any]:
    """Runs the sampler: five blocks of the demo models. Returns what it gives."""
    classes = pack.NODE_CLASS_MAPPINGS
    model, clip, vae = classes["PackForcingDemoModels"].execute().result
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    config = classes["PackForcingCacheConfig"].execute(**SIZES).result[0]
    name = importlib.import_module(f"{pack.__name__}.packforcing.model.compressor").TRAINING_FREE_NAME
    compressor = classes["PackForcingCompressorLoader"].execute(name).result[0]
    sampler = classes["PackForcingSampler"]
    return lambda: (
        sampler.execute(
            model, prompt, config, 0, 64, 64, 1.2, 16.0, STEPS, 5.0, "few-step", compressor, vae, "on"
        ).result
    )


@pytest.fixture(autouse=True)
def folders(comfy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's output folder; the temporary one lies beside it."""
    paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "output"


@pytest.fixture
def fails(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Lets the device's memory run out in these of the denoising passes to come."""
    wan = importlib.import_module(f"{pack.__name__}.packforcing.model.causal_wan").CausalWan
    return fail_passes(monkeypatch, wan)


def test_a_run_whose_memory_ran_out_goes_on_or_is_kept_and_the_next_prompt_runs(
    sample: Callable[[], Any], fails: Callable[[range], None], folders: Path, pack: ModuleType, comfy: ModuleType
) -> None:
    latent, _, whole, state, _ = sample()
    assert whole.notes == []
    samples, made = latent["samples"].clone(), state.latents.clone()
    del latent, whole, state
    before = held_bytes()

    fails(range(3 * STEPS, 3 * STEPS + 1))
    latent, _, record, _, _ = sample()
    assert torch.equal(latent["samples"], samples)
    [note] = record.notes
    assert note.startswith("The device's memory ran out at block 3: from there on blocks are decoded after their ")
    assert list((folders / "packforcing_interrupted").iterdir()) == []
    del latent, record

    fails(range(3 * STEPS, 10**6))
    errors = importlib.import_module(f"{pack.__name__}.packforcing.errors")
    with pytest.raises(errors.PackForcingError, match=r"^The device's memory ran out at block 3, and there is nothing"):
        sample()
    assert comfy.model_management.current_loaded_models == []
    kept = sorted(file.suffix for file in (folders / "packforcing_interrupted").iterdir())
    assert kept == [".latent", ".mp4"]
    [file] = (folders / "packforcing_states").iterdir()
    states = importlib.import_module(f"{pack.__name__}.packforcing.files.state_file")
    assert torch.equal(states.load_state(file).latents, made[:, :, :3])

    fails(range(0))
    assert held_bytes() == before
    assert torch.equal(sample()[0]["samples"], samples)
