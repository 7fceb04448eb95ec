"""Views of a video, and the names of the colours in them: what all metrics look at.

A video is uint8 [F, H, W, 3]. A *view* is one of its frames made small, float32 [64, 64, 3] in [0, 1]; mostly there are
four a second. Its pixels are means over small squares, so that noise and blur of a few levels or pixels do not matter.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from ..world.captions import COLOURS, GROUNDS, SKIES
from ..world.drawing import TRUNK_COLOUR
from ..world.scenes import FPS

VIEW = 64  # rows and columns of a view
VIEWS_PER_SECOND = 4

# Segmentation: the shades in which each named colour is drawn. Landscapes are hazy at the horizon, and landmarks have
# darker parts.
OBJECT_PALETTE = [(name, np.array(rgb) * light) for name, rgb in COLOURS.items() for light in (1.0, 0.82)]
LANDSCAPE_PALETTE = [
    *((name, np.array(rgb) * light) for name, rgb in COLOURS.items() for light in (1.0, 0.8, 0.55)),
    *(
        (f"{name} sky", np.array(rgb) * (1 - haze) + 255 * haze)
        for name, rgb in SKIES.items()
        for haze in (0, 0.18, 0.35)
    ),
    *((f"{name} ground", np.array(rgb) * light) for name, rgb in GROUNDS.items() for light in (1.0, 0.85)),
    ("trunk", np.array(TRUNK_COLOUR)),
]
TABLE_BITS = 5  # of each channel, in the table from colours to names
UNLIKE = 0.25  # root mean square difference at which two colours have nothing in common


def view_frames(frames: int, fps: float = FPS) -> np.ndarray:
    """Frame numbers [N] of the views of a video of `frames` frames."""
    return np.arange(0, frames, max(1, round(fps / VIEWS_PER_SECOND)))


def views(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [N, H, W, 3] as views, float32 [N, 64, 64, 3] in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(pixels, VIEW).div_(255).permute(0, 2, 3, 1).contiguous().numpy()


@cache
def _colour_table(landscape: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """The palette's names, and for every coarse colour the index of the nearest one, uint8 [32, 32, 32]."""
    names, colours = zip(*(LANDSCAPE_PALETTE if landscape else OBJECT_PALETTE), strict=True)
    unique = tuple(dict.fromkeys(names))
    levels = (np.arange(2**TABLE_BITS) + 0.5) * 2 ** (8 - TABLE_BITS)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)[..., None, :]
    nearest = np.square(grid - np.array(colours)).sum(-1).argmin(-1)
    return unique, np.array([unique.index(name) for name in names], np.uint8)[nearest]


def name_colours(pixels: np.ndarray, landscape: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """All names of the palette, and for each of the pixels [..., 3] in [0, 1] the index of its name, uint8 [...]."""
    names, table = _colour_table(landscape)
    levels = np.minimum(pixels * 2**TABLE_BITS, 2**TABLE_BITS - 1).astype(np.uint8)
    return names, table[levels[..., 0], levels[..., 1], levels[..., 2]]


def commonest(names: np.ndarray) -> np.ndarray:
    """The index [N] that is most common in each view's indices of names [N, rows, columns]."""
    return np.array([np.bincount(each.ravel()).argmax() for each in names])


def connected_regions(mask: np.ndarray) -> np.ndarray:
    """Number the 4-connected regions of each mask, bool [N, H, W] to int [N, H, W]: 0 outside, one number a region."""
    numbers = np.arange(1, 1 + mask[0].size, dtype=np.int32).reshape(mask.shape[1:]) * mask
    while True:  # the largest number of a region spreads over it
        before = numbers.copy()
        for axis in (1, 2):
            cells = np.moveaxis(numbers, axis, 0)
            np.maximum(cells[1:], cells[:-1], out=cells[1:])
            np.maximum(cells[:-1], cells[1:], out=cells[:-1])
            numbers *= mask
        if np.array_equal(before, numbers):
            return numbers


def likeness(difference: np.ndarray) -> np.ndarray:
    """1 for equal colours, 0 for quite different ones: [...] for differences of colours [..., 3]."""
    return np.clip(1 - np.square(difference).mean(-1) / UNLIKE**2, 0, 1)


def mean_of_known(values: np.ndarray) -> float:
    """The mean of the values that are not nan; 0 without any."""
    return 0.0 if np.isnan(values).all() else float(np.nanmean(values))
