"""Long videos in the smallest sizes: a random Wan of two layers, a VAE of a few lines, and what tests do with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from wan_reference import DIM, FFN_DIM, HEADS, TEXT_DIM, TEXT_LENGTH, random_weights, seeded

from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape
from packforcing.generate.long_video import Block, LongVideo, VideoModels, VideoSettings
from packforcing.generate.sampling import Sampling
from packforcing.generate.story import Story
from packforcing.model.causal_wan import CausalWan, TextKV
from packforcing.model.compressor import Compressor
from packforcing.model.wan_modules import WanModules, WanSizes, build_wan_modules

SIZE = FrameSize(128, 64)
CELLS = 8, 16
FRAMES = 2  # latent frames a block
# One sink and one recent block: block 3 is the first that attends a mid block, and block 5 the first that must choose.
CONFIG = CacheConfig(block_frames=FRAMES, sink_frames=2, recent_frames=2, top_k=2, query_fraction=1.0)
NO_MIDS = replace(CONFIG, top_k=0)
FIRST_WITH_MID, FIRST_THAT_CHOOSES = 3, 5
SAMPLING = Sampling(seed=11, steps=2)
SHAPE = ModelShape(layers=2, dim=DIM, heads=HEADS)
SIZES = WanSizes(dim=DIM, ffn_dim=FFN_DIM, layers=SHAPE.layers, heads=HEADS, text_dim=TEXT_DIM)


class ToyVAE(nn.Module):
    """A causal video autoencoder in a few lines, for runs that are about the loop: each frame is a mix of its latent
    frame and the one before, and encoding averages."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.colours = 0.2 * seeded(3, 16, seed=8)

    def decode(self, raw: Tensor, history: dict[str, Tensor]) -> Tensor:
        start = "decoder.conv1" not in history
        past = raw[:, :, :1] if start else history["decoder.conv1"]
        history["decoder.conv1"] = raw[:, :, -1:].clone()
        mixed = 0.7 * raw + 0.3 * torch.cat((past, raw[:, :, :-1]), dim=2)
        small = torch.einsum("kc,bcthw->bkthw", self.colours, mixed)
        frames = small.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        return frames[:, :, 3 if start else 0 :]

    def encode(self, pixels: Tensor, history: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        history["encoder.conv1"] = pixels[:, :, -1:].clone()
        first = nn.functional.avg_pool3d(pixels[:, :, :1], (1, 8, 8))
        rest = nn.functional.avg_pool3d(pixels[:, :, 1:], (4, 8, 8))
        mean = torch.einsum("kc,bkthw->bcthw", self.colours, torch.cat((first, rest), dim=2))
        return 5 * mean, torch.zeros_like(mean)


def weights() -> dict[str, Tensor]:
    with torch.device("meta"):
        like = WanModules(SIZES).state_dict()
    return random_weights(like, seed=9)


def causal_wan(state: dict[str, Tensor]) -> CausalWan:
    return CausalWan(build_wan_modules(SIZES, state), text_len=0)  # as the demo's prompts: not padded


def prompt(wan: CausalWan, seed: int = 2, length: int = TEXT_LENGTH) -> TextKV:
    """A random prompt."""
    return wan.embed_text(seeded(1, length, TEXT_DIM, seed=seed))


def long_video(
    wan: CausalWan,
    /,
    config: CacheConfig = CONFIG,
    sampling: Sampling = SAMPLING,
    text: TextKV | Story | None = None,
    **given: Any,
) -> LongVideo:
    """A `LongVideo` of the toy VAE; everything can be replaced."""
    networks = {"wan": wan, "compressor": Compressor(1), "vae": ToyVAE()}
    models = VideoModels(**{name: given.pop(name, network) for name, network in networks.items()})
    if text is None and isinstance(models.wan, CausalWan):
        text = prompt(models.wan)
    on_step = {"on_step": given.pop("on_step")} if "on_step" in given else {}
    direct = isinstance(models.compressor, Compressor) and models.compressor.direct
    settings = VideoSettings(Layout(config, SIZE, temporal_stride=1, direct=direct), sampling, **given)
    return LongVideo(models, text, settings, **on_step)


def latents_of(blocks: list[Block]) -> Tensor:
    return torch.cat([block.latents for block in blocks], dim=2)


def assert_same(found: list[Block], expected: list[Block]) -> None:
    """Latents and frames to the bit."""
    assert [block.index for block in found] == [block.index for block in expected]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.latents, b.latents), f"latents of block {a.index}"
        assert torch.equal(a.frames, b.frames), f"frames of block {a.index}"


class StopHere(Exception):
    pass


def stop_at(block: int, step: int) -> Any:
    def on_step(*now: int) -> None:
        if now == (block, step):
            raise StopHere

    return on_step


def collect(found: list[Block], blocks: Iterator[Block]) -> None:
    """Keeps each block as it comes, as a caller does that saves at once."""
    for block in blocks:
        found.append(block)
