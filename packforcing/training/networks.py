"""The three transformers of joint training, generator, critic and teacher, on one device or shared by FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..cache.gradients import GradientCache
from ..errors import PackForcingError
from ..model.attention import training_attention
from ..model.causal_wan import CausalWan, TextKV
from ..model.compressor import HRBranch
from ..model.vae import WanVAE
from ..model.wan_modules import WanModules
from ..processes import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class ForcingModels:
    """The models of joint training."""

    generator: WanModules  # trained
    hr: HRBranch  # the compressor's branch that is trained
    critic: WanModules  # trained; it usually begins as a copy of the teacher
    teacher: WanModules  # frozen; it was trained bidirectionally
    vae: WanVAE  # frozen, for the compressor's LR branch


@dataclass(frozen=True)
class Placement:
    """Where the models run, and how they save memory."""

    device: torch.device
    cache_dtype: torch.dtype = torch.float32
    fsdp: bool = False  # share generator and critic among the processes
    recompute: bool = False  # of the critic's pass keep only the layers' inputs, and compute the rest again


class Networks:
    """Generator, critic and teacher, each by its name."""

    def __init__(self, models: ForcingModels, placement: Placement) -> None:
        self.device = placement.device
        self.cache_dtype = placement.cache_dtype
        self.modules = {
            "generator": models.generator.requires_grad_(True).to(self.device),
            "critic": models.critic.requires_grad_(True).to(self.device),
            "teacher": models.teacher.requires_grad_(False).to(self.device),
        }
        attention = training_attention(self.device)
        # The teacher's type may be smaller. Then its hidden states have that type too: not every device mixes the two.
        self.wans = {
            name: CausalWan(each, attention, dtype=next(each.parameters()).dtype, device=self.device)
            for name, each in self.modules.items()
        }
        self.wans["critic"].recompute = placement.recompute
        self.shape = self.wans["teacher"].shape
        # Last, since FSDP replaces the parameters.
        if placement.fsdp:
            for name in ("generator", "critic"):
                shard(self.modules[name])

    def call(self, name: str, function: Callable[[], T]) -> T:
        """Runs a function that reads a network's weights; under FSDP they are whole meanwhile.

        The function takes no arguments, so that FSDP sees no gradient in them: otherwise it would take the end of the
        first of a step's backward passes for the end of all.
        """
        return self.modules[name].call(function)

    def denoise(self, name: str, x: Tensor, sigma: float | Tensor, text: TextKV, cache: GradientCache) -> Tensor:
        """The velocity [B, 16, T, h, w] that a network predicts for the cache's current block x."""
        return self.call(name, lambda: self.wans[name].denoise(x, sigma, text, cache))

    @contextmanager
    def constant(self, name: str) -> Iterator[None]:
        """No gradients inside. Under FSDP the network is in parts again afterwards.

        If it stayed whole, it would miss its next update.
        """
        with torch.no_grad():
            yield
        module = self.modules[name]
        if isinstance(module, _fsdp_module()):
            cast(Any, module).reshard()


def _fsdp_module() -> tuple[type, ...]:
    """FSDP's class, where several processes train; importing it takes a second."""
    if not distributed():
        return ()
    from torch.distributed.fsdp import FSDPModule

    return (FSDPModule,)


@contextmanager
def frozen(modules: nn.Module, needed: bool) -> Iterator[None]:
    """If needed: the weights get no gradient from what runs inside, but gradients still flow through it."""
    if not needed:
        yield
        return
    modules.requires_grad_(False)
    try:
        yield
    finally:
        modules.requires_grad_(True)


def shard(modules: nn.Module) -> None:
    """FSDP over all processes: each keeps a part of the weights, of their gradients and of the optimizer's state."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not distributed():
        raise PackForcingError("--fsdp shares a model among processes: start it with torchrun --nproc-per-node N.")
    fully_shard(modules, reshard_after_forward=False)
    register_fsdp_forward_method(modules, "call")
