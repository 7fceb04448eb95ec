"""The networks that make a video, and whether they are all there."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Layout
from ..errors import PackForcingError
from ..model.causal_wan import CausalWan
from ..model.compressor import Compressor
from ..model.vae import WanVAE


@dataclass(frozen=True)
class VideoModels:
    """The networks that make a video."""

    wan: CausalWan  # the transformer
    vae: WanVAE | None = None  # decodes frames; a compressor that goes through pixels needs it too
    compressor: Compressor | None = None  # needed unless `top_k` is 0

    @property
    def decoded_elsewhere(self) -> bool:
        """Whether another process decodes the blocks (`generate.together`)."""
        return self.compressor is not None and self.compressor.decoded_elsewhere


def needs_frames(models: VideoModels, layout: Layout) -> bool:
    """Whether blocks must be decoded for what comes after them: for a compressor that goes through pixels."""
    return layout.config.top_k > 0 and models.compressor is not None and models.compressor.needs_vae


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
    if models.vae is None and compressor.needs_vae:
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
