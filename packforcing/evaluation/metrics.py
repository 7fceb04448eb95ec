"""What a video of the synthetic world shows, measured from its pixels and its caption alone.

A video is uint8 [F, H, W, 3]. Metrics look at *views* of it, float32 [N, 64, 64, 3] in [0, 1], most at four a second:
pixels are means over small squares, so that noise and blur of a few levels or pixels do not matter.

Memory cannot be bought by standing still: without motion `dynamic_degree` is 0, and nothing counts as seen again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log, nan, pi
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from ..config import VAE_TIME_STRIDE, video_frames
from ..errors import PackForcingError
from ..world.captions import COLOURS, GROUNDS, SIZES, SKIES, Attributes, LandscapeAttributes, ObjectAttributes, parse
from ..world.scenes import FPS, FRAME
from ..world.shapes import RELATIVE_RADIUS, SHAPES, signed_distance

Window: TypeAlias = tuple[float, float]  # start and end in seconds

VIEW = 64  # rows and columns of a view
VIEWS_PER_SECOND = 4
FIRST_SECONDS = 5.0  # what drift is measured against: the length of a training clip

# Segmentation: each name's shades as drawn (landscapes are hazy at the horizon, and landmarks have darker parts).
OBJECT_PALETTE = [(name, np.array(rgb) * light) for name, rgb in COLOURS.items() for light in (1.0, 0.82)]
LANDSCAPE_PALETTE = [
    *((name, np.array(rgb) * light) for name, rgb in COLOURS.items() for light in (1.0, 0.8, 0.55)),
    *(
        (f"{name} sky", np.array(rgb) * (1 - haze) + 255 * haze)
        for name, rgb in SKIES.items()
        for haze in (0, 0.18, 0.35)
    ),
    *((f"{name} ground", np.array(rgb) * light) for name, rgb in GROUNDS.items() for light in (1.0, 0.85)),
    ("trunk", np.array((115, 75, 45))),
]
TABLE_BITS = 5  # a channel, in the table from colours to names
SMALLEST_OBJECT = 20  # view pixels; a small circle has 95
SELDOM = 0.1  # a smaller share of views without a blinking object is no blinking
FARTHEST_SHAPE = 0.2  # between a region's features and those of the shape it is called
SKY_ROWS, GROUND_ROWS = slice(0, 9), slice(59, VIEW)  # of a view, where nothing else is drawn
SMALLEST_LANDMARK = 25  # view pixels, without edges
ALL_LANDMARKS_SECONDS = 24.0  # the longest period: a window so long shows every landmark
SHOWN_VIEWS = 4  # a colour in so many views (a second) is a landmark's, and no blend at an edge

# Motion
CELL = 2  # view pixels a side
MOVED = 16 / 255  # a cell that changes by more from one view to the next has motion in it
STILL_SECONDS = 1.0  # a view without motion for so long before and after it is still
STILL_BLINKING_SECONDS = 4.0  # the same where nothing may be there for a while
FASTEST_PAN = 20  # pixels of a 128 pixel frame from one view to the next

# Seen again
UNLIKE = 0.25  # root mean square difference at which two colours have nothing in common
HIDDEN_SECONDS = 10.0  # the background counts as seen again for so long after an object has hidden it
HIDING_PERIOD = 8.0  # objects' longest period: after it, something must have been seen again
AWAY_SECONDS = 30.0  # a place counts as seen again for so long after the camera saw it last
AWAY_PIXELS = 48.0  # that the camera must have gone, of a 128 pixel frame
AWAY_PERIOD = 30.0  # the camera's longest period is 24 s: after it, places must have been seen again

NOISY = 32 / 255  # standard deviation of noise at which a picture is not clean at all


# --- views and names -------------------------------------------------------------------------------------------


def view_frames(frames: int, fps: float = FPS) -> np.ndarray:
    """Frame numbers [N] of the views of a video of `frames` frames."""
    return np.arange(0, frames, max(1, round(fps / VIEWS_PER_SECOND)))


def views(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [N, H, W, 3] as views, float32 [N, 64, 64, 3] in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(pixels, VIEW).div_(255).permute(0, 2, 3, 1).contiguous().numpy()


@cache
def _colour_table(landscape: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """The palette's names, and the index of the nearest for every coarse colour, uint8 [32, 32, 32]."""
    names, colours = zip(*(LANDSCAPE_PALETTE if landscape else OBJECT_PALETTE), strict=True)
    unique = tuple(dict.fromkeys(names))
    levels = (np.arange(2**TABLE_BITS) + 0.5) * 2 ** (8 - TABLE_BITS)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)[..., None, :]
    nearest = np.square(grid - np.array(colours)).sum(-1).argmin(-1)
    return unique, np.array([unique.index(name) for name in names], np.uint8)[nearest]


def name_colours(pixels: np.ndarray, landscape: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and the index of each pixel's, uint8 [...], for pixels [..., 3] in [0, 1]."""
    names, table = _colour_table(landscape)
    levels = np.minimum(pixels * 2**TABLE_BITS, 2**TABLE_BITS - 1).astype(np.uint8)
    return names, table[levels[..., 0], levels[..., 1], levels[..., 2]]


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


# --- objects ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeenObject:
    """An object found in a view: its colour's name, its shape ("" is none of the world's) and its size."""

    colour: str
    shape: str
    size: str


def shape_features(cover: np.ndarray) -> np.ndarray:
    """How 3-, 4- and 5-fold a region is, and how spread out: [4], whatever its place, size and angle; a circle has 0s.

    `cover` [H, W] in [0, 1] is the share of each pixel that the region covers.
    """
    y, x = np.mgrid[: cover.shape[0], : cover.shape[1]]
    area = cover.sum()
    offset = (x - (cover * x).sum() / area) + 1j * (y - (cover * y).sum() / area)
    radius = np.abs(offset)
    turn = offset / np.maximum(radius, 1e-6)
    folds = [np.abs((cover * (radius * turn) ** n).sum()) / (cover * radius**n).sum() for n in (3, 4, 5)]
    return np.array([*folds, 2 * pi * (cover * radius**2).sum() / area**2 - 1])


@cache
def _shapes() -> tuple[np.ndarray, np.ndarray]:
    """Features [4, 4] and areas [4], over the square of a circle of the same size's radius, of the world's SHAPES."""
    side, radius = 129, 30.0
    y, x = np.mgrid[:side, :side] - side // 2
    points = np.stack([x, y], axis=-1)
    covers = [np.clip(0.5 - signed_distance(s, points, radius * RELATIVE_RADIUS[s]), 0, 1) for s in SHAPES]
    return np.stack([shape_features(cover) for cover in covers]), np.array(
        [cover.sum() for cover in covers]
    ) / radius**2


def find_objects(view: np.ndarray, names: np.ndarray, regions: np.ndarray, background: int) -> list[SeenObject]:
    """The objects in a view [64, 64, 3], given its pixels' names and its regions [64, 64] other than the background."""
    behind = names == background
    rows = np.maximum(behind.sum(1), 1)[:, None]
    plain = np.where(behind.any(1)[:, None], (view * behind[..., None]).sum(1) / rows, view[behind].mean(0))[:, None]
    found = []
    for number, area in zip(*np.unique(regions[regions > 0], return_counts=True), strict=True):
        if area < SMALLEST_OBJECT:
            continue
        region = regions == number
        # The region's edge is a blend: its own colour is that of the half that is farthest from the background.
        contrast = np.square(view - plain).sum(-1)[region]
        colour = np.median(view[region][contrast >= np.median(contrast)], axis=0)
        axis = colour - plain
        share = ((view - plain) * axis).sum(-1) / np.maximum(np.square(axis).sum(-1), 1e-6)
        cover = np.clip(2 * share - 0.5, 0, 1) * _grown(region, 2)  # edges twice as steep: noise far from 0.5 is cut
        palette, index = name_colours(colour, landscape=False)
        found.append(SeenObject(palette[int(index)], *_shape_and_size(cover)))
    return found


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    """A mask [H, W] and all within `by` pixels of it, in squares."""
    return F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * by + 1, 1, by)[0].bool().numpy()


def _shape_and_size(cover: np.ndarray) -> tuple[str, str]:
    features, areas = _shapes()
    distance = np.linalg.norm(features - shape_features(cover), axis=1)
    nearest = int(distance.argmin())
    radius = np.sqrt(cover.sum() / areas[nearest]) * FRAME / VIEW
    size = min(SIZES, key=lambda size: abs(log(max(radius, 1e-3) / SIZES[size])))
    return SHAPES[nearest] if distance[nearest] < FARTHEST_SHAPE else "", size


def backgrounds(names: np.ndarray) -> np.ndarray:
    """The most common name [N] in each view's names [N, 64, 64]."""
    return np.array([np.bincount(each.ravel()).argmax() for each in names])


def object_scores(shown: np.ndarray, asked: ObjectAttributes, early: np.ndarray) -> dict[str, np.ndarray]:
    """For each of the views [N, 64, 64, 3], the share of what is asked that is seen: attribute -> [N] in [0, 1].

    A colour that is not asked for must be the usual one of the `early` views, bool [N]. Of what blinks, only views that
    show it count (the others are nan); "blinks" is whether a view shows nothing.
    """
    palette, names = name_colours(shown, landscape=False)
    behind = backgrounds(names)
    regions = connected_regions(names != behind[:, None, None])
    found = [find_objects(*parts) for parts in zip(shown, names, regions, behind, strict=True)]
    behind_names = [palette[each] for each in behind]
    early_colours = [each.colour for views, is_early in zip(found, early, strict=True) if is_early for each in views]
    background = asked.background or _most_common([name for name, e in zip(behind_names, early, strict=True) if e])
    wanted = {"colour": asked.colour or _most_common(early_colours), "shape": asked.shape}
    if asked.size:
        wanted["size"] = asked.size
    scores = {
        "background": [name == background for name in behind_names],
        "count": [len(each) == asked.count for each in found],
        **{
            key: [sum(getattr(each, key) == value for each in seen) / max(len(seen), 1) for seen in found]
            for key, value in wanted.items()
        },
    }
    arrays = {key: np.array(values, float) for key, values in scores.items()}
    if asked.blinks:
        nothing = np.array([not each for each in found])
        arrays = {
            key: values if key == "background" else np.where(nothing, nan, values) for key, values in arrays.items()
        }
        arrays["blinks"] = nothing.astype(float)
    return arrays


def _objects_in_window(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over a window's views, 0 where nothing was ever seen; what blinks must be seen, and not be seen."""
    means = {key: _mean(values) for key, values in scores.items()}
    if "blinks" in means:
        means["blinks"] = float(SELDOM <= means["blinks"] <= 1 - SELDOM)
    return means


def _mean(values: np.ndarray) -> float:
    """Of the values that are not nan; 0 without any."""
    return 0.0 if np.isnan(values).all() else float(np.nanmean(values))


def _most_common(names: Sequence[str]) -> str:
    """The name that comes most often; of none an empty one."""
    return Counter(names).most_common(1)[0][0] if names else ""


# --- landscapes ------------------------------------------------------------------------------------------------


def landmark_colours(names: np.ndarray) -> list[set[int]]:
    """Indices of the landmarks' colours in each view's names [N, 64, 64]: the first len(COLOURS) names of the palette.

    Blends at edges take other colours' names, so a pixel counts where its neighbours have its name.
    """
    inner = names[:, 1:-1, 1:-1]
    same = np.ones(inner.shape, bool)
    for row, column in ((0, 1), (2, 1), (1, 0), (1, 2)):
        same &= names[:, row : row + VIEW - 2, column : column + VIEW - 2] == inner
    counts = [np.bincount(each[where], minlength=len(COLOURS)) for each, where in zip(inner, same, strict=True)]
    return [set(np.flatnonzero(count[: len(COLOURS)] >= SMALLEST_LANDMARK).tolist()) for count in counts]


def landscape_scores(shown: np.ndarray, asked: LandscapeAttributes, early: np.ndarray) -> dict[str, np.ndarray]:
    """For each of the views [N, 64, 64, 3], in [0, 1]: attribute -> [N], and "seen: COLOUR" -> [N] for asked landmarks.

    "only asked" is the share of the landmarks' colours in view that are asked for; nan where no landmark is in view.
    Where a landmark's colour is not asked for, all that the `early` views show, bool [N], count as asked for.
    """
    palette, names = name_colours(shown, landscape=True)
    sky, ground = (backgrounds(names[:, rows]) for rows in (SKY_ROWS, GROUND_ROWS))
    wanted = {palette.index(landmark.colour) for landmark in asked.landmarks if landmark.colour}
    seen = landmark_colours(names)
    if len(wanted) < len(asked.landmarks):
        views_with = Counter(colour for each, is_early in zip(seen, early, strict=True) if is_early for colour in each)
        wanted |= {colour for colour, count in views_with.items() if count >= SHOWN_VIEWS}
    return {
        "sky": (sky == palette.index(f"{asked.sky} sky")).astype(float),
        "ground": (ground == palette.index(f"{asked.ground} ground")).astype(float),
        "only asked": np.array([len(each & wanted) / len(each) if each else nan for each in seen]),
        **{f"seen: {palette[one]}": np.array([float(one in each) for each in seen]) for one in sorted(wanted)},
    }


def _landmarks_in_window(scores: Mapping[str, np.ndarray], seconds: float) -> dict[str, float]:
    """Means over a window's views; asked landmarks must be seen at some time: all in a long window, else one."""
    seen = [values.max(initial=0) for key, values in scores.items() if key.startswith("seen: ")]
    needed = max(1, len(seen)) if seconds >= ALL_LANDMARKS_SECONDS else 1
    return {
        "sky": float(scores["sky"].mean()),
        "ground": float(scores["ground"].mean()),
        "landmarks": float(min(1.0, sum(seen) / needed)),
        "only asked": _mean(scores["only asked"]),
    }


# --- motion ----------------------------------------------------------------------------------------------------


def moving_cells(shown: np.ndarray) -> np.ndarray:
    """Share of the frame [N - 1] in [0, 1] that changes from each of the views [N, 64, 64, 3] to the next.

    Noise of a few levels, flicker and slow drift of colours do not count.
    """
    cells = shown.reshape(len(shown), VIEW // CELL, CELL, VIEW // CELL, CELL, 3).mean((2, 4))
    return (np.abs(np.diff(cells, axis=0)).max(-1) > MOVED).mean((1, 2))


def border_jump(video: np.ndarray, block_frames: int = 4) -> float:
    """Change of the frame across the borders of blocks over that inside of blocks; 1: as smooth; nan without borders.

    `video` is uint8 [F, H, W, 3] from the start of a block (the first block of a video has three frames less). Inside
    of a block only changes from one latent frame to the next count, where it has any, since the VAE may have its own.
    """
    return _border_jump(video, block_frames, first_frame=0)


def _border_jump(video: np.ndarray, block_frames: int, first_frame: int) -> float:
    """`border_jump` of a part of a video: `first_frame` is the number of its first frame in the whole."""
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
    """Whether nothing moves [N] within `seconds` of each view, given each view's `moving_cells` [N]."""
    reach = round(seconds * VIEWS_PER_SECOND)
    near = np.lib.stride_tricks.sliding_window_view(np.pad(moves, reach), 2 * reach + 1)
    return ~(near > 0).any(-1)


# --- colours over time -----------------------------------------------------------------------------------------


def saturation(shown: np.ndarray) -> float:
    """Mean over views [N, 64, 64, 3] of the strongest channel less the weakest, in [0, 1]."""
    return float((shown.max(-1) - shown.min(-1)).mean())


def cleanliness(frames: np.ndarray) -> float:
    """How free of noise and blotches frames uint8 [N, H, W, 3] are, in [0, 1]: most squares of 8x8 pixels are plain."""
    rows, columns = (size // 8 for size in frames.shape[1:3])
    squares = frames[:, : rows * 8, : columns * 8].reshape(len(frames), rows, 8, columns, 8, 3)
    noise = np.median(squares.std(axis=(2, 4), dtype=np.float32).mean(-1)) / 255
    return float(np.clip(1 - noise / NOISY, 0, 1))


def likeness(difference: np.ndarray) -> np.ndarray:
    """1 for equal colours, 0 for quite different ones: [...] for differences of colours [..., 3]."""
    return np.clip(1 - np.square(difference).mean(-1) / UNLIKE**2, 0, 1)


def background_colours(shown: np.ndarray, landscape: bool) -> np.ndarray:
    """The colour [N, 3] of each view's background: of the top of the sky, or of all that has the most common name."""
    if landscape:
        return shown[:, SKY_ROWS].mean((1, 2))
    _, names = name_colours(shown, landscape=False)
    behind = names == backgrounds(names)[:, None, None]
    return (shown * behind[..., None]).sum((1, 2)) / behind.sum((1, 2))[:, None]


# --- seen again: behind an object ------------------------------------------------------------------------------


def object_revisits(shown: np.ndarray) -> np.ndarray:
    """Likeness [N] in [0, 1] of the background that reappears from behind objects to what it was when first seen.

    Over the places that were hidden within the last 10 s before each of the views [N, 64, 64, 3]; nan where none was.
    """
    _, names = name_colours(shown, landscape=False)
    hidden = torch.from_numpy(names != backgrounds(names)[:, None, None])[:, None].float()
    # Cells of 4x4 view pixels, hidden with the cells beside them: an object's edge blends into its surroundings.
    hidden = F.max_pool2d(hidden, 12, 4, 4)[:, 0].bool().numpy()
    cells = shown.reshape(len(shown), VIEW // 4, 4, VIEW // 4, 4, 3).mean((2, 4))

    first = np.argmin(hidden, axis=0)  # the first view that shows a cell
    original = np.take_along_axis(cells, first[None, ..., None], axis=0)
    times = np.arange(len(shown))[:, None, None]
    last_hidden = np.maximum.accumulate(np.where(hidden & (times > first), times, -1), axis=0)
    again = ~hidden & (last_hidden >= 0) & (times - last_hidden <= HIDDEN_SECONDS * VIEWS_PER_SECOND)
    count = again.sum((1, 2))
    total = (likeness(cells - original) * again).sum((1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), nan)


# --- seen again: by a panning camera ---------------------------------------------------------------------------


def _profiles(video: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Columns of the given frames, means over bands of rows: float32 [N, 16 * 3, 128] in [0, 1]."""
    chosen = torch.from_numpy(video[frames]).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(chosen, (16, FRAME)).flatten(1, 2).div_(255).numpy()


def _shift_errors(before: np.ndarray, after: np.ndarray, farthest: int) -> np.ndarray:
    """Mean square differences [N, 2 * farthest + 1] of profiles [N, C, W], `after` moved right by each shift."""
    width = before.shape[-1]
    errors = []
    for shift in range(-farthest, farthest + 1):
        left, right = max(0, shift), min(width, width + shift)
        errors.append(np.square(before[..., left:right] - after[..., left - shift : right - shift]).mean((1, 2)))
    return np.stack(errors, axis=1)


def camera_positions(video: np.ndarray, fps: float = FPS) -> np.ndarray:
    """x of the frame's left edge [F], in pixels of a 128 pixel frame, from 0: sums of shifts that match best.

    Between views (four a second) positions are interpolated.
    """
    frames = np.unique([*view_frames(len(video), fps), len(video) - 1])
    profiles = _profiles(video, frames)
    errors = _shift_errors(profiles[:-1], profiles[1:], FASTEST_PAN)
    best = np.clip(errors.argmin(1), 1, 2 * FASTEST_PAN - 1)
    low, middle, high = (np.take_along_axis(errors, best[:, None] + step, axis=1)[:, 0] for step in (-1, 0, 1))
    bend = low - 2 * middle + high
    part = np.where(bend > 0, (low - high) / np.maximum(2 * bend, 1e-12), 0)  # the bottom of a parabola
    positions = np.concatenate([[0.0], np.cumsum(best - FASTEST_PAN + np.clip(part, -1, 1))])
    return np.interp(np.arange(len(video)), frames, positions)


def last_visit(positions: np.ndarray, frame: int, oldest: int) -> tuple[int, float, float] | None:
    """The last frame, not before `oldest`, that saw what `frame` sees, before the camera went away and came back.

    Returns it with the farthest that the camera went to the left and to the right since, or None.
    """
    offsets = positions[oldest : frame + 1] - positions[frame]
    left = np.minimum.accumulate(offsets[::-1])[::-1]  # farthest from then to now
    right = np.maximum.accumulate(offsets[::-1])[::-1]
    there = (np.abs(offsets) <= 3) & (np.maximum(-left, right) >= AWAY_PIXELS)
    if not there.any():
        return None
    latest = int(np.flatnonzero(there)[-1])
    passed = np.flatnonzero(there & (np.arange(len(there)) > latest - 8))  # this pass, not the one before
    nearest = int(passed[np.abs(offsets[passed]).argmin()])
    return oldest + nearest, float(-left[nearest]), float(right[nearest])


def landscape_revisits(video: np.ndarray, positions: np.ndarray, frames: Sequence[int], fps: float = FPS) -> np.ndarray:
    """Likeness [N] in [0, 1] of what `frames` show to what the camera saw there before it went away and came back.

    Only columns that left the frame meanwhile count, and only what differs along a row (hills and landmarks; the sky
    looks like itself everywhere). nan where the camera was not there within the last 30 s.
    """
    scores = []
    for frame in frames:
        visit = last_visit(positions, frame, max(0, frame - round(AWAY_SECONDS * fps)))
        scores.append(nan if visit is None else _place_likeness(video, frame, *visit))
    return np.array(scores, float)


def _place_likeness(video: np.ndarray, frame: int, earlier: int, left: float, right: float) -> float:
    """How much alike two frames are where `left` and `right` pixels of 128 left the frame in between, in [0, 1]."""
    profiles = _profiles(video, np.array([earlier, frame]))
    farthest = 6  # the camera may be 3 pixels off, and so may its estimated position
    width = video.shape[2]
    shift = int(_shift_errors(profiles[:1], profiles[1:], farthest).argmin()) - farthest
    shift = round(shift * width / FRAME)
    # The camera going right loses the left columns, and the other way round.
    columns = np.arange(width)
    gone = (columns < right * width / FRAME) | (columns >= width - left * width / FRAME)
    gone &= (columns + shift >= 0) & (columns + shift < width)
    now = columns[gone]
    pair = views(np.stack([video[earlier][:, now + shift], video[frame][:, now]]))
    pair -= pair.mean((0, 2), keepdims=True)  # of each row, over both
    structure = np.square(pair).sum() + 1e-3 * pair[0].size
    return float(np.clip(1 - np.square(pair[0] - pair[1]).sum() / structure, 0, 1))


# --- the whole -------------------------------------------------------------------------------------------------


def default_windows(seconds: float) -> list[Window]:
    """The first and the last 5 s, and the whole."""
    last = max(0.0, seconds - FIRST_SECONDS)
    return list(dict.fromkeys([(0.0, min(FIRST_SECONDS, seconds)), (last, seconds), (0.0, seconds)]))


def evaluate_video(
    video: np.ndarray,
    caption: str,
    block_frames: int = 4,
    fps: float = FPS,
    windows: Sequence[Window] | None = None,
) -> dict:
    """All metrics of a video uint8 [F, H, W, 3] that was asked for by a caption of the synthetic world.

    Args:
        block_frames: latent frames a block, for `border_jump`.
        windows: (start, end) in seconds; by default the first and the last 5 s, and the whole.

    Returns {"caption", "seconds", "windows": [...]}; of each window its "start" and "end", and

    - attribute_accuracy: [0, 1], mean share of what is asked that is seen;
    - memory: [0, 1], the same of the colours that an open caption leaves out, which must be those of the video's
      beginning: of its first 5 s, or of the camera's first way there and back (24 s); nan where all is asked for;
    - attributes: the same for each attribute;
    - drift: [-1, 1], accuracy of the video's first 5 s less the window's;
    - revisit_similarity: [0, 1], how much what is seen again (behind an object, or when the camera comes back) looks as
      before; nan where nothing can have been seen again yet; what should have been and was not counts as 0;
    - background_stability: [0, 1], how much the background's colour is that of the first 5 s;
    - cleanliness: [0, 1], how free of noise and blotches plain areas are;
    - saturation_drift: [-1, 1], mean saturation less that of the first 5 s;
    - dynamic_degree: [0, 1], mean share of the frame that changes within a quarter of a second;
    - moving: [0, 1], share of the time in which anything moves;
    - border_jump: (0, inf), change across the borders of blocks over change inside; 1 is smooth; nan without borders.

    Raises PackForcingError for a caption outside of the world, for frames in another form, and for a window without
    frames.
    """
    asked = parse(caption)
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise PackForcingError(f"A video must be uint8 [F, H, W, 3], but it is {video.dtype} {list(video.shape)}.")
    landscape = isinstance(asked, LandscapeAttributes)
    seconds = len(video) / fps
    frames = view_frames(len(video), fps)
    times = frames / fps
    shown = views(video[frames])
    windows = default_windows(seconds) if windows is None else list(windows)
    inside = [(times >= start) & (times < end) for start, end in windows]
    for window, here in zip(windows, inside, strict=True):
        if not here.any():
            raise PackForcingError(f"The video lasts {seconds:g} s: it has no frames in the window {window}.")

    first = times < FIRST_SECONDS
    free = not_asked(asked)
    early = times < (ALL_LANDMARKS_SECONDS if landscape and free else FIRST_SECONDS)
    needed = np.any([early, *inside], axis=0)
    score = landscape_scores if landscape else object_scores
    scores = _spread(score(shown[needed], asked, early[needed]), needed)
    moves = moving_cells(shown)
    moves = np.append(moves, moves[-1:]) if len(moves) else np.zeros(1)  # of each view; the last as the one before
    colours = background_colours(shown, landscape)
    usual = np.median(colours[first], axis=0)
    if landscape:
        compared = needed & (np.arange(len(frames)) % 2 == 0)
        again = landscape_revisits(video, camera_positions(video, fps), frames[compared], fps)
        again = _spread({"again": again}, compared)["again"]
    else:
        again = object_revisits(shown)
        compared = needed
    blinks = not landscape and asked.blinks
    again[is_still(moves, STILL_BLINKING_SECONDS if blinks else STILL_SECONDS)] = nan
    again[np.isnan(again) & compared & (times >= (AWAY_PERIOD if landscape else HIDING_PERIOD))] = 0

    def attributes(here: np.ndarray) -> dict[str, float]:
        chosen = {key: values[here] for key, values in scores.items()}
        if landscape:
            return _landmarks_in_window(chosen, here.sum() / VIEWS_PER_SECOND)
        return _objects_in_window(chosen)

    def accuracy(found: Mapping[str, float]) -> float:
        return float(np.mean([value for key, value in found.items() if key not in free]))

    accuracy_first = accuracy(attributes(first))

    def measure(window: Window, here: np.ndarray) -> dict:
        start, end = (round(second * fps) for second in window)
        found = attributes(here)
        seen_again = again[here][~np.isnan(again[here])]
        return {
            "start": window[0],
            "end": window[1],
            "attribute_accuracy": accuracy(found),
            "memory": float(np.mean([found[key] for key in free])) if free else nan,
            "attributes": found,
            "drift": accuracy_first - accuracy(found),
            "revisit_similarity": float(seen_again.mean()) if len(seen_again) else nan,
            "background_stability": float(likeness(colours[here] - usual).mean()),
            "cleanliness": cleanliness(video[frames[here][::VIEWS_PER_SECOND]]),
            "saturation_drift": saturation(shown[here]) - saturation(shown[first]),
            "dynamic_degree": float(moves[here].mean()),
            "moving": float((moves[here] > 0).mean()),
            "border_jump": _border_jump(video[start:end], block_frames, start),
        }

    return {
        "caption": caption,
        "seconds": seconds,
        "windows": [measure(window, here) for window, here in zip(windows, inside, strict=True)],
    }


def not_asked(asked: Attributes) -> tuple[str, ...]:
    """The attributes that a caption leaves out, and a video chooses."""
    if isinstance(asked, ObjectAttributes):
        return tuple(key for key in ("background", "colour") if not getattr(asked, key))
    return () if all(landmark.colour for landmark in asked.landmarks) else ("landmarks", "only asked")


def _spread(scores: Mapping[str, np.ndarray], where: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of the views at `where` [N] as scores of all views, nan at the others."""
    spread = {key: np.full(len(where), nan) for key in scores}
    for key, values in scores.items():
        spread[key][where] = values
    return spread
