"""The command-line options that all trainers share, and what they become."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ..checks import check_count
from ..devices import fast_dtype
from ..errors import PackForcingError
from ..processes import process_count, rank
from .loop import Outcome
from .run_config import DECAYS, PRECISIONS, RunConfig


def add_run_arguments(
    parser: argparse.ArgumentParser,
    name: str,
    steps: int,
    batch: int,
    rate: float,
    warmup: int,
    decay: str = "cosine",
) -> None:
    """Options of the run itself. `steps`, `batch`, `rate`, `warmup` and `decay` are the trainer's defaults."""
    parser.add_argument(
        "--folder", default=f"out/train-{name}", help="checkpoints, log, curves; an earlier run goes on"
    )
    parser.add_argument(
        "--output", help=f"the safetensors file to export at the end; default: FOLDER/{name}.safetensors"
    )
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", dest="micro_batch", type=int, default=batch, help="samples at once, a process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches an update")
    parser.add_argument("--rate", type=float, default=rate, help="learning rate")
    parser.add_argument("--warmup", type=int, default=warmup, help="steps")
    parser.add_argument("--decay", default=decay, choices=DECAYS)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), help="default: bfloat16 where the device is fast in it, else float32"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is torch's choice")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--max-minutes", type=float, default=0.0, help="stop then, with a checkpoint; 0 is no limit")


def start(options: argparse.Namespace) -> torch.device:
    """Sets threads and precision, joins the other processes when `torchrun` started this one, and returns this
    process's device."""
    check_count("--threads", options.threads)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PackForcingError("--device cuda was asked for, but PyTorch finds no CUDA device here: give --device cpu.")
    if options.precision is None:
        options.precision = str(fast_dtype(device)).removeprefix("torch.")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def run_config(options: argparse.Namespace, final_rate: float = 0.02) -> RunConfig:
    return RunConfig(
        folder=Path(options.folder),
        steps=options.steps,
        micro_batch=options.micro_batch,
        accumulate=options.accumulate,
        seed=options.seed,
        warmup=options.warmup,
        decay=options.decay,
        final_rate=final_rate,
        clip=options.clip,
        precision=options.precision,
        save_every=options.save_every,
        evaluate_every=options.evaluate_every,
        log_every=options.log_every,
        max_minutes=options.max_minutes,
    )


def provenance(options: argparse.Namespace, outcome: Outcome) -> dict[str, str]:
    """How a file was made, for its metadata."""
    return {
        "command": " ".join(["python -m packforcing", *sys.argv[1:]]),
        "hardware": f"{options.device}, {platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "minutes": f"{outcome.minutes:.1f}",
        "steps": str(outcome.step),
    }


def part_of(text: str | None) -> tuple[int, int]:
    """(part, parts) from "I/N"; without text, this process's number and how many there are.

    Raises PackForcingError for anything else.
    """
    if text is None:
        return rank(), process_count()
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise PackForcingError(f"A part is I/N with I from 0 to N - 1, such as 0/2, but it is '{text}'.")
    return int(part), int(parts)


def numbers(text: str | None) -> tuple[int, ...]:
    """The numbers of a list such as "32,64"; without text, none. Raises PackForcingError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise PackForcingError(f"A list of whole numbers was expected, such as 32,64, but it is '{text}'.") from error


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once: on the device, or by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
