"""What a benchmark runs: models of real sizes with random weights, and the videos that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from ..devices import memory_of
from ..generate.autotune import tune_vae_layout
from ..generate.long_video import LongVideo
from ..generate.memory_budget import DecodePlan, DecoderMemory, MemoryDemand, decode_plan
from ..model.attention import Attention
from ..model.causal_wan import CausalWan, TextKV
from ..model.compressor import Compressor
from ..model.vae import WanVAE
from .models import VAE_DTYPE, NoVAE, PooledLatents, random_text, random_vae, random_wan, weight_bytes
from .settings import FPS, Settings


@dataclass(frozen=True)
class Prepared:
    """All that videos are made with."""

    settings: Settings
    wan: CausalWan
    text: TextKV  # a prompt of full length
    vae: WanVAE | NoVAE
    compressor: Compressor
    decoding: DecodePlan
    channels_last: bool | None  # the VAE's memory format; None without a VAE


def memory_demand(settings: Settings) -> MemoryDemand:
    """What the run takes beside the weights, by count."""
    model = settings.model
    decoder = None if model.vae_dim is None else DecoderMemory(model.vae_dim, VAE_DTYPE.itemsize)
    return MemoryDemand(model.sizes.shape, model.dtype.itemsize, settings.layout, settings.blocks, decoder)


def plan_decoding(settings: Settings) -> DecodePlan:
    """How the run decodes in the memory that it may take. Raises PackForcingError when it does not fit at all."""
    model, available = settings.model, limited_memory(settings)
    if available is not None:
        available = max(0, available - weight_bytes(model.name, model.dtype, model.linear_dtype))
    return decode_plan(memory_demand(settings), available, str(settings.device), overlap=settings.overlap)


def limited_memory(settings: Settings) -> int | None:
    """Bytes of the device that the benchmark may take (None: unknown). PyTorch is told where there is a limit."""
    available, limit = memory_of(settings.device), settings.memory_bytes
    if limit is None:
        return available
    if settings.device.type == "cuda":
        whole = torch.cuda.get_device_properties(settings.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), settings.device)
    return limit if available is None else min(limit, available)


def prepare(settings: Settings, decoding: DecodePlan, attention: Attention) -> Prepared:
    """Makes the models and brings them into the forms that are fastest here."""
    model, temporal_stride = settings.model, settings.layout.temporal_stride
    wan = random_wan(model.name, model.device, model.dtype, model.linear_dtype, model.compiled)
    wan.attention = attention
    text = random_text(wan)
    if not model.vae:
        return Prepared(
            settings, wan, text, NoVAE(model.device), PooledLatents(temporal_stride), decoding, channels_last=None
        )
    vae, compressor = random_vae(model.name, model.device), Compressor(temporal_stride)
    channels_last = tune_vae_layout(vae, settings.layout.size)
    if model.compiled:
        vae.compile_norms()
    return Prepared(settings, wan, text, vae, compressor, decoding, channels_last)


def new_video(prepared: Prepared, overlap: bool = False) -> LongVideo:
    """A video with nothing made yet; with `overlap`, blocks are decoded beside the denoising of the next."""
    settings = prepared.settings
    return LongVideo(
        prepared.wan,
        prepared.text,
        settings.layout,
        settings.sampling,
        prepared.compressor,
        cast(WanVAE, prepared.vae),  # or what stands in for one
        decode=settings.model.vae,
        fps=FPS,
        decode_frames=prepared.decoding.frames,
        overlap=overlap,
    )
