"""How long stretches of work take on the device, measured without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Measures stretches of work, and adds their seconds to dictionaries, under names.

    On CUDA a stretch lies between two events in the device's current stream. So times in which the device waits for the
    host are part of it, and its length is known only when the device has come to its end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[tuple[dict[str, float], str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stretch(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        """Times what happens inside; nothing is added when that raises."""
        if self._device.type != "cuda":
            before = time.perf_counter()
            yield
            _add(seconds, name, time.perf_counter() - before)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(self._device))
        yield
        end.record(torch.cuda.current_stream(self._device))
        self._running.append((seconds, name, start, end))

    def settle(self) -> None:
        """Waits until all stretches are over on the device, and adds them."""
        for seconds, name, start, end in self._running:
            end.synchronize()
            _add(seconds, name, start.elapsed_time(end) / 1000)
        self._running.clear()


def _add(seconds: dict[str, float], name: str, elapsed: float) -> None:
    seconds[name] = seconds.get(name, 0.0) + elapsed
