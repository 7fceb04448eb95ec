"""Muon for the matrices of the layers and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import PackForcingError

FULL_RATE_INPUTS = 256  # a matrix under AdamW with more inputs learns at a smaller rate


class JointOptimizer:
    """Several optimizers over different parameters, as one.

    Its state has the form of one optimizer's: the parameters of all parts are numbered through.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for part, first in zip(self.parts, self._firsts(), strict=True):
            own = part.state_dict()
            state.update({first + number: entry for number, entry in own["state"].items()})
            groups += [{**group, "params": [first + n for n in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        groups = iter(state["param_groups"])
        for part, first in zip(self.parts, self._firsts(), strict=True):
            own = [next(groups) for _ in part.param_groups]
            numbers = [n for group in own for n in group["params"]]
            part.load_state_dict(
                {
                    "state": {n - first: state["state"][n] for n in numbers if n in state["state"]},
                    "param_groups": [{**group, "params": [n - first for n in group["params"]]} for group in own],
                }
            )

    def _firsts(self) -> list[int]:
        """The number of each part's first parameter."""
        firsts, count = [], 0
        for part in self.parts:
            firsts.append(count)
            count += sum(len(group["params"]) for group in part.param_groups)
        return firsts


def muon_and_adamw(
    module: nn.Module,
    inner: Iterable[nn.Parameter],
    rate: float,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float = 0.01,
) -> JointOptimizer:
    """Muon over the matrices among `inner` and AdamW over the module's other parameters, at one learning rate.

    Muon (Jordan et al., 2024) makes each update of a matrix orthogonal. Here the update's length is matched to AdamW's,
    so both take the same rate. A step of AdamW moves an output by rate x inputs. So a matrix of more than
    FULL_RATE_INPUTS inputs learns at a rate that is smaller in proportion (Yang et al., 2022, "Tensor Programs V").

    Raises PackForcingError when PyTorch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise PackForcingError(
            f"Training from scratch uses the Muon optimizer, which PyTorch has since 2.9, but this is "
            f"{torch.__version__}: update PyTorch."
        )
    matrices = [p for p in inner if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in module.parameters() if id(p) not in chosen]
    free = [p for p in others if p.ndim <= 1]
    by_rate: dict[float, list[nn.Parameter]] = {}
    for p in others:
        if p.ndim > 1:
            by_rate.setdefault(rate * min(1.0, FULL_RATE_INPUTS / p[0].numel()), []).append(p)
    decayed = [{"params": ps, "lr": own, "weight_decay": weight_decay} for own, ps in by_rate.items()]
    return JointOptimizer(
        torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [*decayed, {"params": free, "weight_decay": 0.0}],
            lr=rate,
            betas=betas,
        ),
    )
