"""What a user sees of a run: the progress bar, the newest block as a moving picture, and where the run stands."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import BinaryIO

import comfy.utils
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..packforcing.generate.story import time_of
from ..packforcing.model.latent_preview import LatentPreview
from ..packforcing.pixels import to_uint8
from . import adapter

PREVIEW_SIDE = 384  # pixels of the longer side
PREVIEW_FRAMES = 8  # a block, evenly spaced
PREVIEW_QUALITY = 80
PREVIEW_FPS = 16  # Wan's, whatever the video is to be played at
RATE_BLOCKS = 8  # over which the speed is measured


class Progress:
    """ComfyUI's progress bar over all model passes, with the newest block's picture; also where Cancel is heard.

    `estimate` makes the picture where there are no frames: no VAE is waited for. `notes` are what the node has said of
    the run before, and goes on to say below the line that changes.
    """

    def __init__(
        self,
        blocks: int,
        given: int,
        steps: int,
        refreshed: int,
        estimate: LatentPreview,
        notes: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        passes = given * 2 + (blocks - given) * (steps + 1) - 1 + refreshed  # the last block has no clean pass
        self._bar = comfy.utils.ProgressBar(passes)
        self._passes = passes
        self._done = 0
        self._blocks = blocks
        self._estimate = estimate
        self._notes = notes
        self._shown = 0
        self._frames = 0
        self._clock = clock
        self._times: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=RATE_BLOCKS + 1)  # seconds, frames so far

    def on_step(self, block: int, step: int) -> None:
        adapter.check_interrupted()
        self._bar.update_absolute(self._done, self._passes)
        self._done += 1

    def more(self, passes: int) -> None:
        """The run takes more passes than were counted."""
        self._passes += passes

    def show(self, latents: Tensor, frames: Tensor | None) -> None:
        """A block is finished: latents [1, 16, T, h, w], and its frames [1, 3, F, H, W] where there is a VAE."""
        self._bar.update_absolute(min(self._done, self._passes), self._passes, preview(latents, frames, self._estimate))
        self._shown += 1
        self._frames += 4 * latents.shape[2] if frames is None else frames.shape[2]
        self._times.append((self._clock(), self._frames))
        adapter.show_on_node("\n".join([self.text(), *self._notes]))

    def text(self) -> str:
        """Where the run stands: the block, the speed over the last blocks, and the time that is left at that speed."""
        (began, before), (now, after) = self._times[0], self._times[-1]
        where = f"block {self._shown:,} of {self._blocks:,}"
        if now <= began:
            return where
        left = (now - began) / (len(self._times) - 1) * (self._blocks - self._shown)
        return f"{where}, {(after - before) / (now - began):.1f} frames/s, {time_of(round(left))} left"


def preview(latents: Tensor, frames: Tensor | None, estimate: LatentPreview) -> tuple[str, Image.Image, None] | None:
    """A block's moving picture, estimated from the latents where there are no frames; None where none is wanted."""
    if not adapter.previews_wanted():
        return None
    return moving_preview(estimate.frames(latents) if frames is None else frames)


def moving_preview(frames: Tensor) -> tuple[str, Image.Image, None]:
    """Some of a block's frames [1, 3, F, H, W] in [-1, 1] as one moving picture, as the progress bar takes it.

    ComfyUI knows previews as JPEG and PNG only, and calls the picture's `save`. This one writes an animated WEBP there:
    a browser goes by what it finds. Whoever asks for the picture itself gets the block's first frame.
    """
    chosen = frames[0, :, :: max(1, frames.shape[2] // PREVIEW_FRAMES)]
    scale = min(1.0, min(PREVIEW_SIDE, adapter.preview_side()) / max(chosen.shape[2:]))
    size = [max(1, round(side * scale)) for side in chosen.shape[2:]]
    small = F.interpolate(chosen.transpose(0, 1).float(), size, mode="area").transpose(0, 1)
    pictures = [Image.fromarray(picture) for picture in to_uint8(small).cpu().numpy()]
    still = pictures[0].copy()
    duration_ms = round(1000 * frames.shape[2] / PREVIEW_FPS / len(pictures))

    def save(file: BinaryIO, *_: object, **__: object) -> None:
        pictures[0].save(
            file, "WEBP", save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0,
            quality=PREVIEW_QUALITY, method=0,
        )  # fmt: skip

    still.save = save  # type: ignore[method-assign]
    return "JPEG", still, None
