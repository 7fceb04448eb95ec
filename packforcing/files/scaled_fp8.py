"""Weights in 8 bits with a scale beside them: how files say so, and plain weights made of them.

Two layouts are in use. ComfyUI's older one marks the file by a tensor `scaled_fp8` and calls the scale of `x.weight`
`x.scale_weight`. The newer one calls it `x.weight_scale`, and names the format of each layer in the safetensors header
(`_quantization_metadata`) or in a tensor `x.comfy_quant` of JSON text (ComfyUI's `comfy/utils.py`,
`convert_old_quants`). In both the weight is the fp8 number times the scale. Scales of activations (`x.scale_input`,
`x.input_scale`) only matter to products in fp8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PackForcingError
from .file_kinds import bare_name
from .weights import DOWNLOAD_AGAIN, quoted, read_json

HEADER_KEY = "_quantization_metadata"
FORMATS = ("float8_e4m3fn", "float8_e5m2")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
MARKER = "scaled_fp8"

_SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)")
_BESIDE = re.compile(r".+\.(scale_weight|weight_scale|scale_input|input_scale)|" + MARKER)
_DESCRIPTION = ".comfy_quant"

LayerFormats = dict[str, dict[str, Any]]  # a layer's name -> what ComfyUI says of it, of which "format" is read here


def is_beside_weights(name: str) -> bool:
    """Whether a tensor of this name is a scale, or marks the file as scaled."""
    return _BESIDE.fullmatch(name) is not None


def header_descriptions(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """What the header says of layers' formats, under the names `x.comfy_quant`, without prefixes; {} of nothing.

    Raises PackForcingError when that cannot be read.
    """
    if HEADER_KEY not in metadata:
        return {}
    try:
        layers = read_json(metadata[HEADER_KEY])["layers"]
        return {bare_name(str(name)) + _DESCRIPTION: value for name, value in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(source, f"'{HEADER_KEY}' in its header", error) from error


def split_descriptions(entries: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], LayerFormats]:
    """The tensors of a file, and what its `x.comfy_quant` say of layers' formats: JSON in a tensor, or read already.

    Raises PackForcingError when one cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    formats: LayerFormats = {}
    for name, value in entries.items():
        if not name.endswith(_DESCRIPTION):
            tensors[name] = value
            continue
        try:
            if isinstance(value, Tensor):
                value = read_json(bytes(value.to(torch.uint8).flatten().tolist()).decode())
            formats[name.removesuffix(_DESCRIPTION)] = _description(value)
        except (ValueError, TypeError) as error:
            raise _unreadable(source, f"'{name[:80]}'", error) from error
    return tensors, formats


def _description(value: Any) -> dict[str, Any]:
    """What is said of one layer. Raises ValueError when no format is named."""
    description = {"format": value} if isinstance(value, str) else value
    if not (isinstance(description, dict) and isinstance(description.get("format"), str)):
        raise ValueError("it names no format")
    return description


def _unreadable(source: str, what: str, error: Exception) -> PackForcingError:
    return PackForcingError(
        f"{source} has quantised weights, but {what} cannot be read ({type(error).__name__}: {str(error)[:80]}): "
        "choose a bf16, fp16 or fp8 version of the model."
    )


def checked_formats(state_dict: Mapping[str, Tensor], formats: LayerFormats, source: str) -> LayerFormats:
    """The formats of the newer layout, also of layers that have fp8 weights and a scale but no description.

    Raises PackForcingError for a format other than fp8 with one scale for a tensor or a row, and for a scale without
    its weight.
    """
    found = {layer: entry for layer, entry in formats.items() if f"{layer}.weight" in state_dict}
    for name, scale in state_dict.items():
        match = _SCALE.fullmatch(name)
        if match is None:
            continue
        layer, weight = match[1], state_dict.get(f"{match[1]}.weight")
        if weight is None:
            raise PackForcingError(
                f"{source} cannot be used: it has a scale '{name[:80]}' without that layer's weight; {DOWNLOAD_AGAIN}."
            )
        if match[2] == "weight_scale" and weight.dtype in FP8_DTYPES:
            found.setdefault(layer, {"format": str(weight.dtype).removeprefix("torch.")})
        known = found.get(layer, {}).get("format", FORMATS[0]) in FORMATS
        if known and scale.numel() not in (1, weight.shape[0]):
            raise PackForcingError(
                f"{source} cannot be used: the scale '{name[:80]}' has the shape {list(scale.shape)}, where one "
                f"number for the weight, or {weight.shape[0]} for its rows, were expected; choose another file."
            )
    others = sorted({entry["format"] for entry in found.values()} - set(FORMATS))
    if others:
        raise PackForcingError(
            f"{source} has weights quantised as {quoted(others)}, and PackForcing reads fp8 ({', '.join(FORMATS)}) "
            "only: load it with ComfyUI's own loader and connect that MODEL, or choose a bf16, fp16 or fp8 file."
        )
    return found


def with_marker(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The older layout with its marker, without which ComfyUI drops the scales; other state dicts as they are.

    Two numbers in the marker mean that nothing is multiplied in fp8.
    """
    scaled = [name.removesuffix(".scale_weight") for name in state_dict if name.endswith(".scale_weight")]
    if MARKER in state_dict or not scaled:
        return dict(state_dict)
    dtypes = {state_dict[f"{layer}.weight"].dtype for layer in scaled}
    return {**state_dict, MARKER: torch.zeros(2, dtype=next((t for t in FP8_DTYPES if t in dtypes), FP8_DTYPES[0]))}


def plain_weights(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict without scales: each weight that has one is multiplied by it in float32, and rounded to `dtype`."""
    plain = {name: tensor for name, tensor in state_dict.items() if not is_beside_weights(name)}
    for name, scale in state_dict.items():
        if match := _SCALE.fullmatch(name):
            weight = state_dict[f"{match[1]}.weight"].float()
            shape = (-1, *(weight.ndim - 1) * (1,)) if scale.numel() > 1 else ()
            plain[f"{match[1]}.weight"] = (weight * scale.float().reshape(shape)).to(dtype)
    return plain
