"""Muon for the matrices of the layers and AdamW for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..devices import fast_dtype

MATCHED_RMS = 0.2  # of an update: about AdamW's ("match_rms_adamw", Liu et al., 2025)
FULL_RATE_INPUTS = 256  # a matrix under AdamW with more inputs learns at a smaller rate


class FloatMuon(Optimizer):
    """Muon with each update made orthogonal in the gradients' own type; PyTorch's does it in bfloat16.

    On a CPU without instructions for bfloat16 that is most of the time of a step (docs/demo-models.md, "Optimizers").
    Hyperparameters and state are those of PyTorch's Muon, so a run may go on with either.

    Args:
        params: matrices.
        lr: matched to AdamW's: an update's root mean square is about MATCHED_RMS x lr.
        weight_decay: as AdamW's, apart from the gradient.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        own = {"momentum": 0.95, "nesterov": True, "ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5}
        defaults = {"lr": lr, "weight_decay": weight_decay, **own, "eps": 1e-7, "adjust_lr_fn": "match_rms_adamw"}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * MATCHED_RMS * math.sqrt(max(p.shape)))


def orthogonal(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, smallest_norm: float = 1e-7
) -> Tensor:
    """About the orthogonal factor of a matrix [m, n] by Newton-Schulz iterations: its singular values become about 1.

    Jordan et al. (2024), "Muon": X becomes a X + b (X X^T) X + c (X X^T)^2 X, from X of norm 1 at most.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=smallest_norm)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


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


def muon(matrices: list[nn.Parameter], rate: float, weight_decay: float) -> Optimizer:
    """PyTorch's Muon where there is one (since 2.9) and the device is fast in bfloat16, and else `FloatMuon`."""
    if hasattr(torch.optim, "Muon") and all(fast_dtype(p.device) == torch.bfloat16 for p in matrices):
        return torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return FloatMuon(matrices, rate, weight_decay)


def muon_and_adamw(
    module: nn.Module,
    inner: Iterable[nn.Parameter],
    rate: float,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float = 0.01,
) -> JointOptimizer:
    """Muon over the matrices among `inner` and AdamW over the module's other parameters, at one learning rate.

    Parameters that need no gradient are left out.

    Muon (Jordan et al., 2024) makes each update of a matrix orthogonal. Here the update's length is matched to AdamW's,
    so both take the same rate. A step of AdamW moves an output by rate x inputs. So a matrix of more than
    FULL_RATE_INPUTS inputs learns at a rate that is smaller in proportion (Yang et al., 2022, "Tensor Programs V").
    """
    matrices = [p for p in inner if p.ndim == 2 and p.requires_grad]
    chosen = {id(p) for p in matrices}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    free = [p for p in others if p.ndim <= 1]
    by_rate: dict[float, list[nn.Parameter]] = {}
    for p in others:
        if p.ndim > 1:
            by_rate.setdefault(rate * min(1.0, FULL_RATE_INPUTS / p[0].numel()), []).append(p)
    decayed = [{"params": ps, "lr": own, "weight_decay": weight_decay} for own, ps in by_rate.items()]
    adamw = torch.optim.AdamW([*decayed, {"params": free, "weight_decay": 0.0}], lr=rate, betas=betas)
    return JointOptimizer(muon(matrices, rate, weight_decay), adamw) if matrices else JointOptimizer(adamw)
