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

POOLED = ("other_distance", "recall", "detail_other_distance", "detail_recall")
COLUMNS = {
    "recall": "recall",
    "revisit_distance": "revisit distance",
    "other_distance": "other distance",
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
    scales = {"": block_scale(shown), "detail_": detail_scale(shown)}
    for prefix, scale in scales.items():
        revisits = [_known(result, f"{prefix or 'revisit_'}distance") for result in own]
        found[f"{prefix}other_distance"] = jackknife(scale, len(own))
        found[f"{prefix}recall"] = jackknife(partial(_recall, revisits, scale), len(own))
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
    return _scale(distances(first, first), np.arange(len(first)), np.arange(len(first)), 3, 3)


def detail_scale(shown: Sequence[Shown]) -> Scale:
    """The mean distance of the details of each returning showing to those of other places' first showings.

    Both sides are taken as `detail_distance` takes them, because a returning showing may be the smoother one: against a
    distance between two sharp pictures, a blur would pass for a memory.
    """
    last, back = (np.concatenate([getattr(each, name) for each in shown]) for name in ("last", "back"))
    returning = np.concatenate([3 * i + np.array(RETURNING) for i in range(len(shown))])
    return _scale(detail_distances(back, last), returning, np.arange(len(last)), len(RETURNING), 3)


def _scale(table: np.ndarray, rows: np.ndarray, columns: np.ndarray, row_size: int, column_size: int) -> Scale:
    """The mean of a table of distances over pairs of different places of the chosen videos.

    `rows` and `columns` have the number of each one's place; so many of them are of one video.
    """
    different = rows[:, None] != columns[None]
    row_videos, column_videos = np.arange(len(rows)) // row_size, np.arange(len(columns)) // column_size

    def scale(chosen: Sequence[int]) -> float:
        used = different & np.isin(row_videos, chosen)[:, None] & np.isin(column_videos, chosen)[None]
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
        "revisit distance / other distance: 0 for a place made up anew, and what `world` has for a perfect memory. n "
        "counts videos."
    ]
    for gap in next(iter(summary.values())):
        head = ["policy", *COLUMNS.values(), "n"]
        lines = [f"## Gap of {gap} blocks", "", row(head), row(["---", *["---:"] * (len(head) - 1)])]
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
