"""Several processes that train one model: means over them, and tensors that are spread over all of them.

Without `torchrun` there is one process, and nothing here does anything. Under FSDP the parameters are DTensors, called
shards here: each process holds a part of each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from ..processes import distributed, is_main, process_count


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gives each process the mean gradient of all. FSDP's shards have it already."""
    if not distributed():
        return
    for parameter in parameters:
        if parameter.grad is not None and not is_shard(parameter.grad):
            dist.all_reduce(parameter.grad)
            parameter.grad /= process_count()


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of all processes' values, which all must give; they are overwritten."""
    if distributed():
        dist.all_reduce(values)
        values /= process_count()
    return values


def is_shard(tensor: Tensor) -> bool:
    """Whether this is a DTensor, as FSDP's parameters are. Importing the class to ask would take a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A shard together with the other processes' parts. All processes must call it; without FSDP it does nothing."""
    return cast(Any, tensor).full_tensor() if is_shard(tensor) else tensor


def gathered(state: Any) -> Any:
    """The same nest of mappings and lists, its tensors whole and on the CPU; None for tensors outside the main one."""
    if isinstance(state, Tensor):
        tensor = whole(state.detach())
        # All processes gather; one keeps.
        return tensor.cpu() if is_main() else None
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [gathered(value) for value in state]
    return state


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, on the device of `like` and spread over the processes as it is."""
    tensor = tensor.to(like.device)
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shard = cast(Any, like)
    return distribute_tensor(tensor, shard.device_mesh, shard.placements)
