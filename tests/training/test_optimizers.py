"""Muon in the gradients' own type: against PyTorch's, and against the singular value decomposition."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from packforcing.training.optimizers import FloatMuon, orthogonal

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def gradients(shape: tuple[int, int], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def stepped(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[torch.Tensor]) -> torch.Tensor:
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_steps_are_those_of_pytorch_but_for_bfloat16(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "weight_decay": 0.1}
    grads = gradients(shape, 6)
    a = stepped(FloatMuon([ours], **options), ours, grads)
    b = stepped(torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options), theirs, grads)
    moved = (b - start).norm()
    # bfloat16 has 8 bits: five iterations of it leave about 1% of an update.
    assert (a - b).norm() < 0.02 * moved
    assert moved > 0.1


def test_a_run_goes_on_with_either() -> None:
    grads = gradients((8, 12), 4)
    p, q = nn.Parameter(torch.zeros(8, 12)), nn.Parameter(torch.zeros(8, 12))
    first = torch.optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    stepped(first, p, grads[:2])
    second = FloatMuon([q], lr=1.0, weight_decay=0.0)
    second.load_state_dict(deepcopy(first.state_dict()))
    with torch.no_grad():
        q.copy_(p)
    assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]
    b = stepped(second, q, grads[2:])
    a = stepped(first, p, grads[2:])
    assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_an_orthogonal_factor_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    x = gradients(shape, 1)[0].double()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.T @ orthogonal(x, COEFFICIENTS, 5) @ vh.T  # diagonal: the new singular values
    values = inner.diagonal()
    assert torch.allclose(inner, values.diag(), atol=1e-9)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_what_has_no_gradient_stays() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    FloatMuon([p], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(p.detach(), torch.ones(3, 3))
