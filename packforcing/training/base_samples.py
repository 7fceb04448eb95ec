"""What a micro-batch of `train base` holds: clips, their captions, and noise at drawn levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..demo.text import encode_prompt
from ..world.captions import opened, parse
from .blocks import noise_levels
from .clips import LatentClips
from .histories import History

MEMORY_LEVEL = 0.85  # a noise level at which colours are decided


@dataclass(frozen=True)
class BaseOptions:
    """The trainer's hyperparameters."""

    rate: float = 1e-3  # learning rate
    ema: float = 0.999
    shift: float = 3.0  # flow shift of the noise levels: more of them are high
    history_noise: float = 0.2  # the largest noise level of a clean pass's latents
    clean_history: float = 0.3  # share of the clean passes without any noise
    first_again: int = 2  # more noise levels of the first block, which has only the prompt to go by
    open_captions: float = 0.0  # share of the captions that leave colours out: then only the history knows them
    away_share: float = 0.5  # share of the samples that are clips with things away, where there are such clips
    focus: float = 0.0  # part of the loss's weight that lies where a clip differs from its rows' mean colours
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01


@dataclass(frozen=True)
class TrainingClips:
    """The clips that a run trains on."""

    clips: LatentClips
    away: LatentClips | None = None  # clips in which things leave the view and come back
    held_out: int = 32  # clips of each set that only measure, the last ones


@dataclass(frozen=True)
class Sample:
    """A clip of T latent frames with noise. Its n denoised blocks are its blocks, the first of them several times."""

    latents: Tensor  # [16, T, h, w]
    compressed: Tensor  # [blocks, 16, T', h', w'], latents of the compressor's LR branch
    caption: str
    noise: Tensor  # [16, n * block_frames, h, w], for the denoised blocks
    history_noise: Tensor  # [16, T, h, w], for the clean passes
    sigma: Tensor  # [n], noise levels of the denoised blocks
    history_sigma: Tensor  # [blocks], noise levels of the clean passes


@dataclass(frozen=True)
class Batch:
    """B samples and the partition of their history."""

    latents: Tensor  # [B, 16, T, h, w]
    compressed: Tensor  # [B, blocks, 16, T', h', w']
    context: Tensor  # [B, L, 4096], encoded captions
    noise: Tensor  # [B, 16, n * block_frames, h, w]
    history_noise: Tensor  # [B, 16, T, h, w]
    sigma: Tensor  # [B, n]
    history_sigma: Tensor  # [B, blocks]
    history: History


class Samples:
    """Draws samples of clips by seed."""

    def __init__(self, data: TrainingClips, options: BaseOptions, block_frames: int) -> None:
        self.data = data
        self.options = options
        self.block_frames = block_frames

    def drawn(self, seed: int) -> Sample:
        """A random clip of the training set, its noise and its noise levels."""
        rng = np.random.default_rng(seed)
        held_out, away = self.data.held_out, self.data.away
        is_away = away is not None and rng.random() < self.options.away_share
        clips = away if away is not None and is_away else self.data.clips
        latents, compressed, caption = clips[int(rng.integers(len(clips) - held_out))]
        if rng.random() < self.options.open_captions:
            caption = opened(parse(caption), rng, share=1 if is_away else 0.5).caption(int(rng.random() < 0.25))
        return self._noised((latents, compressed, caption), seed, rng)

    def measured(self, number: int) -> Sample:
        """The clip of this number under its own caption; noise and levels depend on the number alone."""
        rng = np.random.default_rng(number)
        clips = self.data.clips
        # Drawn and not used: so the noise levels of a clip are the ones that earlier versions measured with.
        rng.integers(len(clips) - self.data.held_out)
        return self._noised(clips[number], number, rng)

    def measured_away(self, away: LatentClips, number: int) -> Sample:
        """A clip with things away under its open caption, with a clean history, all at one noise level."""
        rng = np.random.default_rng(number)
        latents, compressed, caption = away[number]
        caption = opened(parse(caption), rng, share=1).caption()
        sample = self._noised((latents, compressed, caption), number, rng)
        return replace(
            sample,
            sigma=torch.full_like(sample.sigma, MEMORY_LEVEL),
            history_sigma=torch.zeros_like(sample.history_sigma),
        )

    def _noised(self, clip: tuple[Tensor, Tensor, str], seed: int, rng: np.random.Generator) -> Sample:
        """A clip (latents, LR latents, caption) with noise from the seed and noise levels from the generator."""
        latents, compressed, caption = clip
        generator = torch.Generator().manual_seed(seed)
        blocks = latents.shape[1] // self.block_frames
        denoised = blocks + self.options.first_again
        frames, *rest = latents.transpose(0, 1).shape
        both = torch.randn((self.block_frames * denoised + frames, *rest), generator=generator).transpose(0, 1)
        noise, history_noise = both.split((self.block_frames * denoised, frames), dim=1)
        sigma = torch.from_numpy(noise_levels(rng, denoised, self.options.shift)).float()
        history = self.options.history_noise * rng.random(blocks) * (rng.random(blocks) >= self.options.clean_history)
        history_sigma = torch.from_numpy(history).float()
        return Sample(latents, compressed, caption, noise, history_noise, sigma, history_sigma)


def stacked(samples: Sequence[Sample], history: History, device: torch.device) -> Batch:
    """Samples as a batch; the noise levels stay on the CPU."""
    return Batch(
        latents=torch.stack([sample.latents for sample in samples]).to(device),
        compressed=torch.stack([sample.compressed for sample in samples]).to(device),
        context=encode_prompts([sample.caption for sample in samples]).to(device),
        noise=torch.stack([sample.noise for sample in samples]).to(device),
        history_noise=torch.stack([sample.history_noise for sample in samples]).to(device),
        sigma=torch.stack([sample.sigma for sample in samples]),
        history_sigma=torch.stack([sample.history_sigma for sample in samples]),
        history=history,
    )


def encode_prompts(prompts: Sequence[str]) -> Tensor:
    """Embeddings [B, L, 4096]; shorter prompts end in zeros, as Wan's do."""
    encoded = [encode_prompt(prompt)[0] for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)


def held_out(clips: LatentClips, count: int) -> range:
    """The clips of a set that are kept out of training: its last ones."""
    return range(len(clips) - count, len(clips))
