"""A run of the long-video sampler, from what was planned to the node's outputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from torch import Tensor

from ..packforcing.byte_units import readable_bytes
from ..packforcing.config import CacheConfig, FrameSize, Layout
from ..packforcing.devices import is_out_of_memory
from ..packforcing.errors import PackForcingError
from ..packforcing.files.state_file import StatePrompt, VideoState
from ..packforcing.files.video import VideoWriter
from ..packforcing.files.writing import free_space
from ..packforcing.generate.live import LivePrompts
from ..packforcing.generate.long_video import Block, LongVideo, VideoModels
from ..packforcing.generate.memory_faults import MemoryRanOutError, begun_video, lasting_blocks
from ..packforcing.generate.prepare import DeviceMemory, PlannedRun, tune_models
from ..packforcing.generate.record import CacheRecord
from ..packforcing.generate.start import Start
from ..packforcing.generate.state import journalled, state_of, story_from
from ..packforcing.generate.stopwatch import Stopwatch
from ..packforcing.generate.story import Story, refresh_passes
from ..packforcing.host_memory import available_memory
from ..packforcing.model.compressor import TRAINING_FREE, Compressor, CompressorChoice
from . import adapter
from .files import temporary_folder
from .live import Speaker, Told, hearing
from .progress import Progress
from .run_files import RunFiles, TemporaryVideo

log = logging.getLogger(__name__)

MOST_LAST_FRAMES = 16
CPU = torch.device("cpu")  # whose clock a preview's time is: all of it is waited for


@dataclass(frozen=True)
class Run:
    """All that a video is made with. It has been checked, and it fits the device."""

    model: ModelPatcher
    patchers: list[ModelPatcher]  # of all models that the run needs
    planned: PlannedRun
    prompts: tuple[StatePrompt, ...]
    switch: tuple[str, int]  # what happens where the prompt changes, and over how many blocks
    start: Start | None
    blocks: int
    notes: list[str]  # what the user is told of it; more may come while it goes on

    def outputs(self, live_prompt: Speaker | None) -> io.NodeOutput:
        """Makes the video, and gives what the node does."""
        with out_of_memory_told(self.planned):
            self._load_models()
            story = story_from(self.prompts, self.planned.models.wan.embed_text, *self.switch)
            progress = self._progress(story)
            video = begun_video(self.planned, story, progress.on_step, self._say)
            bring_back = partial(self._load_again, video)
            with hearing(live_prompt, video, self.prompts, self.blocks, bring_back, progress.more) as told:
                to_come = lasting_blocks(video, self.start, self.blocks, self._say, partial(bring_back, anew=True))
                made = make(video, to_come, self.model, progress, told)
        return made.outputs(self.model, video.record, state_of(video, told.prompts, made.latents))

    def _load_models(self) -> None:
        """Brings the weights to the device, and into the form that is fastest there."""
        planned = self.planned
        adapter.load_models(self.patchers, planned.needed_bytes + self._room_to_read_ahead())
        # The attention kernel is ComfyUI's choice, or the user's.
        tune_models(planned.models, planned.settings.layout, attention=False, room_to_copy=planned.has_room_to_copy)

    def _room_to_read_ahead(self) -> int:
        """Where weights and run are more than the device holds, has weights read ahead: the bytes that this takes."""
        wan, memory = self.planned.models.wan, self.planned.memory
        if memory.available is not None and memory.movable + self.planned.needed_bytes > memory.available:
            wan.weights = adapter.weights_ahead(self.model, wan)
        return wan.weights.bytes

    def _load_again(self, video: LongVideo, anew: bool = False) -> None:
        """Loads the models again in the midst of a run, which holds a part of what it needs by then.

        Args:
            anew: whether to unload them before, so that they take no more than the run leaves them.
        """
        if anew:
            adapter.free_memory()
        adapter.load_models(self.patchers, max(0, self.planned.needed_bytes - video.cache.allocated_bytes))

    def _progress(self, story: Story) -> Progress:
        """What is told while it goes on."""
        sampling, config = self.planned.settings.sampling, self.planned.settings.layout.config
        again = refresh_passes(story, config, 0, self.blocks)
        again += sampling.more_in_first if self.start is None else 0
        given = 0 if self.start is None else self.start.blocks(config.block_frames)
        estimate = adapter.latent_preview(self.planned.models.wan.shape)
        return Progress(self.blocks, given, len(sampling.steps_of(1)), again, estimate, self.notes)

    def _say(self, sentence: str) -> None:
        """Says one more thing, in the log and, with the next block, on the node."""
        self.notes.append(sentence)
        log.warning("PackForcing: %s", sentence)


def connected(
    model, vae, compressor: CompressorChoice | None, config: CacheConfig, size: FrameSize
) -> tuple[VideoModels, Layout, list[ModelPatcher]]:
    """The library's networks over what is connected to the node, the layout, and the patchers that load the weights."""
    wan = adapter.causal_wan(model)
    layout = (compressor or TRAINING_FREE).layout(config, size)
    built: Compressor | None = None
    if compressor is not None:
        built = compressor.build(config.block_frames, wan.shape.dim, wan.device)
    if vae is None:
        return VideoModels(wan, None, built), layout, [model]
    streaming_vae, vae_patcher = adapter.wan_vae(vae)
    return VideoModels(wan, streaming_vae, built), layout, [model, vae_patcher]


def memory_for(device: torch.device, patchers: list[ModelPatcher]) -> DeviceMemory:
    """What a run with these models can have."""
    weights, disk = sum(patcher.model_size() for patcher in patchers), free_space(temporary_folder())
    return DeviceMemory(str(device), adapter.device_memory(device), weights, available_memory(), disk)


@contextlib.contextmanager
def out_of_memory_told(planned: PlannedRun) -> Iterator[None]:
    """Turns ComfyUI's out-of-memory exception into a PackForcingError, after it has unloaded all models."""
    try:
        yield
    except MemoryRanOutError:
        adapter.free_memory()
        raise
    except Exception as error:
        if not (adapter.is_out_of_memory(error) or is_out_of_memory(error)):
            raise
        adapter.free_memory()
        size = planned.settings.layout.size
        raise PackForcingError(
            f"A video of {size.width}x{size.height} needs about {readable_bytes(planned.needed_bytes)} beside the "
            f"model's weights, more than {planned.models.wan.device} has free: choose a smaller size, a smaller cache "
            "config, or archive_device host."
        ) from error


@dataclass(frozen=True)
class Made:
    """A finished run."""

    latents: Tensor  # of the whole video, [1, 16, T, h, w], normalised, in host memory
    path: Path | None  # the video's file; None without a VAE
    last_frames: Tensor | None  # IMAGE [F, H, W, 3]

    def outputs(self, model, record: CacheRecord, state: VideoState) -> io.NodeOutput:
        """What the node gives. Only a node that asks for pictures is told that there are none."""
        nothing = ExecutionBlocker("The sampler has no VAE and so no video: connect the Wan 2.1 VAE to it.")
        video = TemporaryVideo(self.path) if self.path else nothing
        frames = nothing if self.last_frames is None else self.last_frames
        return io.NodeOutput({"samples": adapter.comfy_samples(model, self.latents)}, video, record, state, frames)


def make(
    video: LongVideo,
    to_come: Iterator[Block],
    model,
    progress: Progress,
    told: Told | LivePrompts,
) -> Made:
    """Makes all blocks `to_come` of a video, and the video's file; `told` has its prompts, those said by then included.

    When the run ends early (Cancel, out of memory, NaN), what is finished is kept in the output folder.
    """
    size = video.layout.size
    files = RunFiles()
    latents: list[Tensor] = []
    last: Tensor | None = None
    try:
        with contextlib.ExitStack() as stack:
            writer = None
            if video.decoder is not None:
                tags = video.record.as_tag()
                writer = stack.enter_context(
                    VideoWriter(files.video, video.record.fps, size.width, size.height, metadata=tags)
                )
            for block in journalled(to_come, video, lambda: told.prompts, files.journal):
                if writer is not None:
                    writer.write(block.decoded)
                latents.append(block.latents.cpu())
                last = block.frames
                with Stopwatch(CPU).stretch(video.record.blocks[block.index].seconds, "preview"):
                    progress.show(block.latents, block.frames)
            if writer is not None:
                writer.tag(**video.record.as_tag())  # with what was said by now
    except BaseException:
        made = torch.cat(latents, dim=2) if latents else None
        files.keep(made, partial(adapter.comfy_samples, model), partial(state_of, video, told.prompts))
        raise
    frames = None if last is None else as_images(last[:, :, -MOST_LAST_FRAMES:])
    return Made(torch.cat(latents, dim=2), files.finished(), frames)


def as_images(frames: Tensor) -> Tensor:
    """Frames [1, 3, F, H, W] in [-1, 1] -> IMAGE [F, H, W, 3] in [0, 1]."""
    return ((frames[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).contiguous().cpu()
