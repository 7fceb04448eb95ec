"""Many runs in several processes, each of which loads the models once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Protocol, TypeVar

import torch

from ..errors import PackForcingError
from .models import Models, Sources, load


class HasSources(Protocol):
    """Settings that say which models are run."""

    @property
    def sources(self) -> Sources: ...


R = TypeVar("R")  # a run
S = TypeVar("S", bound=HasSources)
D = TypeVar("D")  # what is made of a run
Make = Callable[[R, S, Models], D]


@lru_cache(maxsize=1)
def _loaded(sources: Sources) -> Models:
    """The models of a worker process, which lives as long as one evaluation."""
    return load(sources)


def start_worker(threads: int) -> None:
    """What a worker process begins with."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes, and the first one tells of it
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """End this process when its parent is gone: a parent that is killed cannot tell it to, and nobody reads on."""
    parent.join()
    os._exit(1)


def _in_worker(make: Make[R, S, D], one: R, settings: S) -> D:
    return make(one, settings, _loaded(settings.sources))


def made(make: Make[R, S, D], runs: Sequence[R], settings: S, models: Models, jobs: int, threads: int) -> Iterator[D]:
    """Results as they come, from this process or from several others. Raises PackForcingError when one dies.

    `make` is a function of a module, so that other processes find it.
    """
    if jobs == 1:
        torch.set_num_threads(threads)
        yield from (make(one, settings, models) for one in runs)
        return
    context = get_context("spawn")  # a forked process cannot use CUDA, nor count on torch's threads
    with ProcessPoolExecutor(jobs, context, start_worker, (threads,)) as pool:
        try:
            for future in as_completed([pool.submit(_in_worker, make, one, settings) for one in runs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise PackForcingError(
                "One of the processes that make videos died, perhaps for want of memory: finished runs are kept, so "
                "start again with fewer --jobs."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after a mistake, what has not begun never does
