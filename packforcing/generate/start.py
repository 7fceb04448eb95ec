"""What a video can start from, beside noise: a picture, a video, or latents; and how pixels become latents.

All of them are latent frames at the video's beginning: whole blocks of them are taken as they are, and of a block in
which they end the model makes the rest (`LongVideo.replay`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import LATENT_CHANNELS, VAE_TIME_STRIDE, FrameSize
from ..errors import PackForcingError
from ..model.vae import StreamingEncoder, WanVAE
from .long_video import Block, LongVideo, Selected

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a video starts with."""

    what: str  # for messages, such as "The start video"
    frames: int  # latent frames
    latents: Callable[[WanVAE | None], Tensor]  # by the run's VAE: [1, 16, frames, h, w], normalised
    selected: Sequence[Selected] | None = None  # by the blocks of the run that made them, if that is known

    def blocks(self, block_frames: int) -> int:
        """How many blocks it reaches into."""
        return -(-self.frames // block_frames)


def check_start(start: Start, block_frames: int, blocks: int) -> None:
    """Raises PackForcingError when a start leaves nothing to make of a video of so many blocks.

    A state of the whole video is enough: of a run that was killed at its very end, the file may lack its last frames.
    """
    frames = blocks * block_frames
    if start.frames > frames or (start.frames == frames and start.selected is None):
        raise PackForcingError(
            f"{start.what} has {start.blocks(block_frames)} blocks already, but the video is to have {blocks} in all: "
            "ask for more seconds."
        )


def started_blocks(video: LongVideo, start: Start | None, blocks: int) -> Iterator[Block]:
    """All blocks of a video that are to come: those of its start, and then those that are made."""
    made, block_frames = video.made_blocks, video.layout.config.block_frames
    if start is not None and made < start.blocks(block_frames):
        selected = None if start.selected is None else start.selected[made:]
        yield from video.replay(start.latents(video.vae)[:, :, made * block_frames :], selected)
    yield from video.blocks(blocks - video.next_block)


# --- pixels -----------------------------------------------------------------------------------------------------------


def latent_frames(frames: int) -> int:
    """Latent frames of that many video frames; up to three of them fill no latent frame."""
    return 1 + (frames - 1) // VAE_TIME_STRIDE


def pixel_start(what: str, frames: Callable[[], Iterable[Tensor]], count: int, size: FrameSize) -> Start:
    """A start of pictures [h, w, 3] in [0, 1], `count` of them, which may be of another size than the video.

    The first ones are left out where the VAE needs fewer, since the video goes on from the last one.
    """
    if count < 1:
        raise PackForcingError(f"{what} has no frame: choose another.")
    left_out = (count - 1) % VAE_TIME_STRIDE
    if left_out:
        log.warning(
            "PackForcing: %s has %d frames, and the VAE takes 1 + 4k of them: the first %d are left out.",
            what[0].lower() + what[1:],
            count,
            left_out,
        )

    def latents(vae: WanVAE | None) -> Tensor:
        if vae is None:
            raise PackForcingError(f"{what} must be encoded, but there is no VAE: connect the Wan 2.1 VAE.")
        wanted = islice(frames(), left_out, None)
        encoded = encode(vae, (fitted(frame, size) for frame in wanted))
        if encoded.shape[2] != latent_frames(count):
            raise PackForcingError(
                f"{what} was to have {count} frames but breaks off before: cut it to what can be played."
            )
        return encoded

    return Start(what, latent_frames(count), latents)


def encode(vae: WanVAE, frames: Iterable[Tensor]) -> Tensor:
    """Frames [3, h, w] in [-1, 1] -> normalised latents [1, 16, t, h/8, w/8] in host memory, float32.

    A latent frame at a time, so memory does not grow with the video. Frames after the last whole latent frame are left.
    """
    encoder, parts, waiting = StreamingEncoder(vae), [], []
    for frame in frames:
        waiting.append(frame)
        if len(waiting) == (VAE_TIME_STRIDE if encoder.started else 1):
            parts.append(encoder.encode(torch.stack(waiting, dim=1)[None]).float().cpu())
            waiting = []
    return torch.cat(parts, dim=2) if parts else torch.zeros(1, LATENT_CHANNELS, 0, 1, 1)


def fitted(frame: Tensor, size: FrameSize) -> Tensor:
    """A picture [h, w, 3] in [0, 1] -> a frame [3, H, W] in [-1, 1]: its middle, in the video's shape, resized.

    As ComfyUI's nodes do it (bilinear, cropped from the centre), so both give the same latents.
    """
    picture = frame.movedim(-1, 0)[None].float()
    height, width = picture.shape[-2:]
    rows, columns = size.height, size.width
    if width * rows > columns * height:  # too wide
        side = round((width - height * columns / rows) / 2)
        picture = picture[..., side : width - side]
    elif width * rows < columns * height:
        side = round((height - width * rows / columns) / 2)
        picture = picture[..., side : height - side, :]
    if picture.shape[-2:] != (rows, columns):
        picture = F.interpolate(picture, size=(rows, columns), mode="bilinear")
    return picture[0] * 2 - 1


def retimed(frames: Iterable[Tensor], rate: float, fps: float) -> Iterator[Tensor]:
    """Frames at `rate` frames a second -> at `fps`. Some are left out, or come again: motion keeps its speed."""
    made = 0
    for number, frame in enumerate(frames):
        while retimed_from(made, rate, fps) == number:
            made += 1
            yield frame


def retimed_from(number: int, rate: float, fps: float) -> int:
    """Which frame of the source is shown in the middle of frame `number`."""
    return int((number + 0.5) * rate / fps)


def retimed_count(count: int, rate: float, fps: float) -> int:
    """How many frames `retimed` makes of `count`."""
    made = max(0, int(count * fps / rate) - 1)
    while retimed_from(made, rate, fps) < count:
        made += 1
    return made
