"""Devices: finding one by its name, its memory, and copies to and from it that wait as little as possible."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import PackForcingError
from .host_memory import available_memory, is_out_of_host_memory


def usable_device(name: str) -> torch.device:
    """The device of a name such as "cpu" or "cuda:0". Raises PackForcingError when it cannot be used here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown device; a device that torch was built without
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PackForcingError(f"The device '{name}' cannot be used here ({reason}): choose cpu, say.") from error


def memory_of(device: torch.device) -> int | None:
    """Bytes that this process can still use on a device: of a GPU, or of the machine; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_memory() if device.type == "cpu" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the machine's own, is used up. PyTorch has several for it."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or is_out_of_host_memory(error):
        return True
    told = str(error)  # of CUDA itself, and of its libraries for matrices and convolutions
    return isinstance(error, RuntimeError) and ("out of memory" in told or "ALLOC_FAILED" in told)


def release_unused_memory(device: torch.device) -> None:
    """Gives back what this process holds of a device's memory, and of the pinned memory for it, and does not use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if hasattr(torch, "accelerator") and hasattr(torch.accelerator, "empty_host_cache"):  # of newer versions
            torch.accelerator.empty_host_cache()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device multiplies it at least as fast as float32, and else float32.

    Without instructions for bfloat16 a CPU takes 50 to 100 times as long (docs/demo-models.md, "The VAE").
    """
    if torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Brings a tensor to a device, on the device's current stream; `dtype` converts it first.

    From the CPU to CUDA the copy goes through pinned memory: from ordinary memory, the host would wait until the device
    has finished all earlier work.
    """
    x = x if dtype is None else x.to(dtype)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def from_device(x: Tensor) -> Callable[[], Tensor]:
    """Starts to copy a tensor to the CPU. The returned function waits for this copy only, and gives it.

    Between the two calls more work can be queued, so that the device is busy while the host looks at the result.
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
