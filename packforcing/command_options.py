"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from .config import ARCHIVE_DEVICES, KV_DTYPES, SELECTIONS, CacheConfig, FrameSize
from .errors import PackForcingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The type of a name in DTYPES; without a name bfloat16 on a GPU, and float32 on the CPU."""
    return DTYPES[name or ("bfloat16" if device.type == "cuda" else "float32")]


def add_video_options(command: argparse.ArgumentParser, width: int | None, height: int | None, seconds: float) -> None:
    """--width, --height, --seconds and --fps; the arguments are the defaults."""
    command.add_argument("--width", type=int, default=width, help="pixels, a multiple of 16")
    command.add_argument("--height", type=int, default=height, help="pixels, a multiple of 16")
    command.add_argument("--seconds", type=float, default=seconds, help="rounded up to whole blocks")
    command.add_argument("--fps", type=float, default=16.0)


def add_cache_options(command: argparse.ArgumentParser) -> None:
    """The options of the cache, which `cache_config` reads. Each has a field of CacheConfig as its `dest`."""
    default = CacheConfig()
    command.add_argument("--block", dest="block_frames", type=int, default=default.block_frames, help="latent frames")
    command.add_argument("--sink", dest="sink_frames", type=int, default=default.sink_frames, help="latent frames")
    command.add_argument("--recent", dest="recent_frames", type=int, default=default.recent_frames, help="likewise")
    command.add_argument("--top-k", dest="top_k", type=int, default=default.top_k, help="mid blocks attended at most")
    command.add_argument("--selection", default=default.selection, choices=SELECTIONS)
    command.add_argument("--query-fraction", type=float, default=default.query_fraction)
    command.add_argument("--head-fraction", type=float, default=default.head_fraction)
    command.add_argument("--position-range", type=int, default=default.position_range, help="latent frames; 0 is off")
    command.add_argument(
        "--no-rope-adjustment", dest="rope_adjustment", action="store_false", help="leave gaps in time, to compare"
    )
    command.add_argument(
        "--kv-dtype", default=default.kv_dtype, choices=KV_DTYPES, help="of the cached keys and values"
    )
    command.add_argument("--archive-device", default=default.archive_device, choices=ARCHIVE_DEVICES)
    command.add_argument("--archive-budget-gb", type=float, default=default.archive_budget_gb)


def cache_config(options: argparse.Namespace) -> CacheConfig:
    """What `add_cache_options`'s options say. Raises PackForcingError when that is impossible."""
    given = vars(options)
    return CacheConfig(**{field.name: given[field.name] for field in fields(CacheConfig) if field.name in given})


def frame_size(text: str, refusal: str) -> FrameSize:
    """'832x480' -> its FrameSize. Raises PackForcingError for another size, and with `refusal` for what is none."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise PackForcingError(refusal)
    return FrameSize(int(width), int(height))


def check_folder(path: str | None, what: str) -> None:
    """Raises PackForcingError when a file that is written at the end of the run will have no folder."""
    folder = Path(path or ".").parent
    if not folder.is_dir():
        raise PackForcingError(
            f"The {what} cannot be written to {path}: the folder {folder} does not exist, create it first."
        )
