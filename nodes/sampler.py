"""The long-video sampler: MODEL and prompt in, latents, a video file and the cache's record out."""

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
from ..packforcing.config import LARGEST_SIDE, CacheConfig, FrameSize, Layout, Length
from ..packforcing.devices import is_out_of_memory
from ..packforcing.errors import PackForcingError
from ..packforcing.files.state_file import StatePrompt, VideoState
from ..packforcing.files.video import VideoWriter
from ..packforcing.files.writing import free_space
from ..packforcing.generate.live import LivePrompts, most_held
from ..packforcing.generate.long_video import Block, LongVideo, VideoModels, VideoSettings
from ..packforcing.generate.memory_faults import MemoryRanOutError, begun_video, lasting_blocks
from ..packforcing.generate.prepare import DeviceMemory, PlannedRun, planned_run, tune_models
from ..packforcing.generate.record import CacheRecord
from ..packforcing.generate.sampling import Sampling
from ..packforcing.generate.schedule import MOST_STEPS, UPDATES
from ..packforcing.generate.side_stream import CHOICES, overlap_wanted
from ..packforcing.generate.start import Start, check_start
from ..packforcing.generate.state import check_fits, encoded_prompts, journalled, prompts_after, state_of, story_from
from ..packforcing.generate.stopwatch import Stopwatch
from ..packforcing.generate.story import SWITCHES, check_switch, refresh_passes
from ..packforcing.host_memory import available_memory
from ..packforcing.model.compressor import TRAINING_FREE, Compressor, CompressorChoice
from . import adapter, types
from .conditioning import prompts_over_time
from .files import temporary_folder
from .flavours import departing
from .live import Speaker, Told, hearing
from .not_honoured import check_no_start_image, not_honoured
from .progress import Progress
from .run_files import RunFiles, TemporaryVideo
from .start import StartInputs, check_video_latents, start_of
from .timesteps import schedule_given

log = logging.getLogger(__name__)

SIDE = "Pixels, a multiple of 16."
MOST_LAST_FRAMES = 16
CPU = torch.device("cpu")  # whose clock a preview's time is: all of it is waited for


class LongVideoSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingSampler",
            display_name="PackForcing Long Video Sampler",
            category=types.CATEGORY,
            description="Makes a video of any length, block by block, from a KV cache of fixed size. The video is "
            "written to a file while it is being made.",
            inputs=[
                io.Model.Input("model", tooltip="A causal Wan 2.1 text-to-video model, from any loader."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, or several over time from PackForcing Prompt Schedule or Conditioning At. "
                    "These models sample without a negative prompt.",
                ),
                types.CacheConfig.Input("cache_config"),
                types.Compressor.Input(
                    "compressor", optional=True, tooltip="Needed unless top_k of the cache config is 0."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The Wan 2.1 VAE. Needed by the compressor, and for the video output.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
                io.Int.Input(
                    "width", default=832, min=16, max=LARGEST_SIDE, step=16, tooltip="Pixels, a multiple of 16."
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=LARGEST_SIDE, step=16, tooltip="Pixels, a multiple of 16."
                ),
                io.Float.Input(
                    "seconds",
                    default=10.0,
                    min=0.0,
                    max=86400.0,
                    step=0.1,
                    tooltip="Length of the video, rounded up to whole blocks (the first block is 3 frames short).",
                ),
                io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=0.01, tooltip="Wan 2.1 makes 16."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=MOST_STEPS,
                    tooltip="Denoising steps a block; 4 for distilled models.",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Flow shift of the noise levels. 0: the MODEL's own, as ModelSamplingSD3 sets it.",
                ),
                io.Combo.Input(
                    "update",
                    options=list(UPDATES),
                    default=UPDATES[0],
                    tooltip="few-step: predict, add fresh noise (step-distilled models). euler: all other models.",
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(CHOICES),
                    default="auto",
                    optional=True,
                    tooltip="Decode each block beside the denoising of the next, where memory allows: the same video, "
                    "faster. auto: on a GPU.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="An empty video latent: sets size and length in place of width, height and seconds.",
                ),
                io.Latent.Input(
                    "continue_from",
                    optional=True,
                    tooltip="Latents of any video: this one starts with them and goes on to the wanted length. With "
                    "the seed and settings of the run that made them, it goes on as if it had never stopped.",
                ),
                io.Combo.Input(
                    "prompt_switch",
                    options=list(SWITCHES),
                    default="keep",
                    optional=True,  # workflows from before stories go on working
                    tooltip="What happens to the history where the prompt changes. keep: nothing. refresh: the recent "
                    "blocks are computed again under the new prompt. blend: the prompts are mixed for some blocks.",
                ),
                io.Int.Input(
                    "blend_blocks",
                    default=2,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Over how many blocks blend goes from one prompt to the next.",
                ),
                io.MultiType.Input(
                    "schedule",
                    types=[types.Schedule, io.Sigmas],
                    optional=True,
                    tooltip="Noise levels in place of steps and shift, which are then not used: from PackForcing "
                    "Timesteps, or the SIGMAS of a core node.",
                ),
                types.VideoState.Input(
                    "state",
                    optional=True,
                    tooltip="The state of an earlier run, from its output or from PackForcing Load State: the video "
                    "starts with that run's and goes on to the wanted length, to the bit as if it had never stopped.",
                ),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="The video begins with this picture: its middle, in the video's shape and size. Needs the "
                    "VAE.",
                ),
                io.MultiType.Input(
                    "start_video",
                    [io.Video, io.Image],
                    optional=True,
                    tooltip="The video begins with this one, and goes on from its last frame to the wanted length. A "
                    "VIDEO, or a batch of images at the sampler's fps. Needs the VAE.",
                ),
                types.LivePrompt.Input(
                    "live_prompt",
                    optional=True,
                    tooltip="From PackForcing Live Prompt: what is said there while the video is made rules from the "
                    "next block on.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Video.Output(display_name="video"),
                types.CacheRecord.Output(display_name="record"),
                types.VideoState.Output(display_name="state"),
                io.Image.Output(display_name="last_frames"),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, width=None, height=None, seconds=None, fps=None, prompt_switch=None, blend_blocks=None
    ) -> bool | str:
        """Tells a mistake in a widget before anything runs; values that come from other nodes are checked later.

        By an exception: an error that is returned instead, ComfyUI repeats for each input that this function takes.
        """
        if width is not None and height is not None:
            FrameSize(width, height)
        if seconds is not None and fps is not None:
            Length(seconds, fps, block_frames=1)
        check_switch(prompt_switch or "keep", 1 if blend_blocks is None else blend_blocks)
        return True

    @classmethod
    def execute(
        cls,
        model,
        positive,
        cache_config: CacheConfig,
        seed: int,
        width: int,
        height: int,
        seconds: float,
        fps: float,
        steps: int,
        shift: float,
        update: str,
        compressor: CompressorChoice | None = None,
        vae=None,
        overlap: str = "auto",
        latent=None,
        continue_from=None,
        prompt_switch: str = "keep",
        blend_blocks: int = 2,
        schedule=None,
        state: VideoState | None = None,
        start_image=None,
        start_video=None,
        live_prompt: Speaker | None = None,
    ) -> io.NodeOutput:
        shift = shift or adapter.model_shift(model)
        sampling = Sampling(seed, steps, shift, update, schedule_given(schedule))
        size, blocks = video_size(cache_config, width, height, seconds, fps, latent)
        check_no_start_image(positive)
        start = start_of(StartInputs(continue_from, state, start_image, start_video), model, size, fps, vae)
        prompts = all_prompts(positive, fps, cache_config, blocks, start, state, prompt_switch, blend_blocks)
        notes = not_honoured(model, positive, shift if schedule is None else None)
        notes += departing(model, sampling, cache_config)
        tell(notes)
        models, layout, patchers = connected(model, vae, compressor, cache_config, size)
        wan = models.wan
        if state is not None:
            check_fits(state, models, layout)
        beside = overlap_wanted(overlap, wan.device)
        settings = VideoSettings(layout, sampling, fps, overlap=beside, archive_folder=temporary_folder())
        memory = memory_for(wan.device, patchers)
        said = 0 if live_prompt is None else min(blocks, most_held(prompt_switch, blend_blocks))
        planned = planned_run(models, settings, blocks, memory, len(prompts) + said)
        with out_of_memory_told(planned):
            adapter.load_models(patchers, planned.needed_bytes + room_to_read_ahead(model, planned, memory))
            # The attention kernel is ComfyUI's choice, or the user's.
            tune_models(models, layout, attention=False, room_to_copy=planned.has_room_to_copy)
            story = story_from(prompts, wan.embed_text, prompt_switch, blend_blocks)
            again = refresh_passes(story, cache_config, 0, blocks) + (sampling.more_in_first if start is None else 0)
            given = 0 if start is None else start.blocks(cache_config.block_frames)
            estimate = adapter.latent_preview(wan.shape)
            progress = Progress(blocks, given, len(sampling.steps_of(1)), again, estimate, notes)
            say = partial(add_note, notes)
            video = begun_video(planned, story, progress.on_step, say)
            bring_back = partial(load_again, patchers, planned, video)
            with hearing(live_prompt, video, prompts, blocks, bring_back, progress.more) as told:
                to_come = lasting_blocks(video, start, blocks, say, partial(bring_back, anew=True))
                made = run(video, to_come, model, progress, told)
        return made.outputs(model, video.record, state_of(video, told.prompts, made.latents))


def room_to_read_ahead(model, planned: PlannedRun, memory: DeviceMemory) -> int:
    """Where weights and run are more than the device holds, has the weights read ahead: the bytes that this takes."""
    wan = planned.models.wan
    if memory.available is not None and memory.movable + planned.needed_bytes > memory.available:
        wan.weights = adapter.weights_ahead(model, wan)
    return wan.weights.bytes


def memory_for(device: torch.device, patchers: list[ModelPatcher]) -> DeviceMemory:
    """What a run with these models can have."""
    weights, disk = sum(patcher.model_size() for patcher in patchers), free_space(temporary_folder())
    return DeviceMemory(str(device), adapter.device_memory(device), weights, available_memory(), disk)


def load_again(patchers: list[ModelPatcher], planned: PlannedRun, video: LongVideo, anew: bool = False) -> None:
    """Loads the models again in the midst of a run, which holds a part of what it needs by then.

    Args:
        anew: whether to unload them before, so that they take no more than the run leaves them.
    """
    if anew:
        adapter.free_memory()
    adapter.load_models(patchers, max(0, planned.needed_bytes - video.cache.allocated_bytes))


def all_prompts(
    positive,
    fps: float,
    config: CacheConfig,
    blocks: int,
    start: Start | None,
    state: VideoState | None,
    switch: str,
    blend_blocks: int,
) -> tuple[StatePrompt, ...]:
    """The prompts of the whole video, those of a state that it goes on from included.

    Raises PackForcingError for those that cannot be, and for a start that leaves nothing to make.
    """
    check_switch(switch, blend_blocks)
    if start is not None:
        check_start(start, config.block_frames, blocks)
    told = prompts_over_time(positive, fps, config.block_frames, blocks)
    timed, contexts = [prompt.timed for prompt in told], [prompt.context for prompt in told]
    prompts = encoded_prompts(timed, contexts, fps, config.block_frames)
    return prompts_after(state, prompts, switch, blend_blocks)


def tell(sentences: list[str]) -> None:
    """Says in the log and on the node what the user may not have meant."""
    for sentence in sentences:
        log.warning("PackForcing: %s", sentence)
    adapter.show_on_node("\n".join(sentences))


def add_note(notes: list[str], sentence: str) -> None:
    """Says one more thing, in the log and, with the next block, on the node."""
    notes.append(sentence)
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


def video_size(
    config: CacheConfig, width: int, height: int, seconds: float, fps: float, latent
) -> tuple[FrameSize, int]:
    """Frame size and number of blocks, from the widgets or from an empty LATENT [1, 16, T, h, w]."""
    if latent is None:
        return FrameSize(width, height), Length(seconds, fps, config.block_frames).blocks
    samples = latent["samples"]
    check_video_latents(samples, "The latent that sets size and length")
    size = FrameSize(samples.shape[-1] * 8, samples.shape[-2] * 8)
    return size, -(-samples.shape[2] // config.block_frames)


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


def run(
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
