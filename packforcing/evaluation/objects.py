"""Object scenes in views: which objects are seen, whether they are what was asked for, and what they hid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import log, nan, pi

import numpy as np
import torch
import torch.nn.functional as F

from ..world.captions import SIZES, ObjectAttributes
from ..world.scenes import FRAME
from ..world.shapes import RELATIVE_RADIUS, SHAPES, signed_distance
from .views import VIEW, VIEWS_PER_SECOND, commonest, connected_regions, likeness, mean_of_known, name_colours

SMALLEST_OBJECT = 20  # view pixels; a small circle has 95
SELDOM = 0.1  # a smaller share of views without a blinking object is no blinking
FARTHEST_SHAPE = 0.2  # between a region's features and those of the shape it is called
HIDDEN_SECONDS = 10.0  # the background counts as seen again for so long after an object has hidden it
HIDING_PERIOD = 8.0  # objects' longest period: after it, something must have been seen again


# --- objects in a view -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeenObject:
    """An object found in a view."""

    colour: str  # a key of COLOURS
    shape: str  # one of SHAPES; "" is none of the world's
    size: str  # a key of SIZES


def shape_features(cover: np.ndarray) -> np.ndarray:
    """How 3-, 4- and 5-fold symmetric a region is, and how spread out: [4], all 0 for a circle.

    They do not depend on the region's place, size and angle. `cover` [H, W] in [0, 1] is the share of each pixel that
    the region covers.
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
    """Features [4, 4] and areas [4] of the world's SHAPES.

    An area is over the square of the radius of a circle of the same size.
    """
    side, radius = 129, 30.0
    y, x = np.mgrid[:side, :side] - side // 2
    points = np.stack([x, y], axis=-1)
    covers = [np.clip(0.5 - signed_distance(s, points, radius * RELATIVE_RADIUS[s]), 0, 1) for s in SHAPES]
    areas = np.array([cover.sum() for cover in covers]) / radius**2
    return np.stack([shape_features(cover) for cover in covers]), areas


def find_objects(view: np.ndarray, names: np.ndarray, regions: np.ndarray, background: int) -> list[SeenObject]:
    """The objects in a view.

    Args:
        view: [64, 64, 3].
        names: index of each pixel's colour name, [64, 64].
        regions: number of each pixel's region, [64, 64]; 0 is background.
        background: the index of the background's name.
    """
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
    """The shape ("" where none is near enough) and the size of a region, given the share of each pixel [H, W] in it."""
    features, areas = _shapes()
    distance = np.linalg.norm(features - shape_features(cover), axis=1)
    nearest = int(distance.argmin())
    radius = np.sqrt(cover.sum() / areas[nearest]) * FRAME / VIEW
    size = min(SIZES, key=lambda size: abs(log(max(radius, 1e-3) / SIZES[size])))
    return SHAPES[nearest] if distance[nearest] < FARTHEST_SHAPE else "", size


# --- what was asked for ----------------------------------------------------------------------------------------


def object_scores(shown: np.ndarray, asked: ObjectAttributes, early: np.ndarray) -> dict[str, np.ndarray]:
    """For each view, the share of what is asked for that is seen: attribute -> [N] in [0, 1].

    Args:
        shown: the views, [N, 64, 64, 3].
        asked: what the caption says. A colour that it leaves out must be the usual one of the `early` views.
        early: which views are early ones, bool [N].

    Of objects that blink, only views that show one count, and the others are nan; "blinks" is whether a view shows
    none.
    """
    palette, names = name_colours(shown, landscape=False)
    behind = commonest(names)
    regions = connected_regions(names != behind[:, None, None])
    found = [find_objects(*parts) for parts in zip(shown, names, regions, behind, strict=True)]
    backgrounds = [palette[each] for each in behind]
    early_objects = [each for objects, is_early in zip(found, early, strict=True) if is_early for each in objects]
    early_backgrounds = [name for name, is_early in zip(backgrounds, early, strict=True) if is_early]

    background = asked.background or _most_common(early_backgrounds)
    wanted = {"colour": asked.colour or _most_common(each.colour for each in early_objects), "shape": asked.shape}
    if asked.size:
        wanted["size"] = asked.size
    scores = {
        "background": np.array([name == background for name in backgrounds], float),
        "count": np.array([len(objects) == asked.count for objects in found], float),
    }
    for key, value in wanted.items():
        scores[key] = np.array([_share_with(objects, key, value) for objects in found], float)
    return _with_blinking(scores, found) if asked.blinks else scores


def _share_with(objects: list[SeenObject], attribute: str, value: str) -> float:
    """The share of the objects whose attribute has this value; 0 without objects."""
    return sum(getattr(each, attribute) == value for each in objects) / max(len(objects), 1)


def _with_blinking(scores: Mapping[str, np.ndarray], found: list[list[SeenObject]]) -> dict[str, np.ndarray]:
    """The scores, of which views without objects tell only the background, and "blinks": whether a view is such."""
    nothing = np.array([not objects for objects in found])
    blinking = {key: np.where(nothing, nan, values) for key, values in scores.items()}
    return {**blinking, "background": scores["background"], "blinks": nothing.astype(float)}


def _most_common(names: Iterable[str]) -> str:
    """The name that comes most often; "" of none."""
    counts = Counter(names)
    return counts.most_common(1)[0][0] if counts else ""


def objects_in_window(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over a window's views; 0 where nothing was ever seen. What blinks must be there at times, not always."""
    means = {key: mean_of_known(values) for key, values in scores.items()}
    if "blinks" in means:
        means["blinks"] = float(SELDOM <= means["blinks"] <= 1 - SELDOM)
    return means


# --- the background, and what reappears of it ------------------------------------------------------------------


def background_colours(shown: np.ndarray) -> np.ndarray:
    """The mean colour [N, 3] of each view's background: of all pixels that have its most common name."""
    _, names = name_colours(shown, landscape=False)
    behind = names == commonest(names)[:, None, None]
    return (shown * behind[..., None]).sum((1, 2)) / behind.sum((1, 2))[:, None]


def object_revisits(shown: np.ndarray) -> np.ndarray:
    """How much the background that reappears from behind objects looks as when it was first seen: [N] in [0, 1].

    For each of the views [N, 64, 64, 3], it is the mean over the places that were hidden within the last 10 s before;
    nan where none was.
    """
    _, names = name_colours(shown, landscape=False)
    in_front = torch.from_numpy(names != commonest(names)[:, None, None])[:, None].float()
    # Cells of 4x4 view pixels, hidden with the cells beside them: an object's edge blends into its surroundings.
    hidden = F.max_pool2d(in_front, 12, 4, 4)[:, 0].bool().numpy()
    cells = shown.reshape(len(shown), VIEW // 4, 4, VIEW // 4, 4, 3).mean((2, 4))

    first = np.argmin(hidden, axis=0)  # the first view that shows a cell
    original = np.take_along_axis(cells, first[None, ..., None], axis=0)
    times = np.arange(len(shown))[:, None, None]
    last_hidden = np.maximum.accumulate(np.where(hidden & (times > first), times, -1), axis=0)
    again = ~hidden & (last_hidden >= 0) & (times - last_hidden <= HIDDEN_SECONDS * VIEWS_PER_SECOND)
    count = again.sum((1, 2))
    total = (likeness(cells - original) * again).sum((1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), nan)
