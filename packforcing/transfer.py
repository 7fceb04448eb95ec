"""From the CPU to a device without waiting for it, and back with as little waiting as there can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A CPU tensor on a device, in the order of its current stream, and in another type if one is given.

    From ordinary memory to CUDA the host would wait until the device has done all that it was asked to before; from
    pinned memory it goes on.
    """
    x = x if dtype is None else x.to(dtype)
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def from_device(x: Tensor) -> Callable[[], Tensor]:
    """Begins to read a tensor. What is returned gives it on the CPU, and waits for it alone.

    Meanwhile the device can be asked to do more, with which it is busy while the host looks at the result.
    """
    if not x.is_cuda:
        return lambda: x
    copy = x.to("cpu", non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(x.device))

    def read() -> Tensor:
        there.synchronize()
        return copy

    return read
