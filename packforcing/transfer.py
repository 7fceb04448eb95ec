"""From the CPU to a device without waiting for it."""

from __future__ import annotations

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
