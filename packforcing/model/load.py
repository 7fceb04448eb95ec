"""Loading a transformer: from a file, onto a device, in fp8 or compiled; and what tells weights apart."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import PackForcingError
from ..files.lora import Lora, with_loras
from ..files.wan_checkpoint import load_wan
from ..known_models import WanSizes
from .causal_wan import CausalWan
from .fp8_linear import check_fp8, multiply_in_fp8
from .read_ahead import StreamedWeights
from .wan_modules import WanModules, build_wan_modules

WEIGHTS_DEVICES = ("device", "host")  # where the layers' weights lie; from host memory they are read ahead in each pass


def check_speed(device: torch.device, linear_dtype: str, compiled: bool, weights_device: str = "device") -> None:
    """Raises PackForcingError when a device cannot do what `make_causal_wan` is asked for."""
    if compiled and weights_device == "host":
        raise PackForcingError(
            "--compile wants the weights to stay where they are, but --weights-device host reads them anew in each "
            "pass: drop one of them."
        )
    if linear_dtype != "model":
        check_fp8(device)
    if compiled:
        check_compiler(device)


def make_causal_wan(
    modules: WanModules,
    device: torch.device | str,
    dtype: torch.dtype,
    linear_dtype: str = "model",
    compiled: bool = False,
    weights_device: str = "device",
) -> CausalWan:
    """A transformer to run on a device.

    Args:
        linear_dtype: one of `fp8_linear.LINEAR_DTYPES`.
        compiled: that of `CausalWan`.
        weights_device: one of WEIGHTS_DEVICES; "host" leaves the layers' weights in host memory, pinned for a GPU.
    """
    device, on_host = torch.device(device), weights_device == "host"
    home = torch.device("cpu") if on_host else device
    modules = modules.to(dtype)
    if linear_dtype != "model":
        multiply_in_fp8(modules, home)  # before the others: a small device never holds the unrounded layers
    modules.to(home)
    if not on_host:
        return CausalWan(modules, dtype=dtype, device=device, compiled=compiled)
    for name, part in modules.named_children():
        if name != "blocks":
            part.to(device)
        elif device.type == "cuda":
            part._apply(Tensor.pin_memory)
    wan = CausalWan(modules, dtype=dtype, device=device, compiled=compiled)
    wan.weights = StreamedWeights(modules.blocks, device)
    return wan


def check_compiler(device: torch.device) -> None:
    """Raises PackForcingError when torch.compile will find no compiler here: Triton on a GPU, C++ on the CPU."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise PackForcingError(
            "--compile needs Triton on a GPU, which is not installed: pip install triton, or drop it."
        )
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise PackForcingError("--compile needs a C++ compiler on the CPU, and there is none: install g++, or drop it.")


def load_wan_modules(
    path: str | os.PathLike[str],
    weights: str = "auto",
    dtype: torch.dtype = torch.float32,
    loras: Sequence[tuple[Lora, float]] = (),
) -> WanModules:
    """A causal Wan checkpoint as a module tree.

    Args:
        weights: "auto", "ema" or "raw".
        dtype: what scaled fp8 weights and those that a LoRA changes are kept in; all others stay as in the file.
        loras: what is merged, each with its strength.

    Raises what `load_wan` and `merged` raise.
    """
    loaded = load_wan(path, weights)
    shape = loaded.shape
    sizes = WanSizes(
        dim=shape.dim,
        ffn_dim=shape.ffn_dim,
        layers=shape.layers,
        heads=shape.heads,
        channels=shape.in_channels,
        text_dim=shape.text_dim,
        freq_dim=shape.freq_dim,
    )
    return build_wan_modules(sizes, with_loras(loaded.state_dict, loras, dtype))


def digest(state_dict: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes and values; "" for an empty state dict."""
    if not state_dict:
        return ""
    sha = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        sha.update(f"{name} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return sha.hexdigest()[:16]
