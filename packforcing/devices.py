"""Devices: by their names, their memory, and copies to and from them with as little waiting as possible."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import PackForcingError


def usable_device(name: str) -> torch.device:
    """The device of a name such as "cpu" or "cuda:0". Raises PackForcingError when it cannot be used here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch's, for an unknown device and for one it was built without
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PackForcingError(f"The device '{name}' cannot be used here ({reason}): choose cpu, say.") from error


def memory_of(device: torch.device) -> int | None:
    """Bytes that this process can still get on a device: a GPU's free memory, all of a machine's; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


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
