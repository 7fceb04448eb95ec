"""What several commands load: a device by its name, a transformer from its file; and what tells weights apart."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoints import load_wan
from .errors import PackForcingError
from .fp8 import check_fp8, multiply_in_fp8
from .tree import WanSizes, WanTree, build_tree
from .wan import CausalWan


def usable_device(name: str) -> torch.device:
    """The device of a name such as "cpu" or "cuda:0". Raises PackForcingError when it cannot be used here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch's, for an unknown device and for one it was built without
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PackForcingError(f"The device '{name}' cannot be used here ({reason}): choose cpu, say.") from error


def memory_of(device: torch.device) -> int | None:
    """Bytes that this process can still get on a device: a GPU's free memory, all of a machine's; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def check_speed(device: torch.device, linear_dtype: str, compiled: bool) -> None:
    """Raises PackForcingError when a device cannot do what `ready` is asked for."""
    if linear_dtype != "model":
        check_fp8(device)
    if compiled:
        check_compiler(device)


def ready(
    tree: WanTree, device: torch.device | str, dtype: torch.dtype, linear_dtype: str = "model", compiled: bool = False
) -> CausalWan:
    """A transformer to run on a device; `linear_dtype` is one of `fp8.LINEAR_DTYPES`."""
    tree = tree.to(device, dtype)
    if linear_dtype != "model":
        multiply_in_fp8(tree)
    return CausalWan(tree, dtype=dtype, device=device, compiled=compiled)


def check_compiler(device: torch.device) -> None:
    """Raises PackForcingError when torch.compile will find no compiler here: Triton on a GPU, C++ on the CPU."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise PackForcingError(
            "--compile needs Triton on a GPU, which is not installed: pip install triton, or drop it."
        )
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise PackForcingError("--compile needs a C++ compiler on the CPU, and there is none: install g++, or drop it.")


def load_tree(path: str | os.PathLike[str], weights: str = "auto") -> WanTree:
    """A causal Wan checkpoint as a module tree; `weights` is "auto", "ema" or "raw". Raises what `load_wan` raises."""
    loaded = load_wan(path, weights)
    shape = loaded.shape
    sizes = WanSizes(shape.dim, shape.ffn_dim, shape.layers, shape.heads, shape.in_channels, shape.text_dim)
    return build_tree(sizes, loaded.state_dict)


def digest(state_dict: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes and values; "" for an empty state dict."""
    if not state_dict:
        return ""
    sha = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        sha.update(f"{name} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return sha.hexdigest()[:16]
