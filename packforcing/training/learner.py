"""What an optimizer moves: a module, its optimizer, and the moving average of its weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizers import JointOptimizer
from .processes import average_gradients, gathered, is_shard, laid_out_like, whole

M = TypeVar("M", bound=nn.Module)


class Learner(Generic[M]):
    """A module, the optimizer that moves it, and the moving average of its weights.

    Parameter groups are the optimizer's own. The `lr` that a group has when the learner is made is its full rate.

    Args:
        module: what is trained.
        optimizer: over the module's parameters.
        ema: how much of the average stays at each update, e.g. 0.999; 0 keeps no average. The first updates count for
            more than that, so that the random start is soon forgotten.
    """

    def __init__(self, module: M, optimizer: Optimizer | JointOptimizer, ema: float = 0.0) -> None:
        self.module = module
        self.optimizer = optimizer
        self.ema = ema
        self.updates = 0
        self._average = {name: p.detach().clone() for name, p in self._trained()} if ema else {}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def update(self, rate: float, clip: float) -> float:
        """One optimizer step, at a part `rate` of the full rate. Drops the gradients, and returns the norm they had.

        `clip` is the largest norm, 0 for no limit. Raises FloatingPointError when the norm is not finite.
        """
        average_gradients(self.parameters)
        # Even where nothing is clipped: the norm tells whether a run has blown up.
        norm = clip_gradients(self.parameters, clip or math.inf)
        if not math.isfinite(norm):
            raise FloatingPointError
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self._average:
            stays = min(self.ema, self.updates / (self.updates + 10))
            with torch.no_grad():
                for name, p in self._trained():
                    self._average[name].lerp_(p.detach(), 1 - stays)
        return norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[M]:
        """The module with its average weights, for evaluation; without an average, as it is."""
        own = {name: p.detach().clone() for name, p in self._trained()} if self._average else {}
        try:
            self._fill(self._average)
            yield self.module
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._trained():
            if name in values:
                p.copy_(values[name])

    def state(self) -> dict[str, Any]:
        """All that the next update reads, in whole tensors on the CPU. Under FSDP, all processes must call it."""
        return {
            "weights": gathered(self.module.state_dict()),
            "ema": gathered(self._average),
            "optimizer": gathered(self.optimizer.state_dict()),
            "updates": self.updates,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state` gave, whatever the number of processes it was gathered from."""
        like = self.module.state_dict()
        self.module.load_state_dict(
            {name: laid_out_like(value, like[name]) for name, value in state["weights"].items()}
        )
        for name, average in self._average.items():
            average.copy_(laid_out_like(state["ema"][name], average))
        optimizer = state["optimizer"]
        for number, parameter in enumerate(self.parameters):
            entry = optimizer["state"].get(number, {})
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entry[name] = laid_out_like(value, parameter)
        self.optimizer.load_state_dict(optimizer)
        self.updates = state["updates"]


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scales gradients down to a norm of `largest` at most; returns the norm they had.

    FSDP's shards and whole tensors may be mixed, which PyTorch's own function refuses.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    groups = [[g for g in gradients if is_shard(g) == sharded] for sharded in (True, False)]
    norms = [whole(nn.utils.get_total_norm(group)) for group in groups if group]
    norm = torch.stack(norms).norm().item() if norms else 0.0
    if norm > largest:
        for gradient in gradients:
            gradient.mul_(largest / norm)
    return norm
