"""The hyperparameters of joint training, and what one micro-batch of it draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_between, check_count
from ..generate.schedule import check_shift
from .run_config import MicroBatch, check_ema


@dataclass(frozen=True)
class ForcingOptions:
    """The paper's hyperparameters (docs/method.md, section 2), and those of Self-Forcing where it is silent."""

    generator_rate: float = 2e-6
    critic_rate: float = 1e-6
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    critic_turns: int = 5  # critic updates for each generator update
    blocks: int = 5  # of a video: 20 latent frames
    gradient_blocks: int = 5  # of these, how many have a gradient; fewer take less memory
    guidance: float = 3.0  # classifier-free, of the teacher
    shift: float = 5.0  # flow shift
    steps: int = 4  # denoising steps of the generator
    lowest: float = 0.02  # noise levels at which critic and teacher are compared, before the shift
    highest: float = 0.98
    ema: float = 0.99  # of the generator

    def __post_init__(self) -> None:
        for name in ("generator_rate", "critic_rate", "weight_decay", "guidance"):
            check_between(name, getattr(self, name), 0)
        for name in ("critic_turns", "blocks", "gradient_blocks", "steps"):
            check_count(name, getattr(self, name), 1)
        for name in ("lowest", "highest"):
            check_between(name, getattr(self, name), 0, 1)
        check_ema(self.ema)
        check_shift(self.shift)


@dataclass(frozen=True)
class Prompts:
    """The prompts of the generator's videos, encoded."""

    of_seed: Callable[[int], Tensor]  # the prompt [L, 4096] of a sample, by the sample's seed
    empty: Tensor  # [L, 4096]; the teacher's guidance leads away from it


@dataclass(frozen=True)
class Batch:
    """What is drawn for B videos."""

    context: Tensor  # [B, L, 4096], encoded prompts
    seeds: tuple[int, ...]  # B, of the videos' noise
    exit_step: int  # the denoising step after which each block is left
    gradient: tuple[int, ...]  # the blocks that have a gradient
    sigma: Tensor  # [B], the noise levels at which critic and teacher look at the videos


def draw_batch(micro: MicroBatch, options: ForcingOptions, prompts: Prompts, device: torch.device) -> Batch:
    """The batch of a micro-batch: a function of its seeds."""
    seeds = micro.seeds()
    rngs = [np.random.default_rng(seed) for seed in seeds]
    context = nn.utils.rnn.pad_sequence([prompts.of_seed(seed) for seed in seeds], batch_first=True)
    even = np.array([rng.uniform(options.lowest, options.highest) for rng in rngs])
    sigma = options.shift * even / (1 + (options.shift - 1) * even)
    # The same in all processes: otherwise the slowest would decide how long a step takes.
    shared = np.random.default_rng(micro.step_seed())
    exit_step = int(shared.integers(options.steps))
    gradient = tuple(shared.permutation(options.blocks)[: options.gradient_blocks].tolist())
    return Batch(context.to(device), tuple(seeds), exit_step, gradient, torch.from_numpy(sigma).float())
