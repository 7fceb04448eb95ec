"""Several processes of one command, as `torchrun` starts them: which one this is, and how they agree.

Without `torchrun`, and with one process, nothing here does anything. Processes that are not joined (`joined`) work side
by side and know nothing of each other but their numbers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from . import telling
from .errors import PackForcingError

T = TypeVar("T")

SLOWEST = timedelta(hours=2)  # that one process may be behind the others before they give up
FOR_EVER = timedelta(days=365)
PATIENCE = timedelta(seconds=20)  # with a main process that still writes after a failure; `torchrun` has 30
# Keys of what `torchrun` keeps for its processes.
FAILED, MAIN_LEFT, AGREED = "packforcing/failed", "packforcing/main-left", "packforcing/agreed"


# --- what `torchrun` says ---------------------------------------------------------------------------------------------


def started_processes() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0))


def processes_here() -> int:
    """How many of them run on this machine, and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def take_device(name: str) -> str:
    """Takes the device of this process: of "cuda" the GPU with the process's number on its machine.

    Raises PackForcingError when there are fewer GPUs than processes, or when all processes would take one of them.
    """
    if started_processes() == 1 or name == "cpu":
        return name
    if not name.startswith("cuda"):
        raise PackForcingError(f"Several processes run on CUDA devices or on the CPU, but --device is {name}.")
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if name != "cuda":
        raise PackForcingError(f"Each process has a GPU of its own, but --device is {name}: leave it at cuda.")
    if number >= gpus:
        raise PackForcingError(
            f"Each process needs a GPU of its own, but this machine has {gpus}: start at most {gpus} by "
            "torchrun --nproc-per-node."
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


# --- processes that work on one thing ---------------------------------------------------------------------------------


def distributed() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized()


def process_count() -> int:
    return dist.get_world_size() if distributed() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if distributed() else 0


def is_main() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    if distributed():
        dist.barrier()


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set in any process. All must ask, since they have to leave the loop together."""
    if not distributed():
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0


class SaidByAll(PackForcingError):
    """A mistake that all processes know of: the main one tells it."""


def in_all(call: Callable[[], T]) -> T:
    """What a call gives, once all processes have made it. Where one raises PackForcingError, all do, in its words."""
    if not distributed():
        return call()
    result, error = _attempt(call)
    errors: list[str | None] = [None] * process_count()
    dist.all_gather_object(errors, error)
    for number, each in enumerate(errors):
        if each is not None:
            raise SaidByAll(each if errors[0] == each else f"Process {number} of {process_count()}: {each}")
    return cast(T, result)


def from_main(call: Callable[[], T]) -> T:
    """What a call of the main process gives, in all of them; its PackForcingError as well."""
    if not distributed():
        return call()
    box: list[tuple[T | None, str | None] | None] = [_attempt(call) if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    result, error = box[0]
    if error is not None:
        raise SaidByAll(error)
    return cast(T, result)


def _attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return call(), None
    except PackForcingError as error:
        return None, str(error)


def check_same(what: str, value: object) -> None:
    """Raises PackForcingError in all processes when a value is not the same in all; `what` names it in a message."""
    if not distributed():
        return
    values: list[object] = [None] * process_count()
    dist.all_gather_object(values, value)
    other = next((number for number, each in enumerate(values) if each != values[0]), None)
    if other is not None:
        raise SaidByAll(
            f"The processes must make one and the same video, but process {other} of {len(values)} has other {what} "
            "than process 0: give all machines the same files and options."
        )


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Lets the processes that `torchrun` started work together until the body ends.

    On GPUs, tensors go by NCCL; what the hosts agree on, and tensors of a CPU, go by gloo. Of what goes wrong, one
    process tells: the first to find it. The others end without a word, and the main one before that writes what it has.
    """
    if started_processes() == 1:
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    by_nccl = device.startswith("cuda") and torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if by_nccl else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("packforcing", store), rank=number, world_size=count, timeout=SLOWEST
    )
    telling.mute(number > 0)
    try:
        yield
    except (SaidByAll, KeyboardInterrupt):  # in all processes at once
        store.add(FAILED, 1)
        raise
    except Exception as error:
        if store.add(FAILED, 1) > 1:
            raise SystemExit(1) from None
        telling.mute(False)
        if isinstance(error, RuntimeError) and _says_another_ended(error):
            raise PackForcingError(
                f"Another of the {count} processes ended, so this video cannot go on (what was finished is kept): look "
                "at what the other one said, or start again with fewer processes."
            ) from error
        raise
    finally:
        dist.destroy_process_group()  # the others now get an error where they would have waited for this one
        _leave(store, number)


def _leave(store: dist.Store, number: int) -> None:
    """Lets the main process write what it has, and tell: `torchrun` ends all that are left when one has failed."""
    if number == 0:
        store.set(MAIN_LEFT, "")
    elif store.add(FAILED, 0):
        with suppress(dist.DistError, RuntimeError):  # it takes longer, or it was ended
            store.wait([MAIN_LEFT], PATIENCE)
            time.sleep(1)


def _says_another_ended(error: RuntimeError) -> bool:
    """Whether an error comes from the connection to the other processes."""
    told = str(error)
    return isinstance(error, dist.DistError) or "gloo" in told or "Connection closed" in told or "NCCL" in told


# --- processes side by side -------------------------------------------------------------------------------------------


FromFirst = Callable[[list[int]], list[int]]
"""What the first process says, in all of them; each gives what it would say itself."""


def side_by_side(work: Callable[[FromFirst], T]) -> list[T]:
    """What every process's work gave, for the main one once all have done it; for the others nothing.

    They need not be as fast as each other. So what they go by must not change while the first ones are at work already:
    `work` gets a function by which all go by what the first process found. What the work gives must be made of plain
    values, as JSON has them. Of an error that ends the work one process tells, and the others end with it.
    """
    if started_processes() == 1:
        return [work(lambda own: own)]
    store, number, count = next(dist.rendezvous("env://"))

    def from_first(own: list[int]) -> list[int]:
        if number == 0:
            store.set(AGREED, json.dumps(own))
        store.wait([AGREED], FOR_EVER)
        return cast(list[int], json.loads(store.get(AGREED)))

    try:
        own = work(from_first)
    except Exception:
        if store.add(FAILED, 1) > 1:
            raise SystemExit(1) from None
        raise
    keys = [f"packforcing/work-{each}" for each in range(count)]
    store.set(keys[number], json.dumps(own))
    if number:
        return []
    store.wait(keys, FOR_EVER)
    return [json.loads(store.get(key)) for key in keys]
