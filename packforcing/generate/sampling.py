"""How a block is denoised: seed, number of steps, noise levels, update; and the noise that a seed means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..checks import check_whole
from ..errors import PackForcingError
from .schedule import UPDATES, sigmas


@dataclass(frozen=True)
class Sampling:
    """How each block is denoised. Raises PackForcingError for a value that is out of range."""

    seed: int = 0  # 0 <= seed < 2^64
    steps: int = 4  # denoising steps a block
    shift: float = 5.0  # flow shift of the noise levels; 5 in Self-Forcing and in the paper
    update: str = "few-step"  # "few-step" for step-distilled models, "euler" for others

    def __post_init__(self) -> None:
        if self.update not in UPDATES:
            raise PackForcingError(f"update must be one of {', '.join(UPDATES)}, but it is '{self.update}'.")
        check_whole("The seed", self.seed)
        if not 0 <= self.seed < 2**64:
            raise PackForcingError(f"The seed must lie between 0 and 2^64 - 1, but it is {self.seed}.")
        sigmas(self.steps, self.shift)  # checks both

    @property
    def passes(self) -> int:
        """Model passes a block: the denoising steps and the clean pass."""
        return self.steps + 1


def noise_generator(seed: int, block: int) -> torch.Generator:
    """The source of all noise of one block. Blocks are independent of each other, and of the video's length."""
    state = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0]
    # On the CPU, so that a seed means the same on every device. Torch takes seeds below 2^63.
    return torch.Generator().manual_seed(int(state) >> 1)
