"""The options of a benchmark, parsed and checked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from .. import plots
from ..command_options import dtype_of, frame_size
from ..config import (
    TEXT_TOKENS,
    VAE_DIMS,
    VAE_TIME_STRIDE,
    CacheConfig,
    FrameSize,
    Layout,
    Length,
    default_temporal_stride,
)
from ..errors import PackForcingError
from ..generate.sampling import Sampling
from ..known_models import KNOWN_MODELS
from ..model.load import check_speed
from ..model.wan_modules import SIZES, WanSizes
from ..model.weight_count import weight_count
from .work import Workload

DTYPES = ("float32", "bfloat16")  # in which random models are measured
FPS = 16.0


@dataclass(frozen=True)
class ModelChoice:
    """Which models are measured, where they are, and how they run."""

    name: str  # one of models.MODELS
    device: torch.device
    dtype: torch.dtype  # the transformer's
    linear_dtype: str  # "model", or "fp8_e4m3"
    weights_device: str  # one of load.WEIGHTS_DEVICES
    compiled: bool
    vae: bool  # False: nothing is decoded, and a stand-in compresses

    @property
    def fp8(self) -> bool:
        """Whether linear layers multiply in fp8."""
        return self.linear_dtype != "model"

    @property
    def sizes(self) -> WanSizes:
        """Sizes of the transformer."""
        return SIZES[self.name]

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights that a pass reads from host memory."""
        if self.weights_device == "device":
            return 0
        return weight_count(KNOWN_MODELS[self.name]).pass_bytes(self.dtype.itemsize, self.fp8)

    @property
    def vae_dim(self) -> int | None:
        """Width of the VAE; None without one."""
        return VAE_DIMS[self.name] if self.vae else None


@dataclass(frozen=True)
class Settings:
    """The checked options of one benchmark."""

    model: ModelChoice
    layout: Layout
    blocks: int  # length of the video
    sampling: Sampling
    overlap: bool  # whether decoding beside the denoising is measured, where it fits
    memory_bytes: int | None  # of the device that may be used; None: all
    repeats: int  # of each block of the comparison, and of each rate
    baseline_blocks: tuple[int, ...]  # block indices at which caches are compared, ascending

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def frames_per_block(self) -> int:
        """Video frames of a block (the first of a video has three fewer)."""
        return VAE_TIME_STRIDE * self.layout.config.block_frames

    @property
    def workload(self) -> Workload:
        """What floors and rates depend on."""
        return Workload(
            sizes=self.model.sizes,
            layout=self.layout,
            steps=self.sampling.steps,
            text_tokens=TEXT_TOKENS,
            device=self.device,
            dtype=self.model.dtype,
            vae_dim=self.model.vae_dim,
            fp8=self.model.fp8,
            streamed_bytes=self.model.streamed_bytes,
        )


def checked(options: argparse.Namespace, config: CacheConfig, device: torch.device) -> Settings:
    """The settings that the options ask for. Raises PackForcingError when they are impossible."""
    _check(options, device)
    usual = KNOWN_MODELS[options.model]
    size = parsed_size(options.size) if options.size else FrameSize(usual.width, usual.height)
    return Settings(
        model=ModelChoice(
            name=options.model,
            device=device,
            dtype=dtype_of(options.dtype, device),
            linear_dtype=options.linear_dtype,
            weights_device=options.weights_device,
            compiled=options.compile,
            vae=not options.no_vae,
        ),
        layout=Layout(config, size, default_temporal_stride(config.block_frames)),
        blocks=Length(options.seconds, FPS, config.block_frames).blocks,
        sampling=Sampling(steps=options.steps),
        overlap=options.overlap != "off" and not options.no_vae,
        memory_bytes=None if options.memory_gb is None else int(1e9 * options.memory_gb),
        repeats=options.repeats,
        baseline_blocks=() if options.no_baselines else parsed_blocks(options.baseline_blocks),
    )


def _check(options: argparse.Namespace, device: torch.device) -> None:
    if options.repeats < 1:
        raise PackForcingError(f"--repeats must be at least 1, but it is {options.repeats}.")
    if options.memory_gb is not None and not options.memory_gb > 0:
        raise PackForcingError(f"--memory-gb must be above 0, but it is {options.memory_gb}.")
    if options.threads is not None and options.threads < 1:
        raise PackForcingError(f"--threads must be at least 1, but it is {options.threads}.")
    if device.type not in ("cuda", "cpu"):
        raise PackForcingError(f"The benchmark knows the clocks of cuda and cpu, but --device is {device}.")
    if options.plot and not plots.available():
        raise PackForcingError("--plot needs matplotlib, which is not installed: pip install matplotlib, or drop it.")
    check_speed(device, options.linear_dtype, options.compile, options.weights_device)


def parsed_size(text: str) -> FrameSize:
    """'832x480' as a FrameSize. Raises PackForcingError when it is none."""
    return frame_size(text, f"--size is WIDTHxHEIGHT in pixels, such as 832x480, but it is '{text}'.")


def parsed_blocks(text: str) -> tuple[int, ...]:
    """'60,120' as (60, 120), sorted and each once. Raises PackForcingError when these are not positive numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise PackForcingError(f"--baseline-blocks are positive numbers such as 60,120, but they are '{text}'.")
    return tuple(sorted({int(part) for part in parts}))
