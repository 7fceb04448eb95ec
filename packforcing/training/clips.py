"""Clips of the synthetic world as latents: encoded once by a frozen VAE, then read back in any order.

Encoding a clip costs as much as many training steps on it. So `prepare` writes the latents into files, the shards, and
goes on where an earlier call was stopped. Clip i is a function of i alone. So a larger set begins with the smaller one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import VAE_TIME_STRIDE, video_frames
from ..errors import PackForcingError
from ..model.compressor import lr_latents, whole_block
from ..model.load import digest
from ..model.vae import WanVAE, encode_clip
from ..world.drawing import render
from ..world.scenes import FPS, FRAME, LONGEST_START, sample_scene

SHARD = 32  # clips a file


@dataclass(frozen=True)
class ClipSet:
    """Which clips."""

    count: int
    latent_frames: int = 20  # of a clip; 20 are 5 s
    size: int = FRAME  # width and height in pixels
    block_frames: int = 4  # of the blocks that the LR branch compresses
    temporal_stride: int = 2  # of the compressor
    away: bool = False  # of scenes in which things leave the view and come back

    def __post_init__(self) -> None:
        if self.count < 1 or self.latent_frames % self.block_frames:
            raise PackForcingError(f"{self} is no set of clips: give 1 or more clips, of whole blocks.")

    @property
    def shards(self) -> int:
        """Files that hold the set."""
        return -(-self.count // SHARD)


def clip_pixels(number: int, frames: int, size: int, away: bool = False) -> tuple[Tensor, str]:
    """Clip `number`: pixels [3, F, size, size] in [-1, 1], and its caption."""
    rng = np.random.default_rng(number)
    scene = sample_scene(rng, away=away)
    return render(scene, frames, FPS, size, start=int(rng.integers(LONGEST_START))), scene.caption


def compressed_latents(pixels: Tensor, clips: ClipSet, vae: WanVAE) -> Tensor:
    """The LR branch's latents [blocks, 16, T', h', w'] of each block of a clip [1, 3, F, H, W]."""
    video = pixels[0].to(vae.device, vae.dtype)
    first, rest = video.split((pixels.shape[2] - _later_frames(clips), _later_frames(clips)), dim=1)
    later = rest.split(VAE_TIME_STRIDE * clips.block_frames, dim=1) if rest.shape[1] else ()
    blocks = [first, *later]
    whole = torch.stack([whole_block(block[None], clips.block_frames)[0] for block in blocks])
    return lr_latents(whole, vae, clips.temporal_stride)


def _later_frames(clips: ClipSet) -> int:
    """Video frames of all blocks but the first."""
    return VAE_TIME_STRIDE * (clips.latent_frames - clips.block_frames)


def shard_path(folder: Path, clips: ClipSet, shard: int) -> Path:
    kind = "away" if clips.away else "clips"
    return folder / f"{kind}-{clips.size}x{clips.latent_frames}-{shard:05d}.safetensors"


@torch.no_grad()
def prepare(folder: str | Path, clips: ClipSet, vae: WanVAE, part: int = 0, parts: int = 1) -> int:
    """Writes the shards that are not there yet; returns how many. Several processes take a `part` of `parts` each.

    Raises PackForcingError when another VAE encoded the shards that are there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = digest(vae.state_dict())
    written = 0
    for shard in range(part, clips.shards, parts):
        path = shard_path(folder, clips, shard)
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if file.metadata().get("vae") != encoder:
                    raise PackForcingError(
                        f"The clips in {folder} were encoded by another VAE than this one: give another --clip-folder, "
                        "or delete them."
                    )
            continue
        latents, compressed, captions = [], [], []
        for number in range(shard * SHARD, (shard + 1) * SHARD):
            pixels, caption = clip_pixels(number, video_frames(clips.latent_frames), clips.size, clips.away)
            latents.append(encode_clip(vae, pixels[None].to(vae.device, vae.dtype))[0].half().cpu())
            compressed.append(compressed_latents(pixels[None], clips, vae).half().cpu())
            captions.append(caption)
        partial = path.with_suffix(".part")
        tensors = {"latents": torch.stack(latents), "reduced": torch.stack(compressed).contiguous()}
        save_file(tensors, partial, metadata={"captions": json.dumps(captions), "vae": encoder})
        os.replace(partial, path)  # a shard is whole or absent
        written += 1
    return written


class LatentClips:
    """The clips of a prepared folder, in memory: normalised latents and captions.

    Raises PackForcingError when shards are missing.
    """

    def __init__(self, folder: str | Path, clips: ClipSet) -> None:
        self.clips = clips
        self.captions: list[str] = []
        latents, compressed = [], []
        for shard in range(clips.shards):
            path = shard_path(Path(folder), clips, shard)
            if not path.exists():
                raise PackForcingError(
                    f"The clips are not all encoded: {path} is missing; run the command again with --prepare."
                )
            with safe_open(path, framework="pt") as file:
                latents.append(file.get_tensor("latents"))
                compressed.append(file.get_tensor("reduced"))
                self.captions += json.loads(file.metadata()["captions"])
        self.latents = torch.cat(latents)[: clips.count]
        self.compressed = torch.cat(compressed)[: clips.count]

    def __len__(self) -> int:
        return self.clips.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, str]:
        """Latents [16, T, h, w], the LR branch's latents [blocks, 16, T', h', w'], both float32, and the caption."""
        return self.latents[number].float(), self.compressed[number].float(), self.captions[number]
