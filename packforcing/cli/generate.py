"""The command `generate`: makes a video file, and on request the cache's record and its picture."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..command_options import (
    DTYPES,
    add_cache_options,
    add_video_options,
    cache_config,
    check_folder,
    default_device,
    dtype_of,
)
from ..config import FrameSize, Layout, Length
from ..demo.models import SAMPLING, demo_compressor, demo_transformer, demo_vae
from ..devices import memory_of, usable_device
from ..errors import PackForcingError
from ..files.compressor_file import load_compressor
from ..files.lora import given_lora, with_loras
from ..files.weights import read_state_dict
from ..generate.long_video import LongVideo, VideoModels, VideoSettings
from ..generate.prepare import DeviceMemory, planned_run, tune_models
from ..generate.sampling import Sampling
from ..generate.schedule import UPDATES
from ..generate.side_stream import overlap_wanted
from ..inspector import picture, report
from ..known_models import KNOWN_MODELS, SIZES, TINY
from ..model.causal_wan import CausalWan
from ..model.compressor import TRAINING_FREE, CompressorChoice
from ..model.load import check_speed, load_wan_modules, make_causal_wan
from ..model.vae import WanVAE, load_vae
from ..model.wan_modules import build_wan_modules
from .options import Commands, add_speed_options
from .prompts import Prompts, add_prompt_options, prompts_of

if TYPE_CHECKING:
    from ..files.video import VideoWriter

NO_COMPRESSOR_FILE = "training-free"  # the value of --compressor


def add_command(commands: Commands) -> None:
    """Adds `generate` and its options."""
    command = commands.add_parser("generate", help="make a video")
    add_model_options(command)
    add_prompt_options(command)
    add_video_options(command, width=None, height=None, seconds=10.0)
    add_cache_options(command)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="denoising steps a block; default: 4, and 8 for the demo models")
    command.add_argument("--shift", type=float, help="flow shift; default: 5, and 3 for the demo models")
    command.add_argument("--update", choices=UPDATES, help="default: few-step, and euler for the demo models")
    command.add_argument("--device", default=default_device())
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    add_speed_options(command)
    command.add_argument("--output", default="out.mp4", help="the MP4 to write")
    command.add_argument("--report", help="a JSON file for the cache's record")
    command.add_argument("--picture", help="a PNG file for the inspector's picture")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def add_model_options(command: argparse.ArgumentParser) -> None:
    """The networks' files."""
    command.add_argument("--model", default=TINY, help="'tiny' (the demo models), or a causal Wan checkpoint")
    command.add_argument("--weights", default="auto", choices=("auto", "ema", "raw"), help="of a training checkpoint")
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA that belongs to the model, such as LongLive's lora.pt; may be given several times",
    )
    command.add_argument("--vae", help="the Wan 2.1 VAE's file; not for --model tiny")
    command.add_argument(
        "--compressor",
        help=f"a dual-branch compressor's file, or {NO_COMPRESSOR_FILE}; default: the model's own, if any",
    )


# --- what the options say --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """The checked options. No model is loaded yet."""

    layout: Layout
    length: Length
    sampling: Sampling
    device: torch.device
    dtype: torch.dtype  # of the transformer
    compressor: CompressorChoice
    prompts: Prompts


def requested(options: argparse.Namespace) -> Request:
    """Raises PackForcingError for what can be seen to be wrong before a model is loaded."""
    usual = KNOWN_MODELS[TINY if options.model == TINY else "wan2.1-1.3b"]
    size = FrameSize(options.width or usual.width, options.height or usual.height)
    config = cache_config(options)
    length = Length(options.seconds, options.fps, config.block_frames)
    prompts = prompts_of(options, length)
    sampling = sampling_of(options)
    if not options.vae and options.model != TINY:
        raise PackForcingError("A video file needs the Wan 2.1 VAE: give --vae FILE.")
    device = usable_device(options.device)
    check_speed(device, options.linear_dtype, options.compile)
    check_folder(options.report, "report")
    check_folder(options.picture, "picture")
    choice = compressor_choice(options)
    layout = choice.layout(config, size)
    return Request(layout, length, sampling, device, dtype_of(options.dtype, device), choice, prompts)


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The sampling that is asked for. What is not said is what the model was trained for."""
    usual = SAMPLING if options.model == TINY else Sampling()
    said = {name: getattr(options, name) for name in ("steps", "shift", "update")}
    return replace(usual, seed=options.seed, **{name: value for name, value in said.items() if value is not None})


def compressor_choice(options: argparse.Namespace) -> CompressorChoice:
    """The compressor of a file; else the demo's own, where it fits the block size; else the training-free one."""
    if options.compressor is None and options.model == TINY:
        own = demo_compressor()
        if own.metadata is not None and own.metadata.block_frames == options.block_frames:
            return own
    if options.compressor in (None, NO_COMPRESSOR_FILE):
        return TRAINING_FREE
    return CompressorChoice(Path(options.compressor).name, *load_compressor(options.compressor))


# --- the models ------------------------------------------------------------------------------------------------


def load_models(options: argparse.Namespace, dtype: torch.dtype) -> tuple[CausalWan, WanVAE]:
    """The transformer and the VAE that the options name."""
    loras = [given_lora(text) for text in options.lora]
    if options.model == TINY:
        modules = build_wan_modules(SIZES[TINY], with_loras(demo_transformer(), loras, dtype))
        vae = load_vae(demo_vae(options.device), device=options.device)
    else:
        modules = load_wan_modules(options.model, options.weights, dtype, loras)
        vae = load_vae(read_state_dict(options.vae)[0], dtype, options.device)
    return make_causal_wan(modules, options.device, dtype, options.linear_dtype, options.compile), vae


def prepared(options: argparse.Namespace, request: Request) -> LongVideo:
    """Loads the models and prepares them for the video. Raises PackForcingError when it does not fit the device."""
    contexts = request.prompts.contexts()  # first: a mistake in a small file is told before large ones are read
    wan, vae = load_models(options, request.dtype)
    layout, device = request.layout, request.device
    compressor = request.compressor.build(layout.config.block_frames, wan.shape.dim, options.device)
    models = VideoModels(wan, vae, compressor)
    overlap = overlap_wanted(options.overlap, device)
    settings = VideoSettings(layout, request.sampling, options.fps, overlap=overlap)
    memory = DeviceMemory(str(device), memory_of(device))
    planned = planned_run(models, settings, request.length.blocks, memory, len(contexts))
    tune_models(models, layout, compiled=options.compile)
    return planned.video(request.prompts.story(contexts, wan.embed_text, request.length))


# --- the video -------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Makes the video file, and says what came of it."""
    request = requested(options)
    size = request.layout.size
    comment = request.prompts.comment
    tags = {"comment": comment} if comment else {}
    from ..files.video import VideoWriter  # needs av, which `plan` and `bench` can do without

    with VideoWriter(options.output, options.fps, size.width, size.height, metadata=tags) as writer:
        video = prepared(options, request)
        start = time.perf_counter()
        write_blocks(video, request.length.blocks, writer, start)
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
        "context_tokens": request.layout.context_tokens,
    }
    print(json.dumps(summary) if options.json else f"{report(video.record)}\n\nwritten: {options.output}")


def write_blocks(video: LongVideo, count: int, writer: VideoWriter, start: float) -> None:
    """Makes the blocks and writes each one's frames; `start` is when that began, for the progress."""
    for block in video.blocks(count):
        writer.write(block.decoded)
        show_progress(block.index + 1, count, time.perf_counter() - start)


def show_progress(done: int, blocks: int, elapsed: float) -> None:
    end = "\n" if done == blocks else ""
    print(f"\rblock {done} of {blocks}, {elapsed:.1f} s", end=end, file=sys.stderr, flush=True)
