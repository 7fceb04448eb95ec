"""How a run of `generate` can end: each end is brought about for real, and what is left is compared with a run that
nothing happened to, before and after the same command goes on."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from small_options import SMALL_VIDEO

from packforcing.cli.main import main
from packforcing.files.latent_file import load_latents
from packforcing.files.video import read_video
from packforcing.files.writing import PART

from .disk import FailingDisk
from .left import LATENTS, OLDER, REPORT, STATE, VIDEO, End, Reference, after_going_on, what_is_left

BLOCKS = 5
SMALL = [*SMALL_VIDEO, "--steps", "1", "--update", "few-step"]
KEPT = ["--save-state", STATE, "--continue-from", STATE, "--latents", LATENTS, "--report", REPORT]
STORY_FILE = "story.txt"
STORY = "0:00 a red circle\n0:00.3 a blue square\n0:00.7 two yellow stars\n"
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
            left = what_is_left(folder, end, self.reference, power)
            tally.most_missing_frames = max(tally.most_missing_frames, left.missing_frames)
            found = left.problems
            if room is not None:
                (folder / "filler").unlink(missing_ok=True)
            found += after_going_on(folder, self._play(folder), self.reference)
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
