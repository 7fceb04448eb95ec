"""Quality over time, as a picture. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plots import save_figure
from .runs import MEASURES

COLUMNS = 3  # of panels
COLOURS = 10  # in matplotlib's cycle


def quality_over_time(summary: dict[str, Any], path: str | Path) -> None:
    """Draw a PNG with one panel for each measure that is defined: its means over the duration, one line a policy.

    Bars are standard errors.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    defined = [measure for measure in MEASURES if any(points(each, measure)[0] for each in summary.values())]
    rows = max(1, -(-len(defined) // COLUMNS))
    # A figure of its own, not pyplot's: no state is left behind and no window system is asked for.
    figure = Figure(figsize=(4.6 * COLUMNS, 3.0 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    for number, measure in enumerate(defined, 1):
        panel = figure.add_subplot(rows, COLUMNS, number)
        for line, (policy, by_duration) in enumerate(summary.items()):
            style = ("-", "--", ":")[line // COLOURS % 3]
            x, means, errors = points(by_duration, measure)
            panel.errorbar(x, means, errors, fmt=f"o{style}", ms=3, linewidth=1.2, capsize=2, label=policy)
        panel.set_title(measure.replace("_", " "), fontsize=10)
        panel.set_xlabel("seconds of video", fontsize=8)
        panel.grid(alpha=0.3)
        panel.set_xticks([float(key) for key in next(iter(summary.values()))])
        if "drift" not in measure:  # all others are shares, or ratios: not below zero, and small is not nothing
            panel.set_ylim(bottom=0)
    if figure.axes:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8)
    save_figure(figure, path)


def points(by_duration: dict[str, Any], measure: str) -> tuple[list[float], list[float], list[float]]:
    """Durations at which a measure is defined, its means there, and their standard errors (0 where unknown)."""
    found = [(float(key), each[measure]) for key, each in by_duration.items() if each is not None]
    found = [(seconds, each) for seconds, each in found if each["mean"] is not None]
    return (
        [seconds for seconds, _ in found],
        [each["mean"] for _, each in found],
        [each["standard_error"] or 0.0 for _, each in found],
    )


RECALLS = {"recall": "recall of places", "detail_recall": "recall of details"}


def recall_over_gaps(summary: dict[str, Any], path: str | Path) -> None:
    """Draw a PNG of both kinds of recall over the gap, one line a policy. Bars are standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (measure, title) in enumerate(RECALLS.items(), 1):
        panel = figure.add_subplot(1, len(RECALLS), number)
        for line, (policy, by_gap) in enumerate(summary.items()):
            x, means, errors = points(by_gap, measure)
            style = ("-", "--", ":")[line // COLOURS % 3]
            # Side by side, because lines with equal means would hide each other's bars.
            beside = [value * (1 + 0.015 * (line - (len(summary) - 1) / 2)) for value in x]
            panel.errorbar(beside, means, errors, fmt=f"o{style}", ms=3, linewidth=1.2, capsize=2, label=policy)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("blocks between a place and its return", fontsize=8)
        gaps = [float(key) for key in next(iter(summary.values()))]
        panel.set_xticks(gaps)
        panel.set_xlim(0.85 * min(gaps), 1.1 * max(gaps))
        panel.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    save_figure(figure, path)
