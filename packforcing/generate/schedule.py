"""Noise levels of the denoising steps, and the two updates that walk down them (docs/method.md, section 2).

Flow matching: x_sigma = (1 - sigma) x0 + sigma noise, and the model predicts the velocity v = noise - x0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..checks import check_number, check_whole
from ..errors import PackForcingError

UPDATES = ("few-step", "euler")
MOST_STEPS = 1000  # a model was trained on as many noise levels


def sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels of `steps` denoising steps, from 1 downwards, warped by the flow shift. The final 0 is not included.

    4 steps are t = 1000, 750, 500, 250; with shift 5 these are 1, 0.9375, 0.8333, 0.625.
    Raises PackForcingError for fewer than one step or more than MOST_STEPS, and for a shift that is not positive.
    """
    check_whole("The number of denoising steps", steps)
    check_number("The flow shift", shift)
    if steps < 1:
        raise PackForcingError(f"Denoising takes at least 1 step, but {steps} were asked for.")
    if steps > MOST_STEPS:
        raise PackForcingError(f"Denoising takes at most {MOST_STEPS:,} steps, but {steps:,} were asked for.")
    if not 0 < shift < float("inf"):
        raise PackForcingError(f"The flow shift must be above 0, but it is {shift}.")
    even = (1 - step / steps for step in range(steps))
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def level_pairs(steps: int, shift: float) -> list[tuple[float, float]]:
    """The noise level of each denoising step, and the level that it leads to: 0 for the last one."""
    return list(pairwise([*sigmas(steps, shift), 0.0]))


def predicted_x0(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean latents that a velocity points to, from x at noise level sigma."""
    return x - sigma * velocity


def few_step_update(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor) -> Tensor:
    """Predicts x0 and adds fresh noise up to the next level: the update of step-distilled models (Self-Forcing)."""
    return torch.lerp(predicted_x0(x, velocity, sigma), noise, next_sigma)


def euler_update(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step along the probability-flow ODE: the update of models that were not distilled."""
    return x + (next_sigma - sigma) * velocity


def denoising_step(
    x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, update: str, noise: Callable[[], Tensor]
) -> Tensor:
    """x at level `next_sigma`, of the same shape as x, by one of UPDATES.

    Args:
        noise: draws fresh noise of x's shape. It is called only where the update needs noise: not by "euler", and not
            in the last step, which leads to level 0. So the noise of later steps is the same either way.
    """
    if next_sigma == 0:
        return predicted_x0(x, velocity, sigma)
    if update == "few-step":
        return few_step_update(x, velocity, sigma, next_sigma, noise())
    return euler_update(x, velocity, sigma, next_sigma)
