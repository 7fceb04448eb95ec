"""What a benchmark runs: models of real sizes with random weights, and the videos that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..devices import fast_dtype, memory_of
from ..generate.long_video import LongVideo, VideoModels, VideoSettings
from ..generate.memory_budget import DecoderMemory, MemoryDemand
from ..generate.prepare import DeviceMemory, fitted, has_room_to_copy, tune_models
from ..known_models import KNOWN_MODELS
from ..model.attention import Attention
from ..model.causal_wan import TextKV
from ..model.weight_count import weight_count
from .models import random_text, random_wan, video_models
from .settings import FPS, Settings


@dataclass(frozen=True)
class Prepared:
    """All that videos are made with."""

    settings: Settings
    models: VideoModels
    text: TextKV  # a prompt of full length
    decoding: VideoSettings  # the way of decoding that fits; `overlap`: whether that fits too
    channels_last: bool | None  # the VAE's memory format; None without a VAE


def memory_demand(settings: Settings) -> MemoryDemand:
    """What the run takes beside the weights, by count."""
    model = settings.model
    decoder = None if model.vae_dim is None else DecoderMemory(model.vae_dim, fast_dtype(settings.device).itemsize)
    return MemoryDemand(model.sizes.shape, model.dtype.itemsize, settings.layout, settings.blocks, decoder)


def plan_decoding(settings: Settings) -> VideoSettings:
    """How the run decodes in the memory that it may take. Raises PackForcingError when it does not fit at all."""
    wanted = VideoSettings(
        settings.layout, settings.sampling, fps=FPS, decode=settings.model.vae, overlap=settings.overlap
    )
    return fitted(wanted, memory_demand(settings), device_memory(settings))


def device_memory(settings: Settings) -> DeviceMemory:
    """What the run may take of its device beside the weights."""
    model, available = settings.model, limited_memory(settings)
    if available is not None:
        weights = weight_count(KNOWN_MODELS[model.name])
        vae_itemsize = fast_dtype(settings.device).itemsize
        taken = weights.bytes(model.dtype.itemsize, vae_itemsize, model.fp8, model.weights_device == "host")
        available = max(0, available - taken)
    return DeviceMemory(str(settings.device), available)


def limited_memory(settings: Settings) -> int | None:
    """Bytes of the device that the benchmark may take (None: unknown). PyTorch is told where there is a limit."""
    available, limit = memory_of(settings.device), settings.memory_bytes
    if limit is None:
        return available
    if settings.device.type == "cuda":
        whole = torch.cuda.get_device_properties(settings.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), settings.device)
    return limit if available is None else min(limit, available)


def prepare(settings: Settings, decoding: VideoSettings, attention: Attention) -> Prepared:
    """Makes the models and brings them into the forms that are fastest here."""
    model, layout = settings.model, settings.layout
    room = has_room_to_copy(decoding, memory_demand(settings), device_memory(settings))  # before there are weights
    speed = model.linear_dtype, model.compiled, model.weights_device
    wan = random_wan(model.name, model.device, model.dtype, *speed)
    wan.attention = attention
    text = random_text(wan)
    models = video_models(model.name, wan, layout.temporal_stride, model.vae)
    channels_last = None
    if model.vae:
        channels_last = tune_models(models, layout, attention=False, compiled=model.compiled, room_to_copy=room)
    return Prepared(settings, models, text, decoding, channels_last)


def new_video(prepared: Prepared, overlap: bool = False) -> LongVideo:
    """A video with nothing made yet; with `overlap`, blocks are decoded beside the denoising of the next."""
    return LongVideo(prepared.models, prepared.text, replace(prepared.decoding, overlap=overlap))
