"""An allocator that fails when it is told to, for tests."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def device_error() -> Exception:
    """What PyTorch raises when a GPU's memory is used up, in several lines."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


def host_error() -> Exception:
    """What it raises when the machine's is: the real thing, by asking for a petabyte."""
    try:
        torch.empty(10**15, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has a petabyte of memory")


class FailingMemory(TorchDispatchMode):
    """Counts what allocates memory, and lets some of it fail before it is done.

    Args:
        failing: numbers of the allocations that fail, from 0.
    """

    def __init__(self, failing: range | set[int] = range(0), error: Any = device_error) -> None:
        super().__init__()
        self.count = 0
        self.failing = failing
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if allocates(func):
            self.count += 1
            if self.count - 1 in self.failing:
                raise self.error()
        return func(*args, **(kwargs or {}))


def allocates(func: Any) -> bool:
    """Whether an operation gives a new tensor: neither a view, nor one that it was given."""
    schema = func._schema
    new = any(each.alias_info is None and "Tensor" in str(each.type) for each in schema.returns)
    return new and not schema.is_mutable


def fail_passes(monkeypatch: pytest.MonkeyPatch, wan: type) -> Callable[[range], None]:
    """Gives what lets the device's memory run out in some of a transformer's denoising passes to come, by number."""
    whole = wan.denoise

    def at(passes: range) -> None:
        count = itertools.count()

        def denoise(self: Any, *inputs: Any) -> Tensor:
            if next(count) in passes:
                raise device_error()
            return whole(self, *inputs)

        monkeypatch.setattr(wan, "denoise", denoise)

    return at


def held_bytes() -> int:
    """Bytes of all tensors there are, each storage once. Those of meta and fake tensors are none."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]  # asks no object for its class
    storages = [each.untyped_storage() for each in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages if storage.device.type != "meta"}.values())
