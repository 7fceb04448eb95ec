"""The long-video sampler: MODEL and prompt in, latents, a video file and the cache's record out."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..packforcing.config import LARGEST_SIDE, CacheConfig, FrameSize, Length
from ..packforcing.files.state_file import StatePrompt, VideoState
from ..packforcing.generate.live import most_held
from ..packforcing.generate.long_video import VideoSettings
from ..packforcing.generate.prepare import planned_run
from ..packforcing.generate.sampling import Sampling
from ..packforcing.generate.schedule import MOST_STEPS, UPDATES
from ..packforcing.generate.side_stream import CHOICES, overlap_wanted
from ..packforcing.generate.start import Start, check_start
from ..packforcing.generate.state import check_fits, encoded_prompts, prompts_after
from ..packforcing.generate.story import SWITCHES, check_switch
from ..packforcing.model.compressor import CompressorChoice
from . import adapter, types
from .conditioning import prompts_over_time
from .files import temporary_folder
from .flavours import departing
from .live import Speaker
from .not_honoured import check_no_start_image, not_honoured
from .run import Run, connected, memory_for
from .start import StartInputs, check_video_latents, start_of
from .timesteps import schedule_given

log = logging.getLogger(__name__)

SIDE = "Pixels, a multiple of 16."


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
                io.Int.Input("width", default=832, min=16, max=LARGEST_SIDE, step=16, tooltip=SIDE),
                io.Int.Input("height", default=480, min=16, max=LARGEST_SIDE, step=16, tooltip=SIDE),
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
        if state is not None:
            check_fits(state, models, layout)
        beside = overlap_wanted(overlap, models.wan.device)
        settings = VideoSettings(layout, sampling, fps, overlap=beside, archive_folder=temporary_folder())
        said = 0 if live_prompt is None else min(blocks, most_held(prompt_switch, blend_blocks))
        memory = memory_for(models.wan.device, patchers)
        planned = planned_run(models, settings, blocks, memory, len(prompts) + said)
        switch = prompt_switch, blend_blocks
        return Run(model, patchers, planned, prompts, switch, start, blocks, notes).outputs(live_prompt)


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
