"""What decides every bit of a video beside its settings: the seed, the weights, the versions and the machine.

A record holds it (`CacheRecord.made_with`), so that a video can be made again, and a difference can be named.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..model.attention import Attention
from ..model.causal_wan import CausalWan
from .sampling import Sampling
from .video_models import VideoModels

PACKAGES = ("torch", "numpy", "av")  # that compute: the networks, the seeds, the MP4
SMALL = 4096  # numbers of a tensor that is a norm or a bias


def made_with(models: VideoModels, sampling: Sampling, uses_compressor: bool) -> dict[str, Any]:
    """The part of a record, of plain dicts, lists and numbers. It names no folder."""
    wan, vae, compressor = models.wan, models.vae, models.compressor
    digests = {"model": model_digest(wan)}
    if vae is not None:
        small = (each for each in vae.parameters() if each.numel() <= SMALL)  # they lie in reach, as a model's do
        digests["vae"] = tensor_digest(small)
    if uses_compressor and compressor is not None:
        digests["compressor"] = tensor_digest(compressor.parameters())
    return {
        "seed": sampling.seed,
        "sigmas": [step.sigma for step in sampling.steps_of(1)],
        "first_sigmas": [step.sigma for step in sampling.steps_of(0)],
        "digests": digests,
        "versions": versions(),
        "machine": {**machine(wan.device), "attention": _attention_name(wan.attention)},
    }


def _attention_name(attention: Attention) -> str:
    """The kernel that a GPU's trials chose, or the function's name."""
    return str(getattr(attention, "backend", None) or getattr(attention, "__name__", type(attention).__name__))


def model_digest(wan: CausalWan) -> str:
    """A short digest of a model: of its modulations in bfloat16, which every fine-tune changes and no LoRA does.

    They are small, and the only weights that always lie in reach. In bfloat16, so that the type they are loaded in does
    not matter.
    """
    return tensor_digest((*(block.modulation for block in wan.modules.blocks), wan.modules.head.modulation))


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """A short digest of tensors' values in bfloat16, in their order."""
    rounded = [tensor.detach().to(torch.bfloat16).flatten() for tensor in tensors]
    if not rounded:
        return hashlib.sha256().hexdigest()[:16]
    # One copy from the device, where all but the layers' weights may lie.
    values = torch.cat([each.to(rounded[-1].device) for each in rounded]).cpu()
    return hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of what computes; "" for a package that is not installed as one."""
    found = {"packforcing": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What of the machine decides how sums are rounded."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    # The number of threads splits the sums of a CPU's matrix products.
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": device.type, "instructions": capability, "threads": torch.get_num_threads()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs: its name such as "versions.torch", what it was and what it is now; None where it is not there."""
    for name in dict.fromkeys((*before, *now)):
        one, other = before.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from ((f"{name}.{inner}", was, found) for inner, was, found in differences(one, other))
        elif one != other:
            yield name, one, other
