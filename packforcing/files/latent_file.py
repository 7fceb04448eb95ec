"""Latents as ComfyUI's Save Latent writes them: a safetensors file, with the VAE's own (not normalised) latents."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import LATENT_CHANNELS
from ..errors import PackForcingError
from .weights import DOWNLOAD_AGAIN
from .writing import check_output_file, save_tensors

SUFFIXES = (".latent", ".safetensors")
LATENTS, VERSION = "latent_tensor", "latent_format_version_0"


def check_latent_path(path: str | os.PathLike[str]) -> None:
    """Raises PackForcingError when latents could not be written there at the end of a run."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES or not path.parent.is_dir() or path.is_dir():
        raise PackForcingError(
            f"The latents' file {path} must end in {' or '.join(SUFFIXES)} and lie in a folder that exists: change the "
            "path."
        )
    check_output_file(path, "latents")


def save_latents(path: str | os.PathLike[str], raw: Tensor) -> None:
    """Writes raw latents [1, 16, T, h, w]; core's Load Latent reads the file."""
    check_latent_path(path)
    save_tensors(path, {LATENTS: raw.cpu().contiguous(), VERSION: torch.tensor([])}, None, "latents")


def load_latents(path: str | os.PathLike[str]) -> Tensor:
    """The raw latents [1, 16, T, h, w] of a file, float32. Raises PackForcingError when it holds none of one video."""
    path = Path(path)
    if not path.is_file():
        raise PackForcingError(f"{path} does not exist: give a file of latents, or the state of a video.")
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        reason = str(error).split("\n")[0].rstrip(".")[:160]
        raise PackForcingError(
            f"{path} is damaged, incomplete or no file of latents ({reason}): {DOWNLOAD_AGAIN}, or choose another."
        ) from error
    latents = tensors.get(LATENTS)
    if latents is None or VERSION not in tensors:
        raise PackForcingError(
            f"{path} holds no latents: give a file that Save Latent or --latents wrote, or the state of a video."
        )
    if latents.ndim != 5 or latents.shape[:2] != (1, LATENT_CHANNELS) or latents.shape[2] < 1:
        raise PackForcingError(
            f"{path} must hold latents of one Wan 2.1 video, [1, 16, frames, height, width], but they are "
            f"{list(latents.shape)}."
        )
    return latents.float()
