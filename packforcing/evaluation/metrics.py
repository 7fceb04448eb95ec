"""What a video of the synthetic world shows, measured from its pixels and its caption alone.

Memory cannot be bought by standing still: without motion `dynamic_degree` is 0, and nothing counts as seen again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, TypeAlias

import numpy as np

from ..errors import PackForcingError
from ..world.captions import Attributes, LandscapeAttributes, ObjectAttributes, parse
from ..world.scenes import FPS
from .landscapes import (
    ALL_LANDMARKS_SECONDS,
    AWAY_PERIOD,
    camera_positions,
    landmarks_in_window,
    landscape_revisits,
    landscape_scores,
    sky_colours,
)
from .objects import HIDING_PERIOD, background_colours, object_revisits, object_scores, objects_in_window
from .over_time import (
    STILL_BLINKING_SECONDS,
    STILL_SECONDS,
    border_jump,
    cleanliness,
    is_still,
    moving_cells,
    saturation,
)
from .views import VIEWS_PER_SECOND, likeness, view_frames, views

Window: TypeAlias = tuple[float, float]  # start and end in seconds

FIRST_SECONDS = 5.0  # what drift is measured against: the length of a training clip


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
) -> dict[str, Any]:
    """All metrics of a video uint8 [F, H, W, 3] that was asked for by a caption of the synthetic world.

    Args:
        block_frames: latent frames a block, for `border_jump`.
        windows: (start, end) in seconds; by default the first and the last 5 s, and the whole.

    Returns {"caption", "seconds", "windows": [...]}; of each window its "start" and "end", and

    - attribute_accuracy: [0, 1], mean share of what is asked for that is seen;
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
    watched = _watch(video, fps)
    windows = default_windows(watched.seconds) if windows is None else list(windows)
    inside = [_views_inside(watched, window) for window in windows]
    measured = _measure(watched, asked, np.any(inside, axis=0))
    return {
        "caption": caption,
        "seconds": watched.seconds,
        "windows": [
            _in_window(watched, measured, asked, window, here, block_frames)
            for window, here in zip(windows, inside, strict=True)
        ],
    }


def not_asked(asked: Attributes) -> tuple[str, ...]:
    """The attributes that a caption leaves out, and a video chooses."""
    if isinstance(asked, ObjectAttributes):
        return tuple(key for key in ("background", "colour") if not getattr(asked, key))
    return () if all(landmark.colour for landmark in asked.landmarks) else ("landmarks", "only asked")


# --- of every view ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched:
    """A video and its views."""

    video: np.ndarray  # uint8 [F, H, W, 3]
    fps: float
    frames: np.ndarray  # [N], the number of each view's frame
    shown: np.ndarray  # the views, [N, 64, 64, 3] in [0, 1]

    @property
    def seconds(self) -> float:
        return len(self.video) / self.fps

    @property
    def times(self) -> np.ndarray:
        """Seconds [N] at which the views are."""
        return self.frames / self.fps

    @property
    def first(self) -> np.ndarray:
        """Which views are of the first 5 s, bool [N]."""
        return self.times < FIRST_SECONDS


@dataclass(frozen=True)
class _Measured:
    """What is measured of every view."""

    scores: dict[str, np.ndarray]  # attribute -> [N] in [0, 1]; nan where nothing is known, or no window looks
    moves: np.ndarray  # [N], the share of the frame that moves
    colours: np.ndarray  # [N, 3], of the background
    again: np.ndarray  # [N] in [0, 1], likeness of what is seen again; nan where nothing is


def _watch(video: np.ndarray, fps: float) -> _Watched:
    """Raises PackForcingError for frames in another form than uint8 [F, H, W, 3]."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise PackForcingError(f"A video must be uint8 [F, H, W, 3], but it is {video.dtype} {list(video.shape)}.")
    frames = view_frames(len(video), fps)
    return _Watched(video, fps, frames, views(video[frames]))


def _views_inside(watched: _Watched, window: Window) -> np.ndarray:
    """Which views lie in a window, bool [N]. Raises PackForcingError when none does."""
    start, end = window
    here = (watched.times >= start) & (watched.times < end)
    if not here.any():
        raise PackForcingError(f"The video lasts {watched.seconds:g} s: it has no frames in the window {window}.")
    return here


def _measure(watched: _Watched, asked: Attributes, looked_at: np.ndarray) -> _Measured:
    """Measure the views that windows look at, bool [N], and the early ones, which they are compared with."""
    is_landscape = isinstance(asked, LandscapeAttributes)
    early = watched.times < (ALL_LANDMARKS_SECONDS if is_landscape and not_asked(asked) else FIRST_SECONDS)
    needed = early | looked_at
    moves = moving_cells(watched.shown)
    moves = np.append(moves, moves[-1:]) if len(moves) else np.zeros(1)  # the last view moves as the one before it
    return _Measured(
        scores=_scores(watched, asked, early, needed),
        moves=moves,
        colours=sky_colours(watched.shown) if is_landscape else background_colours(watched.shown),
        again=_revisits(watched, asked, moves, needed),
    )


def _scores(watched: _Watched, asked: Attributes, early: np.ndarray, needed: np.ndarray) -> dict[str, np.ndarray]:
    """What is seen of what is asked for: attribute -> [N] in [0, 1]; nan where it is not `needed`, bool [N]."""
    shown = watched.shown[needed]
    if isinstance(asked, LandscapeAttributes):
        scores = landscape_scores(shown, asked, early[needed])
    else:
        scores = object_scores(shown, asked, early[needed])
    return {key: _spread(values, needed) for key, values in scores.items()}


def _revisits(watched: _Watched, asked: Attributes, moves: np.ndarray, needed: np.ndarray) -> np.ndarray:
    """Likeness [N] in [0, 1] of what is seen again to what it was; nan where nothing can have been seen again yet.

    What is still has nothing that comes back. What should have been seen again by then and was not counts as 0.
    """
    if isinstance(asked, LandscapeAttributes):
        compared = needed & (np.arange(len(needed)) % 2 == 0)  # two views a second
        positions = camera_positions(watched.video, watched.fps)
        frames = watched.frames[compared]
        again = _spread(landscape_revisits(watched.video, positions, frames, watched.fps), compared)
        due, still_seconds = AWAY_PERIOD, STILL_SECONDS
    else:
        compared = needed
        again = object_revisits(watched.shown)
        due, still_seconds = HIDING_PERIOD, STILL_BLINKING_SECONDS if asked.blinks else STILL_SECONDS
    again[is_still(moves, still_seconds)] = nan
    again[np.isnan(again) & compared & (watched.times >= due)] = 0
    return again


def _spread(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Values of the views at `where`, bool [N], as values [N] of all views, nan at the others."""
    spread = np.full(len(where), nan)
    spread[where] = values
    return spread


# --- of a window -----------------------------------------------------------------------------------------------


def _in_window(
    watched: _Watched, measured: _Measured, asked: Attributes, window: Window, here: np.ndarray, block_frames: int
) -> dict[str, Any]:
    """The metrics of a window, whose views are at `here`, bool [N]: see `evaluate_video`."""
    start, end = (round(second * watched.fps) for second in window)
    first, moves = watched.first, measured.moves[here]
    free = not_asked(asked)
    found = _attributes(measured, asked, here)
    accuracy = _accuracy(found, free)
    usual_colour = np.median(measured.colours[first], axis=0)
    again = measured.again[here]
    again = again[~np.isnan(again)]
    return {
        "start": window[0],
        "end": window[1],
        "attribute_accuracy": accuracy,
        "memory": float(np.mean([found[key] for key in free])) if free else nan,
        "attributes": found,
        "drift": _accuracy(_attributes(measured, asked, first), free) - accuracy,
        "revisit_similarity": float(again.mean()) if len(again) else nan,
        "background_stability": float(likeness(measured.colours[here] - usual_colour).mean()),
        "cleanliness": cleanliness(watched.video[watched.frames[here][::VIEWS_PER_SECOND]]),
        "saturation_drift": saturation(watched.shown[here]) - saturation(watched.shown[first]),
        "dynamic_degree": float(moves.mean()),
        "moving": float((moves > 0).mean()),
        "border_jump": border_jump(watched.video[start:end], block_frames, start),
    }


def _attributes(measured: _Measured, asked: Attributes, here: np.ndarray) -> dict[str, float]:
    """The share of what is asked for that is seen in the views at `here`, bool [N], by attribute."""
    scores = {key: values[here] for key, values in measured.scores.items()}
    if isinstance(asked, LandscapeAttributes):
        return landmarks_in_window(scores, here.sum() / VIEWS_PER_SECOND)
    return objects_in_window(scores)


def _accuracy(found: Mapping[str, float], free: Sequence[str]) -> float:
    """The mean over the attributes that are not `free`."""
    return float(np.mean([value for key, value in found.items() if key not in free]))
