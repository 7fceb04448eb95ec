"""Noise levels of the denoising steps, and the two updates that walk down them (method 2).

Flow matching: x_sigma = (1 - sigma) x0 + sigma noise, and the model predicts the velocity v = noise - x0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PackForcingError

UPDATES = ("few-step", "euler")


def sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels of `steps` denoising steps, from 1 downwards, warped by the flow shift; the final 0 is not included.

    4 steps are t = 1000, 750, 500, 250, at shift 5: 1, 0.9375, 0.8333, 0.625.
    Raises PackForcingError for fewer than one step or a shift that is not positive.
    """
    if steps < 1:
        raise PackForcingError(f"Denoising takes at least 1 step, but {steps} were asked for.")
    if not 0 < shift < float("inf"):
        raise PackForcingError(f"The flow shift must be above 0, but it is {shift}.")
    even = (1 - step / steps for step in range(steps))
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def predicted_x0(x: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    return x - sigma * velocity


def few_step_update(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor) -> Tensor:
    """Predicts x0 and adds fresh noise up to the next level: the update of step-distilled models (Self-Forcing)."""
    return torch.lerp(predicted_x0(x, velocity, sigma), noise, next_sigma)


def euler_update(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step along the probability-flow ODE: the update of models that were not distilled."""
    return x + (next_sigma - sigma) * velocity
