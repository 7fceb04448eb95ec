"""What a long video is made with: its networks and settings, whether they go together, and the record of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Layout
from ..errors import PackForcingError
from ..model.causal_wan import CausalWan
from ..model.compressor import Compressor
from ..model.vae import WanVAE
from .record import CacheRecord, PromptRecord
from .sampling import Sampling
from .story import Story


@dataclass(frozen=True)
class VideoModels:
    """The networks that make a video."""

    wan: CausalWan  # the transformer
    vae: WanVAE | None = None  # decodes frames; the compressor needs it too
    compressor: Compressor | None = None  # needed unless `top_k` is 0


@dataclass(frozen=True)
class VideoSettings:
    """How a video is made, apart from its prompt and its length."""

    layout: Layout  # partitions, frame size and token counts
    sampling: Sampling
    fps: float = 16.0  # for the record only
    batch: int = 1  # videos made at once
    decode: bool = True  # blocks come with frames, even where the compressor does not need them
    decode_frames: int | None = None  # latent frames that the VAE decodes at a time; None: a whole block
    overlap: bool = False  # decode a block beside the next one's denoising: faster, more memory, the same video


def check_complete(models: VideoModels, layout: Layout) -> None:
    """Raises PackForcingError when a network is missing that the layout needs, or does not fit it."""
    top_k, compressor = layout.config.top_k, models.compressor
    if not top_k:
        return
    if compressor is None:
        raise PackForcingError(
            f"Mid blocks are compressed, but there is no compressor and top_k is {top_k}: connect a "
            "PackForcing Compressor Loader, or set top_k to 0."
        )
    if models.vae is None:
        raise PackForcingError(
            "The compressor's LR branch goes through pixels and needs a VAE, but there is none: connect the Wan "
            "2.1 VAE, or set top_k to 0 to run without mid blocks."
        )
    if compressor.temporal_stride != layout.temporal_stride:
        raise PackForcingError(
            f"The layout has a temporal stride of {layout.temporal_stride}, but the compressor's is "
            f"{compressor.temporal_stride}."
        )
    if compressor.direct != layout.direct:
        raise PackForcingError(
            f"The layout is for another kind of compressor than {compressor.name}: take the layout that "
            "CompressorChoice.layout makes."
        )


def new_record(models: VideoModels, settings: VideoSettings, story: Story) -> CacheRecord:
    """The record of a run that has made no block yet."""
    wan, layout = models.wan, settings.layout
    compressor = models.compressor if layout.config.top_k else None
    return CacheRecord(
        model=wan.shape,
        config=layout.config,
        size=layout.size,
        fps=settings.fps,
        temporal_stride=layout.temporal_stride,
        compressor="none" if compressor is None else compressor.name,
        dtype=str(wan.dtype).removeprefix("torch."),
        device=str(wan.device),
        prompts=[PromptRecord(stretch.start, stretch.prompt) for stretch in story.stretches],
        prompt_switch=story.switch,
        blend_blocks=story.blend_blocks,
        update=settings.sampling.update,
        timesteps=settings.sampling.timesteps_of(1),
        first_timesteps=settings.sampling.timesteps_of(0),
    )
