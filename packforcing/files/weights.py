"""Reading a weights file safely, and saying clearly what is wrong with it.

Nothing here runs code that a file brings along: safetensors files are mapped, and torch files are read with
`weights_only=True`. Tensors are memory-mapped: they stay on disk until they are used. So where a file has two sets of
weights, only the one that is used costs memory.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checks import shown
from ..devices import is_out_of_memory
from ..errors import PackForcingError

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

CHOOSE_CAUSAL_WAN = "choose a causal Wan checkpoint (Self-Forcing, Causal-Forcing, CausVid) instead"
DOWNLOAD_AGAIN = "download the file again"


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
        PackForcingError: the file is missing, not a weights file, damaged, or would run code; or a tensor in it is
            not a dense one that holds what it claims (sparse, nested, quantised by PyTorch, meta, expanded).
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
        raise PackForcingError(f"{path} is empty (0 bytes): {DOWNLOAD_AGAIN}.")
    return head


def _refuse_text(path: Path, head: bytes) -> None:
    """Refuse texts, and name those that are often saved in place of weights."""
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
        if is_out_of_memory(error):  # the sizes in a header are checked, so it is no damage
            raise
        raise _damaged(path, error) from error


def _read_torch(path: Path, head: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    if _is_safetensors(head) and not _is_torch(head):
        raise PackForcingError(
            f"{path} is a safetensors file under a torch name: rename it so that it ends in .safetensors."
        )
    if not _is_torch(head):
        raise PackForcingError(
            f"{path} is not a torch file: it starts with the bytes {head[:8].hex(' ')}; {DOWNLOAD_AGAIN}, "
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
        raise PackForcingError(f"{path} holds a {type(checkpoint).__name__}, not named weights: {CHOOSE_CAUSAL_WAN}.")
    nameless = [name for name, value in checkpoint.items() if isinstance(value, Tensor) and not isinstance(name, str)]
    if nameless:
        raise PackForcingError(
            f"{path} cannot be used: it names a tensor {shown(nameless[0])}, and names of weights are texts; "
            f"{DOWNLOAD_AGAIN}, or choose another."
        )
    _check_dense(checkpoint, path)
    metadata = {str(k): str(v) for k, v in checkpoint.items() if isinstance(v, (str, bool, int, float))}
    return dict(checkpoint), metadata


def _check_torch_zip(path: Path) -> None:
    """Refuse zip archives that torch did not write, and programs."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    inner = {name.partition("/")[2] for name in names}
    if "data.pkl" not in inner:
        raise PackForcingError(
            f"{path} is a zip archive that torch did not write (it holds {some(names)}): unpack it and "
            "choose the weights file inside."
        )
    if "constants.pkl" in inner:
        raise PackForcingError(
            f"{path} is a TorchScript program, which would run code, not weights: {CHOOSE_CAUSAL_WAN}."
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
    """The sentence for a file that cannot be read, with the reader's reason."""
    reason = reason_of(error)
    return PackForcingError(
        f"{path} is damaged, incomplete or of another format: it has {path.stat().st_size:,} bytes and "
        f"cannot be read to its end ({reason}); {DOWNLOAD_AGAIN}, or choose another."
    )


def reason_of(error: Exception) -> str:
    """Why a reader failed, in one line. torch wraps that in advice to load unsafely, which is not passed on."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return text.split("\n")[0].rstrip(".")[:160] or type(error).__name__


# --- tensors ---------------------------------------------------------------------------------------------------


def _check_dense(checkpoint: Mapping[Any, Any], path: Path) -> None:
    """Refuse tensors that are no plain numbers in memory. safetensors has no others."""
    seen, waiting = set(), [checkpoint]  # a pickle may nest mappings as deep as it likes, and in a circle
    while waiting:
        mapping = waiting.pop()
        if id(mapping) in seen:
            continue
        seen.add(id(mapping))
        for name, value in mapping.items():
            if isinstance(value, Mapping):
                waiting.append(value)
            elif isinstance(value, Tensor) and (form := _unusual_form(value)):
                raise PackForcingError(
                    f"{path} cannot be used: '{str(name)[:80]}' is {form}, and weights are dense tensors; choose a "
                    ".safetensors version of the model, or one saved as plain tensors."
                )


def _unusual_form(tensor: Tensor) -> str:
    """What a tensor is that is not dense, or claims more than it holds; "" for any other."""
    if tensor.is_meta:
        return "a meta tensor (a shape without numbers)"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    if tensor.is_quantized:
        return f"a tensor quantised by PyTorch ({tensor.dtype})"
    claimed, held = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
    if claimed > held:
        return f"an expanded tensor that claims {claimed:,} bytes and holds {held:,}"
    return ""


def check_floating(tensors: Mapping[str, Any], source: str) -> None:
    """Raises PackForcingError for a value among weights that is no tensor of real floating-point numbers."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            what = f"a {type(value).__name__}"
        elif value.is_floating_point():
            continue
        else:
            what = f"a tensor of {str(value.dtype).removeprefix('torch.')}"
        raise PackForcingError(
            f"{source} cannot be used: '{name[:80]}' is {what}, and weights are floating-point tensors; choose a "
            "bf16, fp16 or fp8 version of the model."
        )


def read_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError, also for brackets that are nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error


# --- words for sentences ---------------------------------------------------------------------------------------


def quoted(names: Iterable[str], most: int = 3) -> str:
    """The first names in quotes, and how many more there are: `'a', 'b', 'c' and 4 more`; "" of none."""
    names = [str(name) for name in names]
    shown = ", ".join(f"'{name[:80]}'" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def some(names: Iterable[str], noun: str = "file", example: str | None = None) -> str:
    """How many there are, with an example (else the first): `2 tensors such as 'a'`."""
    names = list(names)
    such = f" such as '{(example or names[0])[:80]}'" if names else ""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}{such}"
