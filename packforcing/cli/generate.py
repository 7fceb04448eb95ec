"""The command `generate`: makes a video file, and on request the cache's record and its picture."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..cache.archive_file import ArchiveFile
from ..command_options import (
    DTYPES,
    add_cache_options,
    add_video_options,
    cache_config,
    default_device,
    dtype_of,
)
from ..config import CacheConfig, FrameSize, Layout, Length
from ..demo.models import demo_compressor, demo_transformer, demo_vae
from ..devices import memory_of, usable_device
from ..errors import PackForcingError
from ..files.compressor_file import load_compressor
from ..files.latent_file import save_latents
from ..files.lora import given_lora, with_loras
from ..files.state_file import StatePrompt, VideoState, save_state
from ..files.state_journal import StateJournal
from ..files.weights import read_state_dict
from ..files.writing import free_space, target_of, write_whole
from ..flavours import NO_FLAVOUR, Flavour
from ..generate.live import most_held
from ..generate.long_video import Block, LongVideo, VideoModels, VideoSettings
from ..generate.memory_faults import begun_video, lasting_blocks, weights_told
from ..generate.prepare import DeviceMemory, planned_run, tune_models
from ..generate.record import CacheRecord
from ..generate.sampling import Sampling
from ..generate.side_stream import overlap_wanted
from ..generate.start import Start, check_start
from ..generate.state import check_fits, journalled, prompts_after, state_of, story_from
from ..host_memory import available_memory
from ..inspector import numbers_json, picture, report, story_of
from ..known_models import KNOWN_MODELS, SIZES, TINY
from ..model.causal_wan import CausalWan
from ..model.compressor import TRAINING_FREE, CompressorChoice
from ..model.load import check_speed, load_wan_modules, make_causal_wan
from ..model.vae import WanVAE, denormalise, load_vae
from ..model.wan_modules import build_wan_modules
from ..telling import tell
from .live import add_live_option, check_live, listening
from .options import Commands, add_speed_options
from .prompts import Prompts, add_prompt_options, prompts_of
from .sampling import add_sampling_options, chosen_flavour, requested_sampling, tell_flavour
from .start import add_start_options, check_kept, journal_for, start_of, state_to_go_on_from
from .stopping import stopping

if TYPE_CHECKING:
    from ..files.video import VideoWriter

NO_COMPRESSOR_FILE = "training-free"  # the value of --compressor


def add_command(commands: Commands) -> None:
    """Adds `generate` and its options."""
    command = commands.add_parser("generate", help="make a video")
    add_model_options(command)
    add_prompt_options(command)
    add_live_option(command)
    add_video_options(command, width=None, height=None, seconds=10.0)
    add_cache_options(command)
    command.add_argument("--archive-folder", metavar="FOLDER", help="of --archive-device disk; default: the output's")
    add_sampling_options(command)
    command.add_argument("--device", default=default_device())
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    add_speed_options(command)
    add_start_options(command)
    command.add_argument("--output", default="out.mp4", help="the MP4 to write")
    command.add_argument("--report", help="a JSON file for the cache's record, as the Cache Inspector writes it")
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
    flavour: Flavour | None  # of the checkpoint, where it is known
    start: Start | None
    state: VideoState | None  # that the video goes on from

    def encoded(self) -> tuple[StatePrompt, ...]:
        """The prompts of the whole video, encoded. Raises what `prompts_after` raises."""
        prompts = self.prompts
        return prompts_after(self.state, prompts.told(self.length), prompts.switch, prompts.blend_blocks)


@dataclass(frozen=True)
class Prepared:
    """A video of which no block is made yet."""

    video: LongVideo
    told: tuple[StatePrompt, ...]  # its prompts, encoded


def requested(options: argparse.Namespace) -> Request:
    """Raises PackForcingError for what can be seen to be wrong before a model is loaded."""
    usual = KNOWN_MODELS[TINY if options.model == TINY else "wan2.1-1.3b"]
    size = FrameSize(options.width or usual.width, options.height or usual.height)
    flavour = chosen_flavour(options)
    config = cache_config(options, flavour.preset if flavour else None)
    length = Length(options.seconds, options.fps, config.block_frames)
    sampling = requested_sampling(options, flavour)
    if not options.vae and options.model != TINY:
        raise PackForcingError("A video file needs the Wan 2.1 VAE: give --vae FILE.")
    device = usable_device(options.device)
    check_live(options)
    prompts = prompts_of(options, length, device)
    check_speed(device, options.linear_dtype, options.compile)
    choice = compressor_choice(options, config)
    layout = choice.layout(config, size)
    check_kept(options)
    if config.archive_device == "disk":
        ArchiveFile(archive_folder(options))  # tells what is wrong with the folder, and is gone again
    state = state_to_go_on_from(options)
    start = start_of(options, state, size)
    if start is not None:
        check_start(start, config.block_frames, length.blocks)
    dtype = dtype_of(options.dtype, device)
    return Request(layout, length, sampling, device, dtype, choice, prompts, flavour, start, state)


def archive_folder(options: argparse.Namespace) -> Path:
    """Where the archive's file lies, should there be one: beside the output, since temporary folders may be memory."""
    return Path(options.archive_folder or target_of(options.output).parent)


def compressor_choice(options: argparse.Namespace, config: CacheConfig) -> CompressorChoice:
    """The compressor of a file; else the demo's own, where it fits the block size; else the training-free one."""
    if options.compressor is None and options.model == TINY:
        own = demo_compressor()
        if own.metadata is not None and own.metadata.block_frames == config.block_frames:
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


def prepared(options: argparse.Namespace, request: Request) -> Prepared:
    """Loads the models and prepares them for the video. Raises PackForcingError when it does not fit the device."""
    told = request.encoded()  # first: what encodes them is then gone before the transformer is loaded
    with weights_told():
        wan, vae = load_models(options, request.dtype)
    layout, device = request.layout, request.device
    compressor = request.compressor.build(layout.config.block_frames, wan.shape.dim, options.device)
    models = VideoModels(wan, vae, compressor)
    if request.state is not None:
        check_fits(request.state, models, layout)
    overlap = overlap_wanted(options.overlap, device)
    folder = archive_folder(options)
    settings = VideoSettings(layout, request.sampling, options.fps, overlap=overlap, archive_folder=folder)
    memory = DeviceMemory(str(device), memory_of(device), host=available_memory(), disk=free_space(folder))
    said = most_held(request.prompts.switch, request.prompts.blend_blocks) if options.live else 0
    planned = planned_run(models, settings, request.length.blocks, memory, len(told) + said)
    tune_models(models, layout, compiled=options.compile)
    story = story_from(told, wan.embed_text, request.prompts.switch, request.prompts.blend_blocks)
    return Prepared(begun_video(planned, story, say=tell_fault), told)


# --- the video -------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Makes the video file, and says what came of it."""
    request = requested(options)
    size = request.layout.size
    comment = "" if options.live else request.prompts.comment  # what will be said is not known yet
    tags = {"comment": comment} if comment else {}
    from ..files.video import VideoWriter  # needs av, which `plan` and `bench` can do without

    with (
        stopping() as heard,
        VideoWriter(options.output, options.fps, size.width, size.height, metadata=tags) as writer,
    ):
        ready = prepared(options, request)
        video = ready.video
        tell_flavour(request.flavour, request.sampling, request.layout.config)
        video.on_step = heard.on_step
        live = listening(options, video, ready.told, request.device) if options.live else None

        def told() -> tuple[StatePrompt, ...]:
            return ready.told if live is None else live.prompts

        start = time.perf_counter()
        latents: list[torch.Tensor] = []
        journal = journal_for(options, request.state)
        try:
            heard.making = True
            blocks = lasting_blocks(video, request.start, request.length.blocks, tell_fault)
            kept = journalled(blocks, video, told, journal)
            for block in written_blocks(kept, request.length.blocks, writer, start):
                latents.append(block.latents.cpu())
        finally:
            heard.making = False
            if latents:
                keep(options, request, replace(ready, told=told()), torch.cat(latents, dim=2), journal)
    elapsed = time.perf_counter() - start

    summary: dict[str, Any] = {
        "output": str(options.output),
        "frames": writer.frames,
        "width": size.width,
        "height": size.height,
        "fps": options.fps,
        "video_seconds": writer.frames / options.fps,
        "elapsed_seconds": elapsed,
        "context_tokens": request.layout.context_tokens,
        "flavour": request.flavour.name if request.flavour else NO_FLAVOUR,
    }
    story = story_of(video.record)
    again = f"\nthe story, as --story FILE makes it again:\n{story}" if options.live else ""
    summary |= {"story": story} if options.live else {}
    print(json.dumps(summary) if options.json else f"{report(video.record)}\n\nwritten: {options.output}{again}")


def written_blocks(blocks: Iterable[Block], count: int, writer: VideoWriter, start: float) -> Iterator[Block]:
    """Writes each block's frames and tells how many of `count` there are; `start` is when the first one began."""
    for block in blocks:
        writer.write(block.decoded)
        show_progress(block.index + 1, count, time.perf_counter() - start)
        yield block


def keep(
    options: argparse.Namespace, request: Request, ready: Prepared, latents: torch.Tensor, journal: StateJournal | None
) -> None:
    """Writes what was asked for beside the video, of its finished blocks: latents [1, 16, n * T, h, w], normalised.

    What cannot be written leaves the rest as it is; then the first error is raised at the end.
    """
    record, before = ready.video.record, request.state

    def save() -> None:
        save_state(options.save_state, state_of(ready.video, ready.told, latents))
        if journal is not None:
            journal.remove()

    files: dict[str, Callable[[], object]] = {}
    if options.save_state and (before is None or latents.shape[2] >= before.latents.shape[2]):  # else it would lose
        files["state"] = save
    if options.latents:
        files["latents"] = lambda: save_latents(options.latents, denormalise(latents))
    if options.report:
        files["report"] = lambda: write_whole(options.report, numbers_json(record).encode())
    if options.picture:
        files["picture"] = lambda: write_whole(options.picture, picture_bytes(record))
    errors = [error for what, write in files.items() if (error := failed(what, write)) is not None]
    if journal is not None:
        journal.close()
    if errors:
        raise errors[0]


def failed(what: str, write: Callable[[], object]) -> PackForcingError | None:
    """Writes a file, and gives the error if that fails."""
    try:
        write()
    except PackForcingError as error:
        return error
    except OSError as error:
        return PackForcingError(f"The {what} cannot be written ({error.strerror}): free some space.")
    return None


def picture_bytes(record: CacheRecord) -> bytes:
    """The inspector's picture as a PNG file's bytes."""
    file = BytesIO()
    picture(record).save(file, format="PNG")
    return file.getvalue()


def tell_fault(sentence: str) -> None:
    """Tells that the run goes on with less memory."""
    tell(f"\n{sentence}")


def show_progress(done: int, blocks: int, elapsed: float) -> None:
    end = "\n" if done == blocks else ""
    tell(f"\rblock {done} of {blocks}, {elapsed:.1f} s", end)
