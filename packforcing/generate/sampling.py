"""How a block is denoised: seed, number of steps, noise levels, update; and the noise that a seed means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..checks import check_choice, check_kind, check_whole
from ..config import CacheConfig
from ..errors import PackForcingError
from ..flavours import Flavour
from .schedule import TIMESTEPS, UPDATES, Schedule, Step, even_schedule, schedule_of_timesteps, sigmas, timesteps_text


@dataclass(frozen=True)
class Sampling:
    """How each block is denoised. Raises PackForcingError for a value that is out of range."""

    seed: int = 0  # 0 <= seed < 2^64
    steps: int = 4  # denoising steps a block
    shift: float = 5.0  # flow shift of the noise levels; 5 in Self-Forcing and in the paper
    update: str = "few-step"  # "few-step" for step-distilled models, "euler" for others
    schedule: Schedule | None = None  # noise levels of its own; `steps` and `shift` are not used then

    def __post_init__(self) -> None:
        check_choice("update", self.update, UPDATES)
        if self.schedule is not None:
            check_kind("schedule", self.schedule, Schedule)
        check_whole("The seed", self.seed)
        if not 0 <= self.seed < 2**64:
            raise PackForcingError(f"The seed must lie between 0 and 2^64 - 1, but it is {self.seed}.")
        sigmas(self.steps, self.shift)  # checks both

    def steps_of(self, block: int) -> list[Step]:
        """The denoising steps of a block."""
        return (self.schedule or even_schedule(self.steps, self.shift)).steps(block)

    def timesteps_of(self, block: int) -> list[float]:
        """What the model is told in each step of a block, of 1000."""
        return [TIMESTEPS * step.told for step in self.steps_of(block)]

    @property
    def more_in_first(self) -> int:
        """How many steps more than the others the video's first block takes; below 0 if fewer."""
        return len(self.steps_of(0)) - len(self.steps_of(1))


def sampling_of(flavour: Flavour, seed: int = 0) -> Sampling:
    """How a flavour was trained to sample."""
    if not flavour.timesteps:
        return Sampling(seed, flavour.steps, flavour.shift, flavour.update)
    schedule = schedule_of_timesteps(flavour.timesteps, flavour.first_timesteps, flavour.shift, flavour.warp)
    return Sampling(seed, flavour.steps, flavour.shift, flavour.update, schedule)


def departures(flavour: Flavour, sampling: Sampling, config: CacheConfig) -> list[str]:
    """What of a run differs from how its model was trained: a phrase each."""
    trained, found = sampling_of(flavour), []
    if config.block_frames != flavour.block_frames:
        found.append(f"block_frames is {config.block_frames}, and it was trained with {flavour.block_frames}")
    for block, where in ((1, ""), (0, " in the first block")):
        asked, wanted = sampling.timesteps_of(block), trained.timesteps_of(block)
        if not _alike(asked, wanted):
            found.append(
                f"the timesteps are {timesteps_text(asked)}{where}, and it was trained with {timesteps_text(wanted)}"
            )
            break
    if sampling.update != flavour.update:
        found.append(f"update is {sampling.update}, and it was trained for {flavour.update}")
    return found


def _alike(timesteps: list[float], others: list[float]) -> bool:
    """To one timestep: 937 and 937.5 are the same to a model."""
    return len(timesteps) == len(others) and all(abs(a - b) <= 1 for a, b in zip(timesteps, others, strict=True))


def noise_generator(seed: int, block: int) -> torch.Generator:
    """The source of all noise of one block. Blocks are independent of each other, and of the video's length."""
    state = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0]
    # On the CPU, so that a seed means the same on every device. Torch takes seeds below 2^63.
    return torch.Generator().manual_seed(int(state) >> 1)
