"""Clips of random latents, for training that no files are made for."""

from __future__ import annotations

from torch import Tensor
from wan_reference import seeded

from packforcing.training.clips import ClipCaptions, ClipSet


class ToyClips:
    """Clips that all have the same captions, in place of `LatentClips`. What the LR branch gives is every other latent
    frame, and every fourth row and column."""

    def __init__(self, clips: ClipSet, words: ClipCaptions, seed: int) -> None:
        self.clips, self.words = clips, words
        self.captions = clips.count * [words]
        self.latents = seeded(clips.count, 16, clips.latent_frames, clips.size // 8, clips.size // 8, seed=seed)

    def __len__(self) -> int:
        return self.clips.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, ClipCaptions]:
        latents = self.latents[number]
        blocks = latents.unflatten(1, (self.clips.blocks, self.clips.block_frames)).transpose(0, 1)
        return latents, blocks[:, :, ::2, ::4, ::4], self.words


def one_caption(caption: str, blocks: int) -> ClipCaptions:
    """The captions of a clip whose blocks all have this one."""
    return ClipCaptions(*(2 * [blocks * (caption,)]))
