"""The options that say what a video starts from, and what is kept so that it can go on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..config import VAE_SPACE_STRIDE, FrameSize
from ..errors import PackForcingError
from ..files.latent_file import SUFFIXES, check_latent_path, load_latents
from ..files.state_file import VideoState, check_state_path, is_state
from ..files.state_journal import UNFINISHED, StateJournal, journal_of, read_state
from ..files.weights import SAFETENSORS_SUFFIXES
from ..files.writing import check_distinct, check_output_file
from ..generate.start import Start, pixel_start, retimed, retimed_count
from ..generate.state import state_start
from ..model.vae import normalise


def add_start_options(command: argparse.ArgumentParser) -> None:
    """What to start from, and what to keep."""
    starts = command.add_mutually_exclusive_group()
    starts.add_argument("--start-image", metavar="FILE", help="a picture with which the video begins")
    starts.add_argument("--start-video", metavar="FILE", help="a video with which this one begins, and goes on")
    starts.add_argument(
        "--continue-from",
        metavar="FILE",
        help="a state (--save-state) or latents (--latents, or ComfyUI's Save Latent) of a video that goes on; where "
        "it is the file of --save-state it may be missing, so that the same command begins and goes on",
    )
    command.add_argument("--save-state", metavar="FILE", help="a .safetensors file, from which the video can go on")
    command.add_argument("--latents", metavar="FILE", help="a .latent file, which ComfyUI's Load Latent reads")


def check_kept(options: argparse.Namespace) -> None:
    """Raises PackForcingError when what is to be kept could not be written."""
    check_distinct(
        {
            "--output": options.output,
            "--report": options.report,
            "--picture": options.picture,
            "--latents": options.latents,
            "--save-state": options.save_state,
        }
    )
    check_output_file(options.report, "report")
    check_output_file(options.picture, "picture")
    if options.latents is not None:
        check_latent_path(options.latents)
    if options.save_state is not None:
        check_state_path(options.save_state)
        check_output_file(journal_of(options.save_state), "state")


def state_to_go_on_from(options: argparse.Namespace) -> VideoState | None:
    """The state that --continue-from names, if it is one and is there."""
    file = options.continue_from
    if file is not None and state_or_journal(file) != Path(file):
        return read_state(journal_of(file))
    if file is None or begins_anew(options) or not Path(file).is_file() or not is_state_file(file):
        return None
    return read_state(file)


def state_or_journal(file: str) -> Path:
    """The file to go on from: a state's journal, where that is newer."""
    return journal_of(file) if is_newer(journal_of(file), Path(file)) else Path(file)


def is_newer(journal: Path, state: Path) -> bool:
    """Whether a run that was to write this state was killed since, and left its journal."""
    return journal.is_file() and not (state.exists() and state.stat().st_mtime > journal.stat().st_mtime)


def begins_anew(options: argparse.Namespace) -> bool:
    """Whether the file to go on from is the one that this run will write first."""
    file, saved = options.continue_from, options.save_state
    return file is not None and saved is not None and Path(file) == Path(saved) and not Path(file).exists()


def journal_for(options: argparse.Namespace, state: VideoState | None) -> StateJournal | None:
    """The journal of a run that saves its state, and goes on from that one."""
    if options.save_state is None:
        return None
    return StateJournal(journal_of(options.save_state), 1 if state is None else state.blocks)


def is_state_file(file: str) -> bool:
    """Whether a file is a state and not mere latents. What is neither is told by the reader of latents."""
    suffix = Path(file).suffix.lower()
    if suffix == UNFINISHED:
        return True
    if suffix in SUFFIXES and suffix not in SAFETENSORS_SUFFIXES:
        return False
    return is_state(file)


def start_of(options: argparse.Namespace, state: VideoState | None, size: FrameSize) -> Start | None:
    """The start that the options name. Raises PackForcingError for a file that cannot be one."""
    if state is not None:
        return state_start(state)
    if options.start_image is not None:
        picture = read_picture(options.start_image)
        return pixel_start("The start image", lambda: [picture], 1, size)
    if options.start_video is not None:
        return video_start(options.start_video, size, options.fps)
    if options.continue_from is not None and not begins_anew(options):
        return latent_start(options.continue_from, size)
    return None


def read_picture(file: str) -> Tensor:
    """A picture [h, w, 3] in [0, 1]. Raises PackForcingError for a file that is none."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's for a broken PNG
        raise PackForcingError(
            f"The start image {file} cannot be read ({type(error).__name__}): give a PNG, JPEG or WebP file."
        ) from error
    return torch.from_numpy(pixels / 255)


def video_start(file: str, size: FrameSize, fps: float) -> Start:
    """The start of a video file, at the run's frames a second."""
    from ..files.video import frames_of, probe  # needs av, which `plan` and `bench` can do without

    info = probe(file)

    def frames() -> Iterator[Tensor]:
        return retimed((torch.from_numpy(frame) / 255 for frame in frames_of(file)), info.fps, fps)

    return pixel_start("The start video", frames, retimed_count(info.frames, info.fps, fps), size)


def latent_start(file: str, size: FrameSize) -> Start:
    """The start of a file of latents, which must have the video's size."""
    latents = normalise(load_latents(file))
    height, width = (VAE_SPACE_STRIDE * side for side in latents.shape[-2:])
    if (width, height) != (size.width, size.height):
        raise PackForcingError(
            f"The latents {file} are of {width}x{height} pixels, but the video is to be {size.width}x{size.height}: "
            f"give --width {width} --height {height}."
        )
    return Start("The latents", latents.shape[2], lambda vae: latents)
