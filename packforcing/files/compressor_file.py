"""The compressor's file: its format, how it is written and read, and what is refused."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_kind, shown
from ..errors import PackForcingError
from .file_kinds import PACK_COMPRESSOR, bare_name, looks_like
from .wan_names import named_weight_set
from .weights import DOWNLOAD_AGAIN, SAFETENSORS_SUFFIXES, quoted, read_json, read_state_dict, some
from .writing import save_tensors

COMPRESSOR_KEY = "packforcing.compressor"
COMPRESSOR_VERSION = 1
LATENT_NET = "net."  # begins the names of a compressor out of a checkpoint of PackForcing-Unofficial


@dataclass(frozen=True, kw_only=True)
class CompressorMetadata:
    """What a compressor file says about its HR branch (docs/method.md, section 4).

    Raises PackForcingError for sizes that no compressor has.
    """

    format_version: int = COMPRESSOR_VERSION
    model_dim: int  # width of the Wan it was trained with
    latent_channels: int = 16
    temporal_stride: int  # 1 or 2; 2 needs blocks of an even number of latent frames
    hidden_channels: tuple[int, ...]  # between latent_channels and model_dim, e.g. (32, 128, 512, 2048)
    block_frames: int  # latent frames a block
    base_model: str = ""  # free text

    def __post_init__(self) -> None:
        _check_version("The compressor", self.format_version)
        check_kind("The compressor's hidden_channels", self.hidden_channels, tuple)
        names = ("model_dim", "latent_channels", "temporal_stride", "block_frames")
        numbers = {name: getattr(self, name) for name in names}
        numbers |= {f"hidden_channels[{i}]": n for i, n in enumerate(self.hidden_channels)}
        for name, number in numbers.items():
            if type(number) is not int or number < 1:
                raise PackForcingError(
                    f"The compressor's {name} is {shown(number)}: it must be a whole number above 0."
                )
        if self.temporal_stride not in (1, 2):
            raise PackForcingError(
                f"The compressor's temporal_stride is {shown(self.temporal_stride)}: it must be 1 or 2."
            )
        if self.block_frames % self.temporal_stride:
            raise PackForcingError(
                f"The compressor's temporal_stride {self.temporal_stride} does not divide its block_frames "
                f"{self.block_frames}: use stride 1 for blocks of an odd number of frames."
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels before, between and after the HR branch's convolutions: each step is one convolution."""
        return (self.latent_channels, *self.hidden_channels, self.model_dim)


def save_compressor(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], metadata: CompressorMetadata
) -> None:
    """Write a compressor file; a run that is stopped midway leaves no half file under `path`.

    Args:
        path: ends in `.safetensors`, in a folder that exists.
        state_dict: `hr.{i}.weight` [out, in, kt, kh, kw] and `hr.{i}.bias` [out] of each convolution.
        metadata: agrees with them.

    Raises:
        PackForcingError: path, weights or metadata would not load again.
    """
    path = Path(path)
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES or not path.parent.is_dir():
        raise PackForcingError(f"{path} must end in .safetensors and lie in a folder that exists: change the path.")
    _check_compressor(state_dict, metadata, f"The compressor for {path}")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    save_tensors(path, tensors, {COMPRESSOR_KEY: json.dumps(asdict(metadata))}, "compressor")


def load_compressor(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], CompressorMetadata]:
    """Read a compressor file that `save_compressor` wrote, or the compressor in a file of PackForcing-Unofficial.

    Returns:
        (state dict with `hr.{i}.weight`/`hr.{i}.bias`, on the CPU; metadata). For PackForcing-Unofficial the names are
        `net.{i}.weight` and `net.{i}.bias`, and the metadata is read from the tensors' sizes.

    Raises:
        PackForcingError: not a compressor file, of an unknown version, or weights that disagree with the
            metadata or are not finite.
    """
    source = os.fspath(path)
    checkpoint, header = read_state_dict(path)
    net = _latent_net(checkpoint, source)
    if net:
        return net, _latent_metadata(net, source)
    text = header.get(COMPRESSOR_KEY)
    if text is None or Path(path).suffix.lower() not in SAFETENSORS_SUFFIXES:
        sets = [value for value in checkpoint.values() if isinstance(value, Mapping)]
        names = [str(name) for group in (sets or [checkpoint]) for name in group]
        kind = looks_like(names)
        looks = f", which is {kind.what}" if kind and "compressor" not in kind.what else ""
        raise PackForcingError(
            f"{source} is not a PackForcing compressor: it is no safetensors file with '{COMPRESSOR_KEY}' in "
            f"its header (found {some(names, 'tensor')}{looks}); choose a file that PackForcing's training "
            "wrote, or run without one."
        )
    metadata = _parse_metadata(text, source)
    _check_compressor(checkpoint, metadata, source)
    return checkpoint, metadata


def _parse_metadata(text: str, source: str) -> CompressorMetadata:
    """Metadata from the header's JSON."""
    try:
        values = read_json(text)
        _check_version(source, values["format_version"])  # first: another version may have other fields
        values = {field.name: values[field.name] for field in fields(CompressorMetadata)}
        values["hidden_channels"] = tuple(values["hidden_channels"])
        values["base_model"] = str(values["base_model"])
    except PackForcingError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise PackForcingError(
            f"{source} has damaged compressor metadata ({type(error).__name__}: {error}); {DOWNLOAD_AGAIN}, "
            "or export it again."
        ) from error
    try:
        return CompressorMetadata(**values)
    except PackForcingError as error:
        raise PackForcingError(f"{source} cannot be used: {error}") from error


def _check_version(source: str, version: Any) -> None:
    if version != COMPRESSOR_VERSION:
        raise PackForcingError(
            f"{source} has compressor format version {shown(version)}, and this PackForcing knows version "
            f"{COMPRESSOR_VERSION}: update PackForcing, or choose another compressor."
        )


def _check_compressor(state_dict: Mapping[str, Tensor], metadata: CompressorMetadata, source: str) -> None:
    """Refuse weights that disagree with the metadata or are not finite."""
    steps = list(enumerate(pairwise(metadata.channels)))
    expected = {f"hr.{i}.{part}" for i, _ in steps for part in ("weight", "bias")}
    if expected != set(state_dict):
        raise PackForcingError(
            f"{source} does not hold the {len(steps)} convolutions that its metadata tells of: missing "
            f"{quoted(sorted(expected - set(state_dict))) or 'none'}, unexpected "
            f"{quoted(sorted(set(state_dict) - expected)) or 'none'}; export it again."
        )
    for i, (before, after) in steps:
        weight, bias = state_dict[f"hr.{i}.weight"], state_dict[f"hr.{i}.bias"]
        if weight.dim() != 5 or tuple(weight.shape[:2]) != (after, before) or tuple(bias.shape) != (after,):
            raise PackForcingError(
                f"{source} disagrees with its metadata: 'hr.{i}' has weight {list(weight.shape)} and bias "
                f"{list(bias.shape)} instead of [{after}, {before}, time, height, width] and [{after}]; "
                "export it again."
            )
    _check_finite(state_dict, source)


def _check_finite(state_dict: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in state_dict.items():
        if not (tensor.is_floating_point() and torch.isfinite(tensor.float()).all()):
            raise PackForcingError(
                f"{source} cannot be used: '{name}' ({tensor.dtype}) holds values that are not finite "
                "numbers; choose an earlier compressor of that training."
            )


# --- PackForcing-Unofficial ------------------------------------------------------------------------------------

# github.com/AshadowZ/PackForcing-Unofficial, wan/modules/pack_compressor.py: a Sequential of convolutions with SiLU
# between, inside the generator. Its configurations have blocks of 3 latent frames.
_CONVOLUTIONS = {0: (1, 3, 3), 2: (1, 3, 3), 4: (1, 3, 3), 6: (1, 1, 1)}  # place in it -> kernel
_BLOCK_FRAMES = 3
_MOST_NAMES = 16 << 20  # bytes of names and sizes that are read; a Wan has 0.2 MB of them


def _latent_net(checkpoint: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The compressor's tensors in a generator's file, `net.0.weight` and so on; {} where it has none."""
    try:
        _, weights = named_weight_set(checkpoint, "auto", source)
    except PackForcingError:
        return {}
    bare = {bare_name(name): tensor for name, tensor in weights.items()}
    return {
        name.removeprefix(PACK_COMPRESSOR): tensor for name, tensor in bare.items() if name.startswith(PACK_COMPRESSOR)
    }


def _latent_metadata(net: Mapping[str, Tensor], source: str) -> CompressorMetadata:
    """What the tensors' sizes say. Refuses other networks, and numbers that are not finite."""
    names = {f"{LATENT_NET}{i}.{part}" for i in _CONVOLUTIONS for part in ("weight", "bias")}
    if names != set(net):
        raise PackForcingError(
            f"{source} has a compressor inside of a kind that is not known: missing "
            f"{quoted(sorted(names - set(net))) or 'none'}, unexpected {quoted(sorted(set(net) - names)) or 'none'}; "
            "choose another compressor, or run without one."
        )
    weights = [net[f"{LATENT_NET}{i}.weight"] for i in _CONVOLUTIONS]
    channels = [weights[0].shape[1] if weights[0].ndim > 1 else 0, *map(len, weights)]
    for (i, kernel), (before, after) in zip(_CONVOLUTIONS.items(), pairwise(channels), strict=True):
        found = [list(net[f"{LATENT_NET}{i}.{part}"].shape) for part in ("weight", "bias")]
        if found != [[after, before, *kernel], [after]]:
            raise PackForcingError(
                f"{source} has a compressor inside that cannot be used: weight and bias of '{LATENT_NET}{i}' are "
                f"{found[0]} and {found[1]}, where {[after, before, *kernel]} and {[after]} were expected; choose "
                "another compressor, or run without one."
            )
    _check_finite(net, source)
    return CompressorMetadata(
        model_dim=channels[-1],
        latent_channels=channels[0],
        temporal_stride=1,
        hidden_channels=tuple(channels[1:-1]),
        block_frames=_BLOCK_FRAMES,
        base_model="PackForcing-Unofficial",
    )


def has_compressor_inside(path: Path) -> bool:
    """Whether a checkpoint brings a compressor of PackForcing-Unofficial, from the names in it alone. Reads no weights,
    unpickles nothing, and is False for what cannot be read."""
    try:
        if path.suffix.lower() in SAFETENSORS_SUFFIXES:
            with path.open("rb") as file:
                names = file.read(min(int.from_bytes(file.read(8), "little"), _MOST_NAMES))
        else:
            with zipfile.ZipFile(path) as archive:
                [pickle] = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
                with archive.open(pickle) as file:
                    names = file.read(_MOST_NAMES)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False
    return PACK_COMPRESSOR.encode() in names
