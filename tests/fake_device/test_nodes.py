"""The sampler node on a CUDA device: ComfyUI's own model tree, its VAE's weights and its conditioning."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import CUDA, FakeDevice, on_host

from packforcing.demo.models import demo_preview

SECONDS, BLOCKS = 2.3, 5  # of two latent frames
# What waits once a run: loading, tuning, the state's digest, the last frames.
ONCE = ("load_models", "autotune.py:_wait", "tensor_digest", "as_images")


@pytest.fixture
def nodes(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The pack's nodes; ComfyUI's model management loads whatever it is asked to, whole."""
    import comfy.model_management as management
    import folder_paths
    from comfy.ldm.modules.attention import attention_pytorch

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()

    def load(patchers: list[Any], memory_required: int = 0) -> None:
        for patcher in patchers:
            patcher.model.to(patcher.load_device)

    monkeypatch.setattr(management, "load_models_gpu", load)
    monkeypatch.setattr(management, "get_total_memory", lambda device=None: 80 * 10**9)
    of = {name: import_module(f"{pack.__name__}.nodes.{name}") for name in ("adapter", "loaders", "sampler", "state")}
    monkeypatch.setattr(of["adapter"], "optimized_attention", attention_pytorch)  # as on an NVIDIA card
    config = import_module(f"{pack.__name__}.packforcing.config")
    return SimpleNamespace(**of, config=config)


def sampled(nodes: SimpleNamespace, device: torch.device, **options: Any) -> Any:
    """What the sampler gives with the demo models on a device."""
    model, clip, vae = nodes.loaders.DemoModelsNode.execute().args
    vae = nodes.adapter.demo_vae(vae.get_sd(), torch.float32)
    model.load_device = vae.device = device
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle bounces on a blue background"))
    config = nodes.config.CacheConfig(block_frames=2, sink_frames=2, recent_frames=2, top_k=1)
    compressor = nodes.loaders.CompressorLoaderNode.execute(nodes.loaders.TRAINING_FREE_NAME).args[0]
    return nodes.sampler.LongVideoSamplerNode.execute(
        model, positive, config, 1, 64, 64, SECONDS, 16.0, 1, 5.0, "few-step", compressor=compressor, vae=vae, **options
    ).args


def test_the_sampler_runs_on_the_device_and_gives_what_lies_on_the_host(nodes: SimpleNamespace):
    """A block costs one copy of its latents, one of its preview, and what the loop itself waits for; the video's frames
    are waited for by the thread that writes them."""
    wanted = sampled(nodes, torch.device("cpu"))
    with FakeDevice() as fake:
        latent, video, record, state, frames = sampled(nodes, CUDA)
        waits = Counter(wait.where for wait in fake.waits if not wait.beside)
    for tensor in (latent["samples"], state.latents, frames):
        assert not tensor.is_cuda
    torch.testing.assert_close(latent["samples"], wanted[0]["samples"], rtol=0, atol=0.05)
    torch.testing.assert_close(state.latents, wanted[3].latents, rtol=0, atol=0.05)
    assert video.get_dimensions() == (64, 64)
    assert (record.device, len(record.blocks)) == ("cuda:0", BLOCKS)

    assert {place: count for place, count in waits.items() if not place.endswith(ONCE)} == {
        "packforcing/generate/long_video.py:_check_finite": BLOCKS,
        "packforcing/generate/state.py:journalled": BLOCKS,
        "nodes/progress.py:moving_preview": BLOCKS,
        "packforcing/devices.py:read": record.model.layers,  # only the last block has a choice
    }


def test_previews_without_a_vae_are_made_on_the_device():
    latents, preview = torch.randn(1, 16, 2, 8, 8), demo_preview()
    with FakeDevice():
        found = preview.frames(latents.to("cuda"))
        assert found.is_cuda
    torch.testing.assert_close(on_host(found), preview.frames(latents))
