"""Single runs of a recall evaluation: one policy, one tour, one gap; and the results that are kept of them."""

from __future__ import annotations

import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod

import numpy as np
import torch

from ..checks import check_whole
from ..config import FrameSize, Layout, Length, block_lengths, default_temporal_stride
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..generate.sampling import Sampling
from ..generate.story import Story, Stretch
from ..model.causal_wan import CausalWan
from ..model.vae import StreamingDecoder, encode_clip
from ..pixels import to_uint8
from ..world.places import Tour, held_out_tours
from ..world.scenes import FPS
from .models import Models, Sources
from .policies import Policy
from .recall import Measures, Shown, looked_at, measure_recall, measure_selection, recall_way
from .runs import BLOCK_FRAMES, facts_of, hash_of, new_video
from .views import VIEW

RECALL_MEASUREMENT = 1  # raised whenever results of an older version of this code are no longer comparable
WORLD = Policy("world", "the drawn places through the VAE and back: what a perfect memory would score", "none")
LONGEST_GAP = 1_000_000_000  # blocks
WORLD_GAP = 1  # a place's clock stands still while it is away, so that the drawn world is the same after any gap
SHAPES = {
    "first": (3, 2, VIEW, VIEW, 3),
    "again": (2, 2, VIEW, VIEW, 3),
    "last": (3, VIEW, VIEW, 3),
    "back": (2, VIEW, VIEW, 3),
}


@dataclass(frozen=True)
class RecallSettings:
    """What is evaluated. Raises PackForcingError when that is nothing, or not possible.

    Attributes:
        gaps: blocks between the first showing of the third place and the return of the second.
        videos: how many tours; video number v has seed v.
        unsaid: whether captions name places without describing them, also the first time.
        sampling: how blocks are denoised; its seed is not used.
    """

    policies: tuple[Policy, ...]
    gaps: tuple[int, ...]
    videos: int = 8
    unsaid: bool = False
    size: FrameSize = field(default_factory=lambda: FrameSize(128, 128))
    sampling: Sampling = field(default_factory=Sampling)
    sources: Sources = field(default_factory=Sources)

    def __post_init__(self) -> None:
        for what, found in (("policy", self.policies), ("gap", self.gaps)):
            if not found:
                raise PackForcingError(f"An evaluation of recall needs at least one {what}, but none is given.")
        check_whole("--videos", self.videos)
        if self.videos < 1:
            raise PackForcingError(f"--videos must be at least 1, but it is {self.videos}.")
        for gap in self.gaps:
            check_whole("A gap", gap)
            if gap > LONGEST_GAP:
                raise PackForcingError(f"A gap can be at most {LONGEST_GAP:,} blocks, but --gaps has {gap:,}.")
            if gap < 1:
                raise PackForcingError(f"A gap must be at least 1 block, but --gaps has {gap}.")
            Length(blocks_of(gap) * BLOCK_FRAMES * 4 / FPS, FPS, BLOCK_FRAMES)  # checks that it is not too long
        if self.size.width != self.size.height:
            raise PackForcingError(
                f"With --recall frames must be square, because the drawn world is, but --size is {self.size.width}x"
                f"{self.size.height}: choose one such as 128x128."
            )
        for policy in self.policies:
            Layout(policy.config(blocks=1), self.size, default_temporal_stride(BLOCK_FRAMES))

    def runs(self) -> list[RecallRun]:
        """All runs, video by video, so that what is done at any time compares policies on the same videos."""
        return [
            RecallRun(policy, number, gap)
            for number in range(self.videos)
            for policy, gap in [(WORLD, WORLD_GAP), *((policy, gap) for gap in self.gaps for policy in self.policies)]
        ]


@dataclass(frozen=True)
class RecallRun:
    """One video to be made and measured."""

    policy: Policy
    number: int  # of the tour, and the seed
    gap: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from the other runs of an evaluation."""
        return self.policy.name, self.number, self.gap


@dataclass(frozen=True)
class RecallResult:
    """A run that is done, and the seconds that it took."""

    policy: str
    number: int
    gap: int
    fingerprint: str
    elapsed: float
    measures: Measures
    layers: dict[str, list[float]]  # measures of the selection by layer; {} without mid blocks
    shown: dict[str, str]  # the fields of `Shown`, packed

    def __post_init__(self) -> None:
        if self.shown.keys() != SHAPES.keys():
            raise ValueError("A result of recall has the pictures that were shown.")
        self.views  # noqa: B018 (raises ValueError for pictures that are damaged)

    @property
    def key(self) -> tuple[str, int, int]:
        """Its run's."""
        return self.policy, self.number, self.gap

    @property
    def views(self) -> Shown:
        """To 1/255."""
        return Shown(**{name: unpack(self.shown[name], shape) for name, shape in SHAPES.items()})


def pack(pictures: np.ndarray) -> str:
    """Pictures in [0, 1] as text, a byte a value."""
    return b64encode(zlib.compress(np.rint(pictures * 255).astype(np.uint8).tobytes())).decode()


def unpack(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The pictures that were packed, float32. Raises ValueError for what is none."""
    try:
        values = zlib.decompressobj().decompress(b64decode(text), prod(shape) + 1)  # no more, whatever it claims
    except zlib.error as error:
        raise ValueError("Pictures cannot be unpacked.") from error
    return np.frombuffer(values, np.uint8).reshape(shape).astype(np.float32) / 255


def blocks_of(gap: int) -> int:
    """Blocks of a recall story."""
    return len(recall_way(1)) - 1 + gap  # no list: a gap may be any number


@lru_cache(maxsize=4)
def _tours(count: int, way: tuple[int, ...]) -> list[Tour]:
    return held_out_tours(count, way)


def tour_of(run: RecallRun) -> Tour:
    """The run's places, on the way of its gap."""
    short = _tours(run.number + 1, recall_way(WORLD_GAP))[run.number]
    return replace(short, way=recall_way(run.gap))


def captions_of(run: RecallRun, unsaid: bool) -> list[str]:
    """The caption of each block."""
    tour = tour_of(run)
    return tour.captions([not unsaid] * len(tour.places))


def story_of_captions(captions: list[str], wan: CausalWan) -> Story:
    """A stretch for each run of blocks with one caption. Each caption is embedded once."""
    texts = {caption: wan.embed_text(encode_prompt(caption)) for caption in dict.fromkeys(captions)}
    starts = [i for i, caption in enumerate(captions) if not i or caption != captions[i - 1]]
    return Story(tuple(Stretch(i, texts[captions[i]], captions[i]) for i in starts))


def recall_fingerprint(run: RecallRun, settings: RecallSettings, models: Models) -> str:
    """What a result depends on besides its key: two runs of one key and fingerprint are the same."""
    facts = facts_of(run.policy, replace(settings.sampling, seed=run.number), settings.size, models)
    said = [*captions_of(run, settings.unsaid), *(place.scene.caption for place in tour_of(run).places)]
    if run.policy == WORLD:  # made by no transformer, and without noise
        facts = {name: facts[name] for name in ("vae", "size", "device")}
        said = captions_of(run, False)
    return hash_of({"recall": RECALL_MEASUREMENT, "captions": said, **facts})


# --- one run ----------------------------------------------------------------------------------------------------------


def make_recall(run: RecallRun, settings: RecallSettings, models: Models) -> RecallResult:
    """Makes a video and measures it. Raises PackForcingError when it cannot be made."""
    start = time.perf_counter()
    wanted, tour = looked_at(run.gap), tour_of(run)
    selection: tuple[Measures, dict[str, list[float]]] = {}, {}
    if run.policy == WORLD:
        frames = {i: block for i, block in enumerate(drawn(tour, settings.size.width, models)) if i in wanted}
    else:
        count = blocks_of(run.gap)
        story = story_of_captions(captions_of(run, settings.unsaid), models.wan)
        sampling = replace(settings.sampling, seed=run.number)
        video = new_video(run.policy, count, story, sampling, settings.size, models)
        made = video.blocks(count)
        frames = {each.index: to_uint8(each.decoded[0]).cpu().numpy() for each in made if each.index in wanted}
        selection = measure_selection(video.record, run.gap)
    measures, shown = measure_recall(frames, tour, run.gap, settings.unsaid and run.policy != WORLD)
    return RecallResult(
        run.policy.name,
        run.number,
        run.gap,
        recall_fingerprint(run, settings, models),
        time.perf_counter() - start,
        measures | selection[0],
        selection[1],
        {name: pack(getattr(shown, name)) for name in SHAPES},
    )


@torch.no_grad()
def drawn(tour: Tour, size: int, models: Models) -> Iterator[np.ndarray]:
    """The blocks of the drawn tour, encoded and decoded by the VAE: uint8 [F, size, size, 3] each."""
    vae = models.vae
    pixels = tour.pixels(block_lengths(len(tour.way), BLOCK_FRAMES), size)
    latents = encode_clip(vae, pixels[None].to(vae.device, vae.dtype))
    decoder = StreamingDecoder(vae)
    for block in latents.split(BLOCK_FRAMES, dim=2):
        yield to_uint8(decoder.decode(block)[0]).cpu().numpy()
