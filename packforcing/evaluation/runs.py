"""Single runs: one policy, one prompt, one seed; what is measured of each, and the file that keeps it.

A model is causal and a block's noise follows from the seed and the block's number alone, so a longer video begins with
the shorter one: one run at the longest duration measures all shorter ones, on its prefixes.

Runs are made one at a time (`LongVideo` could make several at once): mid blocks are selected for a whole batch, so
videos that are made together would choose each other's history.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np

from ..checks import check_whole, is_of
from ..config import CacheConfig, FrameSize, Layout, Length, default_temporal_stride
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..files.weights import read_json
from ..generate.long_video import LongVideo, VideoModels, VideoSettings
from ..generate.sampling import Sampling
from ..generate.story import Story
from ..model.causal_wan import TextKV
from ..pixels import to_uint8
from ..world.scenes import FPS, evaluation_prompts
from .metrics import FIRST_SECONDS, evaluate_video
from .models import Models, Sources
from .policies import Policy

MEASUREMENT = 1  # raised whenever results of an older version of this code are no longer comparable
BLOCK_FRAMES = CacheConfig().block_frames
MOST_PROMPTS = 96  # every eighth is of a landscape with one landmark, and 12 of those are held out

LATE = (
    "attribute_accuracy",
    "memory",
    "drift",
    "background_stability",
    "cleanliness",
    "saturation_drift",
    "dynamic_degree",
    "moving",
    "border_jump",
)
MEASURES = (*LATE, "revisit_similarity")

Kept = TypeVar("Kept")  # a kind of result
Measures = dict[str, float | None]  # None: not defined in this video


@dataclass(frozen=True)
class Settings:
    """What is evaluated. Raises PackForcingError when that is nothing, or not possible.

    Attributes:
        seconds: durations at which videos are measured; each run is as long as the longest.
        prompts: how many of the world's held-out captions.
        open_prompts: whether they leave colours out (`world.evaluation_prompts`).
        seeds: how many seeds, from 0.
        sampling: how blocks are denoised; its seed is not used.
    """

    policies: tuple[Policy, ...]
    seconds: tuple[float, ...]
    prompts: int = 4
    open_prompts: bool = False
    seeds: int = 1
    size: FrameSize = field(default_factory=lambda: FrameSize(128, 128))
    sampling: Sampling = field(default_factory=Sampling)
    sources: Sources = field(default_factory=Sources)

    def __post_init__(self) -> None:
        for what, found in (("policy", self.policies), ("duration", self.seconds)):
            if not found:
                raise PackForcingError(f"An evaluation needs at least one {what}, but none is given.")
        for what, count in (("prompts", self.prompts), ("seeds", self.seeds)):
            check_whole(f"An evaluation's number of {what}", count)
            if count < 1:
                raise PackForcingError(f"An evaluation needs at least one of its {what}, but {count} are asked for.")
        if self.prompts > MOST_PROMPTS:
            raise PackForcingError(
                f"There are {MOST_PROMPTS} prompts to choose from, but {self.prompts} are asked for."
            )
        names = [policy.name for policy in self.policies]
        for name in names:
            if names.count(name) > 1:
                raise PackForcingError(f"The policy '{name}' is asked for twice, once is enough.")
        for seconds in self.seconds:
            blocks(seconds)  # checks it
        for policy in self.policies:
            Layout(policy.config(blocks=1), self.size, default_temporal_stride(BLOCK_FRAMES))

    def durations(self, policy: Policy) -> tuple[float, ...]:
        """The durations at which a policy is measured; none when all are too long for it."""
        return tuple(seconds for seconds in self.seconds if seconds <= policy.longest)

    def runs(self) -> list[Run]:
        """All runs. Policies take turns, so that what is done at any time compares them on the same videos."""
        return [
            Run(policy, prompt, seed, self.durations(policy))
            for seed in range(self.seeds)
            for prompt in evaluation_prompts(self.prompts, self.open_prompts)
            for policy in self.policies
            if self.durations(policy)
        ]


@dataclass(frozen=True)
class Run:
    """One video to be made and measured."""

    policy: Policy
    prompt: str
    seed: int
    seconds: tuple[float, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the other runs of an evaluation."""
        return self.policy.name, self.prompt, self.seed


@dataclass(frozen=True)
class Result:
    """A run that is done: its measures by duration, and the seconds that it took."""

    policy: str
    prompt: str
    seed: int
    fingerprint: str
    elapsed: float
    measures: dict[str, Measures]

    def __post_init__(self) -> None:
        if not self.measures or not all(re.fullmatch(r"[0-9.e+]+", key) for key in self.measures):
            raise ValueError("A result has measures by its durations.")
        max(map(float, self.measures))  # raises ValueError for what is no number

    @property
    def key(self) -> tuple[str, str, int]:
        """Its run's."""
        return self.policy, self.prompt, self.seed

    @property
    def video_seconds(self) -> float:
        """The longest duration."""
        return max(float(key) for key in self.measures)

    def covers(self, run: Run, fingerprint: str) -> bool:
        """Whether this is the run's result, at all of its durations."""
        same = (self.key, self.fingerprint) == (run.key, fingerprint)
        return same and all(duration_key(seconds) in self.measures for seconds in run.seconds)


def duration_key(seconds: float) -> str:
    """A duration as results name it: "5", "7.5"."""
    return f"{seconds:g}"


def length(seconds: float) -> Length:
    return Length(seconds, FPS, BLOCK_FRAMES)


def blocks(seconds: float) -> int:
    """Blocks of a video. Raises PackForcingError when it is not longer than 0 s, or too long."""
    return length(seconds).blocks


def fingerprint(run: Run, settings: Settings, models: Models) -> str:
    """What a result depends on besides its policy's name, prompt and seed: two runs of one fingerprint are the same."""
    facts = facts_of(run.policy, replace(settings.sampling, seed=run.seed), settings.size, models)
    return hash_of({"measurement": MEASUREMENT, **facts})


def facts_of(policy: Policy, sampling: Sampling, size: FrameSize, models: Models) -> dict[str, Any]:
    """What a video depends on besides its prompts and its length."""
    choice = models.choice(policy.compressor)
    return {
        "model": models.digests["model"],
        "vae": models.digests["vae"],
        "compressor": models.digests["compressor"] if choice is models.trained else "",
        "stride": choice and choice.temporal_stride(BLOCK_FRAMES),
        "changes": dict(policy.changes),
        "sampling": {key: value for key, value in asdict(sampling).items() if value is not None},
        "size": asdict(size),
        "device": models.wan.device.type,
        "dtype": str(models.wan.dtype),
    }


def hash_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# --- one run ---------------------------------------------------------------------------------------------------


def make(run: Run, settings: Settings, models: Models) -> Result:
    """Makes a video and measures its prefixes. Raises PackForcingError when it cannot be made."""
    start = time.perf_counter()
    video = make_video(run, settings, models)
    measures = {duration_key(s): measure(video, run.prompt, s) for s in run.seconds}
    elapsed = time.perf_counter() - start
    return Result(run.policy.name, run.prompt, run.seed, fingerprint(run, settings, models), elapsed, measures)


def make_video(run: Run, settings: Settings, models: Models) -> np.ndarray:
    """The run's frames at its longest duration, uint8 [F, H, W, 3]."""
    count = blocks(max(run.seconds))
    text = models.wan.embed_text(encode_prompt(run.prompt))
    sampling = replace(settings.sampling, seed=run.seed)
    video = new_video(run.policy, count, text, sampling, settings.size, models)
    return np.concatenate([to_uint8(block.decoded[0]).cpu().numpy() for block in video.blocks(count)])


def new_video(
    policy: Policy, count: int, text: TextKV | Story, sampling: Sampling, size: FrameSize, models: Models
) -> LongVideo:
    """A video of `count` blocks under a policy, of which no block is made yet."""
    compressor = models.compressor(policy.compressor, BLOCK_FRAMES)
    stride = compressor.temporal_stride if compressor else default_temporal_stride(BLOCK_FRAMES)
    layout = Layout(policy.config(count), size, stride, compressor is not None and compressor.direct)
    return LongVideo(VideoModels(models.wan, models.vae, compressor), text, VideoSettings(layout, sampling, FPS))


def measure(video: np.ndarray, prompt: str, seconds: float) -> Measures:
    """Measures of a video's first `seconds` (rounded up to whole blocks), as if it ended there.

    Of its last 5 s, except for `revisit_similarity`, which is the whole's: that few seconds may show nothing again.
    """
    part = video[: length(seconds).video_frames]
    end = len(part) / FPS
    late, whole = evaluate_video(
        part, prompt, BLOCK_FRAMES, FPS, windows=[(max(0.0, end - FIRST_SECONDS), end), (0.0, end)]
    )["windows"]
    found = {name: late[name] for name in LATE} | {"revisit_similarity": whole["revisit_similarity"]}
    return {name: None if math.isnan(value) else float(value) for name, value in found.items()}


# --- the file of results ---------------------------------------------------------------------------------------


def read_results(path: Path, kind: type[Kept]) -> list[Kept]:
    """All results of a file of JSON lines; none when there is no file. A line that is none, since it was cut off or
    damaged, is passed over."""
    return list(_parsed(path.read_text(errors="replace").splitlines(), kind)) if path.is_file() else []


def _parsed(lines: Sequence[str], kind: type[Kept]) -> Iterator[Kept]:
    types = get_type_hints(kind)
    for line in lines:
        try:
            values = read_json(line)
        except ValueError:  # the process was killed while it wrote
            continue
        same = isinstance(values, dict) and values.keys() == types.keys()
        if same and all(is_of(values[name], types[name]) for name in types):
            try:
                result = kind(**values)
            except ValueError:
                continue
            yield result


def add_result(path: Path, result: Any) -> None:
    """Appends a result, a dataclass, on a line of its own even where the line before was cut off."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(asdict(result)) + "\n").encode())
