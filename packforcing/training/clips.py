"""Clips of the synthetic world as latents: encoded once by a frozen VAE, then read back in any order.

Encoding a clip costs as much as many training steps on it. So `prepare` writes the latents into files, the shards, and
goes on where an earlier call was stopped. Clip i is a function of i alone. So a larger set begins with the smaller one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import check_count, check_whole, is_of
from ..config import LATENT_CHANNELS, VAE_SPACE_STRIDE, block_lengths, video_frames
from ..errors import PackForcingError
from ..files.weights import read_json
from ..files.writing import save_tensors
from ..model.compressor import lr_latents, whole_block
from ..model.load import digest
from ..model.vae import WanVAE, encode_clip
from ..world.drawing import render
from ..world.places import FEWEST_BLOCKS, sample_tour
from ..world.scenes import FPS, FRAME, LONGEST_START, sample_scene
from ..world.twins import twin_scene

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
    places: bool = False  # of tours through places (world/places.py)
    twins: bool = False  # each the same as in the set without, but for one colour (world/twins.py)

    def __post_init__(self) -> None:
        for name in ("count", "latent_frames"):
            check_whole(f"A set of clips' {name}", getattr(self, name))
        for name, least in (("size", 8), ("block_frames", 1), ("temporal_stride", 1)):
            check_count(f"A set of clips' {name}", getattr(self, name), least)
        if self.count < 1 or self.latent_frames < 1 or self.latent_frames % self.block_frames:
            raise PackForcingError(f"{self} is no set of clips: give 1 or more clips, of whole blocks.")
        if self.places and self.blocks < FEWEST_BLOCKS:
            raise PackForcingError(
                f"A clip of places has at least {FEWEST_BLOCKS} blocks, so that one of them can come back, but "
                f"{self.latent_frames} latent frames are {self.blocks}: give --latent-frames 20, say."
            )

    @property
    def blocks(self) -> int:
        """Blocks of a clip."""
        return self.latent_frames // self.block_frames

    @property
    def shards(self) -> int:
        """Files that hold the set."""
        return -(-self.count // SHARD)

    @property
    def kind(self) -> str:
        """How the files are named."""
        return "places" if self.places else "away" if self.away else "twins" if self.twins else "clips"

    def as_dict(self) -> dict[str, Any]:
        """What tells the set from others. Sets without places or twins are told as before there were any."""
        return {name: value for name, value in vars(self).items() if name not in ("places", "twins") or value}


@dataclass(frozen=True)
class ClipCaptions:
    """The captions of a clip's blocks.

    Where the clip is a tour, a caption is shorter ("place two") or, in the first stretch of a place, longer ("place
    two: a red circle ..."). In other clips both are the same caption, all over.
    """

    short: tuple[str, ...]  # one a block
    long: tuple[str, ...]  # one a block


def clip_pixels(number: int, clips: ClipSet) -> tuple[Tensor, ClipCaptions]:
    """Clip `number` of a set: pixels [3, F, size, size] in [-1, 1], and its captions."""
    rng = np.random.default_rng(number)
    if clips.places:
        tour = sample_tour(rng, clips.blocks)
        several = [len(tour.places) * [described] for described in (False, True)]
        captions = ClipCaptions(*(tuple(tour.captions(described)) for described in several))
        return tour.pixels(block_lengths(clips.blocks, clips.block_frames), clips.size), captions
    scene = sample_scene(rng, away=clips.away)
    start = int(rng.integers(LONGEST_START))
    scene = twin_scene(scene, rng) if clips.twins else scene
    pixels = render(scene, video_frames(clips.latent_frames), FPS, clips.size, start)
    same = clips.blocks * (scene.caption,)
    return pixels, ClipCaptions(same, same)


def compressed_latents(pixels: Tensor, clips: ClipSet, vae: WanVAE) -> Tensor:
    """The LR branch's latents [blocks, 16, T', h', w'] of each block of a clip [1, 3, F, H, W]."""
    video = pixels[0].to(vae.device, vae.dtype)
    blocks = video.split(block_lengths(clips.blocks, clips.block_frames), dim=1)
    whole = torch.stack([whole_block(block[None], clips.block_frames)[0] for block in blocks])
    return lr_latents(whole, vae, clips.temporal_stride)


def shard_numbers(clips: ClipSet, shard: int) -> range:
    """The clips of a shard; the last one has no more than are asked for."""
    return range(shard * SHARD, min((shard + 1) * SHARD, clips.count))


def shard_path(folder: Path, clips: ClipSet, shard: int) -> Path:
    return folder / f"{clips.kind}-{clips.size}x{clips.latent_frames}-{shard:05d}.safetensors"


@torch.no_grad()
def prepare(folder: str | Path, clips: ClipSet, vae: WanVAE, part: int = 0, parts: int = 1) -> int:
    """Writes the shards that are not there yet; returns how many. Several processes take a `part` of `parts` each.

    A larger set makes the last shard of a smaller one anew.

    Raises PackForcingError when another VAE encoded the shards that are there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = digest(vae.state_dict())
    written = 0
    for shard in range(part, clips.shards, parts):
        path = shard_path(folder, clips, shard)
        numbers = shard_numbers(clips, shard)
        if path.exists():
            tensors, metadata = read_shard(path)
            if metadata["vae"] != encoder:
                raise PackForcingError(
                    f"The clips in {folder} were encoded by another VAE than this one: give another --clip-folder, or "
                    "delete them."
                )
            if len(tensors["latents"]) >= len(numbers):
                continue
        latents, compressed, captions = [], [], []
        for number in numbers:
            pixels, words = clip_pixels(number, clips)
            latents.append(encode_clip(vae, pixels[None].to(vae.device, vae.dtype))[0].half().cpu())
            compressed.append(compressed_latents(pixels[None], clips, vae).half().cpu())
            captions.append(asdict(words) if clips.places else words.short[0])
        tensors = {"latents": torch.stack(latents), "reduced": torch.stack(compressed).contiguous()}
        save_tensors(path, tensors, {"captions": json.dumps(captions), "vae": encoder}, "clips")
        written += 1
    return written


class LatentClips:
    """The clips of a prepared folder, in memory: normalised latents and captions.

    Raises PackForcingError when shards are missing.
    """

    def __init__(self, folder: str | Path, clips: ClipSet) -> None:
        self.clips = clips
        self.captions: list[ClipCaptions] = []
        latents, compressed = [], []
        for shard in range(clips.shards):
            path = shard_path(Path(folder), clips, shard)
            if not path.exists():
                raise PackForcingError(
                    f"The clips are not all encoded: {path} is missing; run the command again with --prepare."
                )
            tensors, metadata = read_shard(path)
            _check_fits(tensors, metadata["captions"], clips, path)
            if len(tensors["latents"]) < len(shard_numbers(clips, shard)):
                raise PackForcingError(
                    f"The clips are not all encoded: {path} is of a smaller set; run the command again with --prepare."
                )
            latents.append(tensors["latents"])
            compressed.append(tensors["reduced"])
            self.captions += [_captions(each, clips.blocks) for each in metadata["captions"]]
        self.latents = torch.cat(latents)[: clips.count]
        self.compressed = torch.cat(compressed)[: clips.count]

    def __len__(self) -> int:
        return self.clips.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, ClipCaptions]:
        """Latents [16, T, h, w], the LR branch's latents [blocks, 16, T', h', w'], both float32, and the captions."""
        return self.latents[number].float(), self.compressed[number].float(), self.captions[number]


def loudness(latents: Tensor) -> Tensor:
    """How much each channel varies in the first clips of latents [N, 16, T, h, w]: [16], of mean 1.

    The errors of a channel weigh as much, since the VAE scales channels by how much they show.
    """
    stds = latents[:256].float().std(dim=(0, 2, 3, 4))
    return stds / stds.mean()


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a shard. Raises PackForcingError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("latents", "reduced")}
            return tensors, {"captions": read_json(file.metadata()["captions"]), "vae": file.metadata().get("vae")}
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise PackForcingError(
            f"The clips {path} are damaged ({str(error)[:80]}): delete the file, and run the command again with "
            "--prepare."
        ) from error


def _check_fits(tensors: Mapping[str, Tensor], captions: Any, clips: ClipSet, path: Path) -> None:
    """Raises PackForcingError for a shard that is not one of this set."""
    latents, reduced, cells = tensors["latents"], tensors["reduced"], clips.size // VAE_SPACE_STRIDE
    count = len(captions) if isinstance(captions, list) else 0
    fits = latents.shape == (count, LATENT_CHANNELS, clips.latent_frames, cells, cells) and count >= 1
    fits = fits and reduced.ndim == 6 and reduced.shape[:3] == (count, clips.blocks, LATENT_CHANNELS)
    fits = fits and all(_is_caption(each, clips.blocks) for each in captions)
    if not fits or not all(
        tensor.is_floating_point() and tensor.float().isfinite().all() for tensor in (latents, reduced)
    ):
        raise PackForcingError(
            f"The clips {path} are not those that are wanted, or damaged: delete the file, and run the command again "
            "with --prepare."
        )


def _is_caption(stored: object, blocks: int) -> bool:
    """Whether `_captions` can read it."""
    if not is_of(stored, dict[str, list[str]]):
        return isinstance(stored, str)
    return stored.keys() == {"short", "long"} and all(len(each) == blocks for each in stored.values())  # type: ignore[attr-defined]


def _captions(stored: str | dict[str, list[str]], blocks: int) -> ClipCaptions:
    """The captions of a clip as a shard keeps them: one for all blocks, or the two of each."""
    if isinstance(stored, str):
        return ClipCaptions(blocks * (stored,), blocks * (stored,))
    return ClipCaptions(tuple(stored["short"]), tuple(stored["long"]))
