"""Causal-Wan checkpoints: reading one, its sizes, and the refusal of what is not a Wan 2.1 for text-to-video."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ..errors import PackForcingError
from .file_kinds import PACK_COMPRESSOR, looks_like
from .scaled_fp8 import (
    LayerFormats,
    checked_formats,
    header_descriptions,
    is_beside_weights,
    split_descriptions,
    with_marker,
)
from .wan_names import from_diffusers, named_weight_set, strip_prefixes, transformer_part
from .weights import CHOOSE_CAUSAL_WAN, DOWNLOAD_AGAIN, check_floating, quoted, read_state_dict, some


@dataclass(frozen=True)
class WanShape:
    """The sizes of a Wan diffusion transformer, read from its weights."""

    dim: int
    layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    heads: int  # of 128 each, as in every Wan
    patch_size: tuple[int, int, int]
    has_image_branch: bool  # image-to-video: img_emb, and k_img/v_img in cross attention


@dataclass(frozen=True)
class LoadedWan:
    """A causal Wan's weights, ready for a module tree with Wan 2.1's names."""

    state_dict: dict[str, Tensor]  # memory-mapped where the file allows; dtype as in the file, fp8 with its scales
    shape: WanShape
    metadata: dict[str, str]
    weight_set: str  # the set's name in the file, e.g. "generator_ema"; "" where the file is one flat set
    formats: LayerFormats = field(default_factory=dict)  # of layers with a `weight_scale`: float8_e4m3fn, say


def load_wan(path: str | os.PathLike[str], which: str = "auto") -> LoadedWan:
    """Read a Wan 2.1 text-to-video transformer: torch or safetensors, Wan's or diffusers' names.

    Args:
        path: the file.
        which: "auto", "ema" or "raw", see `pick_weight_set`.

    Raises:
        PackForcingError: from reading, choosing or checking.
    """
    source = os.fspath(path)
    checkpoint, metadata = read_state_dict(path)
    weight_set, chosen = named_weight_set(checkpoint, which, source)
    entries = {**strip_prefixes(transformer_part(chosen), source), **header_descriptions(metadata, source)}
    tensors, described = split_descriptions(from_diffusers(entries), source)
    # A generator of PackForcing-Unofficial brings a compressor, which `load_compressor` reads.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(PACK_COMPRESSOR)}
    formats = checked_formats(tensors, described, source)
    state_dict = with_marker(tensors)
    return LoadedWan(state_dict, check_wan(state_dict, source), metadata, weight_set, formats)


# Also under diffusers' name add_k_proj, which from_diffusers leaves alone: such a model is only ever refused.
_IMAGE_BRANCH = re.compile(r"^img_emb\.|\.k_img\.|\.add_k_proj\.")


def describe_wan(state_dict: Mapping[str, Tensor], source: str = "the state dict") -> WanShape:
    """The sizes of a Wan transformer (also of one that `check_wan` refuses, such as image-to-video).

    Args:
        state_dict: tensors under Wan 2.1's bare names.
        source: how to call it in an error.

    Raises:
        PackForcingError: a tensor that tells a size is missing or has another number of axes.
    """

    def size(name: str, axes: int) -> tuple[int, ...]:
        if name not in state_dict:
            raise PackForcingError(f"{source} is not a complete Wan model: '{name}' is missing; {CHOOSE_CAUSAL_WAN}.")
        shape = tuple(state_dict[name].shape)
        if len(shape) != axes or 0 in shape:
            raise PackForcingError(
                f"{source} is not a Wan model that can be used: '{name}' has shape {list(shape)} where "
                f"{axes} axes were expected; {CHOOSE_CAUSAL_WAN}."
            )
        return shape

    dim, in_channels, *patch = size("patch_embedding.weight", 5)
    return WanShape(
        dim=dim,
        layers=len(_block_numbers(state_dict)),
        ffn_dim=size("blocks.0.ffn.0.bias", 1)[0],  # the bias, since packed weights lie about their sizes
        in_channels=in_channels,
        out_channels=size("head.head.bias", 1)[0] // prod(patch),
        text_dim=size("text_embedding.0.weight", 2)[1],
        freq_dim=size("time_embedding.0.weight", 2)[1],
        heads=dim // 128,
        patch_size=(patch[0], patch[1], patch[2]),
        has_image_branch=any(_IMAGE_BRANCH.search(name) for name in state_dict),
    )


# --- checks ----------------------------------------------------------------------------------------------------


def check_wan(state_dict: Mapping[str, Tensor], source: str = "the state dict") -> WanShape:
    """Refuse what is not a complete Wan 2.1 text-to-video transformer under Wan 2.1's bare names.

    Scales of fp8 weights are left alone. Of the values only those of the norms and biases are looked at: they are a
    thousandth of the file, and a training that has diverged shows in them.

    Returns:
        Its sizes.

    Raises:
        PackForcingError: the sentence says what the weights look like, or which tensors are missing, misshapen,
            no numbers or too many.
    """
    if not any(_WAN_BLOCK.fullmatch(name) for name in state_dict):
        raise _not_wan(source, state_dict)
    for pattern, what, advice in _QUANTISED_OR_OTHER:
        if any(pattern.search(name) for name in state_dict):
            raise PackForcingError(_refusal(source, what, advice))

    numbers = _block_numbers(state_dict)
    layers = max(numbers) + 1
    if len(numbers) != layers:
        raise PackForcingError(
            f"{source} lacks blocks: found {len(numbers)} of {layers} (block {_first_gap(numbers)} is "
            f"missing); {_incomplete_advice(source)}."
        )
    missing = [name for name in _expected_names(layers) if name not in state_dict]
    if missing:
        raise PackForcingError(
            f"{source} is not a complete Wan model: it lacks {quoted(missing)}; {_incomplete_advice(source)}."
        )
    shape = describe_wan(state_dict, source)
    _check_kind(shape, source)
    _check_shapes(state_dict, shape, source)
    _check_values(state_dict, source)
    return shape


def _check_kind(shape: WanShape, source: str) -> None:
    """Refuse Wans whose inputs differ from text-to-video's."""
    channels = (shape.in_channels, shape.out_channels)
    if channels == (48, 48):
        what = "a Wan 2.2 5B model with 48 latent channels, and PackForcing's VAE and compressor have 16"
    elif shape.in_channels == 36 or shape.has_image_branch:
        what = f"an image-to-video Wan with {shape.in_channels} input channels"
    elif channels[0] != channels[1]:
        what = f"a Wan with {channels[0]} input and {channels[1]} output channels (control or inpainting)"
    elif channels != (16, 16):
        what = f"a Wan with {channels[0]} latent channels, where Wan 2.1 has 16"
    elif shape.patch_size != (1, 2, 2):
        what = f"a Wan with patches of {'x'.join(map(str, shape.patch_size))}, where Wan 2.1 has 1x2x2"
    elif shape.dim % 128:
        what = f"a Wan of width {shape.dim}, which is not a number of heads of 128"
    else:
        return
    raise PackForcingError(_refusal(source, what, CHOOSE_CAUSAL_WAN))


def _check_shapes(state_dict: Mapping[str, Tensor], shape: WanShape, source: str) -> None:
    """Refuse packed weights, and tensors that have not the size that a Wan of this shape gives them."""
    expected = _expected_shapes(shape)
    packed = [name for name in expected if state_dict[name].dtype == torch.uint8]
    if packed:
        raise PackForcingError(
            f"{source} has packed 4-bit weights (such as '{packed[0]}'), which PackForcing does not read "
            "itself: load it with ComfyUI's own loader and connect that MODEL, or choose a bf16, fp16 or fp8 "
            "file."
        )
    wrong = [
        f"'{name}' is {list(state_dict[name].shape)} instead of {list(size)}"
        for name, size in expected.items()
        if tuple(state_dict[name].shape) != size
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PackForcingError(
            f"{source} is not a Wan model that can be used: tensors have unexpected shapes, "
            f"{', '.join(wrong[:3])}{more}; {CHOOSE_CAUSAL_WAN}."
        )
    unknown = [name for name in state_dict if name not in expected and not is_beside_weights(name)]
    if unknown:
        raise PackForcingError(
            f"{source} is not a plain Wan 2.1: it has {some(unknown, 'tensor')} that Wan 2.1 has not, and computes "
            f"something else with them; {CHOOSE_CAUSAL_WAN}."
        )


def _check_values(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Refuse what is no floating-point number, and norms and biases that are not finite."""
    check_floating(state_dict, source)
    for name, tensor in state_dict.items():
        if tensor.ndim == 1 and not torch.isfinite(tensor.float()).all():
            raise PackForcingError(
                f"{source} cannot be used: '{name}' holds values that are not finite numbers; choose an earlier "
                f"checkpoint of that training, or {DOWNLOAD_AGAIN}."
            )


def _expected_shapes(shape: WanShape) -> dict[str, tuple[int, ...]]:
    """The name and size of every tensor of a Wan 2.1 text-to-video transformer."""
    d, ffn = shape.dim, shape.ffn_dim
    sizes: dict[str, tuple[int, ...]] = {"head.modulation": (1, 2, d)}
    sizes |= {"patch_embedding.weight": (d, shape.in_channels, *shape.patch_size), "patch_embedding.bias": (d,)}
    linears = {
        "text_embedding.0": (d, shape.text_dim),
        "text_embedding.2": (d, d),
        "time_embedding.0": (d, shape.freq_dim),
        "time_embedding.2": (d, d),
        "time_projection.1": (6 * d, d),
        "head.head": (shape.out_channels * prod(shape.patch_size), d),
    }
    for i in range(shape.layers):
        block = f"blocks.{i}"
        sizes |= {f"{block}.modulation": (1, 6, d), f"{block}.norm3.weight": (d,), f"{block}.norm3.bias": (d,)}
        for attention in ("self_attn", "cross_attn"):
            linears |= {f"{block}.{attention}.{part}": (d, d) for part in "qkvo"}
            sizes |= {f"{block}.{attention}.norm_{part}.weight": (d,) for part in "qk"}
        linears |= {f"{block}.ffn.0": (ffn, d), f"{block}.ffn.2": (d, ffn)}
    for name, (rows, columns) in linears.items():
        sizes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return sizes


def _expected_names(layers: int) -> Iterable[str]:
    """The names of all tensors, which depend on no other size."""
    any_shape = WanShape(
        dim=128,
        layers=layers,
        ffn_dim=1,
        in_channels=16,
        out_channels=16,
        text_dim=1,
        freq_dim=1,
        heads=1,
        patch_size=(1, 2, 2),
        has_image_branch=False,
    )
    return _expected_shapes(any_shape)


def _block_numbers(names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(r"blocks\.(\d{1,4})\.", name))}


def _first_gap(numbers: set[int]) -> int:
    return next(i for i in range(len(numbers) + 1) if i not in numbers)


def _incomplete_advice(source: str) -> str:
    """What to do about a model that lacks tensors."""
    if re.search(r"-\d{5}-of-\d{5}", source):
        return "this is one part of a model in several files, so choose a version of it in a single file"
    return "choose a complete checkpoint, or download the file again"


# --- what else a file may be -----------------------------------------------------------------------------------

_WAN_BLOCK = re.compile(r"blocks\.\d{1,4}\.self_attn\.q\.(weight|quantized_weight_values)")

# Wans with more inputs, by the names from which ComfyUI knows them, and weights in a form that torch cannot multiply.
_QUANTISED_OR_OTHER = [
    (re.compile(pattern), what, advice)
    for pattern, what, advice in (
        (r"quantized_weight_values$", "a Wan in LongLive's packed NVFP4 form", "choose its bf16 version"),
        (r"^vace_", "a Wan VACE model", CHOOSE_CAUSAL_WAN),
        (r"^control_adapter\.", "a Wan camera-control model", CHOOSE_CAUSAL_WAN),
        (r"^(casual_audio_encoder|audio_proj)\.", "a Wan speech-to-video model", CHOOSE_CAUSAL_WAN),
        (r"^(face_adapter|motion_encoder)\.", "a Wan Animate model", CHOOSE_CAUSAL_WAN),
        (r"^ref_conv\.", "a Wan reference-image model", CHOOSE_CAUSAL_WAN),
    )
]


def _not_wan(source: str, names: Iterable[str]) -> PackForcingError:
    """The refusal of a file without a Wan's blocks: it says what the file looks like."""
    names = list(names)
    found = looks_like(names)
    example, what, advice = found or (None, "no model that PackForcing knows", CHOOSE_CAUSAL_WAN)
    return PackForcingError(
        f"{source} is not a Wan 2.1 text-to-video model: found {some(names, 'tensor', example)}, which is "
        f"{what}; {advice}."
    )


def _refusal(source: str, what: str, advice: str) -> str:
    """The refusal of a Wan that is not for text-to-video."""
    return f"{source} is not a Wan 2.1 text-to-video model: it is {what}; {advice}."
