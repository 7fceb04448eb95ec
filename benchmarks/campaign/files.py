"""Damaged files: each is read in a process that may be killed, and ends in success or in the library's own error."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from packforcing.errors import PackForcingError

from .damage import CANARY, damaged
from .kinds import KINDS, Kind

LONGEST = 5.0  # seconds of the processor; as many of the clock would depend on what else the machine does
MOST_MEMORY = 512 * 2**20  # bytes beyond what the process had before
LIMIT = 6 * 2**30  # bytes of data after which an allocation fails


@dataclass
class Damage:
    """All damaged files of one kind."""

    files: int = 0
    read: int = 0  # that were read all the same
    refused: int = 0  # with one sentence
    longest_seconds: float = 0.0
    most_bytes: int = 0
    problems: dict[str, int] = field(default_factory=dict)  # what happened -> how often
    examples: dict[str, int] = field(default_factory=dict)  # what happened -> the number of one such file

    def add(self, number: int, outcome: str, seconds: float, memory: int) -> None:
        self.files += 1
        self.read += outcome == "read"
        self.refused += outcome == "refused"
        self.longest_seconds = max(self.longest_seconds, seconds)
        self.most_bytes = max(self.most_bytes, memory)
        if outcome not in ("read", "refused"):
            self.problems[outcome] = self.problems.get(outcome, 0) + 1
            self.examples.setdefault(outcome, number)


def campaign(count: int, seed: int, kinds: tuple[Kind, ...] = KINDS) -> dict[str, Damage]:
    """Damages `count` files in all, as many of each kind."""
    found = {}
    for number, kind in enumerate(kinds):
        share = (count + number) // len(kinds)
        found[kind.name] = damage_of(kind, share, seed)
        print(f"files, {kind.name}: {share}, problems {dict(found[kind.name].problems)}", file=sys.stderr, flush=True)
    return found


def damage_of(kind: Kind, count: int, seed: int, first: int = 0) -> Damage:
    """Damages files of one kind."""
    found = Damage()
    with tempfile.TemporaryDirectory(prefix="faults-") as base:
        path = Path(base) / "whole" / kind.file
        path.parent.mkdir(parents=True)
        kind.write(path)
        kind.read(path)  # the whole one is read
        number = first
        while number < first + count:
            number += _in_one_process(kind, Path(base), seed, number, first + count, found)
    return found


def _in_one_process(kind: Kind, base: Path, seed: int, first: int, last: int, found: Damage) -> int:
    """Reads damaged files in a child until that is done or dies; returns how many."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _child(kind, base, seed, range(first, last), writing)
        finally:
            os._exit(0)
    os.close(writing)
    done = 0
    with open(reading) as lines:
        for line in lines:
            found.add(first + done, *json.loads(line))
            done += 1
    _, status = os.waitpid(child, 0)
    if first + done < last:  # it died at the next one
        code = os.waitstatus_to_exitcode(status)
        slow = code == -signal.SIGPROF
        found.add(first + done, "took too long" if slow else f"the process ended with {code}", LONGEST * slow, 0)
        done += 1
    return done


def _child(kind: Kind, base: Path, seed: int, numbers: range, writing: int) -> None:
    """The forked process: one line of JSON for each file."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    faulthandler.disable()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    content = (base / "whole" / kind.file).read_bytes()
    with open(writing, "w") as lines:
        for number in numbers:
            folder = base / "damaged"
            shutil.rmtree(folder, ignore_errors=True)  # of a process that died
            shutil.copytree(base / "whole", folder)
            os.chdir(folder)
            (folder / kind.file).write_bytes(damaged(content, kind.form, random.Random(f"{seed} {kind.name} {number}")))
            before, start = _most_held(), time.process_time()
            signal.setitimer(signal.ITIMER_PROF, LONGEST)
            outcome = outcome_of(kind, folder / kind.file)
            signal.setitimer(signal.ITIMER_PROF, 0)
            memory = _most_held() - before
            if (folder / CANARY).exists():
                outcome = "RAN CODE"
            elif memory > MOST_MEMORY:
                outcome = f"took more than {MOST_MEMORY >> 20} MB"
            lines.write(json.dumps([outcome, time.process_time() - start, memory]) + "\n")
            lines.flush()
            os.chdir(base)


def _most_held() -> int:
    """Most resident bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcome_of(kind: Kind, path: Path) -> str:
    """Reads a file: "read", "refused", or what happened instead, and where."""
    try:
        kind.read(path)
    except PackForcingError as error:
        text = str(error)
        return "refused" if "\n" not in text and len(text) < 1500 else f"a long message: {text[:80]!r}"
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "packforcing" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} at {where}: {str(error)[:60]}"
    return "read"
