"""Measures of change over time: motion, jumps at the borders of blocks, saturation, noise."""

from __future__ import annotations

from math import nan

import numpy as np

from ..config import VAE_TIME_STRIDE, video_frames
from .views import VIEW, VIEWS_PER_SECOND, views

CELL = 2  # view pixels a side
MOVED = 16 / 255  # a cell that changes by more from one view to the next has motion in it
STILL_SECONDS = 1.0  # a view without motion for so long before and after it is still
STILL_BLINKING_SECONDS = 4.0  # the same where nothing may be there for a while
NOISY = 32 / 255  # standard deviation of noise at which a picture is not clean at all


def moving_cells(shown: np.ndarray) -> np.ndarray:
    """Share of the frame that changes from each of the views [N, 64, 64, 3] to the next: [N - 1] in [0, 1].

    Noise of a few levels, flicker and slow drift of colours do not count.
    """
    cells = shown.reshape(len(shown), VIEW // CELL, CELL, VIEW // CELL, CELL, 3).mean((2, 4))
    return (np.abs(np.diff(cells, axis=0)).max(-1) > MOVED).mean((1, 2))


def border_jump(video: np.ndarray, block_frames: int = 4, first_frame: int = 0) -> float:
    """Change of the frame across the borders of blocks, over change inside of blocks; 1 is as smooth.

    Args:
        video: a video or a part of one, uint8 [F, H, W, 3].
        block_frames: latent frames a block. The first block of a video has three frames less than the others.
        first_frame: the number of the part's first frame in the whole video.

    Inside of a block, only changes from one latent frame to the next count, where it has any, because the VAE may have
    jumps of its own. nan without borders, and without changes inside.
    """
    frames = np.arange(first_frame + 1, first_frame + len(video))  # each with the frame before it
    latents = (frames - 1) % VAE_TIME_STRIDE == 0
    borders = (frames - 1) % (VAE_TIME_STRIDE * block_frames) == video_frames(block_frames) - 1
    inside = latents & ~borders if block_frames > 1 else ~latents
    if not borders.any() or not inside.any():
        return nan

    def change(which: np.ndarray) -> float:
        after = np.flatnonzero(which) + 1
        return float(np.abs(views(video[after]) - views(video[after - 1])).mean())

    small = 1e-4  # a frozen video has no jumps, and no division by 0
    return (change(borders) + small) / (change(inside) + small)


def is_still(moves: np.ndarray, seconds: float = STILL_SECONDS) -> np.ndarray:
    """Whether nothing moves within `seconds` of each view: bool [N], given each view's `moving_cells` [N]."""
    reach = round(seconds * VIEWS_PER_SECOND)
    near = np.lib.stride_tricks.sliding_window_view(np.pad(moves, reach), 2 * reach + 1)
    return np.logical_not((near > 0).any(-1))


def saturation(shown: np.ndarray) -> float:
    """Mean over views [N, 64, 64, 3] of the strongest channel less the weakest, in [0, 1]."""
    return float((shown.max(-1) - shown.min(-1)).mean())


def cleanliness(frames: np.ndarray) -> float:
    """How free of noise and blotches frames uint8 [N, H, W, 3] are, in [0, 1].

    It looks at the usual square of 8x8 pixels, since most of them are plain.
    """
    rows, columns = (size // 8 for size in frames.shape[1:3])
    squares = frames[:, : rows * 8, : columns * 8].reshape(len(frames), rows, 8, columns, 8, 3)
    noise = np.median(squares.std(axis=(2, 4), dtype=np.float32).mean(-1)) / 255
    return float(np.clip(1 - noise / NOISY, 0, 1))
