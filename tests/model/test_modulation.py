"""The modulations, which belong to no sub-module: where they lie on another device, they are sent once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from packforcing.model.causal_wan import CausalWan
from packforcing.model.wan_modules import WanSizes, build_wan_modules, random_state_dict

SIZES = WanSizes(dim=16, ffn_dim=16, layers=2, heads=2, text_dim=16)


@pytest.fixture
def wan() -> CausalWan:
    return CausalWan(build_wan_modules(SIZES, random_state_dict(SIZES, seed=0)))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The parameters that are sent or cast from here on."""
    calls: list[Tensor] = []
    to = Tensor.to

    def counting(tensor: Tensor, *args, **kwargs) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            calls.append(tensor)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", counting)
    return calls


def modulations(wan: CausalWan, like: Tensor) -> list[Tensor]:
    return [wan._modulation_of(module, like) for module in (*wan.modules.blocks, wan.modules.head)]


@torch.inference_mode()
def test_from_another_device_they_are_sent_once(wan: CausalWan, sent: list[Tensor]):
    like = torch.empty(1, 3, 16, device="meta", dtype=torch.bfloat16)  # in the part of a GPU
    first, second = modulations(wan, like), modulations(wan, like)
    assert len(sent) == SIZES.layers + 1
    for a, b in zip(first, second, strict=True):
        assert a is b
        assert (a.device, a.dtype) == (like.device, like.dtype)


@torch.inference_mode()
def test_on_the_same_device_they_are_read_each_time(wan: CausalWan):
    like = torch.empty(1, 3, 16)
    assert all(a is module.modulation for a, module in zip(modulations(wan, like), wan.modules.blocks, strict=False))
    wan.modules.head.modulation.data.add_(1)
    assert torch.equal(modulations(wan, like)[-1], wan.modules.head.modulation)


def test_with_gradients_nothing_is_kept(wan: CausalWan, sent: list[Tensor]):
    like = torch.empty(1, 3, 16, device="meta")
    modulations(wan, like), modulations(wan, like)
    assert len(sent) == 2 * (SIZES.layers + 1)
