"""`generate` under `torchrun`: what several processes cannot do together, and what each has of its machine."""

from __future__ import annotations

import argparse

import torch

from ..devices import memory_of
from ..errors import PackForcingError
from ..generate.prepare import DeviceMemory
from ..host_memory import available_memory
from ..processes import process_count, processes_here, started_processes


def check_together(options: argparse.Namespace) -> None:
    """Raises PackForcingError for what one video by several processes cannot have."""
    if started_processes() == 1:
        return
    refused = {
        "--live": (options.live, "only one process could hear what is typed"),
        "--linear-dtype fp8_e4m3": (options.linear_dtype != "model", "PyTorch shares out plain linear layers only"),
        "--weights-device host": (
            options.weights_device != "device",
            "each has its share of the weights on its device",
        ),
        "--compile": (options.compile, "nobody has tried what the compiler makes of shared layers"),
    }
    for option, (given, reason) in refused.items():
        if given:
            raise PackForcingError(
                f"{option} does not go with one video by {started_processes()} processes, since {reason}: leave it "
                "out, or share out prompts instead (--prompts)."
            )


def own_memory(device: torch.device, held: int = 0, disk: int | None = None) -> DeviceMemory:
    """What this process can have: the machine's own memory is for all processes on it.

    Args:
        held: bytes on the device that are not counted elsewhere, for weights that are read ahead.
        disk: bytes that a file of the archive may have.
    """
    free, host = memory_of(device), available_memory()
    free = None if free is None else max(0, free - held)
    if device.type == "cpu" and free is not None:
        free //= processes_here()
    own_host = None if host is None else host // processes_here()
    return DeviceMemory(str(device), free, host=own_host, disk=disk)


def device_name(device: str) -> str:
    """What a record calls the device: of several, it has the bytes of the first."""
    return device if process_count() == 1 else f"{device}, the first of {process_count()}"
