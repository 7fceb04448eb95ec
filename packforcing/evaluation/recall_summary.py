"""What the results of a recall evaluation say together: statistics over videos, as JSON and as a table.

Standard errors are by videos, since places of one video share its noise and its history. Where a number is made of
pairs of places of different videos, or is a ratio of means, its error is the jackknife's: the number is computed anew
without each of the videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np

from .recall import RETURNING, SELECTION_MEASURES, VIDEO_MEASURES, Shown, detail_distances, distances
from .recall_runs import WORLD, WORLD_GAP, RecallResult, RecallSettings
from .summary import REFERENCE, Statistics, cell, row, statistics

ALL = (0, 1, 2)  # the places of a video
# Recalls, each 1 - the first distance, of every video / the second one, of all videos together.
RECALLS = {
    "recall": ("revisit_distance", "other_distance"),
    "matched_recall": ("revisit_distance", "return_other_distance"),
    "detail_recall": ("detail_distance", "detail_other_distance"),
}
COLUMNS = {
    "recall": "recall",
    "revisit_distance": "revisit distance",
    "other_distance": "other distance",
    "matched_recall": "matched recall",
    "return_other_distance": "return to other",
    "nearest_right": "nearest right",
    "detail_recall": "detail recall",
    "detail_distance": "detail distance",
    "detail_other_distance": "detail, other",
    "attributes_first": "attributes, first",
    "attributes_returned": "attributes, returned",
    "attributes_other": "attributes, other",
}

Scale = Callable[[Sequence[int]], float]  # the other distance of some of the videos, by their numbers
Summary = dict[str, dict[str, dict[str, Any]]]  # policy -> gap -> measure -> Statistics, and "layers"


def summarise_recall(settings: RecallSettings, results: Sequence[RecallResult]) -> Summary:
    """Statistics by policy, gap and measure. "layers" has the selection's measures by layer, as means over videos."""
    summary: Summary = {}
    for policy in (WORLD, *settings.policies):
        summary[policy.name] = {}
        for gap in settings.gaps:
            at = WORLD_GAP if policy == WORLD else gap
            own = [result for result in results if (result.policy, result.gap) == (policy.name, at)]
            summary[policy.name][str(gap)] = _summarised(sorted(own, key=lambda result: result.number))
    return summary


def _summarised(own: Sequence[RecallResult]) -> dict[str, Any]:
    """Statistics of the results of one policy and gap."""
    names = (*VIDEO_MEASURES, *SELECTION_MEASURES)
    found: dict[str, Any] = {name: statistics([result.measures.get(name) for result in own]) for name in names}
    shown = [result.views for result in own]
    scales = {
        "other_distance": block_scale(shown),
        "return_other_distance": return_scale(shown),
        "detail_other_distance": detail_scale(shown),
    }
    found |= {name: jackknife(scale, len(own)) for name, scale in scales.items()}
    for name, (distance, other) in RECALLS.items():
        revisits = [_known(result, distance) for result in own]
        found[name] = jackknife(partial(_recall, revisits, scales[other]), len(own))
    by_layer = {name for result in own for name in result.layers}
    found["layers"] = {
        name: np.mean([r.layers[name] for r in own if name in r.layers], axis=0).tolist() for name in sorted(by_layer)
    }
    return found


def _recall(revisits: Sequence[float], scale: Scale, chosen: Sequence[int]) -> float:
    """1 - revisit distance / other distance, of the chosen videos."""
    return 1 - fmean(revisits[i] for i in chosen) / scale(chosen)


def _known(result: RecallResult, name: str) -> float:
    value = result.measures[name]
    assert value is not None, "distances are defined in every video"
    return value


# --- the scale --------------------------------------------------------------------------------------------------------


def block_scale(shown: Sequence[Shown]) -> Scale:
    """The mean distance of the first showings of all pairs of different places, block by block in order."""
    first = np.concatenate([each.first for each in shown])
    return _scale(distances(first, first), ALL, ALL)


def return_scale(shown: Sequence[Shown]) -> Scale:
    """The mean distance of returning showings to the first showings of other places, block by block in order.

    A return that is a blend of all places is nearer to each of them than they are to each other. Measured on this
    scale, what does not depend on the place remembers nothing.
    """
    first, again = (np.concatenate([getattr(each, name) for each in shown]) for name in ("first", "again"))
    return _scale(distances(again, first), RETURNING, ALL)


def detail_scale(shown: Sequence[Shown]) -> Scale:
    """The same of details. A blur has none, so it is half as far from any place as two places are from each other."""
    last, back = (np.concatenate([getattr(each, name) for each in shown]) for name in ("last", "back"))
    return _scale(detail_distances(back, last), RETURNING, ALL)


def _scale(table: np.ndarray, row_places: Sequence[int], column_places: Sequence[int]) -> Scale:
    """The mean of a table of distances over pairs of different places of the chosen videos.

    A video has a row for each of `row_places`, and a column for each of `column_places`.
    """
    videos = np.arange(len(table) // len(row_places))
    row_videos, column_videos = videos.repeat(len(row_places)), videos.repeat(len(column_places))
    rows, columns = np.tile(row_places, len(videos)), np.tile(column_places, len(videos))
    different = (row_videos[:, None] != column_videos) | (rows[:, None] != columns)

    def scale(chosen: Sequence[int]) -> float:
        used = different & np.isin(row_videos, chosen)[:, None] & np.isin(column_videos, chosen)
        return float(table[used].mean())

    return scale


def jackknife(estimate: Callable[[Sequence[int]], float], count: int) -> Statistics:
    """An estimate from `count` videos, and its standard error: sqrt((n - 1) / n * sum of (e_i - mean of e)^2), where
    e_i is the estimate without video i. Of a mean, that is the usual standard error."""
    numbers = list(range(count))
    if not count:
        return {"mean": None, "spread": None, "standard_error": None, "n": 0}
    error = None
    if count > 1:
        without = [estimate([j for j in numbers if j != i]) for i in numbers]
        error = sqrt((count - 1) / count * sum((each - fmean(without)) ** 2 for each in without))
    return {"mean": estimate(numbers), "spread": None, "standard_error": error, "n": count}


def compared_recall(settings: RecallSettings, results: Sequence[RecallResult]) -> Summary:
    """Statistics of each policy's differences from REFERENCE, on the same video and gap; {} without it."""
    usual = {(r.number, r.gap): r.measures for r in results if r.policy == REFERENCE}
    found: Summary = {}
    for policy in settings.policies if usual else ():
        if policy.name == REFERENCE:
            continue
        found[policy.name] = {
            str(gap): {
                name: statistics(
                    [
                        _difference(result.measures.get(name), usual.get((result.number, gap), {}).get(name))
                        for result in results
                        if (result.policy, result.gap) == (policy.name, gap)
                    ]
                )
                for name in VIDEO_MEASURES
            }
            for gap in settings.gaps
        }
    return found


def _difference(value: float | None, usual: float | None) -> float | None:
    return None if value is None or usual is None else value - usual


# --- the table --------------------------------------------------------------------------------------------------------


def recall_table(summary: Summary, remarks: Sequence[str]) -> str:
    """Markdown: for each gap what came back, and what the layers took up; means ± standard errors."""
    parts = [
        "Means ± standard errors by videos. Distances are mean absolute differences of frames in [0, 1]; recall is 1 - "
        "revisit distance / other distance: 0 for a place made up anew, and what `world` has for a perfect memory. "
        "Matched recall has the returns' distance to other places as its scale. n counts videos."
    ]
    for gap in next(iter(summary.values())):
        head = ["policy", *COLUMNS.values(), "n"]
        lines = [f"## Gap in blocks: {gap}", "", row(head), row(["---", *["---:"] * (len(head) - 1)])]
        for name, by_gap in summary.items():
            found = by_gap[gap]
            lines.append(row([name, *(cell(found[each]) for each in COLUMNS), str(found["recall"]["n"])]))
        parts += ["\n".join(lines), *_selection_table(summary, gap)]
    return "\n\n".join([*parts, *remarks]) + "\n"


def _selection_table(summary: Summary, gap: str) -> list[str]:
    """What was taken up at the returns, of the policies with mid blocks; nothing without such."""
    with_mids = {name: by[gap] for name, by in summary.items() if by[gap]["selected_right"]["n"]}
    if not with_mids:
        return []
    head = ["policy", *(name.replace("_", " ") for name in SELECTION_MEASURES), "right taken up, by layer"]
    lines = ["Mid blocks at the first and the second block of a return:", ""]
    lines += [row(head), row(["---", *["---:"] * (len(head) - 1)])]
    for name, found in with_mids.items():
        layers = " ".join(f"{value:.2f}" for value in found["layers"]["right_taken_up"])
        lines.append(row([name, *(cell(found[each]) for each in SELECTION_MEASURES), layers]))
    return ["\n".join(lines)]
