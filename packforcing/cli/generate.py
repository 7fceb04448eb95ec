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
from ..cache.head_share import HeadShare
from ..command_options import (
    DTYPES,
    add_cache_options,
    add_video_options,
    cache_config,
    default_device,
    dtype_of,
)
from ..config import FrameSize, Layout, Length
from ..devices import usable_device
from ..errors import PackForcingError
from ..files.latent_file import save_latents
from ..files.state_file import StatePrompt, VideoState, save_state
from ..files.state_journal import StateJournal
from ..files.writing import free_space, target_of, write_whole
from ..flavours import NO_FLAVOUR, Flavour
from ..generate.live import most_held
from ..generate.long_video import Block, LongVideo, VideoModels, VideoSettings
from ..generate.memory_faults import begun_video, lasting_blocks, weights_told
from ..generate.prepare import planned_run, tune_models
from ..generate.record import CacheRecord
from ..generate.sampling import Sampling
from ..generate.side_stream import overlap_wanted
from ..generate.start import Start, check_start, started_blocks
from ..generate.state import check_fits, journalled, prompts_after, state_of, story_from
from ..generate.together import SharedCompressor, as_main_decodes, shared_start
from ..inspector import numbers_json, picture, report, story_of
from ..known_models import KNOWN_MODELS, TINY
from ..model.compressor import CompressorChoice
from ..model.load import check_speed
from ..model.vae import denormalise
from ..processes import any_process, check_same, from_main, in_all, is_main, joined, process_count, rank, take_device
from ..telling import tell
from .live import add_live_option, check_live, listening
from .networks import add_model_options, compressor_choice, load_models
from .options import Commands, add_speed_options
from .prompts import Prompts, add_prompt_options, prompts_of
from .recipe import Recipe
from .sampling import add_sampling_options, chosen_flavour, requested_sampling, tell_flavour
from .several import check_together, device_name, own_memory
from .start import add_start_options, check_kept, journal_for, start_of, state_to_go_on_from
from .stopping import Stopping, stopping

if TYPE_CHECKING:
    from ..files.video import VideoWriter

OUTPUT = "out.mp4"  # the default of --output


def add_command(commands: Commands) -> argparse.ArgumentParser:
    """Adds `generate` and its options for one video."""
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
    command.add_argument("--output", default=OUTPUT, help="the MP4 to write; with --prompts a folder for them")
    command.add_argument("--report", help="a JSON file for the cache's record, as the Cache Inspector writes it")
    command.add_argument("--picture", help="a PNG file for the inspector's picture")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)
    return command


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

    @property
    def identity(self) -> tuple[Any, ...]:
        """What must be the same in all processes that make the video; the prompts are encoded by one of them."""
        start = self.start and (self.start.what, self.start.frames, self.start.selected)
        return self.layout, self.length, self.sampling, self.dtype, self.prompts.timed, self.prompts.switch, start

    def encoded(self) -> tuple[StatePrompt, ...]:
        """The prompts of the whole video, encoded. Raises what `prompts_after` raises."""
        prompts = self.prompts
        return prompts_after(self.state, prompts.told(self.length), prompts.switch, prompts.blend_blocks)


@dataclass(frozen=True)
class Prepared:
    """A video of which no block is made yet."""

    video: LongVideo
    told: tuple[StatePrompt, ...]  # its prompts, encoded
    start: Start | None


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
    check_speed(device, options.linear_dtype, options.compile, options.weights_device)
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


def recipe_of(options: argparse.Namespace, request: Request) -> Recipe:
    """The recipe of a checked run, whose files are being read from now on."""
    return Recipe(
        options,
        request.layout,
        request.sampling,
        request.dtype,
        request.compressor,
        request.flavour,
        request.state,
        request.prompts.timed,
    )


def archive_folder(options: argparse.Namespace) -> Path:
    """Where the archive's file lies, should there be one: beside the output, since temporary folders may be memory."""
    return Path(options.archive_folder or target_of(options.output).parent)


# --- the models ------------------------------------------------------------------------------------------------


def models_of(options: argparse.Namespace, request: Request) -> VideoModels:
    """All networks of a run, on the device."""
    share = HeadShare(rank(), process_count())
    with weights_told():
        wan, vae = load_models(options, request.dtype, share)
    compressor = request.compressor.build(request.layout.config.block_frames, wan.shape.dim, options.device)
    return VideoModels(wan, vae, compressor if share.count == 1 else SharedCompressor(compressor, wan))


def prepared(options: argparse.Namespace, request: Request, models: VideoModels | None = None) -> Prepared:
    """Prepares the models for the video, which it loads if they are not given.

    Raises PackForcingError when it does not fit the device.
    """
    told = from_main(request.encoded)  # first: what encodes them is then gone before the transformer is loaded
    models = models_of(options, request) if models is None else models
    layout, device, state = request.layout, request.device, request.state
    if state is not None:
        check_fits(state, models, layout)
    overlap, folder = overlap_wanted(options.overlap, device), archive_folder(options)
    settings = VideoSettings(layout, request.sampling, options.fps, overlap=overlap, archive_folder=folder)
    said = most_held(request.prompts.switch, request.prompts.blend_blocks) if options.live else 0
    prompts = len(told) + said
    memory = own_memory(device, models.wan.weights.bytes, free_space(folder))
    planned = in_all(lambda: planned_run(models, settings, request.length.blocks, memory, prompts))
    planned = as_main_decodes(planned)
    tune_models(models, layout, compiled=options.compile, room_to_copy=planned.has_room_to_copy)
    story = story_from(told, models.wan.embed_text, request.prompts.switch, request.prompts.blend_blocks)
    if process_count() == 1:
        return Prepared(begun_video(planned, story, say=tell_fault), told, request.start)
    video = planned.video(story)
    video.record.device = device_name(video.record.device)
    return Prepared(video, told, shared_start(request.start, layout.size, device))


# --- the video -------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Makes the video file, and says what came of it; under `torchrun` together with the other processes."""
    with joined(options.device), stopping(any_process) as heard:
        options.device = in_all(lambda: take_device(options.device))
        in_all(lambda: check_together(options))
        request = in_all(lambda: requested(options))
        check_same("options or files", request.identity)
        if is_main():
            summary, text = made(options, request, heard)
            print(json.dumps(summary) if options.json else text)
        else:
            help_along(prepared(options, request), request, heard)


def help_along(ready: Prepared, request: Request, heard: Stopping) -> None:
    """What the other processes do while the main one makes a video: their share of each pass, and nothing else."""
    ready.video.on_step = heard.on_step
    heard.making = True
    for _ in all_blocks(ready, request.length.blocks):
        pass


def all_blocks(ready: Prepared, blocks: int) -> Iterator[Block]:
    """The blocks of a video, which go on after memory has run out, where no other process must be told of it."""
    if process_count() > 1:
        return started_blocks(ready.video, ready.start, blocks)
    return lasting_blocks(ready.video, ready.start, blocks, tell_fault)


def made(
    options: argparse.Namespace, request: Request, heard: Stopping, models: VideoModels | None = None
) -> tuple[dict[str, Any], str]:
    """Makes the video file. Returns what came of it, as values and as text."""
    size = request.layout.size
    recipe = recipe_of(options, request)
    comment = "" if options.live else request.prompts.comment  # what will be said is not known yet
    tags = {"comment": comment} if comment else {}
    from ..files.video import VideoWriter  # needs av, which `plan` and `bench` can do without

    with VideoWriter(options.output, options.fps, size.width, size.height, metadata=tags) as writer:
        ready = prepared(options, request, models)
        video = ready.video
        given = video.record.made_with
        tell_flavour(request.flavour, request.sampling, request.layout.config)
        video.on_step = heard.on_step
        live = listening(options, video, ready.told, request.device) if options.live else None

        def told() -> tuple[StatePrompt, ...]:
            return ready.told if live is None else live.prompts

        def tell_recipe() -> None:
            video.record.made_with = recipe.made_with(given, told())
            writer.tag(**video.record.as_tag())

        tell_recipe()
        start = time.perf_counter()
        latents: list[torch.Tensor] = []
        journal = journal_for(options, request.state)
        try:
            heard.making = True
            blocks = all_blocks(ready, request.length.blocks)
            kept = journalled(blocks, video, told, journal)
            for block in written_blocks(kept, request.length.blocks, writer, start):
                latents.append(block.latents.cpu())
        finally:
            tell_recipe()  # with what was said by now
            if latents:
                keep(options, request, replace(ready, told=told()), torch.cat(latents, dim=2), journal)
    return summary_of(options, request, video.record, writer.frames, time.perf_counter() - start)


def summary_of(
    options: argparse.Namespace, request: Request, record: CacheRecord, frames: int, elapsed: float
) -> tuple[dict[str, Any], str]:
    """What came of a video of that many frames, made in so many seconds: as values and as text."""
    size = request.layout.size
    summary: dict[str, Any] = {
        "output": str(options.output),
        "frames": frames,
        "width": size.width,
        "height": size.height,
        "fps": options.fps,
        "video_seconds": frames / options.fps,
        "elapsed_seconds": elapsed,
        "context_tokens": request.layout.context_tokens,
        "flavour": request.flavour.name if request.flavour else NO_FLAVOUR,
    }
    story = story_of(record)
    again = f"\nthe story, as --story FILE makes it again:\n{story}" if options.live else ""
    summary |= {"story": story} if options.live else {}
    return summary, f"{report(record)}\n\nwritten: {options.output}{again}"


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
