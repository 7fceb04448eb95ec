"""What a micro-batch of `train base` holds: clips, their captions, and noise at drawn levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..checks import check_between, check_count
from ..errors import PackForcingError
from ..generate.schedule import check_shift
from ..world.captions import opened, parse
from ..world.places import MOST_PLACES, NAMES, sample_way, showings, telling_name, tour_captions
from .blocks import noise_levels
from .clips import ClipCaptions, LatentClips
from .histories import History
from .prompts import Prompts, encoded
from .run_config import check_ema

SHARES = (
    "history_noise",
    "clean_history",
    "open_captions",
    "away_share",
    "focus",
    "place_share",
    "described",
    "composed",
    "telling_names",
    "pure_noise",
    "dual_share",
    "switch_share",
)
SWITCH_BLOCK = 2  # where the prompt of a measured clip changes
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
    place_share: float = 0.65  # share of the samples that are tours through places, where there are such clips
    described: float = 0.5  # share of the places that the caption of their first stretch describes
    composed: float = 0.0  # share of the tours that are put together from blocks of clips, where blocks often stay
    telling_names: float = 0.0  # share of these whose names tell the places' colours
    pure_noise: float = 0.0  # share of the blocks of tours and changes at noise level 1: only the caption tells them
    switch_share: float = 0.25  # share of the samples whose prompt changes on the way, where there are twins
    least_returns: int = 1  # tours with fewer blocks that show a place again are left out
    dual_share: float = 0.7  # share of the micro-batches whose mid blocks have the HR branch, where one is trained
    whole_steps: int = 0  # first steps of a run on places that see the whole history
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in SHARES:
            check_between(name, getattr(self, name), 0, 1)
        check_ema(self.ema)
        check_shift(self.shift)
        for name in ("rate", "weight_decay"):
            check_between(name, getattr(self, name), 0)
        for name in ("first_again", "least_returns", "whole_steps"):
            check_count(name, getattr(self, name))


# Those that mean nothing without tours.
PLACE_OPTIONS = (
    "place_share",
    "described",
    "composed",
    "telling_names",
    "pure_noise",
    "least_returns",
    "whole_steps",
)
HR_OPTIONS = ("dual_share",)  # and those without an HR branch
SWITCH_OPTIONS = ("switch_share",)  # and those without twins


@dataclass(frozen=True)
class TrainingClips:
    """The clips that a run trains on."""

    clips: LatentClips
    away: LatentClips | None = None  # clips in which things leave the view and come back
    held_out: int = 32  # clips of each set that only measure, the last ones
    places: LatentClips | None = None  # tours through places
    twins: LatentClips | None = None  # of the first of `clips`, number by number


@dataclass(frozen=True)
class Sample:
    """A clip of T latent frames with noise. Its n denoised blocks are its blocks, the first of them several times."""

    latents: Tensor  # [16, T, h, w]
    compressed: Tensor  # [blocks, 16, T', h', w'], latents of the compressor's LR branch
    captions: tuple[str, ...]  # one a block, or one for all
    clean_captions: tuple[str, ...]  # of the clean passes, in the same form
    noise: Tensor  # [16, n * block_frames, h, w], for the denoised blocks
    history_noise: Tensor  # [16, T, h, w], for the clean passes
    sigma: Tensor  # [n], noise levels of the denoised blocks
    history_sigma: Tensor  # [blocks], noise levels of the clean passes


@dataclass(frozen=True)
class Batch:
    """B samples and the partition of their history."""

    latents: Tensor  # [B, 16, T, h, w]
    compressed: Tensor  # [B, blocks, 16, T', h', w']
    prompts: Prompts  # of each block, or of one for all of them
    clean_prompts: Prompts  # of the clean passes
    noise: Tensor  # [B, 16, n * block_frames, h, w]
    history_noise: Tensor  # [B, 16, T, h, w]
    sigma: Tensor  # [B, n]
    history_sigma: Tensor  # [B, blocks]
    history: History
    dual: bool = False  # whether mid blocks have the HR branch too


class Samples:
    """Draws samples of clips by seed."""

    def __init__(self, data: TrainingClips, options: BaseOptions, block_frames: int) -> None:
        self.data = data
        self.options = options
        self.block_frames = block_frames
        self._tours = self._chosen_tours()
        self._check_composed()

    def _check_composed(self) -> None:
        """Raises PackForcingError when the clips are too few, or too alike, to put tours together from."""
        options, clips = self.options, self.data.clips
        if self.data.places is None or not options.composed:
            return
        training = clips.captions[: len(clips) - self.data.held_out]
        what, found = "clips", len(training)
        if options.telling_names:
            what, found = "telling names", len({telling_name(parse(words.short[0])) for words in training})
        if found < MOST_PLACES:
            raise PackForcingError(
                f"A tour is put together from {MOST_PLACES} clips that are told apart, but there are {found} {what} to "
                "choose from: ask for more --clips, or for no --composed."
            )

    def _chosen_tours(self) -> list[int]:
        """Numbers of the tours to train on. Raises PackForcingError when none has as many returns as asked for."""
        places, least = self.data.places, self.options.least_returns
        if places is None:
            return []
        training = range(len(places) - self.data.held_out)
        chosen = [number for number in training if showings(places.captions[number].short).count("return") >= least]
        if not chosen:
            raise PackForcingError(
                f"No tour has {least} blocks that show a place again, as --least-returns asks for: ask for fewer, or "
                "for longer clips."
            )
        return chosen

    def drawn(self, seed: int) -> Sample:
        """A random clip of the training set, its noise and its noise levels."""
        rng = np.random.default_rng(seed)
        held_out, away, places, twins = self.data.held_out, self.data.away, self.data.places, self.data.twins
        if twins is not None and rng.random() < self.options.switch_share:
            number, cut = int(rng.integers(len(twins) - held_out)), int(rng.integers(1, self.data.clips.clips.blocks))
            pair = (self.data.clips[number], twins[number])
            before, after = pair if rng.random() < 0.5 else pair[::-1]
            sample = self._often_pure(self._noised(switched(before, after, cut), seed, rng), rng)
            return refreshed(sample, cut) if rng.random() < 0.5 else sample
        if places is not None and rng.random() < self.options.place_share:
            if rng.random() < self.options.composed:
                telling = rng.random() < self.options.telling_names
                latents, compressed, words = composed_tour(
                    self.data.clips, len(self.data.clips) - held_out, rng, telling
                )
            else:
                latents, compressed, words = places[self._tours[rng.integers(len(self._tours))]]
            return self._often_pure(
                self._noised((latents, compressed, self._some_described(words, rng)), seed, rng), rng
            )
        is_away = away is not None and rng.random() < self.options.away_share
        clips = away if away is not None and is_away else self.data.clips
        latents, compressed, words = clips[int(rng.integers(len(clips) - held_out))]
        caption = words.short[0]
        if rng.random() < self.options.open_captions:
            caption = opened(parse(caption), rng, share=1 if is_away else 0.5).caption(int(rng.random() < 0.25))
        return self._noised((latents, compressed, (caption,)), seed, rng)

    def _often_pure(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with a share of its denoised blocks at noise level 1."""
        pure = torch.from_numpy(rng.random(len(sample.sigma)) < self.options.pure_noise)
        return replace(sample, sigma=sample.sigma.masked_fill(pure, 1.0))

    def _some_described(self, words: ClipCaptions, rng: np.random.Generator) -> tuple[str, ...]:
        """Captions of a tour in which some places are described the first time."""
        chosen = {name: rng.random() < self.options.described for name in dict.fromkeys(words.short)}
        pairs = zip(words.short, words.long, strict=True)
        return tuple(long if chosen[short] else short for short, long in pairs)

    def measured(self, number: int) -> Sample:
        """The clip of this number under its own caption; noise and levels depend on the number alone."""
        rng = np.random.default_rng(number)
        clips = self.data.clips
        # Drawn and not used: so the noise levels of a clip are the ones that earlier versions measured with.
        rng.integers(len(clips) - self.data.held_out)
        latents, compressed, words = clips[number]
        return self._noised((latents, compressed, words.short[:1]), number, rng)

    def measured_away(self, away: LatentClips, number: int) -> Sample:
        """A clip with things away under its open caption, with a clean history, all at one noise level."""
        rng = np.random.default_rng(number)
        latents, compressed, words = away[number]
        caption = opened(parse(words.short[0]), rng, share=1).caption()
        return at_one_level(self._noised((latents, compressed, (caption,)), number, rng))

    def measured_places(self, places: LatentClips, number: int) -> Sample:
        """A tour whose captions say nothing but names, with a clean history, all of it pure noise.

        Below that, the noisy block itself tells which place it shows, and what is found by its looks needs no name.
        """
        latents, compressed, words = places[number]
        sample = self._noised((latents, compressed, words.short), number, np.random.default_rng(number))
        return at_one_level(sample, level=1.0)

    def measured_switch(self, number: int, refresh: bool) -> Sample:
        """A clip whose prompt changes at block SWITCH_BLOCK, with a clean history, all of it pure noise."""
        assert self.data.twins is not None, "only a trainer with twins asks for it"
        both = switched(self.data.clips[number], self.data.twins[number], SWITCH_BLOCK)
        sample = at_one_level(self._noised(both, number, np.random.default_rng(number)), level=1.0)
        return refreshed(sample, SWITCH_BLOCK) if refresh else sample

    def _noised(self, clip: tuple[Tensor, Tensor, tuple[str, ...]], seed: int, rng: np.random.Generator) -> Sample:
        """A clip (latents, LR latents, captions) with noise from the seed and noise levels from the generator."""
        latents, compressed, captions = clip
        generator = torch.Generator().manual_seed(seed)
        blocks = latents.shape[1] // self.block_frames
        denoised = blocks + self.options.first_again
        frames, *rest = latents.transpose(0, 1).shape
        both = torch.randn((self.block_frames * denoised + frames, *rest), generator=generator).transpose(0, 1)
        noise, history_noise = both.split((self.block_frames * denoised, frames), dim=1)
        sigma = torch.from_numpy(noise_levels(rng, denoised, self.options.shift)).float()
        history = self.options.history_noise * rng.random(blocks) * (rng.random(blocks) >= self.options.clean_history)
        history_sigma = torch.from_numpy(history).float()
        return Sample(latents, compressed, captions, captions, noise, history_noise, sigma, history_sigma)


def switched(
    before: tuple[Tensor, Tensor, ClipCaptions], after: tuple[Tensor, Tensor, ClipCaptions], cut: int
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """A clip (latents, LR latents, captions) that is `before` up to block `cut`, and `after` from there on."""
    (first, first_small, asked), (second, second_small, then) = before, after
    frames = cut * first.shape[1] // len(first_small)
    return (
        torch.cat([first[:, :frames], second[:, frames:]], dim=1),
        torch.cat([first_small[:cut], second_small[cut:]]),
        (*asked.short[:cut], *then.short[cut:]),
    )


def refreshed(sample: Sample, cut: int) -> Sample:
    """The sample as where the recent block is refreshed at a change of the prompt before block `cut`."""
    said = sample.clean_captions
    return replace(sample, clean_captions=(*said[: cut - 1], said[cut], *said[cut:]))


def at_one_level(sample: Sample, level: float = MEMORY_LEVEL) -> Sample:
    """The sample with all denoised blocks at one noise level, and a clean history."""
    return replace(
        sample,
        sigma=torch.full_like(sample.sigma, level),
        history_sigma=torch.zeros_like(sample.history_sigma),
    )


def composed_tour(
    clips: LatentClips, count: int, rng: np.random.Generator, telling: bool = False
) -> tuple[Tensor, Tensor, ClipCaptions]:
    """A tour through the first `count` clips, put together from their blocks; like an item of `LatentClips`.

    In half of the blocks the place stays. So neither "another one than before" nor "the one that is left" tells which
    place comes next, and its name must be read. Only the first block is a clip's first one, which the VAE encodes in
    another way. The latents of a cut are those of uncut clips.

    Names are drawn anew each time, or (`telling`) tell the places' colours.
    """
    blocks = clips.clips.blocks
    way = sample_way(rng, blocks, stay=0.5)
    while True:
        shown = [clips[int(number)] for number in rng.choice(count, max(way) + 1, replace=False)]
        names = rng.permutation(NAMES)[: len(shown)].tolist()
        if telling:
            names = [telling_name(parse(words.short[0])) for _, _, words in shown]
        if len(set(names)) == len(names):
            break
    following = [int(place != way[0]) for place in range(len(shown))]  # the clip's block that is shown next
    latents, compressed = [], []
    for place in way:
        i, (own, small, _) = following[place], shown[place]
        following[place] += 1
        latents.append(own.unflatten(1, (blocks, -1))[:, i])
        compressed.append(small[i])
    descriptions = [words.short[0] for _, _, words in shown]
    several = (tour_captions(names, said, way) for said in (len(names) * [""], descriptions))
    return torch.cat(latents, dim=1), torch.stack(compressed), ClipCaptions(*map(tuple, several))


def stacked(samples: Sequence[Sample], history: History, device: torch.device, dual: bool = False) -> Batch:
    """Samples as a batch; the noise levels stay on the CPU."""
    captions = [sample.captions for sample in samples]
    clean_captions = [sample.clean_captions for sample in samples]
    prompts = encoded(captions, device)
    return Batch(
        latents=torch.stack([sample.latents for sample in samples]).to(device),
        compressed=torch.stack([sample.compressed for sample in samples]).to(device),
        prompts=prompts,
        clean_prompts=prompts if clean_captions == captions else encoded(clean_captions, device),
        noise=torch.stack([sample.noise for sample in samples]).to(device),
        history_noise=torch.stack([sample.history_noise for sample in samples]).to(device),
        sigma=torch.stack([sample.sigma for sample in samples]),
        history_sigma=torch.stack([sample.history_sigma for sample in samples]),
        history=history,
        dual=dual,
    )


def held_out(clips: LatentClips, count: int) -> range:
    """The clips of a set that are kept out of training: its last ones."""
    return range(len(clips) - count, len(clips))
