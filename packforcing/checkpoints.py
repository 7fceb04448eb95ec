"""Reading the weights of every causal-Wan flavour, and saying clearly what is wrong with a file.

Nothing here runs code that a file brings along: safetensors are mapped, and torch files are read with
`weights_only=True`. Tensors stay on disk until they are used (memory-mapped), so of a file with two weight sets
only the one that is used costs memory.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import PackForcingError

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

# What trainers call the weights inside a torch file. Self-Forcing saves generator, critic, generator_ema
# (its published DMD file holds generator_ema alone); Causal-Forcing generator_ema or generator; CausVid
# generator and critic; LongLive generator, generator_ema or model. The rest are the habits of forks.
EMA_NAMES = ("generator_ema", "ema", "model_ema", "ema_model", "state_dict_ema")
RAW_NAMES = ("generator", "model", "state_dict", "module")

COMPRESSOR_KEY = "packforcing.compressor"
COMPRESSOR_VERSION = 1

_CHOOSE_CAUSAL_WAN = "choose a causal Wan checkpoint (Self-Forcing, Causal-Forcing, CausVid) instead"
_DOWNLOAD_AGAIN = "download the file again"


# --------------------------------------------------------------------------------------------- reading a file


def read_state_dict(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a weights file without running anything that is in it.

    Args:
        path: `.safetensors`/`.sft`, or a torch file (`.pt`, `.pth`, `.ckpt`, `.bin`).

    Returns:
        (checkpoint, metadata). The checkpoint is as the file has it: names to tensors, or, for a torch file,
        perhaps weight sets under names (see `pick_weight_set`). Tensors are on the CPU and memory-mapped
        where the format allows. Metadata is the safetensors header's, or the plain top-level values of a
        torch file (step, ...).

    Raises:
        PackForcingError: the file is missing, not a weights file, damaged, or would run code.
    """
    path = Path(path)
    head = _read_head(path)
    suffix = path.suffix.lower()
    if suffix == ".gguf" or head.startswith(b"GGUF"):
        raise PackForcingError(
            f"{path} is a GGUF file, which PackForcing does not read itself: load it with a GGUF loader node "
            "and connect that node's MODEL instead."
        )
    if suffix not in SAFETENSORS_SUFFIXES + TORCH_SUFFIXES:
        raise PackForcingError(
            f"{path} has the suffix '{suffix}', and weights files end in "
            f"{', '.join(SAFETENSORS_SUFFIXES + TORCH_SUFFIXES)}: choose such a file."
        )
    _refuse_text(path, head)
    return _read_safetensors(path, head) if suffix in SAFETENSORS_SUFFIXES else _read_torch(path, head)


def _read_head(path: Path) -> bytes:
    """The first bytes of a regular, non-empty file."""
    if path.is_dir():
        raise PackForcingError(f"{path} is a folder, not a weights file: choose the file inside it.")
    if not path.exists():
        raise PackForcingError(f"{path} does not exist: check the name, or download the file.")
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise PackForcingError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if not head:
        raise PackForcingError(f"{path} is empty (0 bytes): {_DOWNLOAD_AGAIN}.")
    return head


def _refuse_text(path: Path, head: bytes) -> None:
    """Name the texts that are commonly saved in place of weights."""
    if _is_safetensors(head):  # the eight bytes of its length may look like text
        return
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise PackForcingError(
            f"{path} is a git-lfs pointer of {path.stat().st_size} bytes, not the weights it points to: run "
            "'git lfs pull' where it came from, or download the file itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise PackForcingError(
            f"{path} is a web page, not weights: download the file itself (on Hugging Face the 'resolve' "
            "link, not the 'blob' page; gated models need a login)."
        )
    if text.startswith((b'{"', b"{\n")):
        raise PackForcingError(
            f"{path} is JSON text (a configuration, an index, or a server's error message), not weights: "
            "choose the weights file itself, or download it again."
        )


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _is_torch(head: bytes) -> bool:
    return head.startswith((b"PK\x03\x04", b"\x80"))


def _read_safetensors(path: Path, head: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    if _is_torch(head) and not _is_safetensors(head):
        raise PackForcingError(f"{path} is a torch file under a safetensors name: rename it so that it ends in .pt.")
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # the reader's own exception type has no public base class
        raise _damaged(path, error) from error


def _read_torch(path: Path, head: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    if _is_safetensors(head) and not _is_torch(head):
        raise PackForcingError(
            f"{path} is a safetensors file under a torch name: rename it so that it ends in .safetensors."
        )
    if not _is_torch(head):
        raise PackForcingError(
            f"{path} is not a torch file: it starts with the bytes {head[:8].hex(' ')}; {_DOWNLOAD_AGAIN}, "
            "or choose another."
        )
    is_zip = head.startswith(b"PK")
    if is_zip:
        _check_torch_zip(path)
    elif tarfile.is_tarfile(path):
        # torch before 2.6 unpickled old tar files even with weights_only=True (CVE-2025-32434).
        raise PackForcingError(f"{path} is a tar archive, not weights: unpack it and choose the file inside.")
    checkpoint = _torch_load(path, is_zip)
    if not isinstance(checkpoint, Mapping):
        raise PackForcingError(f"{path} holds a {type(checkpoint).__name__}, not named weights: {_CHOOSE_CAUSAL_WAN}.")
    metadata = {str(k): str(v) for k, v in checkpoint.items() if isinstance(v, (str, bool, int, float))}
    return dict(checkpoint), metadata


def _check_torch_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    inner = {name.partition("/")[2] for name in names}
    if "data.pkl" not in inner:
        raise PackForcingError(
            f"{path} is a zip archive that torch did not write (it holds {_some(names)}): unpack it and "
            "choose the weights file inside."
        )
    if "constants.pkl" in inner:
        raise PackForcingError(
            f"{path} is a TorchScript program, which would run code, not weights: {_CHOOSE_CAUSAL_WAN}."
        )


# How torch (2.1 and later) names the class or function that a pickle asks for and weights_only refuses.
_NEEDS_CODE = re.compile(r"(?:GLOBAL|Unsupported class|unrecognized function|objects, but got) <?([A-Za-z_][\w.]+)")


def _torch_load(path: Path, is_zip: bool) -> Any:
    name = os.fspath(path)
    try:
        if is_zip:
            try:
                return torch.load(name, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                pass  # some network drives cannot be mapped; a damaged file fails once more below
        return torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        needs = _NEEDS_CODE.search(str(error))
        if needs is None:
            raise _damaged(path, error) from error
        raise PackForcingError(
            f"{path} holds more than weights: unpickling it would run '{needs[1]}', and nothing of it was "
            "run; use a .safetensors version of the model, or one saved as plain tensors."
        ) from error


def _damaged(path: Path, error: Exception) -> PackForcingError:
    # torch wraps the reason of an unpickling error in advice to load unsafely, which is not passed on.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    reason = text.split("\n")[0].rstrip(".")[:160] or type(error).__name__
    return PackForcingError(
        f"{path} is damaged, incomplete or of another format: it has {path.stat().st_size:,} bytes and "
        f"cannot be read to its end ({reason}); {_DOWNLOAD_AGAIN}, or choose another."
    )


# -------------------------------------------------------------------------------- weight sets and their names


def pick_weight_set(
    checkpoint: Mapping[str, Any], which: str = "auto", source: str = "the checkpoint"
) -> dict[str, Tensor]:
    """One set of weights out of a checkpoint, under the names it has there.

    Args:
        checkpoint: what `read_state_dict` gave.
        which: "ema" (averaged weights), "raw" (the trained ones), or "auto" (EMA if there, else raw).
        source: how to call the checkpoint in an error.

    Raises:
        PackForcingError: the set is not in the checkpoint; the sentence lists what is.
    """
    return _choose(checkpoint, which, source)[1]


def _choose(checkpoint: Mapping[str, Any], which: str, source: str) -> tuple[str, dict[str, Tensor]]:
    """(name of the set in the file, its tensors); the name is "" where the file is one flat set."""
    wanted = {"auto": EMA_NAMES + RAW_NAMES, "ema": EMA_NAMES, "raw": RAW_NAMES}.get(which)
    if wanted is None:
        raise PackForcingError(f"There is no weight set '{which}': choose auto, ema or raw.")
    sets = {str(k): _tensors(v) for k, v in checkpoint.items() if isinstance(v, Mapping) and _tensors(v)}
    for name in wanted:
        if name in sets:
            return name, sets[name]
    flat = _tensors(checkpoint)
    if flat and not sets and which != "ema":
        return "", flat
    if flat and not sets:
        raise PackForcingError(
            f"{source} has no EMA weights to choose: found one set of {_some(flat, 'tensor')}; choose auto."
        )
    known = [name for name in EMA_NAMES + RAW_NAMES if name in sets]
    if known:
        raise PackForcingError(f"{source} has no {which} weights: found {_quoted(known)}; choose auto.")
    if any(name.endswith("_lora") for name in sets):  # LongLive saves generator_lora, critic_lora, step
        raise PackForcingError(
            f"{source} is a LoRA ({_quoted(sets)}), not a model: load its base model here, and apply this "
            "file with a LoRA loader node."
        )
    raise PackForcingError(
        f"{source} holds no generator weights: found {_quoted(checkpoint) or 'nothing'}; {_CHOOSE_CAUSAL_WAN}."
    )


def _tensors(mapping: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}


# Wrappers of torch leave their names wherever they wrapped a module: Self-Forcing's and Causal-Forcing's EMA
# names are model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.weight.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
_OUTER = frozenset({"model", "module", "diffusion_model"})


def strip_prefixes(state_dict: Mapping[str, Tensor], source: str = "the checkpoint") -> dict[str, Tensor]:
    """The same tensors under bare names, e.g. `blocks.0.self_attn.q.weight`, whatever wrapped the module.

    Raises:
        PackForcingError: two tensors would get one name.
    """
    bare: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        short = _strip(name)
        if short in bare:
            raise PackForcingError(
                f"{source} holds two tensors that are both '{short}' once wrappers' prefixes are removed "
                f"(one is '{name}'): keep one set of weights in the file."
            )
        bare[short] = tensor
    return bare


def _strip(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _OUTER:
        del parts[0]
    return ".".join(parts)


# The names of diffusers' WanTransformer3DModel, as its scripts/convert_wan_to_diffusers.py writes them. It
# renames without touching a tensor; norm1 and its norm3 (Wan's norm2) have no weights.
_DIFFUSERS_OUTER = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
_DIFFUSERS_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    **{
        f"{theirs}.{part}": f"{ours}.{short}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for part, short in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
}


def from_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wan 2.1's names for a state dict that may have diffusers' names (`blocks.0.attn1.to_q.weight`)."""
    if not any(re.fullmatch(r"blocks\.\d+\.attn1\.to_q\.weight", name) for name in state_dict):
        return dict(state_dict)
    return {_from_diffusers_name(name): tensor for name, tensor in state_dict.items()}


def _from_diffusers_name(name: str) -> str:
    block = re.match(r"blocks\.\d+\.", name)
    prefix = block[0] if block else ""
    rest = name[len(prefix) :]
    for theirs, ours in (_DIFFUSERS_BLOCK if block else _DIFFUSERS_OUTER).items():
        if rest == theirs or rest.startswith(f"{theirs}."):
            return prefix + ours + rest[len(theirs) :]
    return name


# ---------------------------------------------------------------------------------------------- what a Wan is


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

    state_dict: dict[str, Tensor]  # memory-mapped where the file allows; dtype as in the file
    shape: WanShape
    metadata: dict[str, str]
    weight_set: str  # the set's name in the file, e.g. "generator_ema"; "" where the file is one flat set


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
    weight_set, chosen = _choose(checkpoint, which, source)
    state_dict = from_diffusers(strip_prefixes(chosen, source))
    return LoadedWan(state_dict, check_wan(state_dict, source), metadata, weight_set)


# Also under diffusers' names, which from_diffusers leaves alone here: such a model is only ever refused.
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
            raise PackForcingError(f"{source} is not a complete Wan model: '{name}' is missing; {_CHOOSE_CAUSAL_WAN}.")
        shape = tuple(state_dict[name].shape)
        if len(shape) != axes or 0 in shape:
            raise PackForcingError(
                f"{source} is not a Wan model that can be used: '{name}' has shape {list(shape)} where "
                f"{axes} axes were expected; {_CHOOSE_CAUSAL_WAN}."
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


def check_wan(state_dict: Mapping[str, Tensor], source: str = "the state dict") -> WanShape:
    """Refuse what is not a complete Wan 2.1 text-to-video transformer under Wan 2.1's bare names.

    More tensors than Wan has are left alone (fp8 files carry scales). Values are not looked at.

    Returns:
        Its sizes.

    Raises:
        PackForcingError: the sentence says what the weights look like, or which tensors are missing or
            misshapen.
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
            f"{source} is not a complete Wan model: it lacks {_quoted(missing)}; {_incomplete_advice(source)}."
        )
    shape = describe_wan(state_dict, source)
    _check_kind(shape, source)
    _check_shapes(state_dict, shape, source)
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
    raise PackForcingError(_refusal(source, what, _CHOOSE_CAUSAL_WAN))


def _check_shapes(state_dict: Mapping[str, Tensor], shape: WanShape, source: str) -> None:
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
            f"{', '.join(wrong[:3])}{more}; {_CHOOSE_CAUSAL_WAN}."
        )


def _expected_shapes(shape: WanShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Wan 2.1 text-to-video transformer."""
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
    return _expected_shapes(WanShape(128, layers, 1, 16, 16, 1, 1, 1, (1, 2, 2), False))


def _block_numbers(names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(r"blocks\.(\d{1,4})\.", name))}


def _first_gap(numbers: set[int]) -> int:
    return next(i for i in range(len(numbers) + 1) if i not in numbers)


def _incomplete_advice(source: str) -> str:
    if re.search(r"-\d{5}-of-\d{5}", source):
        return "this is one part of a model in several files, so choose a version of it in a single file"
    return "choose a complete checkpoint, or download the file again"


# ------------------------------------------------------------------------------------ what else a file may be

_WAN_BLOCK = re.compile(r"blocks\.\d{1,4}\.self_attn\.q\.(weight|quantized_weight_values)")

# Wans with further inputs (the names by which ComfyUI tells them apart), and weights in a form that torch
# cannot multiply.
_QUANTISED_OR_OTHER = [
    (re.compile(pattern), what, advice)
    for pattern, what, advice in (
        (r"quantized_weight_values$", "a Wan in LongLive's packed NVFP4 form", "choose its bf16 version"),
        (r"^vace_", "a Wan VACE model", _CHOOSE_CAUSAL_WAN),
        (r"^control_adapter\.", "a Wan camera-control model", _CHOOSE_CAUSAL_WAN),
        (r"^(casual_audio_encoder|audio_proj)\.", "a Wan speech-to-video model", _CHOOSE_CAUSAL_WAN),
        (r"^(face_adapter|motion_encoder)\.", "a Wan Animate model", _CHOOSE_CAUSAL_WAN),
        (r"^ref_conv\.", "a Wan reference-image model", _CHOOSE_CAUSAL_WAN),
    )
]

_LORA_ADVICE = "load its base model here, and apply this file with a LoRA loader node"

# First match wins: a LoRA names the modules of the model it belongs to. Names are bare (see strip_prefixes).
_OTHER_FILES = [
    (re.compile(pattern), what, advice)
    for pattern, what, advice in (
        (r"\blora_?(A|B|up|down)\b|^lora_|\.lora\.|\.(hada|lokr)_w\d|\.diff$", "a LoRA", _LORA_ADVICE),
        (r"^hr\.\d+\.weight$", "a PackForcing compressor", "give it to the compressor loader"),
        (r"^blocks\.\d+\.self_attn\.q\.", "a Wan diffusion model", _CHOOSE_CAUSAL_WAN),
        (r"^blocks\.\d+\.attn1\.to_q\.", "a diffusers-format Wan", _CHOOSE_CAUSAL_WAN),
        (r"^(encoder\.downsamples|decoder\.upsamples)\.", "a Wan VAE", _CHOOSE_CAUSAL_WAN),
        (r"^(encoder|decoder)\.(mid_block|down_blocks|up_blocks)\.", "a diffusers-format VAE", _CHOOSE_CAUSAL_WAN),
        (r"^(first_stage_model\.)?decoder\.(up|mid)\.(\d|block)", "an image VAE", _CHOOSE_CAUSAL_WAN),
        (r"^token_embedding\.weight$|\.SelfAttention\.q\.", "a UMT5 text encoder", _CHOOSE_CAUSAL_WAN),
        (r"^(visual\.transformer|vision_model)\.", "a CLIP vision encoder", _CHOOSE_CAUSAL_WAN),
        (r"^text_model\.encoder\.", "a CLIP text encoder", _CHOOSE_CAUSAL_WAN),
        (r"^label_emb\.\d|^add_embedding\.", "an SDXL UNet", _CHOOSE_CAUSAL_WAN),
        (r"^input_blocks\.|^down_blocks\.\d+\.resnets\.", "a Stable Diffusion UNet", _CHOOSE_CAUSAL_WAN),
        (r"^txt_in\.individual_token_refiner\.", "a HunyuanVideo model", _CHOOSE_CAUSAL_WAN),
        (r"^double_blocks\.|^single_transformer_blocks\.", "a Flux model", _CHOOSE_CAUSAL_WAN),
        (r"^joint_blocks\.", "a Stable Diffusion 3 model", _CHOOSE_CAUSAL_WAN),
        (r"^transformer_blocks\.", "another model's diffusion transformer", _CHOOSE_CAUSAL_WAN),
    )
]


def _looks_like(names: Iterable[str]) -> tuple[str, str, str] | None:
    """(a name that gives it away, what it is, what to do when a Wan was wanted), or None."""
    names = list(names)
    for pattern, what, advice in _OTHER_FILES:
        for name in names:
            if pattern.search(_strip(name)):
                return name, what, advice
    return None


def _not_wan(source: str, names: Iterable[str]) -> PackForcingError:
    names = list(names)
    found = _looks_like(names)
    example, what, advice = found or (None, "no model that PackForcing knows", _CHOOSE_CAUSAL_WAN)
    return PackForcingError(
        f"{source} is not a Wan 2.1 text-to-video model: found {_some(names, 'tensor', example)}, which is "
        f"{what}; {advice}."
    )


def _refusal(source: str, what: str, advice: str) -> str:
    return f"{source} is not a Wan 2.1 text-to-video model: it is {what}; {advice}."


def _quoted(names: Iterable[str], most: int = 3) -> str:
    names = [str(name) for name in names]
    shown = ", ".join(f"'{name[:80]}'" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _some(names: Iterable[str], noun: str = "file", example: str | None = None) -> str:
    names = list(names)
    such = f" such as '{(example or names[0])[:80]}'" if names else ""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}{such}"


# ------------------------------------------------------------------------------------------- compressor files


@dataclass(frozen=True, kw_only=True)
class CompressorMetadata:
    """What a compressor file says about its HR branch (method, section 4); checks itself."""

    format_version: int = COMPRESSOR_VERSION
    model_dim: int  # width of the Wan it was trained with
    latent_channels: int = 16
    temporal_stride: int  # 1 or 2; 2 needs blocks of an even number of latent frames
    hidden_channels: tuple[int, ...]  # between latent_channels and model_dim, e.g. (32, 128, 512, 2048)
    block_frames: int  # latent frames a block
    base_model: str = ""  # free text

    def __post_init__(self) -> None:
        _check_version("The compressor", self.format_version)
        names = ("model_dim", "latent_channels", "temporal_stride", "block_frames")
        numbers = {name: getattr(self, name) for name in names}
        numbers |= {f"hidden_channels[{i}]": n for i, n in enumerate(self.hidden_channels)}
        for name, number in numbers.items():
            if type(number) is not int or number < 1:
                raise PackForcingError(f"The compressor's {name} is {number!r}: it must be a whole number above 0.")
        if self.temporal_stride not in (1, 2):
            raise PackForcingError(f"The compressor's temporal_stride is {self.temporal_stride!r}: it must be 1 or 2.")
        if self.block_frames % self.temporal_stride:
            raise PackForcingError(
                f"The compressor's temporal_stride {self.temporal_stride} does not divide its block_frames "
                f"{self.block_frames}: use stride 1 for blocks of an odd number of frames."
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels before, between and after the HR branch's convolutions; one convolution a step."""
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
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={COMPRESSOR_KEY: json.dumps(asdict(metadata))})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_compressor(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], CompressorMetadata]:
    """Read a compressor file that `save_compressor` wrote.

    Returns:
        (state dict with `hr.{i}.weight`/`hr.{i}.bias`, on the CPU; metadata).

    Raises:
        PackForcingError: not a compressor file, of an unknown version, or weights that disagree with the
            metadata or are not finite.
    """
    source = os.fspath(path)
    checkpoint, header = read_state_dict(path)
    text = header.get(COMPRESSOR_KEY)
    if text is None or Path(path).suffix.lower() not in SAFETENSORS_SUFFIXES:
        sets = [value for value in checkpoint.values() if isinstance(value, Mapping)]
        names = [str(name) for group in (sets or [checkpoint]) for name in group]
        what = _looks_like(names)
        looks = f", which is {what[1]}" if what and "compressor" not in what[1] else ""
        raise PackForcingError(
            f"{source} is not a PackForcing compressor: it is no safetensors file with '{COMPRESSOR_KEY}' in "
            f"its header (found {_some(names, 'tensor')}{looks}); choose a file that PackForcing's training "
            "wrote, or run without one."
        )
    metadata = _parse_metadata(text, source)
    _check_compressor(checkpoint, metadata, source)
    return checkpoint, metadata


def _parse_metadata(text: str, source: str) -> CompressorMetadata:
    try:
        values = json.loads(text)
        _check_version(source, values["format_version"])  # first: another version may have other fields
        values = {field.name: values[field.name] for field in fields(CompressorMetadata)}
        values["hidden_channels"] = tuple(values["hidden_channels"])
        values["base_model"] = str(values["base_model"])
    except PackForcingError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise PackForcingError(
            f"{source} has damaged compressor metadata ({type(error).__name__}: {error}); {_DOWNLOAD_AGAIN}, "
            "or export it again."
        ) from error
    try:
        return CompressorMetadata(**values)
    except PackForcingError as error:
        raise PackForcingError(f"{source} cannot be used: {error}") from error


def _check_version(source: str, version: Any) -> None:
    if version != COMPRESSOR_VERSION:
        raise PackForcingError(
            f"{source} has compressor format version {version!r}, and this PackForcing knows version "
            f"{COMPRESSOR_VERSION}: update PackForcing, or choose another compressor."
        )


def _check_compressor(state_dict: Mapping[str, Tensor], metadata: CompressorMetadata, source: str) -> None:
    steps = list(enumerate(pairwise(metadata.channels)))
    expected = {f"hr.{i}.{part}" for i, _ in steps for part in ("weight", "bias")}
    if expected != set(state_dict):
        raise PackForcingError(
            f"{source} does not hold the {len(steps)} convolutions that its metadata tells of: missing "
            f"{_quoted(sorted(expected - set(state_dict))) or 'none'}, unexpected "
            f"{_quoted(sorted(set(state_dict) - expected)) or 'none'}; export it again."
        )
    for i, (before, after) in steps:
        weight, bias = state_dict[f"hr.{i}.weight"], state_dict[f"hr.{i}.bias"]
        if weight.dim() != 5 or tuple(weight.shape[:2]) != (after, before) or tuple(bias.shape) != (after,):
            raise PackForcingError(
                f"{source} disagrees with its metadata: 'hr.{i}' has weight {list(weight.shape)} and bias "
                f"{list(bias.shape)} instead of [{after}, {before}, time, height, width] and [{after}]; "
                "export it again."
            )
    for name, tensor in state_dict.items():
        if not (tensor.is_floating_point() and torch.isfinite(tensor.float()).all()):
            raise PackForcingError(
                f"{source} cannot be used: '{name}' ({tensor.dtype}) holds values that are not finite "
                "numbers; choose an earlier compressor of that training."
            )
