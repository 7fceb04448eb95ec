"""The command line: python -m packforcing plan | generate | bench | evaluate | train."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench import run as bench
from ..config import ARCHIVE_DEVICES, KV_DTYPES, SELECTIONS, CacheConfig, FrameSize, Layout, Length
from ..demo.models import SAMPLING, demo_compressor, demo_transformer, demo_vae
from ..demo.text import encode_prompt
from ..devices import memory_of, usable_device
from ..errors import PackForcingError
from ..evaluation import run as evaluation
from ..files.compressor_file import load_compressor
from ..files.weights import read_state_dict
from ..generate.autotune import tune_vae_layout, tuned_attention
from ..generate.long_video import LongVideo, Sampling
from ..generate.memory_budget import DecoderMemory, MemoryDemand, decode_plan
from ..generate.plan import MODELS, VAE_DIMS, plan, plan_text
from ..generate.schedule import UPDATES
from ..generate.side_stream import CHOICES, overlap_wanted
from ..inspector import picture, report
from ..model.causal_wan import CausalWan
from ..model.compressor import CompressorChoice
from ..model.fp8_linear import LINEAR_DTYPES
from ..model.load import check_speed, load_wan_modules, make_causal_wan
from ..model.vae import WanVAE, load_vae
from ..model.wan_modules import SIZES, build_wan_modules
from ..training import base as train_base
from ..training import compressor as train_compressor
from ..training import forcing as train_forcing
from ..training import vae as train_vae

TRAINING_FREE = "training-free"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m packforcing", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)

    plan_command = commands.add_parser("plan", help="what a run will hold, in tokens and bytes")
    plan_command.add_argument("--model", default="wan2.1-1.3b", choices=MODELS)
    add_video_options(plan_command, width=832, height=480, seconds=120.0)
    add_cache_options(plan_command)
    plan_command.add_argument("--json", action="store_true", help="print one JSON object")
    plan_command.set_defaults(run=run_plan)

    generate = commands.add_parser("generate", help="make a video")
    generate.add_argument("--model", default="tiny", help="'tiny' (the demo models), or a causal Wan checkpoint")
    generate.add_argument("--weights", default="auto", choices=("auto", "ema", "raw"), help="of a training checkpoint")
    generate.add_argument("--vae", help="the Wan 2.1 VAE's file; not for --model tiny")
    generate.add_argument(
        "--compressor", help=f"a dual-branch compressor's file, or {TRAINING_FREE}; default: the model's own, if any"
    )
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="for --model tiny")
    prompt.add_argument(
        "--text-embedding", help="a safetensors file with one tensor [1, L, 4096]: the prompt, encoded by UMT5-XXL"
    )
    add_video_options(generate, width=None, height=None, seconds=10.0)
    add_cache_options(generate)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--steps", type=int, help="denoising steps a block; default: 4, and 8 for the demo models")
    generate.add_argument("--shift", type=float, help="flow shift; default: 5, and 3 for the demo models")
    generate.add_argument("--update", choices=UPDATES, help="default: few-step, and euler for the demo models")
    generate.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    generate.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    add_speed_options(generate)
    generate.add_argument("--output", default="out.mp4", help="the MP4 to write")
    generate.add_argument("--report", help="a JSON file for the cache's record")
    generate.add_argument("--picture", help="a PNG file for the inspector's picture")
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.set_defaults(run=run_generate)

    bench_command = commands.add_parser("bench", help="measure time and memory, against floors and other caches")
    bench.add_arguments(bench_command)
    add_speed_options(bench_command)
    add_cache_options(bench_command)
    bench_command.set_defaults(run=run_bench)

    evaluation.add_arguments(commands.add_parser("evaluate", help="compare cache policies, measured from pixels"))

    train = commands.add_parser("train", help="train a part of the demo model").add_subparsers(
        dest="part", required=True
    )
    train_vae.add_arguments(train.add_parser("vae", help="the demo's VAE, on a synthetic video world"))
    train_base.add_arguments(train.add_parser("base", help="the demo's generator, by causal flow matching"))
    train_compressor.add_arguments(train.add_parser("compressor", help="the HR branch, for a frozen generator"))
    train_forcing.add_arguments(train.add_parser("forcing", help="generator and HR branch together, by DMD"))
    return root


def add_video_options(command: argparse.ArgumentParser, width: int | None, height: int | None, seconds: float) -> None:
    command.add_argument("--width", type=int, default=width, help="pixels, a multiple of 16")
    command.add_argument("--height", type=int, default=height, help="pixels, a multiple of 16")
    command.add_argument("--seconds", type=float, default=seconds, help="rounded up to whole blocks")
    command.add_argument("--fps", type=float, default=16.0)


def add_cache_options(command: argparse.ArgumentParser) -> None:
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


def add_speed_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--compile", action="store_true", help="compile the transformer's layers first, which takes a minute"
    )
    command.add_argument(
        "--overlap",
        default="auto",
        choices=CHOICES,
        help="decode each block beside the denoising of the next, where memory allows; auto: on a GPU",
    )
    command.add_argument(
        "--linear-dtype", default="model", choices=LINEAR_DTYPES, help="what the transformer's layers multiply in"
    )


def cache_config(options: argparse.Namespace) -> CacheConfig:
    given = vars(options)
    return CacheConfig(**{field.name: given[field.name] for field in fields(CacheConfig) if field.name in given})


def run_plan(options: argparse.Namespace) -> None:
    size = FrameSize(options.width, options.height)
    result = plan(
        MODELS[options.model],
        cache_config(options),
        size,
        options.seconds,
        options.fps,
        vae_dim=VAE_DIMS[options.model],
    )
    print(json.dumps(result.as_dict()) if options.json else plan_text(result, options.model))


def load_models(options: argparse.Namespace, dtype: torch.dtype) -> tuple[CausalWan, WanVAE | None, Tensor]:
    """The transformer, the VAE and the encoded prompt [1, L, 4096] that the options name."""
    if options.model == "tiny":
        if options.vae or options.text_embedding:
            raise PackForcingError(
                "The tiny model brings its own VAE and text encoder: leave --vae and --text-embedding out, and give "
                "--prompt."
            )
        modules = build_wan_modules(SIZES["tiny"], demo_transformer())
        vae = load_vae(demo_vae(), device=options.device)
        context = encode_prompt(options.prompt)
    else:
        if options.text_embedding is None:
            raise PackForcingError(
                "A real model needs a prompt encoded by UMT5-XXL, and the command line has no UMT5: give "
                "--text-embedding FILE, or generate in ComfyUI."
            )
        modules = load_wan_modules(options.model, options.weights)
        vae = load_vae(read_state_dict(options.vae)[0], dtype, options.device) if options.vae else None
        context = only_tensor(options.text_embedding)
    return make_causal_wan(modules, options.device, dtype, options.linear_dtype, options.compile), vae, context


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The sampling that is asked for; what is not said is what the model was trained for."""
    usual = SAMPLING if options.model == "tiny" else Sampling()
    said = {name: getattr(options, name) for name in ("steps", "shift", "update")}
    return replace(usual, seed=options.seed, **{name: value for name, value in said.items() if value is not None})


def compressor_choice(options: argparse.Namespace) -> CompressorChoice:
    if options.compressor is None and options.model == "tiny":
        own = demo_compressor()
        if own.metadata is not None and own.metadata.block_frames == options.block_frames:
            return own
    if options.compressor in (None, TRAINING_FREE):
        return CompressorChoice("training-free (LR branch)")
    return CompressorChoice(Path(options.compressor).name, *load_compressor(options.compressor))


def check_folder(path: str | None, what: str) -> None:
    """Raises PackForcingError when a file that is written at the end of the run will have no folder."""
    folder = Path(path or ".").parent
    if not folder.is_dir():
        raise PackForcingError(
            f"The {what} cannot be written to {path}: the folder {folder} does not exist, create it first."
        )


def only_tensor(path: str) -> Tensor:
    tensors, _ = read_state_dict(path)
    if len(tensors) != 1:
        raise PackForcingError(f"{path} must hold one tensor, the encoded prompt [1, L, 4096], but has {len(tensors)}.")
    return next(iter(tensors.values()))


def run_generate(options: argparse.Namespace) -> None:
    default_size = (128, 128) if options.model == "tiny" else (832, 480)
    size = FrameSize(options.width or default_size[0], options.height or default_size[1])
    config = cache_config(options)
    length = Length(options.seconds, options.fps, config.block_frames)
    sampling = sampling_of(options)
    if not options.vae and options.model != "tiny":
        raise PackForcingError("A video file needs the Wan 2.1 VAE: give --vae FILE.")
    device = usable_device(options.device)
    dtype = DTYPES[options.dtype] if options.dtype else torch.float32
    if options.dtype is None and device.type == "cuda":
        dtype = torch.bfloat16
    check_speed(device, options.linear_dtype, options.compile)
    check_folder(options.report, "report")
    check_folder(options.picture, "picture")
    choice = compressor_choice(options)
    layout = Layout(config, size, choice.temporal_stride(config.block_frames))
    tags = {"comment": options.prompt} if options.prompt else {}
    from ..files.video import VideoWriter  # needs av, which `plan` and `bench` can do without

    with VideoWriter(options.output, options.fps, size.width, size.height, metadata=tags) as writer:
        wan, vae, context = load_models(options, dtype)
        compressor = choice.build(config.block_frames, wan.shape.dim, options.device)
        demand = MemoryDemand(
            wan.shape, dtype.itemsize, layout, length.blocks, DecoderMemory(vae.dim, vae.dtype.itemsize)
        )
        decoding = decode_plan(demand, memory_of(device), str(device), overlap=overlap_wanted(options.overlap, device))
        wan.attention = tuned_attention(wan.shape, layout, device, dtype)
        tune_vae_layout(vae, size)
        if options.compile:
            vae.compile_norms()
        video = LongVideo(
            wan,
            wan.embed_text(context),
            layout,
            sampling,
            compressor,
            vae,
            fps=options.fps,
            decode_frames=decoding.frames,
            overlap=decoding.overlap,
        )
        start = time.perf_counter()
        for block in video.blocks(length.blocks):
            writer.write(block.frames)
            show_progress(block.index + 1, length.blocks, time.perf_counter() - start)
    elapsed = time.perf_counter() - start

    if options.report:
        Path(options.report).write_text(json.dumps(video.record.as_dict()))
    if options.picture:
        picture(video.record).save(options.picture, format="PNG")
    summary: dict[str, Any] = {
        "output": str(options.output),
        "frames": writer.frames,
        "width": size.width,
        "height": size.height,
        "fps": options.fps,
        "video_seconds": writer.frames / options.fps,
        "elapsed_seconds": elapsed,
        "context_tokens": layout.context_tokens,
    }
    print(json.dumps(summary) if options.json else f"{report(video.record)}\n\nwritten: {options.output}")


def run_bench(options: argparse.Namespace) -> None:
    check_folder(options.plot, "plot")
    check_folder(options.json if options.json != "-" else None, "result")
    bench.run(options, cache_config(options), usable_device(options.device))


def show_progress(done: int, blocks: int, elapsed: float) -> None:
    end = "\n" if done == blocks else ""
    print(f"\rblock {done} of {blocks}, {elapsed:.1f} s", end=end, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except PackForcingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        print(
            f"error: The device ran out of memory ({reason}), and what was finished is kept: choose a smaller frame or "
            "batch, or close other programs that use the device.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was finished is in the file", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
