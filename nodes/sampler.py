"""The long-video sampler: MODEL and prompt in, latents, a video file and the cache's record out."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.input_impl import VideoFromFile
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from safetensors.torch import save_file
from torch import Tensor

from ..packforcing.byte_units import readable_bytes
from ..packforcing.config import LARGEST_SIDE, CacheConfig, FrameSize, Layout, Length
from ..packforcing.errors import PackForcingError
from ..packforcing.files.video import VideoWriter
from ..packforcing.generate.long_video import Block, LongVideo, VideoModels, VideoSettings
from ..packforcing.generate.prepare import DeviceMemory, PlannedRun, planned_run, tune_models
from ..packforcing.generate.sampling import Sampling
from ..packforcing.generate.schedule import MOST_STEPS, UPDATES
from ..packforcing.generate.side_stream import CHOICES, overlap_wanted
from ..packforcing.generate.story import SWITCHES, check_switch, refresh_passes, story_of
from ..packforcing.model.compressor import TRAINING_FREE, Compressor, CompressorChoice
from . import adapter, types
from .conditioning import prompts_over_time
from .files import temporary_video

log = logging.getLogger(__name__)

SIDE = "Pixels, a multiple of 16."
RESCUE_FOLDER = "packforcing_interrupted"


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
                    "shift", default=5.0, min=0.01, max=100.0, step=0.01, tooltip="Flow shift of the noise levels."
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
                    tooltip="Latents of an earlier run: the video starts with them and goes on to the wanted length. "
                    "With the seed and settings of that run, it goes on as if it had never stopped.",
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
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Video.Output(display_name="video"),
                types.CacheRecord.Output(display_name="record"),
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
    ) -> io.NodeOutput:
        sampling = Sampling(seed, steps, shift, update)
        size, blocks = video_size(cache_config, width, height, seconds, fps, latent)
        given = given_latents(cache_config, size, blocks, continue_from)
        check_switch(prompt_switch, blend_blocks)
        prompts = prompts_over_time(positive, fps, cache_config.block_frames, blocks)
        models, layout, patchers = connected(model, vae, compressor, cache_config, size)
        wan = models.wan
        settings = VideoSettings(layout, sampling, fps, overlap=overlap_wanted(overlap, wan.device))

        weights = sum(patcher.model_size() for patcher in patchers)
        memory = DeviceMemory(str(wan.device), adapter.device_memory(wan.device), movable=weights)
        planned = planned_run(models, settings, blocks, memory, len(prompts))
        with out_of_memory_told(planned):
            adapter.load_models(patchers, planned.needed_bytes)
            tune_models(models, layout, attention=False)  # which is ComfyUI's choice, or the user's
            texts = [wan.embed_text(prompt.context) for prompt in prompts]
            timed = [prompt.timed for prompt in prompts]
            story = story_of(timed, texts, fps, cache_config.block_frames, prompt_switch, blend_blocks)
            again = refresh_passes(story, cache_config, 0, blocks)
            progress = Progress(blocks, len_given(given, cache_config), steps, again)
            video = planned.video(story, progress.on_step)
            samples, path = run(video, blocks, given, model, progress)

        # Only a node that asks for the video is told that there is none.
        no_video = ExecutionBlocker("The sampler has no VAE and so no video: connect the Wan 2.1 VAE to it.")
        output = VideoFromFile(str(path)) if path else no_video
        return io.NodeOutput({"samples": samples}, output, video.record)


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
    except adapter.OutOfMemory as error:
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


def check_video_latents(samples: Tensor, what: str) -> None:
    if samples.ndim != 5 or samples.shape[0] != 1 or samples.shape[1] != 16 or samples.shape[2] < 1:
        raise PackForcingError(
            f"{what} must be one Wan 2.1 video, [1, 16, frames, height, width], but it has the shape "
            f"{list(samples.shape)}: use the core node EmptyHunyuanLatentVideo with a batch size of 1, say."
        )


def given_latents(config: CacheConfig, size: FrameSize, blocks: int, continue_from) -> Tensor | None:
    """The samples to go on from, in ComfyUI's convention; checked against the video that they are to start."""
    if continue_from is None:
        return None
    samples = continue_from["samples"]
    check_video_latents(samples, "The latent to go on from")
    found = (samples.shape[-1] * 8, samples.shape[-2] * 8)
    if found != (size.width, size.height) or samples.shape[2] % config.block_frames:
        raise PackForcingError(
            f"The latent to go on from must be {size.width}x{size.height} pixels and whole blocks of "
            f"{config.block_frames} latent frames, but it is {found[0]}x{found[1]} with {samples.shape[2]} frames."
        )
    if samples.shape[2] // config.block_frames >= blocks:
        raise PackForcingError(
            f"The latent to go on from has {samples.shape[2] // config.block_frames} blocks already, but the video is "
            f"to have {blocks} in all: ask for more seconds."
        )
    return samples


def len_given(given: Tensor | None, config: CacheConfig) -> int:
    """How many blocks are given."""
    return 0 if given is None else given.shape[2] // config.block_frames


class Progress:
    """ComfyUI's progress bar over all model passes, with the newest block's picture; also where Cancel is heard."""

    def __init__(self, blocks: int, given: int, steps: int, refreshed: int) -> None:
        passes = given * 2 + (blocks - given) * (steps + 1) - 1 + refreshed  # the last block has no clean pass
        self._bar = comfy.utils.ProgressBar(passes)
        self._passes = passes
        self._done = 0

    def on_step(self, block: int, step: int) -> None:
        adapter.check_interrupted()
        self._bar.update_absolute(self._done, self._passes)
        self._done += 1

    def show(self, latents: Tensor, frames: Tensor | None) -> None:
        self._bar.update_absolute(min(self._done, self._passes), self._passes, adapter.preview(latents, frames))


def run(video: LongVideo, blocks: int, given: Tensor | None, model, progress: Progress) -> tuple[Tensor, Path | None]:
    """Makes all blocks; returns LATENT samples and the video's file (None without a VAE).

    When the run ends early (Cancel, out of memory, NaN), what is finished is kept in the output folder.
    """
    size = video.layout.size
    path: Path | None = None
    latents: list[Tensor] = []
    try:
        with contextlib.ExitStack() as stack:
            writer = None
            if video.decoder is not None:
                path = temporary_video()
                writer = stack.enter_context(VideoWriter(path, video.record.fps, size.width, size.height))
            for block in all_blocks(video, blocks, given, model):
                if writer is not None:
                    writer.write(block.decoded)
                latents.append(block.latents.cpu())
                progress.show(block.latents, block.frames)
    except BaseException:
        keep_what_is_done(latents, path, model)
        raise
    return adapter.comfy_samples(model, torch.cat(latents, dim=2)), path


def all_blocks(video: LongVideo, blocks: int, given: Tensor | None, model) -> Iterator[Block]:
    """The blocks that are given, and then those that are made."""
    if given is not None:
        yield from video.replay(adapter.normalised(model, given))
    yield from video.blocks(blocks - video.next_block)


def keep_what_is_done(latents: list[Tensor], path: Path | None, model) -> None:
    """Moves an unfinished run's video to the output folder, and its latents beside it in ComfyUI's .latent format."""
    if not latents:
        return
    folder = Path(folder_paths.get_output_directory()) / RESCUE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    samples = adapter.comfy_samples(model, torch.cat(latents, dim=2)).cpu().contiguous()
    save_file({"latent_tensor": samples, "latent_format_version_0": torch.tensor([])}, folder / f"{name}.latent")
    if path is not None and path.exists():
        shutil.move(path, folder / f"{name}.mp4")
    log.warning(
        "PackForcing: the run ended early; its %d finished blocks are kept as %s (.latent, .mp4). To go on, load the "
        "latent into continue_from.",
        len(latents),
        folder / name,
    )
