"""Time on the device's own clock, and memory as the device or the operating system counts it."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..generate.stopwatch import Stopwatch

R = TypeVar("R")

STATUS = Path("/proc/self/status")
MEMINFO = Path("/proc/meminfo")
RESET_PEAK = Path("/proc/self/clear_refs")
ENOUGH_MS = 10.0  # a measurement shorter than this is repeated until it is as long


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Milliseconds spent in named parts of the work, summed until `take`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stopwatch = Stopwatch(device)
        self._seconds: dict[str, float] = defaultdict(float)

    def part(self, name: str) -> AbstractContextManager[None]:
        return self._stopwatch.stretch(self._seconds, name)

    def timed(self, name: str, call: Callable[..., R]) -> Callable[..., R]:
        """`call`, whose time counts as the part `name`."""

        @functools.wraps(call)
        def wrapper(*arguments: Any) -> R:
            with self.part(name):
                return call(*arguments)

        return wrapper

    def take(self) -> dict[str, float]:
        """Waits for the device: milliseconds of each part since the last `take`, 0 for a part that did not run."""
        synchronise(self._device)
        self._stopwatch.settle()
        taken = defaultdict(float, {name: 1000 * seconds for name, seconds in self._seconds.items()})
        self._seconds.clear()
        return taken


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that a call takes, from an idle device until the device is idle again."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return 1000 * (time.perf_counter() - start)


def best_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of a call: the shortest of `repeats` measurements, after one call to warm up.

    The shortest stands for what the machine can do: a floor, not a typical time. Short calls are measured many at a
    time.
    """
    call()
    times = max(1, ceil(ENOUGH_MS / max(elapsed_ms(call, device), 1e-3)))

    def many() -> None:
        for _ in range(times):
            call()

    return min(elapsed_ms(many, device) for _ in range(repeats)) / times


# ---------------------------------------------------------------------- memory


def _kilobytes(file: Path, field: str) -> int | None:
    """Reads a file under /proc, with lines such as 'VmRSS:  123 kB': the bytes of one line; None without the file."""
    if not file.exists():
        return None
    lines = (line.split() for line in file.read_text().splitlines())
    return next((1024 * int(words[1]) for words in lines if words and words[0] == f"{field}:"), None)


def held_bytes(device: torch.device) -> int | None:
    """Bytes held: on CUDA the most since the last call, on the CPU resident memory now (None where not on Linux)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return _kilobytes(STATUS, "VmRSS")


def reset_peak(device: torch.device) -> None:
    """Starts a new peak of memory, which `peak_bytes` tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET_PEAK.exists():
        try:
            RESET_PEAK.write_text("5")
        except OSError:  # not allowed in some containers: the peak is then that of the whole process
            return


def peak_bytes(device: torch.device, held: Sequence[int | None]) -> int | None:
    """The peak of memory since `reset_peak`, in bytes; None where the system does not tell.

    Args:
        held: all that `held_bytes` gave since. On CUDA each of these was a peak of its own. On the CPU they were
            samples, and the system itself keeps the peak of the process.
    """
    if device.type == "cuda":
        return max(sample for sample in held if sample is not None)
    return _kilobytes(STATUS, "VmHWM")


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that can still be had; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return _kilobytes(MEMINFO, "MemAvailable") or 0
