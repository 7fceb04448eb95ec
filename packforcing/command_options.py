"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

import torch

from .config import ARCHIVE_DEVICES, KV_DTYPES, SELECTIONS, CacheConfig, FrameSize
from .errors import PackForcingError
from .presets import PRESET_NAMES, preset_named

SIZES = ("block_frames", "sink_frames", "recent_frames", "top_k", "position_range")  # what a preset is about
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
    """The options of the cache, which `cache_config` reads. Each has a field of CacheConfig as its `dest`.

    An option that is not given is None, and is what the preset says.
    """
    command.add_argument("--preset", choices=PRESET_NAMES, help="a cache configuration; other options change it")
    command.add_argument("--block", dest="block_frames", type=int, help="latent frames; default: 4")
    command.add_argument("--sink", dest="sink_frames", type=int, help="latent frames; default: 8")
    command.add_argument("--recent", dest="recent_frames", type=int, help="likewise; default: 4")
    command.add_argument("--top-k", dest="top_k", type=int, help="mid blocks attended at most; default: 16")
    command.add_argument("--selection", choices=SELECTIONS)
    command.add_argument("--query-fraction", type=float)
    command.add_argument("--head-fraction", type=float)
    command.add_argument("--position-range", type=int, help="latent frames; 0, the default, is off")
    command.add_argument(
        "--no-rope-adjustment",
        dest="rope_adjustment",
        action="store_false",
        default=None,
        help="leave gaps in time, to compare",
    )
    command.add_argument("--kv-dtype", choices=KV_DTYPES, help="of the cached keys and values")
    command.add_argument("--archive-device", choices=ARCHIVE_DEVICES)
    command.add_argument("--archive-budget-gb", type=float)


def cache_config(options: argparse.Namespace, usual: str | None = None) -> CacheConfig:
    """What `add_cache_options`'s options say. Raises PackForcingError when that is impossible.

    Args:
        usual: the preset that holds where neither a preset nor one of SIZES is given.
    """
    given = {field.name: getattr(options, field.name, None) for field in fields(CacheConfig)}
    preset = options.preset or (usual if all(given[name] is None for name in SIZES) else None)
    base = preset_named(preset).config if preset else CacheConfig()
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def frame_size(text: str, refusal: str) -> FrameSize:
    """'832x480' -> its FrameSize. Raises PackForcingError for another size, and with `refusal` for what is none."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise PackForcingError(refusal)
    return FrameSize(int(width), int(height))
