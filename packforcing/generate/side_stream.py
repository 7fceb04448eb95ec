"""Work beside the main work: in its own thread, and on a CUDA device in its own stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

R = TypeVar("R")

CHOICES = ("auto", "on", "off")  # whether decoding should run beside denoising


def overlap_wanted(choice: str, device: torch.device) -> bool:
    """Whether one of CHOICES means yes on a device.

    "auto" means no on a CPU: one piece of work keeps all cores busy, and two at once took 1.1 times as long
    (docs/performance.md).
    """
    return choice == "on" or (choice == "auto" and device.type == "cuda")


class SideStream:
    """Runs calls one after another, while the caller goes on with other work.

    What a call reads must be finished on the device when the call is submitted. The thread ends with the object.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packforcing-side")

    def submit(self, call: Callable[[], R]) -> Future[tuple[R, float]]:
        """Runs `call` without gradients. The future holds its result and the seconds that it took, and is done when the
        device has finished too."""
        return self._thread.submit(self._run, call, torch.is_inference_mode_enabled())

    def _run(self, call: Callable[[], R], inference: bool) -> tuple[R, float]:
        start = time.perf_counter()
        with torch.inference_mode(inference), torch.no_grad():  # each thread has these for itself
            if self._stream is None:
                result = call()
            else:
                with torch.cuda.stream(self._stream):
                    result = call()
                self._stream.synchronize()
        return result, time.perf_counter() - start
