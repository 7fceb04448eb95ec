"""How a run of `generate` can end: each end is brought about for real, and what is left is compared with a run that
nothing happened to, before and after the same command goes on."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packforcing.cli.main import main
from packforcing.cli.start import is_newer
from packforcing.errors import PackForcingError
from packforcing.files.latent_file import load_latents
from packforcing.files.state_file import VideoState
from packforcing.files.state_journal import journal_of, read_state
from packforcing.files.video import read_video
from packforcing.files.weights import read_json
from packforcing.files.writing import PART
from packforcing.model.vae import denormalise

from .disk import FailingDisk

VIDEO, STATE, LATENTS, REPORT = "out.mp4", "s.safetensors", "l.latent", "r.json"
BLOCKS = 5
SMALL = [
    "--width",
    "64",
    "--height",
    "64",
    "--block",
    "1",
    "--sink",
    "1",
    "--recent",
    "1",
    "--top-k",
    "2",
    "--steps",
    "1",
    "--update",
    "few-step",
]
KEPT = ["--save-state", STATE, "--continue-from", STATE, "--latents", LATENTS, "--report", REPORT]
STORY_FILE = "story.txt"
STORY = "0:00 a red circle\n0:00.5 a blue square\n0:01 two yellow stars\n"
SCENARIOS = {
    "prompt": ["--prompt", "a red circle"],
    "story": ["--story", STORY_FILE, "--prompt-switch", "blend"],
    "overlap": ["--prompt", "a red circle", "--overlap", "on"],
    "story, overlap, fp8": ["--story", STORY_FILE, "--overlap", "on", "--kv-dtype", "fp8_e4m3"],
}
DISK_FAULTS: dict[str, dict[str, Any]] = {
    "SIGKILL at a step": {},
    "ENOSPC once": {"error": errno.ENOSPC},
    "SIGKILL within a write": {"torn": True},
    "EIO once": {"error": errno.EIO},
    "power cut at a step": {"power": True},
    "ENOSPC from a step on": {"error": errno.ENOSPC, "lasting": True},
}
FLUSHED = 1.0  # level of 255 by which frames may differ on average where the encoder ended early
HELD_BACK = 4 + 5  # frames in the encoder, and those that wait for their fragment's end
OLDER = b"an older video"  # what lies under the video's name before


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


@dataclass(frozen=True)
class Reference:
    """The run that nothing happened to."""

    video: bytes
    frames: np.ndarray
    latents: torch.Tensor  # raw
    files: frozenset[str]
    calls: int  # that change files
    seconds: float


@dataclass
class Tally:
    """One kind of end, over all runs of it."""

    runs: int = 0
    refused: int = 0  # that said why they could not go on
    most_missing_frames: int = 0  # of the blocks that were told, in the video that a killed run left
    problems: list[str] = field(default_factory=list)


class Ends:
    """Brings about ends of one scenario's run, and looks at what is left."""

    def __init__(self, scenario: str, disk: FailingDisk, generator: random.Random, tallies: dict[str, Tally]) -> None:
        self.scenario, self.disk, self.generator, self.tallies = scenario, disk, generator, tallies
        self._number = 0
        folder = self._new_folder(older=False)
        end = self._play(folder)
        assert end.code == 0, end.told
        frames, _ = read_video(folder / VIDEO)
        files = frozenset(file.name for file in folder.iterdir())
        latents = load_latents(folder / LATENTS)
        self.reference = Reference((folder / VIDEO).read_bytes(), frames, latents, files, disk.calls, end.seconds)
        shutil.rmtree(folder)

    # --- the ends ---------------------------------------------------------------------------------------------------

    def at_steps(self, every: int, kinds: int) -> None:
        """Failures of the disk at every so many of the calls that change files, each of so many kinds.

        Kinds take turns, and begin with another one in each scenario.
        """
        names = list(DISK_FAULTS)
        first = list(SCENARIOS).index(self.scenario)
        for step in range(1 + first % every, self.reference.calls + 1, every):
            for kind in range(kinds):
                name = names[(step // every + first + kind) % len(names)]
                self._one(name, f"step {step}", at=step, **DISK_FAULTS[name])

    def by_signals(self, times: int) -> None:
        """Signals at drawn moments of the run."""
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
            for _ in range(times):
                after = self.generator.uniform(0, self.reference.seconds)
                self._one(number.name, f"after {after:.2f} s", send=(number, after))

    def on_full_disks(self, times: int) -> None:
        """A limit on the size of files; and a small tmpfs that somebody else fills, where this process may mount."""
        for _ in range(times):
            limit = int(10 ** self.generator.uniform(2.5, 5.5))
            self._one("RLIMIT_FSIZE", f"{limit} bytes", limit=limit)
            if can_mount():
                room = int(10 ** self.generator.uniform(3, 5.5))
                self._one("full tmpfs", f"{room} bytes", room=room)

    # --- one end ----------------------------------------------------------------------------------------------------

    def _one(self, kind: str, where: str, power: bool = False, room: int | None = None, **how: Any) -> None:
        tally = self.tallies.setdefault(kind, Tally())
        tally.runs += 1
        folder = self._new_folder(older=self.generator.random() < 0.5, room=room)
        try:
            end = self._play(folder, filled_to=room, **how)
            if power and end.code < 0:
                self.disk.cut_power(folder, {STORY_FILE})
            found = list(self._left(folder, end, tally, power=power))
            if room is not None:
                (folder / "filler").unlink(missing_ok=True)
            found += self._going_on(folder)
        finally:
            remove(folder, mounted=room is not None)
        tally.refused += end.code == 1
        for problem in found:
            tally.problems.append(f"{self.scenario}, {where}: {problem}")
            print(f"  {kind}, {tally.problems[-1]}", file=sys.stderr, flush=True)

    def _new_folder(self, older: bool, room: int | None = None) -> Path:
        self._number += 1
        folder = self.disk.folder / f"{os.getpid()}-{self._number}"
        folder.mkdir(parents=True)
        if room is not None:
            mount(folder)
        (folder / STORY_FILE).write_text(STORY)
        if older:
            (folder / VIDEO).write_bytes(OLDER)
        return folder

    def _play(
        self,
        folder: Path,
        send: tuple[int, float] | None = None,
        limit: int | None = None,
        filled_to: int | None = None,
        **how: Any,
    ) -> End:
        """Runs the command in a process of its own."""
        self.disk.arm(**how)
        reading, writing = os.pipe()  # holds 64 kB: more than a run says
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            in_child(folder, writing, SCENARIOS[self.scenario], limit)
        os.close(writing)
        if send is not None:
            time.sleep(send[1])
            os.kill(child, send[0])
        if filled_to is not None:
            fill(folder, filled_to)
        _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - start
        with open(reading, errors="replace") as told:
            return End(os.waitstatus_to_exitcode(status), told.read(), seconds)

    # --- what is left -----------------------------------------------------------------------------------------------

    def _left(self, folder: Path, end: End, tally: Tally, power: bool) -> Iterator[str]:
        """What a user would complain about after an end."""
        stopped = end.code in (-signal.SIGTERM, -signal.SIGHUP) and end.blocks == 0  # before anything began
        if end.code not in (0, 1, 130, -signal.SIGKILL) and not stopped:
            yield f"it ended with {end.code}: {end.told[-300:]}"
        if end.code == 1 and "error: " not in end.told:
            yield f"it failed without a sentence: {end.told[-300:]}"
        if "Traceback" in end.told:
            yield f"a traceback: {end.told[-300:]}"
        frames = 0
        if not power:  # the video reaches the disk as the system writes it
            frames = self._frames_left(folder / VIDEO, flushed=end.code == 130)
            if frames < 0:
                yield {-1: "the video has 0 bytes", -2: "the video's frames differ", -3: "the video does not play"}[
                    frames
                ]
        state = None
        try:
            state = newest_state(folder)
        except PackForcingError as error:
            yield f"the state cannot be read: {error}"
        if state is not None:
            made = denormalise(state.latents)
            if not torch.equal(made, self.reference.latents[:, :, : made.shape[2]]):
                yield "the state's latents differ"
        blocks = state.blocks if state is not None else 0
        if end.code < 0 and blocks < end.blocks:
            yield f"{end.blocks} blocks were told, and the state has {blocks}"
        if end.code < 0 and not power:
            missing = frames_of_blocks(end.blocks) - frames
            tally.most_missing_frames = max(tally.most_missing_frames, missing)
            if missing > 4 + HELD_BACK:  # and the block that was being handed over
                yield f"{end.blocks} blocks were told, and the video has {frames} frames"
        if end.code == 130 and frames != frames_of_blocks(blocks):
            yield f"it was stopped after {blocks} blocks, and the video has {frames} frames"
        if end.code >= 0:
            yield from (f"{file.name} is left" for file in folder.glob(f"*{PART}"))
        yield from self._others_left(folder)

    def _frames_left(self, path: Path, flushed: bool) -> int:
        """Frames of the video under the final name; below 0 for what must not be.

        `flushed`: the encoder was told that no frame follows, so it chose other kinds for the last ones than where more
        follow. Then they are compared to the rounding of the encoder, and not to the bit.
        """
        if not path.exists() or path.read_bytes() == OLDER:
            return 0
        if path.stat().st_size == 0:
            return -1
        try:
            frames, _ = read_video(path)
        except PackForcingError:
            return -3
        away = np.abs(frames.astype(float) - self.reference.frames[: len(frames)])
        return len(frames) if away.mean() <= (FLUSHED if flushed else 0) else -2

    def _others_left(self, folder: Path) -> Iterator[str]:
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

    def _going_on(self, folder: Path) -> Iterator[str]:
        """What differs after the same command once more, from a run that nothing happened to."""
        end = self._play(folder)
        if end.code != 0:
            yield f"the same command ended with {end.code}: {end.told[-300:]}"
            return
        if (folder / VIDEO).read_bytes() != self.reference.video:
            yield "the video differs after going on"
        if not torch.equal(load_latents(folder / LATENTS), self.reference.latents):
            yield "the latents differ after going on"
        if (files := {file.name for file in folder.iterdir()}) != self.reference.files:
            yield f"after going on there are {sorted(files ^ self.reference.files)}"


def frames_of_blocks(blocks: int) -> int:
    """Frames of a video of that many blocks of one latent frame."""
    return max(0, 4 * blocks - 3)


def newest_state(folder: Path) -> VideoState | None:
    """The state from which the same command goes on."""
    state = folder / STATE
    journal = journal_of(state)
    if is_newer(journal, state):
        return read_state(journal)
    return read_state(state) if state.exists() else None


def in_child(folder: Path, told: int, options: list[str], limit: int | None) -> None:
    """The forked process: the command, and then the end."""
    code = 70
    try:
        os.chdir(folder)
        os.dup2(told, 1)
        os.dup2(told, 2)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        length = ["--seconds", str(BLOCKS / 4), "--output", VIDEO]
        code = main(["generate", "--model", "tiny", *SMALL, *KEPT, *length, *options])
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- full disks -----------------------------------------------------------------------------------------------------


@lru_cache
def can_mount() -> bool:
    """Whether this process may mount a small file system."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder))
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def mount(folder: Path) -> None:
    """Mounts a file system of 24 MiB; below 16 MiB free, no video begins."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "faults", folder], check=True, stderr=subprocess.DEVNULL)


def fill(folder: Path, room: int) -> None:
    """Fills a file system as soon as a run has begun there, so that `room` bytes are left."""
    deadline = time.monotonic() + 60
    while not (folder / f"{VIDEO}{PART}").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    free = shutil.disk_usage(folder).free
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - room))


def remove(folder: Path, mounted: bool) -> None:
    if mounted:
        subprocess.run(["umount", folder], check=True)
    shutil.rmtree(folder)
