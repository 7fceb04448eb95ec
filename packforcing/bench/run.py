"""The command `python -m packforcing bench`: measures, compares with baselines and floors, and reports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import plots
from ..config import CacheConfig
from .measure import measure
from .models import MODELS
from .result import json_result
from .settings import DTYPES, checked
from .stages import MeasuredBlock
from .text import text_report


def add_arguments(command: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    command.add_argument("--device", default="cuda" if cuda else "cpu")
    command.add_argument("--model", default="wan2.1-1.3b" if cuda else "tiny", choices=MODELS, help="its sizes")
    command.add_argument("--seconds", type=float, default=60.0, help="of video; a thousand make a soak test")
    command.add_argument("--size", help="WIDTHxHEIGHT, multiples of 16; default 832x480, for tiny 128x128")
    command.add_argument("--steps", type=int, default=4, help="denoising steps a block")
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    command.add_argument("--repeats", type=int, default=3, help="of each block of the comparison, and of each floor")
    command.add_argument("--no-vae", action="store_true", help="no decoding, no file; compression by a stand-in")
    command.add_argument("--no-baselines", action="store_true", help="leave the comparison with other caches out")
    command.add_argument("--baseline-blocks", default="60,120", help="block indices at which caches are compared")
    command.add_argument("--threads", type=int, help="CPU threads")
    command.add_argument("--memory-gb", type=float, help="use no more device memory than this, as on a smaller card")
    command.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write one JSON object; default: print it"
    )
    command.add_argument("--plot", help="a PNG of time and memory over the blocks")


def run(options: argparse.Namespace, config: CacheConfig, device: torch.device) -> None:
    """Runs the benchmark and reports. Raises PackForcingError before anything is computed."""
    settings = checked(options, config, device)
    if options.threads:
        torch.set_num_threads(options.threads)
    measured = measure(settings)
    result = json_result(measured)
    if options.plot:
        draw(measured.run.blocks, options.plot)
    if options.json == "-":
        print(json.dumps(result))
        return
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print(text_report(result))


def draw(blocks: Sequence[MeasuredBlock], path: str) -> None:
    """Time and memory of every block over its index, as a PNG."""
    log = [
        {"step": block.index, "block time, ms": block.ms}
        | ({} if block.memory_bytes is None else {"memory, MB": block.memory_bytes / 1e6})
        for block in blocks
    ]
    plots.curves(log, path, from_zero=True)
