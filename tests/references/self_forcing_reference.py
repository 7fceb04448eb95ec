"""Self-Forcing's own sampler, from its description and configurations alone. Nothing of `packforcing` is used.

Its scheduler is a table of 1000 noise levels, sigma and timestep = 1000 sigma, in float32. A configuration lists
timesteps: whole numbers. Warped, 1000 - t is a row of the table. Unwarped, the model is given the whole number. Either
way, both x0 = x - sigma v and new noise take their sigma from the row whose timestep is nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SelfForcing:
    """A sampler as a configuration sets it up."""

    denoising_step_list: Sequence[int]
    first_chunk: Sequence[int] = ()
    timestep_shift: float = 5.0
    warp_denoising_step: bool = True

    def table(self) -> Tensor:
        """The scheduler's sigmas [1000], from 1 down."""
        even = torch.linspace(1.0, 0.0, 1001)[:-1]
        return self.timestep_shift * even / (1 + (self.timestep_shift - 1) * even)

    def timesteps(self, chunk: int) -> Tensor:
        listed = torch.tensor(self.first_chunk if chunk == 0 and self.first_chunk else self.denoising_step_list)
        return torch.cat((1000 * self.table(), torch.zeros(1)))[1000 - listed] if self.warp_denoising_step else listed

    def sigma(self, timestep: Tensor) -> float:
        return self.table()[(1000 * self.table() - timestep).abs().argmin()].item()

    def chunks(
        self,
        count: int,
        velocity: Callable[[Tensor, float], Tensor],  # of x [B, 16, T, h, w] and a timestep of 1000
        keep: Callable[[Tensor], None],  # puts a finished chunk into the KV cache
        noise: Callable[[int], Callable[[], Tensor]],  # for a chunk, what draws its next noise
    ) -> Iterator[Tensor]:
        """The finished chunks, one after another."""
        for chunk in range(count):
            draw = noise(chunk)
            x = draw()
            timesteps = self.timesteps(chunk)
            for step, timestep in enumerate(timesteps):
                x0 = x - self.sigma(timestep) * velocity(x, timestep.item())
                if step + 1 < len(timesteps):
                    sigma = self.sigma(timesteps[step + 1])
                    x = (1 - sigma) * x0 + sigma * draw()
            keep(x0)
            yield x0
