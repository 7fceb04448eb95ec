"""What a run of `generate` left behind, against a run that nothing happened to: all that a user would mind."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from packforcing.cli.start import state_or_journal
from packforcing.errors import PackForcingError
from packforcing.files.latent_file import load_latents
from packforcing.files.state_file import VideoState
from packforcing.files.state_journal import read_state
from packforcing.files.video import read_video
from packforcing.files.weights import read_json
from packforcing.files.writing import PART
from packforcing.model.vae import denormalise

VIDEO, STATE, LATENTS, REPORT = "out.mp4", "s.safetensors", "l.latent", "r.json"
OLDER = b"an older video"  # what lies under the video's name before
FLUSHED_DB = 30.0  # least PSNR of a frame where the encoder ended early
B_FRAMES = 3  # most that wait for the frame after them, which is written first
HELD_BACK = 4 + 5  # frames in the encoder, and those that wait for their fragment's end
STOPPED = 130  # exit code of a run that a signal stopped


@dataclass(frozen=True)
class End:
    """How a run ended, and what it had said until then."""

    code: int  # the exit code; below 0: the signal
    told: str
    seconds: float

    @property
    def blocks(self) -> int:
        """Blocks that it told were made."""
        return max(map(int, re.findall(r"block (\d+) of", self.told)), default=0)

    @property
    def before_anything(self) -> bool:
        """Whether it was stopped before it had begun."""
        return self.code in (-signal.SIGTERM, -signal.SIGHUP) and self.blocks == 0


@dataclass(frozen=True)
class Reference:
    """The run that nothing happened to."""

    video: bytes
    frames: np.ndarray
    latents: torch.Tensor  # raw
    files: frozenset[str]
    calls: int  # that change files
    seconds: float


@dataclass(frozen=True)
class Left:
    """What an end left."""

    problems: list[str]
    missing_frames: int = 0  # of the blocks that a killed run told, in its video


def what_is_left(folder: Path, end: End, reference: Reference, power: bool = False) -> Left:
    """Looks at a folder after an end.

    Args:
        power: whether power was cut. The video is then on the disk as far as the system wrote it, and not looked at.
    """
    problems = [*badly_told(end), *others_left(folder)]
    blocks, problem = blocks_in_state(folder, reference)
    problems += problem
    killed = end.code < 0
    if killed and blocks < end.blocks:
        problems.append(f"{end.blocks} blocks were told, and the state has {blocks}")
    if not killed:
        problems += [f"{file.name} is left" for file in folder.glob(f"*{PART}") if not is_kept(file, reference)]
    if power:
        return Left(problems)
    frames, problem = frames_in_video(folder / VIDEO, reference, flushed=end.code in (1, STOPPED))
    problems += problem
    missing = frames_of_blocks(end.blocks) - frames if killed else 0
    if missing > 4 + HELD_BACK:  # and the block that was being handed over
        problems.append(f"{end.blocks} blocks were told, and the video has {frames} frames")
    if end.code == STOPPED and frames != frames_of_blocks(blocks):
        problems.append(f"it was stopped after {blocks} blocks, and the video has {frames} frames")
    return Left(problems, missing)


def is_kept(part: Path, reference: Reference) -> bool:
    """Whether a part is all there is of the video: it plays, and a disk that failed did not let it have its name."""
    frames, problems = frames_in_video(part, reference, flushed=True) if part.name == VIDEO + PART else (0, [])
    return frames > 0 and not problems and frames_in_video(part.with_name(VIDEO), reference, flushed=True)[0] == 0


def badly_told(end: End) -> Iterator[str]:
    """What is wrong with how it ended and what it said."""
    if end.code not in (0, 1, STOPPED, -signal.SIGKILL) and not end.before_anything:
        yield f"it ended with {end.code}: {end.told[-300:]}"
    if end.code == 1 and "error: " not in end.told:
        yield f"it failed without a sentence: {end.told[-300:]}"
    if "Traceback" in end.told:
        yield f"a traceback: {end.told[-300:]}"


def frames_in_video(path: Path, reference: Reference, flushed: bool) -> tuple[int, list[str]]:
    """Frames of the video under the final name, 0 if it is not there; and what is wrong with it.

    `flushed`: the encoder was told that no frame follows, so it chose other kinds for the last ones than where more
    follow. Then they are compared to the rounding of the encoder, and not to the bit. In the file of a killed run
    some of the last `B_FRAMES` frames may be missing: they refer to one after them, and are written after it.
    """
    if not path.exists() or path.read_bytes() == OLDER:
        return 0, []
    if path.stat().st_size == 0:
        return 0, ["the video has 0 bytes"]
    try:
        frames, _ = read_video(path)
    except PackForcingError:
        return 0, ["the video does not play"]
    wanted = reference.frames
    if flushed:
        same = len(frames) <= len(wanted) and all(map(alike, frames, wanted))
    else:
        whole = max(0, len(frames) - B_FRAMES)
        rest = wanted[whole : len(frames) + B_FRAMES]
        same = np.array_equal(frames[:whole], wanted[:whole]) and are_among(frames[whole:], rest)
    return len(frames), [] if same else ["the video's frames differ"]


def are_among(frames: np.ndarray, others: np.ndarray) -> bool:
    """Whether all of these frames are found among the others, in their order."""
    rest = iter(others)
    return all(any(np.array_equal(frame, other) for other in rest) for frame in frames)


def alike(frame: np.ndarray, other: np.ndarray) -> bool:
    """Whether two frames are the same picture, encoded in two ways."""
    error = np.square(frame.astype(float) - other).mean()
    return error <= 255**2 / 10 ** (FLUSHED_DB / 10)


def blocks_in_state(folder: Path, reference: Reference) -> tuple[int, list[str]]:
    """Blocks in the state, 0 if there is none; and what is wrong with it."""
    try:
        state = newest_state(folder)
    except PackForcingError as error:
        return 0, [f"the state cannot be read: {error}"]
    if state is None:
        return 0, []
    made = denormalise(state.latents)
    same = torch.equal(made, reference.latents[:, :, : made.shape[2]])
    return state.blocks, [] if same else ["the state's latents differ"]


def newest_state(folder: Path) -> VideoState | None:
    """The state from which the same command goes on."""
    path = state_or_journal(str(folder / STATE))
    return read_state(path) if path.exists() else None


def others_left(folder: Path) -> Iterator[str]:
    """Files that are neither whole nor absent."""
    readers: dict[str, Callable[[Path], object]] = {
        LATENTS: load_latents,
        REPORT: lambda path: read_json(path.read_text()),
    }
    for name, read in readers.items():
        if (folder / name).exists():
            try:
                read(folder / name)
            except (PackForcingError, OSError, ValueError) as error:
                yield f"{name} is damaged ({error})"


def after_going_on(folder: Path, end: End, reference: Reference) -> list[str]:
    """What differs after the same command once more, from a run that nothing happened to."""
    if end.code != 0:
        return [f"the same command ended with {end.code}: {end.told[-300:]}"]
    problems = []
    if (folder / VIDEO).read_bytes() != reference.video:
        problems.append("the video differs after going on")
    if not torch.equal(load_latents(folder / LATENTS), reference.latents):
        problems.append("the latents differ after going on")
    if (files := {file.name for file in folder.iterdir()}) != reference.files:
        problems.append(f"after going on there are {sorted(files ^ reference.files)}")
    return problems


def frames_of_blocks(blocks: int) -> int:
    """Frames of a video of that many blocks of one latent frame."""
    return max(0, 4 * blocks - 3)
