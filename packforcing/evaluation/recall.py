"""What a video keeps of places that it leaves and comes back to, measured from its pixels.

A *recall story* shows three places, two blocks each; then the first one for `gap` blocks; then the second and the third
again, two blocks each, with a block of the first between. The second and the third are what is measured: the sinks do
not hold them, and by then the recent blocks do not either. The first place keeps the sinks busy.

All measures look at views (`views.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..generate.record import CacheRecord
from ..inspector.returns import chance_share, selected_share
from ..world.places import Tour
from ..world.scenes import FPS
from .metrics import evaluate_video
from .views import views

FIRST = ((0, 1), (2, 3), (4, 5))  # the blocks of each place's first showing
RETURNING = (1, 2)  # the places that are measured
SETTLED = (
    4  # a return is looked at from this frame on: in its first latent frame, the VAE blends it with what was before
)
DETAIL = 17  # view pixels: what is smaller is a detail; a small object is 11 wide, a large one 25
SHIFT = 4  # view pixels by which details may have moved meanwhile

VIDEO_MEASURES = (
    "revisit_distance",
    "nearest_right",
    "detail_distance",
    "attributes_first",
    "attributes_returned",
    "attributes_other",
)
_SELECTION = ("selected_right", "selected_right_chance", "right_taken_up", "right_taken_up_chance")
SELECTION_MEASURES = (*_SELECTION, *(f"{name}_second" for name in _SELECTION))

Measures = dict[str, float | None]  # None: not defined in this video


def recall_way(gap: int) -> tuple[int, ...]:
    """The place that each block shows: one one two two three three, one for `gap` blocks, two two one three three."""
    return (0, 0, 1, 1, 2, 2, *[0] * gap, 1, 1, 0, 2, 2)


def returned(gap: int) -> dict[int, tuple[int, int]]:
    """The blocks of the returning showing of each of the places RETURNING."""
    return {1: (gap + 6, gap + 7), 2: (gap + 9, gap + 10)}


def looked_at(gap: int) -> set[int]:
    """All blocks whose frames are measured."""
    return {block for pair in (*FIRST, *returned(gap).values()) for block in pair}


@dataclass(frozen=True)
class Shown:
    """What a video has shown of its places, as views in [0, 1]."""

    first: np.ndarray  # [3, 2, 64, 64, 3], the mean over time of each block of each place's first showing
    again: np.ndarray  # [2, 2, 64, 64, 3], the same of the returning showings
    last: np.ndarray  # [3, 64, 64, 3], the last frame of each first showing
    back: np.ndarray  # [2, 64, 64, 3], frame SETTLED of each returning showing


def shown_by(frames: Mapping[int, np.ndarray], gap: int) -> Shown:
    """Of the frames of the blocks `looked_at`, uint8 [F, H, W, 3] each."""
    return Shown(
        first=block_means(frames, FIRST),
        again=block_means(frames, returned(gap).values()),
        last=views(np.array([frames[pair[1]][-1] for pair in FIRST])),
        back=views(np.array([frames[pair[0]][SETTLED] for pair in returned(gap).values()])),
    )


def block_means(frames: Mapping[int, np.ndarray], showings: Iterable[tuple[int, int]]) -> np.ndarray:
    """The mean over time of each block of the showings, as views [N, 2, 64, 64, 3]."""
    return np.array([[views(frames[block]).mean(0) for block in pair] for pair in showings])


def details(pictures: np.ndarray) -> np.ndarray:
    """Pictures [N, H, W, 3] without what is large: each pixel less the mean of the square of DETAIL pixels around it.

    The colours of sky, ground and background go with it.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(pictures, dtype=np.float32)).permute(0, 3, 1, 2)
    around = F.pad(pixels, (DETAIL // 2,) * 4, mode="reflect")
    return (pixels - F.avg_pool2d(around, DETAIL, 1)).permute(0, 2, 3, 1).numpy()


def distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean absolute differences [N, M] of each of `some` [N, ...] to each of `others` [M, ...]."""
    axes = tuple(range(1, others.ndim))
    return np.array([np.abs(others - one).mean(axes) for one in some])


def detail_distances(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`distances` [N, M] of the details of pictures [N, H, W, 3] and [M, H, W, 3], at the best shift for each pair.

    A shift is one of whole pixels, up to SHIFT along each axis, because things go on moving for a few frames. The
    outermost SHIFT pixels do not count.
    """
    inner = (slice(None), slice(SHIFT, -SHIFT), slice(SHIFT, -SHIFT))
    fine, fixed = details(some), details(others)[inner]
    shifts = [(down, right) for down in range(-SHIFT, SHIFT + 1) for right in range(-SHIFT, SHIFT + 1)]
    return np.min([distances(np.roll(fine, shift, (1, 2))[inner], fixed) for shift in shifts], axis=0)


def measure_recall(frames: Mapping[int, np.ndarray], tour: Tour, gap: int, unsaid: bool) -> tuple[Measures, Shown]:
    """The VIDEO_MEASURES of a recall story, and what `other` distances are taken from.

    Args:
        frames: of the blocks `looked_at`, uint8 [F, H, W, 3] each.
        tour: the places, on the way `recall_way(gap)`.
        unsaid: whether no caption described the places: then attributes are not defined.

    - revisit_distance: mean absolute difference, in [0, 1], of the time-averaged blocks of a returning showing to those
      of the first showing, block by block in order. In order, since "other" distances are taken so, too: the best of
      several pairs would be nearer by chance alone, and most so where nothing is remembered.
    - nearest_right: share of the returning blocks that are nearer to their own place's first showing than to those of
      the video's two other places, by the same distance; 1/3 by chance.
    - detail_distance: `detail_distances` of two single frames: the last one of the first showing, and frame SETTLED of
      the return. A place's clock stands still while it is away, so that they are five frames apart. A block's mean over
      time would not do: what is small moves in it.
    - attributes_first, attributes_returned: attribute accuracy of both showings under the place's description.
    - attributes_other: that of each first showing under the other place's description, what a wrong place has.
    """
    seen = shown_by(frames, gap)
    plain = np.abs(seen.again[:, None] - seen.first[None]).mean((3, 4, 5))  # [returning place, place, block]
    own = plain[np.arange(len(RETURNING)), list(RETURNING)]
    fine = detail_distances(seen.back, seen.last[list(RETURNING)]).diagonal().mean()
    found: Measures = dict.fromkeys(VIDEO_MEASURES)
    found |= {
        "revisit_distance": float(own.mean()),
        "nearest_right": float((plain.argmin(1) == np.array(RETURNING)[:, None]).mean()),
        "detail_distance": float(fine),
    }
    return (found if unsaid else found | _attributes(frames, tour, gap)), seen


def _attributes(frames: Mapping[int, np.ndarray], tour: Tour, gap: int) -> Measures:
    """Attribute accuracies, means over the places RETURNING."""
    described = {place: tour.places[place].scene.caption for place in RETURNING}
    first = {place: np.concatenate([frames[block] for block in FIRST[place]]) for place in RETURNING}
    again = {place: np.concatenate([frames[block] for block in returned(gap)[place]]) for place in RETURNING}
    other = dict(zip(RETURNING, reversed(RETURNING), strict=True))
    return {
        "attributes_first": _mean(accuracy(first[place], described[place]) for place in RETURNING),
        "attributes_returned": _mean(accuracy(again[place], described[place]) for place in RETURNING),
        "attributes_other": _mean(accuracy(first[place], described[other[place]]) for place in RETURNING),
    }


def accuracy(video: np.ndarray, caption: str) -> float:
    """The attribute accuracy of a whole video uint8 [F, H, W, 3]: see `evaluate_video`."""
    window = (0.0, len(video) / FPS)
    return float(evaluate_video(video, caption, windows=[window])["windows"][0]["attribute_accuracy"])


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# --- what the cache took up -------------------------------------------------------------------------------------------


def measure_selection(record: CacheRecord, gap: int) -> tuple[Measures, dict[str, list[float]]]:
    """The SELECTION_MEASURES of a recall story: what the first and ("_second") the second block of a return took up.

    - selected_right: share of the mid blocks taken up, over all layers, that show the returning place;
      "_chance": of all that could be chosen.
    - right_taken_up: share of the returning place's mid blocks that a layer took up, mean over layers; "_chance": the
      share of all mid blocks that are taken up.

    Means over the places RETURNING. All are None where no mid blocks are attended. The second value has the first two
    measures without "_chance", of both blocks, layer by layer.
    """
    found: dict[str, list[float]] = {}
    layers: dict[str, list[list[float]]] = {}
    for place, pair in returned(gap).items():
        for block, suffix in zip(pair, ("", "_second"), strict=True):
            choices = list(record.config.partition(block).mid) if record.config.top_k else []
            right = sorted(set(choices) & set(FIRST[place]))
            made = record.blocks[block]
            share, chance = selected_share(made, right), chance_share(choices, right)
            if share is None or chance is None or not right:
                continue
            taken = np.array(made.selected)
            by_layer = np.isin(taken, right).sum(1)
            values = (share, chance, by_layer.mean() / len(right), taken.shape[1] / len(choices))
            for name, value in zip(_SELECTION, values, strict=True):
                found.setdefault(name + suffix, []).append(float(value))
            layers.setdefault("selected_right" + suffix, []).append((by_layer / taken.shape[1]).tolist())
            layers.setdefault("right_taken_up" + suffix, []).append((by_layer / len(right)).tolist())
    measures: Measures = {name: _mean(found[name]) if name in found else None for name in SELECTION_MEASURES}
    return measures, {name: np.mean(each, axis=0).tolist() for name, each in layers.items()}
