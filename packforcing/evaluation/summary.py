"""What results say together: statistics over prompts and seeds, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from .runs import MEASURES, Measures, Result, Settings, duration_key

Statistics = dict[str, float | int | None]

NONE = "–"
REFERENCE = "packforcing"  # what other policies are compared with


def statistics(values: Sequence[float | None]) -> Statistics:
    """Mean, standard deviation ("spread") and standard error of the values that are not None, and their number.

    What is not defined is None: without values all three, with one value spread and standard error.
    """
    found = [value for value in values if value is not None]
    spread = stdev(found) if len(found) > 1 else None
    return {
        "mean": fmean(found) if found else None,
        "spread": spread,
        "standard_error": None if spread is None else spread / sqrt(len(found)),
        "n": len(found),
    }


def summarise(settings: Settings, results: Sequence[Result]) -> dict[str, dict[str, dict[str, Statistics] | None]]:
    """Statistics by policy, duration and measure; None for a duration that a policy was not run for."""
    summary: dict[str, dict[str, dict[str, Statistics] | None]] = {}
    for policy in settings.policies:
        own = [result for result in results if result.policy == policy.name]
        summary[policy.name] = {}
        for seconds in settings.seconds:
            key = duration_key(seconds)
            # A result of an older version lacks the newer measures: those are not defined in it.
            measured = [result.measures[key] for result in own if key in result.measures]
            ran = seconds in settings.durations(policy)
            summary[policy.name][key] = (
                {name: statistics([each.get(name) for each in measured]) for name in MEASURES} if ran else None
            )
    return summary


def compared(settings: Settings, results: Sequence[Result]) -> dict[str, dict[str, dict[str, Statistics]]]:
    """Statistics of each policy's differences from REFERENCE, on the same prompt, seed and duration; {} without it.

    Two videos differ much more than one video does under two policies. The difference within a pair leaves out what the
    pair has in common.
    """
    usual = {(result.prompt, result.seed): result.measures for result in results if result.policy == REFERENCE}
    found: dict[str, dict[str, dict[str, Statistics]]] = {}
    for policy in settings.policies if usual else ():
        if policy.name == REFERENCE:
            continue
        own = [result for result in results if result.policy == policy.name]
        found[policy.name] = {
            key: {name: statistics([_difference(each, usual, key, name) for each in own]) for name in MEASURES}
            for key in map(duration_key, settings.durations(policy))
        }
    return found


def _difference(
    result: Result, usual: Mapping[tuple[str, int], Mapping[str, Measures]], key: str, name: str
) -> float | None:
    """A measure less that of the reference; None where one of them is not defined, or was not run."""
    reference = usual.get((result.prompt, result.seed), {})
    value, usual_value = (measures.get(key, {}).get(name) for measures in (result.measures, reference))
    return None if value is None or usual_value is None else value - usual_value


def costs(results: Sequence[Result]) -> dict[str, float]:
    """By policy, the seconds of work that a second of video took."""
    names = dict.fromkeys(result.policy for result in results)
    return {
        name: sum(r.elapsed for r in results if r.policy == name)
        / sum(r.video_seconds for r in results if r.policy == name)
        for name in names
    }


def notes(settings: Settings, trained: bool) -> list[str]:
    """What a reader of the table must know."""
    found = []
    short = [p for p in settings.policies if len(settings.durations(p)) < len(settings.seconds)]
    if short:
        limits = ", ".join(f"{p.name} {p.longest:g} s" for p in short)
        found.append(f"Not run for longer than: {limits}.")
    if not trained and any(policy.compressor == "trained" for policy in settings.policies):
        found.append("No trained compressor was given: all policies with mid blocks use the training-free one.")
    return found


def table(summary: dict[str, Any], remarks: Sequence[str], differences: Mapping[str, Any] | None = None) -> str:
    """A Markdown table for each duration: policies down, measures across, means ± standard errors.

    Below them, one of the `differences` that `compared` finds, at each policy's longest duration.
    """
    durations = list(next(iter(summary.values())))
    parts = [
        "Means ± standard errors over prompts and seeds. Revisit similarity is the whole video's, all else is measured "
        "in its last 5 s; drift is the loss of attribute accuracy since the first 5 s. Means are over the videos in "
        "which a measure is defined; n counts all."
    ]
    for key in durations:
        head = ["policy", *(name.replace("_", " ") for name in MEASURES), "n"]
        lines = [f"## {key} s", "", row(head), row(["---", *["---:"] * (len(head) - 1)])]
        lines += [row(_cells(name, summary[name][key])) for name in summary]
        parts.append("\n".join(lines))
    if differences:
        lines = [f"## Less {REFERENCE}, pair by pair", ""]
        lines += ["Means ± standard errors of the differences on the same prompt and seed.", ""]
        head = ["policy", *(name.replace("_", " ") for name in MEASURES), "at"]
        lines += [row(head), row(["---", *["---:"] * (len(head) - 1)])]
        for name, found in differences.items():
            longest = list(found)[-1]
            lines.append(row([name, *(cell(found[longest][measure], "+") for measure in MEASURES), f"{longest} s"]))
        parts.append("\n".join(lines))
    parts += remarks
    return "\n\n".join(parts) + "\n"


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _cells(name: str, measured: dict[str, Statistics] | None) -> list[str]:
    if measured is None:
        return [name, *[NONE] * (len(MEASURES) + 1)]
    return [name, *(cell(measured[measure]) for measure in MEASURES), str(measured[MEASURES[0]]["n"])]


def cell(found: Statistics, sign: str = "-") -> str:
    """A mean and its standard error; `sign` "+" shows the sign of positive means, too."""
    if found["mean"] is None:
        return NONE
    error = found["standard_error"]
    return f"{found['mean']:{sign}.3f}" if error is None else f"{found['mean']:{sign}.3f} ± {error:.3f}"
