"""Noise levels of the denoising steps, and the two updates that walk down them (docs/method.md, section 2).

Flow matching: x_sigma = (1 - sigma) x0 + sigma noise, and the model predicts the velocity v = noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_between, check_number, check_whole, shown
from ..errors import PackForcingError

UPDATES = ("few-step", "euler")
TIMESTEPS = 1000  # a model was trained on as many noise levels
SMALLEST_SHIFT, LARGEST_SHIFT = 1e-6, 1e6  # beyond, all levels are 0 or 1 to rounding
MOST_STEPS = TIMESTEPS


class Level(NamedTuple):
    """A noise level that a step starts from."""

    sigma: float  # the share of noise in x, in (0, 1]
    told: float  # what the model is told, a timestep / 1000: sigma, or a value beside it


class Step(NamedTuple):
    """One denoising step: from a level down to `next_sigma`, which is 0 in a block's last step."""

    sigma: float
    told: float
    next_sigma: float


@dataclass(frozen=True)
class Schedule:
    """The noise levels of each block's steps, falling. Raises PackForcingError when they are no schedule."""

    levels: tuple[Level, ...]
    first: tuple[Level, ...] = ()  # of the video's first block, where it has its own

    def __post_init__(self) -> None:
        for name in ("levels", "first"):
            given = getattr(self, name)
            if not isinstance(given, tuple) or not all(isinstance(level, Level) for level in given):
                raise PackForcingError(f"A schedule's {name} must be a tuple of noise levels, but are {shown(given)}.")
        for levels in (self.levels, self.first or self.levels):
            _check_count(len(levels))
            for before, after in pairwise(levels):
                if not before.sigma > after.sigma:
                    raise PackForcingError(
                        f"Noise levels must fall from step to step, but {after.sigma:.4g} follows {before.sigma:.4g}: "
                        "leave one of them out."
                    )

    def steps(self, block: int) -> list[Step]:
        """The denoising steps of a block."""
        levels = self.first or self.levels if block == 0 else self.levels
        following = [level.sigma for level in levels[1:]] + [0.0]
        return [Step(*level, next_sigma) for level, next_sigma in zip(levels, following, strict=True)]


def warped(share: float, shift: float) -> float:
    """The noise level in [0, 1] that the flow shift makes of an even one."""
    return shift * share / (1 + (shift - 1) * share)


def check_shift(shift: float) -> None:
    """Raises PackForcingError for a flow shift that is not positive."""
    check_number("The flow shift", shift)
    if not 0 < shift < float("inf"):
        raise PackForcingError(f"The flow shift must be above 0, but it is {shift}.")
    check_between("The flow shift", shift, SMALLEST_SHIFT, LARGEST_SHIFT)


def _check_count(steps: int) -> None:
    if steps < 1:
        raise PackForcingError(f"Denoising takes at least 1 step, but {steps} were asked for.")
    if steps > MOST_STEPS:
        raise PackForcingError(f"Denoising takes at most {MOST_STEPS:,} steps, but {steps:,} were asked for.")


def sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels of `steps` denoising steps, from 1 downwards, warped by the flow shift. The final 0 is not included.

    4 steps are t = 1000, 750, 500, 250; with shift 5 these are 1, 0.9375, 0.8333, 0.625.
    Raises PackForcingError for fewer than one step or more than MOST_STEPS, and for a shift that is not positive.
    """
    check_whole("The number of denoising steps", steps)
    check_number("The flow shift", shift)
    _check_count(steps)
    check_shift(shift)
    return [warped(1 - step / steps, shift) for step in range(steps)]


# --- where a schedule comes from ---------------------------------------------------------------------------------


def even_schedule(steps: int, shift: float) -> Schedule:
    """The schedule of `sigmas`."""
    return schedule_of_sigmas(sigmas(steps, shift))


def schedule_of_sigmas(levels: Sequence[float]) -> Schedule:
    """A schedule of noise levels in (0, 1], of which the model is told as they are; a final 0 is left out.

    Raises PackForcingError for levels that are out of range or do not fall.
    """
    levels = levels[:-1] if len(levels) and levels[-1] == 0 else levels
    _check_count(len(levels))
    for sigma in levels:
        if not 0 < sigma <= 1 + 1e-6:  # some schedulers round 1 up
            raise PackForcingError(
                f"Noise levels (sigmas) must lie above 0 and at most at 1, but one is {sigma:g}: use those of a flow "
                "model such as Wan."
            )
    return Schedule(tuple(Level(sigma, sigma) for sigma in (min(1.0, level) for level in levels)))


def schedule_of_timesteps(
    timesteps: Sequence[float], first: Sequence[float] = (), shift: float = 5.0, warp: bool = True
) -> Schedule:
    """A schedule of timesteps in (0, 1000], falling, as the configurations of checkpoints list them.

    Args:
        timesteps: of each block.
        first: of the video's first block, if it has its own.
        shift: the flow shift.
        warp: whether the shift warps the timesteps (Self-Forcing), after rounding them to whole numbers. If not, the
            model is told the timesteps as they are, and the noise level is the nearest of the 1000 that the shift
            makes: 757 with shift 8 is 0.7568 (CausVid).

    Raises PackForcingError for timesteps that are out of range or do not fall.
    """
    check_shift(shift)
    return Schedule(*(tuple(_levels(_checked(each), shift, warp)) for each in (timesteps, first)))


def _checked(timesteps: Sequence[float]) -> Sequence[float]:
    if len(timesteps) > MOST_STEPS:
        _check_count(len(timesteps))
    for timestep in timesteps:
        check_number("A timestep", timestep)
        if not 0 < timestep <= TIMESTEPS:
            raise PackForcingError(f"A timestep must lie above 0 and at most at {TIMESTEPS}, but one is {timestep:g}.")
    for before, after in pairwise(timesteps):
        if not before > after:
            raise PackForcingError(
                f"Timesteps must fall from step to step, but {after:g} follows {before:g}: put them in order."
            )
    return timesteps


def _levels(timesteps: Sequence[float], shift: float, warp: bool) -> list[Level]:
    # In float32, as Self-Forcing's scheduler computes its table: a timestep's last bit is a few 1e-6 of a block.
    even = torch.linspace(1, 0, TIMESTEPS + 1)[:-1]
    table = shift * even / (1 + (shift - 1) * even)
    asked = torch.tensor(timesteps, dtype=torch.float32)
    rows = [int(((TIMESTEPS * (even if warp else table)) - t).abs().argmin()) for t in asked]
    told = TIMESTEPS * table[rows] if warp else asked
    return [Level(sigma, t / TIMESTEPS) for sigma, t in zip(table[rows].tolist(), told.tolist(), strict=True)]


def parse_timesteps(text: str) -> list[float]:
    """'1000, 757, 522' -> [1000.0, 757.0, 522.0]; commas or blanks between. Raises PackForcingError for no numbers."""
    words = text.replace(",", " ").split()
    _check_count(len(words))
    try:
        return [float(word) for word in words]
    except ValueError:
        raise PackForcingError(
            f"Timesteps are numbers with commas between, such as 1000, 757, 522, but they are {shown(text)}."
        ) from None


def timesteps_text(timesteps: Sequence[float]) -> str:
    """Timesteps as people write them: '1000, 757, 522'; of more than eight, the first three and the last."""
    words = [f"{timestep:.5g}" for timestep in timesteps]
    return ", ".join(words) if len(words) <= 8 else f"{', '.join(words[:3])}, ..., {words[-1]} ({len(words)} steps)"


# --- updates ---------------------------------------------------------------------------------------------------


def predicted_x0(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean latents that a velocity points to, from x at noise level sigma."""
    return x - sigma * velocity


def few_step_update(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor) -> Tensor:
    """Predicts x0 and adds fresh noise up to the next level: the update of step-distilled models (Self-Forcing)."""
    return torch.lerp(predicted_x0(x, velocity, sigma), noise, next_sigma)


def euler_update(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step along the probability-flow ODE: the update of models that were not distilled."""
    return x + (next_sigma - sigma) * velocity


def denoising_step(x: Tensor, velocity: Tensor, step: Step, update: str, noise: Callable[[], Tensor]) -> Tensor:
    """x at the level that a step leads to, of the same shape as x, by one of UPDATES.

    Args:
        noise: draws fresh noise of x's shape. It is called only where the update needs noise: not by "euler", and not
            in the last step, which leads to level 0. So the noise of later steps is the same either way.
    """
    if step.next_sigma == 0:
        return predicted_x0(x, velocity, step.sigma)
    if update == "few-step":
        return few_step_update(x, velocity, step.sigma, step.next_sigma, noise())
    return euler_update(x, velocity, step.sigma, step.next_sigma)
