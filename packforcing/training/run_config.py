"""How long and how a run trains (`RunConfig`), and which samples a micro-batch holds (`MicroBatch`)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checks import check_between, check_choice, check_count, check_whole, shown
from ..errors import PackForcingError

DECAYS = ("cosine", "constant")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}

# These may change between a run and its continuation, since they do not change what a step computes.
FREE_OPTIONS = {
    "folder",
    "save_every",
    "keep",
    "log_every",
    "evaluate_every",
    "max_minutes",
    "micro_batch",
    "accumulate",
}


@dataclass(frozen=True)
class RunConfig:
    """How long and how a run trains, and where it writes.

    A turn has processes x `micro_batch` x `accumulate` samples.
    """

    folder: str | Path
    steps: int
    micro_batch: int = 1  # samples that go through the model at once, in each process
    accumulate: int = 1  # micro-batches whose gradients make one update
    seed: int = 0
    warmup: int = 0  # steps over which the learning rate rises from 0
    decay: str = "cosine"
    final_rate: float = 0.0  # the rate at the end of the cosine, as a part of the full one
    clip: float = 1.0  # largest norm of a learner's gradient; 0 is off
    precision: str = "float32"
    save_every: int = 100  # steps
    keep: int = 2  # checkpoints; older ones are deleted
    log_every: int = 10  # steps
    evaluate_every: int = 0  # steps; 0 is never
    max_minutes: float = 0.0  # wall clock of this process; 0 is no limit

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "accumulate", "save_every", "keep", "log_every"):
            check_whole(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise PackForcingError(f"{name} counts from 1, but is {getattr(self, name)}; give 1 or more.")
        for name in ("warmup", "evaluate_every"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)
        check_between("final_rate", self.final_rate, 0, 1)
        for name in ("clip", "max_minutes"):
            check_between(name, getattr(self, name), 0)
        check_choice("decay", self.decay, DECAYS)
        check_choice("precision", self.precision, PRECISIONS)

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0), as a part of the full one."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch's place in the run: which samples it holds."""

    step: int
    turn: str
    samples: range  # numbers within the turn: 0 to `micro_batch * accumulate * processes`
    seed: int  # the run's

    def seeds(self) -> list[int]:
        """One seed a sample; no two samples of a run share one."""
        return [_seed_of(self.seed, self.turn, self.step, sample) for sample in self.samples]

    def step_seed(self) -> int:
        """A seed that all samples of the turn share: for what a batch has in common, such as its shape."""
        return _seed_of(self.seed, self.turn, self.step, "step")

    def __len__(self) -> int:
        return len(self.samples)


def check_seed(seed: int) -> None:
    """Raises PackForcingError for a seed that PyTorch's generators do not take."""
    check_whole("seed", seed)
    if not 0 <= seed < 2**64:
        raise PackForcingError(f"seed must lie between 0 and 2^64 - 1, but it is {shown(seed)}.")


def check_ema(ema: float) -> None:
    """Raises PackForcingError for a share of a moving average that would never move, or is none; 0 is no average."""
    check_between("ema", ema, 0, 1)
    if ema == 1:
        raise PackForcingError("ema must be below 1, since an average of 1 never moves, but it is 1.")


def _seed_of(*parts: object) -> int:
    """A seed from names and numbers: the same on every machine, and unrelated to those of other parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: what torch and numpy take
