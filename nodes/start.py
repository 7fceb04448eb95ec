"""What the sampler starts from: its inputs continue_from, state, start_image and start_video, as one start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
from comfy_api.input_impl import VideoFromFile
from torch import Tensor

from ..packforcing.config import FrameSize
from ..packforcing.errors import PackForcingError
from ..packforcing.files.state_file import VideoState
from ..packforcing.files.video import frames_of, probe
from ..packforcing.generate.start import Start, pixel_start, retimed, retimed_count
from ..packforcing.generate.state import state_start
from . import adapter
from .files import temporary_video


@dataclass(frozen=True)
class StartInputs:
    """What is connected to the sampler; None: nothing."""

    continue_from: Any = None  # LATENT
    state: VideoState | None = None
    start_image: Tensor | None = None  # IMAGE
    start_video: Any = None  # VIDEO or IMAGE


def start_of(inputs: StartInputs, model, size: FrameSize, fps: float, vae) -> Start | None:
    """The start that is connected, if there is one. Raises PackForcingError for several, and for one that cannot be."""
    given = [name for name, value in vars(inputs).items() if value is not None]
    if len(given) > 1:
        raise PackForcingError(
            f"A video starts from one thing, but {' and '.join(given)} are connected: leave one of them out."
        )
    if given in (["start_image"], ["start_video"]) and vae is None:
        raise PackForcingError(f"The {given[0]} must be encoded, but there is no VAE: connect the Wan 2.1 VAE.")
    if inputs.continue_from is not None:
        return latent_start(inputs.continue_from, model, size)
    if inputs.state is not None:
        return state_start(inputs.state)
    if inputs.start_image is not None:
        pictures = inputs.start_image[:1, ..., :3]
        return pixel_start("The start image", lambda: heard(pictures), len(pictures), size)
    if inputs.start_video is not None:
        return video_start(inputs.start_video, size, fps)
    return core_start(model, size)


def core_start(model, size: FrameSize) -> Start | None:
    """The start that core's node ARVideoI2V has put on a MODEL: its picture, encoded."""
    options = model.model_options.get("transformer_options", {}).get("ar_config", {})
    samples = options.get("initial_latent")
    return None if samples is None else latent_start({"samples": samples}, model, size)


def latent_start(latent, model, size: FrameSize) -> Start:
    """The start of a LATENT, which must have the video's size."""
    samples = latent["samples"]
    what = "The latent to go on from"
    check_video_latents(samples, what)
    found = (samples.shape[-1] * 8, samples.shape[-2] * 8)
    if found != (size.width, size.height):
        raise PackForcingError(
            f"{what} must be {size.width}x{size.height} pixels, but it is {found[0]}x{found[1]}: set width and height "
            "to that."
        )
    return Start(what, samples.shape[2], lambda vae: adapter.normalised(model, samples))


def check_video_latents(samples: Tensor, what: str) -> None:
    """Raises PackForcingError when samples are not those of one Wan 2.1 video."""
    if samples.ndim != 5 or samples.shape[0] != 1 or samples.shape[1] != 16 or samples.shape[2] < 1:
        raise PackForcingError(
            f"{what} must be one Wan 2.1 video, [1, 16, frames, height, width], but it has the shape "
            f"{list(samples.shape)}: use the core node EmptyHunyuanLatentVideo with a batch size of 1, say."
        )


def video_start(video, size: FrameSize, fps: float) -> Start:
    """The start of a VIDEO, at the run's frames a second; or of a batch of images, which are taken as they come."""
    what = "The start video"
    if isinstance(video, Tensor):
        return pixel_start(what, lambda: heard(video[..., :3]), len(video), size)
    if not isinstance(video, VideoFromFile):  # its frames lie in memory already
        parts = video.get_components()
        images, rate = parts.images[..., :3], float(parts.frame_rate)
        count = retimed_count(len(images), rate, fps)
        return pixel_start(what, lambda: heard(retimed(images, rate, fps)), count, size)
    file = saved(video)
    info = probe(file)

    def frames() -> Iterator[Tensor]:
        try:
            yield from heard(retimed((torch.from_numpy(frame) / 255 for frame in frames_of(file)), info.fps, fps))
        finally:
            file.unlink(missing_ok=True)

    return pixel_start(what, frames, retimed_count(info.frames, info.fps, fps), size)


def saved(video: VideoFromFile) -> Path:
    """A copy of a VIDEO as a temporary file, trimmed where it is trimmed: its packets, not its frames in memory."""
    file = temporary_video()
    try:
        video.save_to(str(file))
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise PackForcingError(
            f"The start video cannot be copied into an MP4 ({error}): convert it, or connect its images from the core "
            "node Get Video Components."
        ) from error
    return file


def heard(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """The frames, between which Cancel is heard."""
    for frame in frames:
        adapter.check_interrupted()
        yield frame
