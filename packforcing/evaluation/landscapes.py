"""Landscapes in views: sky, ground and landmarks, where the camera is, and whether places look as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import nan

import numpy as np
import torch
import torch.nn.functional as F

from ..world.captions import COLOURS, LandscapeAttributes
from ..world.scenes import FPS, FRAME
from .views import VIEW, commonest, mean_of_known, name_colours, view_frames, views

SKY_ROWS, GROUND_ROWS = slice(0, 9), slice(59, VIEW)  # of a view, where nothing else is drawn
SMALLEST_LANDMARK = 25  # view pixels, without edges
ALL_LANDMARKS_SECONDS = 24.0  # the longest period: a window so long shows every landmark
SHOWN_VIEWS = 4  # a colour in so many views (a second) is a landmark's, and no blend at an edge

FASTEST_PAN = 20  # pixels of a 128 pixel frame from one view to the next
AWAY_SECONDS = 30.0  # a place counts as seen again for so long after the camera saw it last
AWAY_PIXELS = 48.0  # that the camera must have gone, of a 128 pixel frame
AWAY_PERIOD = 30.0  # the camera's longest period is 24 s: after it, places must have been seen again
SAME_PLACE_PIXELS = 3  # two positions of the camera that differ by no more are one place


# --- what was asked for ----------------------------------------------------------------------------------------


def landmark_colours(names: np.ndarray) -> list[set[int]]:
    """Indices of the landmarks' colours in each view, given the indices of its pixels' names [N, 64, 64].

    Landmarks have the first len(COLOURS) names of the palette. Blends at edges take other colours' names, so a pixel
    counts only where its neighbours have the same name.
    """
    inner = names[:, 1:-1, 1:-1]
    same = np.ones(inner.shape, bool)
    for row, column in ((0, 1), (2, 1), (1, 0), (1, 2)):
        same &= names[:, row : row + VIEW - 2, column : column + VIEW - 2] == inner
    counts = [np.bincount(each[where], minlength=len(COLOURS)) for each, where in zip(inner, same, strict=True)]
    return [set(np.flatnonzero(count[: len(COLOURS)] >= SMALLEST_LANDMARK).tolist()) for count in counts]


def landscape_scores(shown: np.ndarray, asked: LandscapeAttributes, early: np.ndarray) -> dict[str, np.ndarray]:
    """For each view, the share of what is asked for that is seen: attribute -> [N] in [0, 1].

    Args:
        shown: the views, [N, 64, 64, 3].
        asked: what the caption says. Where it leaves a landmark's colour out, all landmarks' colours that the `early`
            views show count as asked for.
        early: which views are early ones, bool [N].

    "seen: COLOUR" is whether a landmark of that colour, which is asked for, is in view. "only asked" is the share of
    the landmarks' colours in view that are asked for; nan where no landmark is in view.
    """
    palette, names = name_colours(shown, landscape=True)
    sky, ground = (commonest(names[:, rows]) for rows in (SKY_ROWS, GROUND_ROWS))
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


def landmarks_in_window(scores: Mapping[str, np.ndarray], seconds: float) -> dict[str, float]:
    """Means over a window's views. Landmarks must be seen at some time: in a long window all of them, else one."""
    seen = [values.max(initial=0) for key, values in scores.items() if key.startswith("seen: ")]
    needed = max(1, len(seen)) if seconds >= ALL_LANDMARKS_SECONDS else 1
    return {
        "sky": float(scores["sky"].mean()),
        "ground": float(scores["ground"].mean()),
        "landmarks": float(min(1.0, sum(seen) / needed)),
        "only asked": mean_of_known(scores["only asked"]),
    }


def sky_colours(shown: np.ndarray) -> np.ndarray:
    """The mean colour [N, 3] at the top of the sky of each of the views [N, 64, 64, 3]."""
    return shown[:, SKY_ROWS].mean((1, 2))


# --- the camera ------------------------------------------------------------------------------------------------


def _profiles(video: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """128 columns of each of the given frames, as means over 16 bands of rows: float32 [N, 16 * 3, 128] in [0, 1]."""
    chosen = torch.from_numpy(video[frames]).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(chosen, (16, FRAME)).flatten(1, 2).div_(255).numpy()


def _shift_errors(before: np.ndarray, after: np.ndarray, farthest: int) -> np.ndarray:
    """Mean square differences [N, 2 * farthest + 1] of profiles [N, C, W], with `after` moved right by each shift."""
    width = before.shape[-1]
    errors = []
    for shift in range(-farthest, farthest + 1):
        left, right = max(0, shift), min(width, width + shift)
        errors.append(np.square(before[..., left:right] - after[..., left - shift : right - shift]).mean((1, 2)))
    return np.stack(errors, axis=1)


def camera_positions(video: np.ndarray, fps: float = FPS) -> np.ndarray:
    """x of each frame's left edge [F], in pixels of a 128 pixel frame; the first frame's is 0.

    From each view to the next, the camera went by the shift that matches best. Between views (four a second) positions
    are interpolated.
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
    """When the camera last saw what `frame` sees, before it went away and came back.

    Args:
        positions: of the camera in each frame [F], in pixels.
        oldest: the first frame that counts.

    Returns:
        (frame of that visit, the farthest that the camera was to the left since, and to the right), or None.
    """
    offsets = positions[oldest : frame + 1] - positions[frame]
    left = np.minimum.accumulate(offsets[::-1])[::-1]  # farthest from then to now
    right = np.maximum.accumulate(offsets[::-1])[::-1]
    there = (np.abs(offsets) <= SAME_PLACE_PIXELS) & (np.maximum(-left, right) >= AWAY_PIXELS)
    if not there.any():
        return None
    latest = int(np.flatnonzero(there)[-1])
    passed = np.flatnonzero(there & (np.arange(len(there)) > latest - 8))  # this pass, not the one before
    nearest = int(passed[np.abs(offsets[passed]).argmin()])
    return oldest + nearest, float(-left[nearest]), float(right[nearest])


# --- places that are seen again --------------------------------------------------------------------------------


def landscape_revisits(video: np.ndarray, positions: np.ndarray, frames: Iterable[int], fps: float = FPS) -> np.ndarray:
    """How much what `frames` show looks as it did before the camera went away and came back: [N] in [0, 1].

    Only columns that left the frame meanwhile count, and only what differs along a row: hills and landmarks, because
    the sky looks the same everywhere. nan where the camera was not there within the last 30 s.
    """
    scores = []
    for frame in frames:
        visit = last_visit(positions, frame, max(0, frame - round(AWAY_SECONDS * fps)))
        scores.append(nan if visit is None else _place_likeness(video, frame, *visit))
    return np.array(scores, float)


def _place_likeness(video: np.ndarray, frame: int, earlier: int, left: float, right: float) -> float:
    """How much alike two frames are, in [0, 1], where they left the view in between.

    `left` and `right` say how far the camera went to either side, in pixels of a 128 pixel frame.
    """
    profiles = _profiles(video, np.array([earlier, frame]))
    farthest = 2 * SAME_PLACE_PIXELS  # the camera may be so far off, and so may its estimated position
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
