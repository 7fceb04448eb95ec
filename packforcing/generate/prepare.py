"""Preparing a run: does it fit the device, how does it decode there, and what is fastest on it.

A run is prepared in this order, each step with what the step before it found:

    planned_run    what the run takes, and the fastest way of decoding that fits; or a refusal, before any work
    (the caller)   brings the weights to the device, if they are not there: `PlannedRun.needed_bytes` must stay free
    tune_models    tries on a GPU which attention kernel and which memory format of the VAE are fastest
    PlannedRun.video
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import Layout
from ..model.causal_wan import TextKV
from .autotune import tune_vae_layout, tuned_attention
from .long_video import LongVideo, VideoModels, VideoSettings, no_callback
from .memory_budget import DecoderMemory, MemoryDemand, check_disk, check_host, decode_plan
from .story import Story


@dataclass(frozen=True)
class DeviceMemory:
    """What a run can have of its device's memory."""

    device: str  # its name, for messages
    available: int | None  # bytes; None if that is not known
    movable: int = 0  # bytes of weights that lie there too; they had better stay, but can be moved out of the way
    host: int | None = None  # bytes of the machine's own memory that the run can have; None if that is not known
    disk: int | None = None  # bytes that are free where the archive's file would lie; None if that is not known


@dataclass(frozen=True)
class PlannedRun:
    """A run that fits its device."""

    models: VideoModels
    settings: VideoSettings  # with the way of decoding that fits
    demand: MemoryDemand
    memory: DeviceMemory

    @property
    def needed_bytes(self) -> int:
        """Bytes of the device that the run takes beside the weights."""
        return run_bytes(self.settings, self.demand)

    @property
    def has_room_to_copy(self) -> bool:
        """`has_room_to_copy` of this run."""
        return has_room_to_copy(self.settings, self.demand, self.memory)

    def video(self, text: TextKV | Story, on_step: Callable[[int, int], None] = no_callback) -> LongVideo:
        """The video, of which no block is made yet. Raises what `LongVideo` raises."""
        return LongVideo(self.models, text, self.settings, on_step)


def memory_demand(models: VideoModels, layout: Layout, blocks: int, prompts: int = 1) -> MemoryDemand:
    """What a video of that many blocks, and of a story of so many prompts, takes of the device beside the weights."""
    wan, vae = models.wan, models.vae
    decoder = None if vae is None else DecoderMemory(vae.dim, vae.dtype.itemsize)
    part = wan.share.of(wan.shape)
    return MemoryDemand(part, wan.dtype.itemsize, layout, blocks, decoder, prompts, wan.share.count)


def fitted(settings: VideoSettings, demand: MemoryDemand, memory: DeviceMemory) -> VideoSettings:
    """The settings with the fastest way of decoding that fits. `settings.overlap` says whether overlap is wanted.

    Raises PackForcingError, with what would fit, when the run does not fit at all.
    """
    plan = decode_plan(demand, memory.available, memory.device, memory.movable, settings.overlap)
    check_host(demand, memory.host, shared=memory.device == "cpu")
    check_disk(demand, memory.disk)
    return replace(settings, decode_frames=plan.frames, overlap=plan.overlap)


def run_bytes(settings: VideoSettings, demand: MemoryDemand) -> int:
    """Bytes of the device that a run takes beside the weights, decoding as its settings say."""
    return demand.bytes(settings.decode_frames or settings.layout.config.block_frames, settings.overlap)


def has_room_to_copy(settings: VideoSettings, demand: MemoryDemand, memory: DeviceMemory) -> bool:
    """Whether the run would also fit with a VAE whose convolutions copy what they read and write."""
    if demand.vae is None or memory.available is None:
        return True
    copying = replace(demand, vae=replace(demand.vae, copies=True))
    return run_bytes(settings, copying) + memory.movable <= memory.available


def planned_run(
    models: VideoModels, settings: VideoSettings, blocks: int, memory: DeviceMemory, prompts: int = 1
) -> PlannedRun:
    """A run of that many blocks, under a story of so many prompts. Raises what `fitted` raises."""
    demand = memory_demand(models, settings.layout, blocks, prompts)
    return PlannedRun(models, fitted(settings, demand, memory), demand, memory)


def tune_models(
    models: VideoModels, layout: Layout, attention: bool = True, compiled: bool = False, room_to_copy: bool = True
) -> bool | None:
    """Sets the models to what is fastest on their device. The video stays the same to rounding.

    Args:
        attention: whether to choose the attention kernel as well; not where the user has chosen one.
        compiled: whether to compile the VAE's norms.
        room_to_copy: whether the VAE's convolutions may copy what they read and write.

    Returns whether the VAE's convolutions are in the channels-last format; None without a VAE.
    """
    wan, vae = models.wan, models.vae
    if attention:
        wan.attention = tuned_attention(wan.share.of(wan.shape), layout, wan.device, wan.dtype)
    if vae is None:
        return None
    channels_last = tune_vae_layout(vae, layout.size, room_to_copy)
    if compiled:
        vae.compile_norms()
    return channels_last
