"""`generate` with the files that models are published as: scaled fp8, and a base with its LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_options import SMALL_VIDEO
from torch import Tensor

from packforcing.cli.main import main, parser
from packforcing.cli.networks import load_models
from packforcing.config import CacheConfig, FrameSize
from packforcing.demo.models import demo_transformer, demo_vae
from packforcing.files.compressor_file import load_compressor
from packforcing.generate.long_video import VideoModels, VideoSettings
from packforcing.generate.prepare import DeviceMemory, planned_run
from packforcing.generate.sampling import Sampling
from packforcing.model.compressor import TRAINING_FREE, CompressorChoice

LAYER = "blocks.1.ffn.0"


def options(tmp_path: Path, model: dict[str, Tensor], *more: str) -> list[str]:
    """A command line for a model of its own, with files for the rest."""
    save_file(model, tmp_path / "model.safetensors")
    save_file(demo_vae(), tmp_path / "vae.safetensors")
    save_file({"prompt": torch.randn(1, 5, 4096)}, tmp_path / "words.safetensors")
    files = {"--model": "model", "--vae": "vae", "--text-embedding": "words"}
    given = [part for option, name in files.items() for part in (option, str(tmp_path / f"{name}.safetensors"))]
    return ["generate", *given, *SMALL_VIDEO, *more]


def scaled(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The state dict with one layer in scaled fp8, and what its weight then stands for."""
    scale = state[f"{LAYER}.weight"].abs().max().float() / 448
    rounded = (state[f"{LAYER}.weight"].float() / scale).to(torch.float8_e4m3fn)
    return state | {f"{LAYER}.weight": rounded, f"{LAYER}.weight_scale": scale}, rounded.float() * scale


def test_a_scaled_fp8_model_makes_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, _ = scaled(demo_transformer())
    assert main(options(tmp_path, model, "--seconds", "1", "--output", str(tmp_path / "out.mp4"))) == 0
    assert (tmp_path / "out.mp4").stat().st_size > 1000


def test_a_lora_is_merged_into_the_weights(tmp_path: Path):
    model, meant = scaled(demo_transformer())
    down, up = torch.randn(2, 256), torch.randn(512, 2)
    save_file({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    lora = str(tmp_path / "lora.safetensors")
    for given, strength in ([f"{lora}:0.5"], 0.5), ([lora, f"{lora}:2"], 3.0):
        more = [part for each in given for part in ("--lora", each)]
        wan, _ = load_models(parser().parse_args(options(tmp_path, model, *more)), torch.float32)
        found = wan.modules.state_dict()[f"{LAYER}.weight"]
        torch.testing.assert_close(found, meant + strength * up @ down, rtol=1e-5, atol=1e-5)


def test_a_lora_for_the_demo_models(tmp_path: Path):
    save_file({"blocks.0.norm3.diff": torch.ones(256)}, tmp_path / "lora.safetensors")
    given = ["generate", "--model", "tiny", "--lora", str(tmp_path / "lora.safetensors")]
    wan, _ = load_models(parser().parse_args(given), torch.float32)
    expected = demo_transformer()["blocks.0.norm3.weight"].float() + 1
    assert torch.equal(wan.modules.state_dict()["blocks.0.norm3.weight"], expected)


@pytest.mark.parametrize(
    ("lora", "told"),
    [({"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.ones(2, 2)}, "('x')"), ({}, "is not a LoRA")],
)
def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path, capsys, lora: dict[str, Tensor], told: str):
    save_file(lora or {"a": torch.ones(1)}, tmp_path / "lora.safetensors")
    more = ("--lora", str(tmp_path / "lora.safetensors"), "--output", str(tmp_path / "out.mp4"))
    assert main(options(tmp_path, demo_transformer(), *more)) == 1
    assert told in capsys.readouterr().err


def test_a_compressor_out_of_a_checkpoint_makes_other_mid_blocks(tmp_path: Path):
    """PackForcing-Unofficial's, with blocks of 3 frames: it matters once mid blocks are attended, and not before."""
    net, widths = {}, (16, 4, 4, 4, 256)
    for i, place in enumerate((0, 2, 4, 6)):
        kernel = (1, 1, 1) if place == 6 else (1, 3, 3)
        net[f"model.pack_compressor.net.{place}.weight"] = torch.randn(widths[i + 1], widths[i], *kernel)
        net[f"model.pack_compressor.net.{place}.bias"] = torch.randn(widths[i + 1])
    transformer = {f"model.{name}": tensor for name, tensor in demo_transformer().items()}
    torch.save({"generator": transformer | net}, tmp_path / "model.pt")
    config, words = CacheConfig(block_frames=3, sink_frames=3, recent_frames=3, top_k=1), torch.randn(1, 5, 4096)
    wan, vae = load_models(parser().parse_args(["generate", "--model", "tiny"]), torch.float32)
    made = []
    for choice in (CompressorChoice("model.pt", *load_compressor(tmp_path / "model.pt")), TRAINING_FREE):
        models = VideoModels(wan, vae, choice.build(3, wan.shape.dim))
        settings = VideoSettings(choice.layout(config, FrameSize(64, 64)), Sampling(seed=1, steps=2), fps=16.0)
        video = planned_run(models, settings, 4, DeviceMemory("cpu", None)).video(wan.embed_text(words))
        made.append([block.latents for block in video.blocks(4)])
    for block, (own, free) in enumerate(zip(*made, strict=True)):
        assert own.isfinite().all()
        assert torch.equal(own, free) == (block < 3)
