"""LoRA files: read under any of the names that are in use, and merged into a Wan state dict.

A layer's weight W becomes W + strength * alpha / rank * up @ down. LongLive ships as a base model and such a file
(`lora.pt`): a torch file with the sets `generator_lora` and `critic_lora` under peft's names. Its alpha and rank are
both 256 (NVlabs/LongLive, `configs/longlive_inference.yaml`). Where a file does not say its alpha, it is the rank.

    peft        base_model.model.blocks.0.self_attn.q.lora_A.weight, ...lora_B.weight
    diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight, or ...lora.down.weight
    ComfyUI     diffusion_model.blocks.0.self_attn.q.lora_down.weight, ...lora_up.weight, .alpha, .diff, .diff_b
    kohya       lora_unet_blocks_0_self_attn_q.lora_down.weight
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from ..errors import PackForcingError
from .file_kinds import bare_name
from .scaled_fp8 import plain_weights
from .wan_names import wan_name
from .weights import check_floating, quoted, read_state_dict, some

GENERATOR_SETS = ("generator_lora", "generator_ema_lora", "lora", "state_dict")

_PARTS = {
    "down": r"lora_A(\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight",
    "up": r"lora_B(\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight",
    "alpha": r"alpha",
    "weight": r"diff",
    "bias": r"diff_b",
}
_NAME = re.compile(r"(?P<layer>.+?)\.(?:" + "|".join(f"(?P<{part}>{names})" for part, names in _PARTS.items()) + ")")
_KOHYA = "lora_unet_"


@dataclass
class LayerChange:
    """What a LoRA says of one layer."""

    down: Tensor | None = None  # [r, in, ...]
    up: Tensor | None = None  # [out, r, ...]
    alpha: float | None = None  # None: as large as the rank
    weight: Tensor | None = None  # added to the weight as it is
    bias: Tensor | None = None  # added to the bias


@dataclass(frozen=True)
class Lora:
    """A LoRA's layers, by the names that the file has for them, without prefixes."""

    source: str
    layers: Mapping[str, LayerChange]


def load_lora(path: str | os.PathLike[str]) -> Lora:
    """Read a LoRA: safetensors, or a torch file such as LongLive's `lora.pt`.

    Raises:
        PackForcingError: from reading; or the file is no LoRA, or a LoRA of another kind (LoHa, DoRA, ...).
    """
    source = os.fspath(path)
    layers: dict[str, LayerChange] = {}
    for name, tensor in _generator_set(read_state_dict(path)[0], source).items():
        layer, part = _parsed(name, source)
        change = layers.setdefault(layer, LayerChange())
        if getattr(change, part) is not None:
            raise PackForcingError(f"{source} cannot be used: it has two tensors for '{layer}', one is '{name[:80]}'.")
        setattr(change, part, _alpha(tensor, name, source) if part == "alpha" else tensor)
    for name, change in layers.items():
        _check_pair(name, change, source)
    return Lora(source, layers)


def _check_pair(name: str, change: LayerChange, source: str) -> None:
    """Refuse a layer with one of the two matrices, or with two that cannot be multiplied."""
    down, up = change.down, change.up
    if (down is None) != (up is None):
        raise PackForcingError(
            f"{source} is not a complete LoRA: '{name[:80]}' has one of its two matrices only; download the file again."
        )
    if down is not None and up is not None and (min(down.ndim, up.ndim) < 2 or up.shape[1:].numel() != len(down)):
        raise PackForcingError(
            f"{source} cannot be used: the matrices of '{name[:80]}' are {list(up.shape)} and {list(down.shape)}, "
            "which have no rank in common; download the file again."
        )


def given_lora(text: str) -> tuple[Lora, float]:
    """The LoRA and its strength, from FILE or FILE:STRENGTH, as a command line has them.

    Raises what `load_lora` raises, and PackForcingError for a strength that is no finite number.
    """
    file, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        return load_lora(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        return load_lora(text), 1.0  # the colon belongs to the file's name
    if not isfinite(strength):
        raise PackForcingError(f"The strength of a LoRA must be a finite number, but it is {number}: try 1.")
    return load_lora(file), strength


def _generator_set(checkpoint: Mapping[str, Any], source: str) -> Mapping[str, Tensor]:
    """The tensors of the generator's LoRA."""
    for name in GENERATOR_SETS:
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
            break
    tensors = {str(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not any(_NAME.fullmatch(name) for name in tensors):
        found = some(tensors, "tensor") if tensors else quoted(checkpoint) or "nothing"
        raise PackForcingError(
            f"{source} is not a LoRA: found {found}, and no pairs such as 'lora_A.weight' and 'lora_B.weight'; "
            "choose a LoRA of this model, or run without one."
        )
    check_floating({name: value for name, value in tensors.items() if not name.endswith(".alpha")}, source)
    return tensors


def _parsed(name: str, source: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, and which part of its change it is."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise PackForcingError(
            f"{source} has '{name[:80]}', which is not part of a plain LoRA (lora_A and lora_B, or lora_down and "
            "lora_up, with alpha, diff, diff_b): apply it with ComfyUI's LoRA loader, or choose another file."
        )
    layer = bare_name(found["layer"].removeprefix("base_model.").removeprefix("transformer."))
    return layer, next(part for part in _PARTS if found[part] is not None)


def _alpha(tensor: Tensor, name: str, source: str) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise PackForcingError(f"{source} cannot be used: '{name[:80]}' is not one number but {list(tensor.shape)}.")
    return float(tensor)


# --- applying --------------------------------------------------------------------------------------------------


def wan_layers(lora: Lora, state_dict: Mapping[str, Tensor]) -> dict[str, LayerChange]:
    """The LoRA's changes by a model's own names of its layers, once they are known to fit its tensors.

    Raises PackForcingError when one is for a layer that the model does not have, or that has another size there:
    nothing is left out silently.
    """
    modules = {name.rpartition(".")[0] for name in state_dict}
    by_kohya = {_KOHYA + module.replace(".", "_"): module for module in modules}
    found, unknown = {}, []
    for name, change in lora.layers.items():
        module = by_kohya.get(name, wan_name(name))
        if module in modules:
            found[module] = change
        else:
            unknown.append(name)
    if unknown:
        raise PackForcingError(
            f"{lora.source} does not fit the model: {len(unknown)} of its {len(lora.layers)} layers are not in it "
            f"({quoted(unknown)}); choose a LoRA of this model, or run without one."
        )
    for module, change in found.items():
        for part, size in _sizes(change):
            name = f"{module}.{part}"
            there = list(state_dict[name].shape) if name in state_dict else []
            if not there or there[0] != size[0] or prod(there) != prod(size):
                raise PackForcingError(
                    f"{lora.source} does not fit the model: it changes '{name}' by {size}, which is "
                    f"{there or 'absent'} there; choose a LoRA of this model, or run without one."
                )
    return found


def _sizes(change: LayerChange) -> Iterator[tuple[str, list[int]]]:
    """The sizes of what is added to a layer, each with the tensor's name that it is added to."""
    if change.up is not None and change.down is not None:
        yield "weight", [len(change.up), *change.down.shape[1:]]
    if change.weight is not None:
        yield "weight", list(change.weight.shape)
    if change.bias is not None:
        yield "bias", list(change.bias.shape)


def merged(state_dict: Mapping[str, Tensor], lora: Lora, strength: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """A Wan state dict with a LoRA merged into it; scaled fp8 weights become plain ones.

    Args:
        state_dict: tensors under Wan's names.
        dtype: of the tensors that change. They are computed in float32, and the others stay as they are.

    Raises what `wan_layers` raises.
    """
    result = plain_weights(state_dict, dtype)
    for module, change in wan_layers(lora, state_dict).items():
        for part in ("weight", "bias"):
            added = _added(change, part)
            if added is not None:
                tensor = result[f"{module}.{part}"]
                result[f"{module}.{part}"] = (tensor.float() + strength * added.view_as(tensor)).to(dtype)
    return result


def with_loras(
    state_dict: Mapping[str, Tensor], loras: Sequence[tuple[Lora, float]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """`merged` for several LoRAs, each with its strength; without any, the same with scaled fp8 weights made plain."""
    result = plain_weights(state_dict, dtype)
    for lora, strength in loras:
        result = merged(result, lora, strength, dtype)
    return result


def comfy_lora(layers: Mapping[str, LayerChange]) -> dict[str, Tensor]:
    """Changes by a model's own names, under the names that ComfyUI's LoRA loader knows."""
    tensors: dict[str, Tensor] = {}
    for module, change in layers.items():
        name = f"diffusion_model.{module}"
        if change.bias is not None:
            tensors[f"{name}.diff_b"] = change.bias
        whole = _added(change, "weight")
        if change.weight is not None and whole is not None:  # ComfyUI takes either a difference or a pair
            tensors[f"{name}.diff"] = whole
        elif change.up is not None and change.down is not None:
            tensors |= {f"{name}.lora_up.weight": change.up, f"{name}.lora_down.weight": change.down}
            if change.alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(change.alpha)
    return tensors


def _added(change: LayerChange, part: str) -> Tensor | None:
    """What is added to a layer's weight or bias at strength 1, float32; None of nothing."""
    given: Tensor | None = getattr(change, part)
    added = None if given is None else given.float()
    if part == "bias" or change.up is None or change.down is None:
        return added
    rank = change.down.shape[0]
    scale = 1.0 if change.alpha is None else change.alpha / rank
    product = scale * (change.up.float().flatten(1) @ change.down.float().flatten(1))
    return product if added is None else product + added.view_as(product)
