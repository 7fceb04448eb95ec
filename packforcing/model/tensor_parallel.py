"""A Wan transformer shared out among processes, by PyTorch's own tensor parallelism (DTensor).

    q, k, v      by columns: each process has its heads
    o            by rows: the processes' parts are summed (an all-reduce of the hidden tokens)
    ffn          the first layer by columns, the second by rows (another all-reduce)
    norm_q, k    `SharedRMSNorm`: an all-reduce of a number a token
    the rest     whole in each process: norms of hidden tokens, embeddings, modulations, head

So hidden tokens are the same everywhere, and each process attends with its own heads to its own part of the cache.

PyTorch's parallel styles cut the weights (`cut`), and what they would compute is then computed on the parts themselves
(`PartLinear`): the same sums by the same collective operation. Their own way through DTensors takes the host some 20
times as long a layer (docs/performance.md), which is longer than a GPU takes for the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.head_share import HeadShare
from ..config import ModelShape
from ..errors import PackForcingError
from ..processes import check_same
from .causal_wan import CausalWan
from .wan_modules import WanModules

BY_COLUMNS = (*(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkv"), "ffn.0")
BY_ROWS = ("self_attn.o", "cross_attn.o", "ffn.2")
NORMS = ("norm_q", "norm_k")


class SharedRMSNorm(nn.Module):
    """RMS norm of tokens [B, L, d] of which this process has some columns, [B, L, d / N].

    Wan norms queries and keys over all heads together, so the mean square is that of all processes. The parallel styles
    cannot say this: their norms want each token whole, and would gather what the heads have just been shared out for.
    """

    def __init__(self, norm: nn.RMSNorm, share: HeadShare) -> None:
        super().__init__()
        assert norm.eps is not None, "Wan's norms have one"
        self.share, self.eps = share, norm.eps
        self.width = norm.weight.numel()
        part = norm.weight.detach().chunk(share.count)[share.rank].clone()
        self.weight = nn.Parameter(part, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        square = self.share.summed(exact.square().sum(dim=-1, keepdim=True)) / self.width
        return (exact * torch.rsqrt(square + self.eps)).to(x.dtype) * self.weight


class PartLinear(nn.Module):
    """A linear layer of which this process has a part of the columns or, if its products are `summed`, of the rows.

    Args:
        whole: a layer that a parallel style has cut: its weight and bias are DTensors.
    """

    def __init__(self, whole: nn.Linear, share: HeadShare, summed: bool) -> None:
        super().__init__()
        self.share, self.summed = share, summed
        weight, bias = (cast(Any, parameter).to_local() for parameter in (whole.weight, whole.bias))
        self.weight, self.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.summed:
            return self.share.summed(F.linear(x, self.weight)) + self.bias
        return F.linear(x, self.weight, self.bias)


def check_shares(model: ModelShape, ffn_dim: int, count: int) -> None:
    """Raises PackForcingError when so many processes cannot have equal parts of a model."""
    if model.heads % count or ffn_dim % count:
        fitting = [n for n in range(1, model.heads + 1) if not model.heads % n and not ffn_dim % n]
        raise PackForcingError(
            f"The model has {model.heads} heads and a hidden width of {ffn_dim:,}, which {count} processes cannot "
            f"share equally: start {one_of(fitting)} by torchrun --nproc-per-node, or share out prompts (--prompts)."
        )


def one_of(numbers: Sequence[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def check_same_weights(modules: WanModules) -> None:
    """Raises PackForcingError in all processes when they have read different weights.

    Eight values of each tensor are compared: they differ between any two fine-tunes, and with any LoRA.
    """
    values = {}
    for name, tensor in modules.state_dict().items():
        every = max(1, tensor.numel() // 8)
        values[name] = tensor.detach().reshape(-1)[::every][:8].float().tolist()
    check_same("weights", values)


def shared_wan(modules: WanModules, device: torch.device | str, dtype: torch.dtype, share: HeadShare) -> CausalWan:
    """A transformer of which this process runs its share. All processes call it, each with the whole module tree.

    Raises PackForcingError when they cannot share it, or have different ones.
    """
    shape = CausalWan(modules).shape
    check_shares(shape, modules.state_dict()["blocks.0.ffn.0.weight"].shape[0], share.count)
    check_same_weights(modules)
    share_out(modules, share, torch.device(device), dtype)
    return CausalWan(modules, dtype=dtype, device=device, share=share)


def share_out(modules: WanModules, share: HeadShare, device: torch.device, dtype: torch.dtype) -> None:
    """Leaves of a module tree, in place, what this process has of it: on the device, in the type.

    A layer at a time, so that the device never holds more than its share and one layer. Each process has read the whole
    file, and cuts its part out; nothing is sent.
    """
    for block in modules.blocks:
        cut(block.to(dtype), share, device)
        for attention in (block.self_attn, block.cross_attn):
            for name in NORMS:
                setattr(attention, name, SharedRMSNorm(getattr(attention, name), share))
        for name in (*BY_COLUMNS, *BY_ROWS):
            block.set_submodule(name, PartLinear(cast(nn.Linear, block.get_submodule(name)), share, name in BY_ROWS))
    modules.to(device, dtype).requires_grad_(False)


def cut(block: nn.Module, share: HeadShare, device: torch.device) -> None:
    """Cuts a layer's weights by PyTorch's parallel styles: they become DTensors, of which each process has its part.

    Raises PackForcingError where PyTorch is too old.
    """
    # Imported only here: it takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.distributed.tensor.parallel.style import ParallelStyle

    if "src_data_rank" not in signature(parallelize_module).parameters:
        raise PackForcingError(
            f"One video by several processes needs a newer PyTorch than {torch.__version__}: update it to 2.9, say."
        )
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in BY_COLUMNS}
    plan |= {name: RowwiseParallel() for name in BY_ROWS}
    parallelize_module(block, init_device_mesh(device.type, (share.count,)), plan, src_data_rank=None)
