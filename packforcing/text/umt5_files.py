"""The files that hold UMT5's encoder: three layouts, one set of names.

- ComfyUI's file (`umt5_xxl_fp16.safetensors`, `umt5_xxl_fp8_e4m3fn_scaled.safetensors`): Hugging Face's names. The
  tokenizer is a tensor of its own, `spiece_model`, and a weight in fp8 may have its factor beside it (`scale_weight`).
- The Wan authors' file (`models_t5_umt5-xxl-enc-bf16.pth`): names of their own, and the tokenizer in a folder beside it
  (`google/umt5-xxl`).
- A Hugging Face folder (`config.json`, shards and their index), with the tokenizer in it or in `tokenizer` beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PackForcingError
from ..files.file_kinds import bare_name, looks_like
from ..files.weights import DOWNLOAD_AGAIN, quoted, read_json, read_state_dict

SPIECE_TENSOR = "spiece_model"  # ComfyUI's files hold the tokenizer as a tensor of bytes
SPIECE_FILE = "spiece.model"
EMBEDDING = "shared.weight"
WANTED = "give --text-encoder the UMT5-XXL of Wan 2.1 (ComfyUI's file, the Wan authors' or a Hugging Face folder)"

# The factor of a weight in fp8, instead of `weight`: ComfyUI's older and newer name.
_SCALES = ("scale_weight", "weight_scale")

# The Wan authors' names, and Hugging Face's.
_WAN_LAYER = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_WAN = {"token_embedding.weight": EMBEDDING, "norm.weight": "encoder.final_layer_norm.weight"}
LAYER_NAMES = tuple(_WAN_LAYER.values())


@dataclass(frozen=True)
class UMT5File:
    """The weights of UMT5's encoder under Hugging Face's names, memory-mapped where the format allows."""

    path: Path
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]  # the factors of weights in fp8, by the weight's name
    spiece: bytes | None  # the tokenizer, if the file has it

    @property
    def layers(self) -> int:
        return layer_count(self.tensors)

    def weight(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor on a device, times its factor if it has one."""
        tensor = self.tensors[name].to(device).to(dtype)  # moved first: the file's type is the smaller one
        scale = self.scales.get(name)
        return tensor if scale is None else tensor * scale.to(device, dtype)

    def rows(self, name: str, ids: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Some rows of a matrix, times its factor if it has one: those that the ids [L] name, [L, width]."""
        matrix = self.tensors[name]
        # fp8 has no indexing on the CPU, but its bytes have.
        found = matrix.view(torch.uint8)[ids].view(matrix.dtype) if matrix.itemsize == 1 else matrix[ids]
        # A plain fp8 file has NaN for embeddings beyond fp8's range; ComfyUI takes 0 for them, too.
        rows = torch.nan_to_num(found.to(device).to(dtype)) if matrix.itemsize == 1 else found.to(device, dtype)
        scale = self.scales.get(name)
        return rows if scale is None else rows * scale.to(device, dtype)


def layer_count(names: Iterable[str]) -> int:
    """One more than the highest layer's number; 0 where there is none."""
    numbers = (re.match(r"encoder\.block\.(\d+)\.", name) for name in names)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def read_umt5(path: str) -> UMT5File:
    """Maps the encoder's weights.

    Raises PackForcingError when there are none, when they are another model's, or when some are missing.
    """
    files = weight_files(Path(path))
    named: dict[str, Tensor] = {}
    for file in files:
        named |= {name: each for name, each in read_state_dict(file)[0].items() if isinstance(each, Tensor)}
    shown = Path(path) if len(files) > 1 else files[0]
    found = UMT5File(shown, *named_alike(named), spiece_of(named))
    check_umt5(found, named)
    return found


# --- where the files are ----------------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files of the weights that a path means: a file, or those of a folder. Raises PackForcingError for none."""
    if not path.is_dir():
        return [path]  # one that is missing is told when it is read
    for folder in (path, path / "text_encoder"):
        for index in sorted(folder.glob("*.index.json"), key=lambda each: "safetensors" not in each.name):
            return indexed_files(index)
        for pattern in ("model*.safetensors", "pytorch_model*.bin", "models_t5*.pth", "*umt5*.safetensors"):
            if files := sorted(folder.glob(pattern)):
                return files if "-of-" in files[0].name else files[:1]
    raise PackForcingError(f"The folder {path} has no weights of a text encoder: {WANTED}.")


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names. Raises PackForcingError when it cannot be read or one is missing."""
    try:
        names = sorted(set(read_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError("it names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackForcingError(f"{index} is no index of weights: {DOWNLOAD_AGAIN}.") from error
    missing = [name for name in names if not os.path.isfile(index.parent / name)]  # also of a name too long
    if missing or not names:
        raise PackForcingError(
            f"The folder {index.parent} lacks {len(missing)} of the {len(names)} files of its weights "
            f"({quoted(missing)}): download them, too."
        )
    return [index.parent / name for name in names]


def tokenizer_near(path: Path) -> Path | None:
    """The tokenizer's file in the places where the layouts have it, seen from the weights' path; None if nowhere."""
    folder = path if path.is_dir() else path.parent
    places = (".", "tokenizer", "../tokenizer", "google/umt5-xxl")
    return next((file for place in places if (file := folder / place / SPIECE_FILE).is_file()), None)


# --- names ------------------------------------------------------------------------------------------------------------


def hugging_face_name(name: str) -> str:
    """The name of a tensor in a Hugging Face file; one that the Wan authors' file does not have stays."""
    name = bare_name(name)
    if layer := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        inner = _WAN_LAYER.get(layer[2])
        return f"encoder.block.{layer[1]}.{inner}" if inner else name
    return EMBEDDING if name == "encoder.embed_tokens.weight" else _WAN.get(name, name)


def named_alike(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's tensors under Hugging Face's names, and the factors of those in fp8."""
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in named.items():
        outer, _, last = name.rpartition(".")
        if last in _SCALES:
            scales[hugging_face_name(f"{outer}.weight")] = tensor
            continue
        alike = hugging_face_name(name)
        if alike == EMBEDDING or alike.startswith("encoder."):
            tensors[alike] = tensor
    return tensors, scales


def spiece_of(named: Mapping[str, Tensor]) -> bytes | None:
    """The tokenizer that a file has among its tensors."""
    tensor = named.get(SPIECE_TENSOR)
    return None if tensor is None or tensor.dtype != torch.uint8 else tensor.numpy().tobytes()


# --- checks -----------------------------------------------------------------------------------------------------------


def check_umt5(file: UMT5File, named: Mapping[str, object]) -> None:
    """Raises PackForcingError unless the tensors are a whole UMT5 encoder's."""
    path, tensors = file.path, file.tensors
    if EMBEDDING not in tensors or not file.layers:
        kind = looks_like(named)
        what = kind.what if kind else "another model"
        raise PackForcingError(f"{path} holds no UMT5 text encoder, but {what}: {WANTED}.")
    layers = range(min(file.layers, len(tensors)))  # a number in a name may be any
    wanted = [f"encoder.block.{layer}.{name}" for layer in layers for name in LAYER_NAMES]
    missing = [name for name in [*wanted, "encoder.final_layer_norm.weight"] if name not in tensors]
    if missing and all("relative_attention_bias" in name for name in missing):
        raise PackForcingError(f"{path} is a T5, whose layers share their positions, not a UMT5: {WANTED}.")
    if missing:
        raise PackForcingError(
            f"{path} lacks {len(missing)} tensors of a UMT5 encoder of {file.layers} layers ({quoted(missing)}): "
            f"{DOWNLOAD_AGAIN}."
        )
    for name in (*wanted, EMBEDDING, "encoder.final_layer_norm.weight"):
        check_tensor(file, name)


def check_tensor(file: UMT5File, name: str) -> None:
    """Raises PackForcingError for a tensor of another shape, or of a type that is not known here."""
    tensor, embedding = file.tensors[name], file.tensors[EMBEDDING]
    width = embedding.shape[1] if embedding.ndim == 2 else 0
    scale = file.scales.get(name)
    if not tensor.is_floating_point() or (scale is not None and scale.numel() != 1):
        raise PackForcingError(
            f"{file.path} is quantized in a way that is not read here ('{name}' is {str(tensor.dtype)[6:]}): take the "
            "fp16, bf16 or fp8_e4m3fn_scaled file."
        )
    if name.endswith("norm.weight"):
        fits = tensor.shape == (width,)
    elif name.endswith("relative_attention_bias.weight"):
        rows = file.tensors[name.replace("relative_attention_bias", "q")].shape[0]
        fits = tensor.ndim == 2 and tensor.shape[1] > 0 and rows % tensor.shape[1] == 0
    else:
        fits = tensor.ndim == 2 and tensor.shape[0 if name.endswith((".o.weight", ".wo.weight")) else 1] == width
    if not fits:
        raise PackForcingError(
            f"{file.path} does not fit together: '{name}' has the shape {list(tensor.shape)} beside embeddings {width} "
            f"wide: {WANTED}."
        )
