"""`evaluate --recall`: whether places come back as they were, under several cache policies.

Each finished run is added to FOLDER/recall.jsonl at once, and taken from there when the command is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import PackForcingError
from ..telling import tell
from .models import Models, load
from .plots import recall_over_gaps
from .policies import Policy, policy
from .processes import made
from .recall_runs import (
    WORLD,
    RecallResult,
    RecallRun,
    RecallSettings,
    blocks_of,
    captions_of,
    make_recall,
    recall_fingerprint,
)
from .recall_summary import compared_recall, recall_table, summarise_recall
from .reporting import (
    Report,
    Tell,
    described_conditions,
    described_policies,
    readable_seconds,
    ready_folder,
    resumed,
    unique,
    versions,
    write_report,
)

RESULTS, SUMMARY, TABLE, PLOT = "recall.jsonl", "recall.json", "recall.md", "recall.png"
DEFAULT_POLICIES = "packforcing,packforcing-lr,packforcing-recency,packforcing-no-rope,sink-recent,window"
DEFAULTS = {"gaps": "16,60", "videos": 8, "unsaid": False}  # of the options that --recall alone has


def add_recall_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate --recall` alone."""
    parser.add_argument(
        "--recall", action="store_true", help="instead, whether places that a video leaves come back as they were"
    )
    parser.add_argument(
        "--gaps", default=DEFAULTS["gaps"], help="with --recall: blocks for which places are away, with commas between"
    )
    parser.add_argument(
        "--videos", type=int, default=DEFAULTS["videos"], help="with --recall or --switches: how many videos"
    )
    parser.add_argument(
        "--unsaid", action="store_true", help="with --recall: name places without describing them, also the first time"
    )


def recall_policies(text: str | None) -> tuple[Policy, ...]:
    """The policies of a list with commas between; the world is always among what is compared.

    Raises PackForcingError for an unknown one, and for a limit in seconds.
    """
    names = unique(DEFAULT_POLICIES if text is None else text)
    for name in names:
        if "@" in name:
            raise PackForcingError(f"With --recall a policy has no limit in seconds: write '{name.partition('@')[0]}'.")
    return tuple(replace(policy(name), longest=inf) for name in names if name != WORLD.name)


def gaps_of(text: str) -> tuple[int, ...]:
    """Gaps with commas between, shortest first. Raises PackForcingError for what is no whole number."""
    try:
        return tuple(sorted({int(each) for each in unique(text)}))
    except ValueError:
        raise PackForcingError(
            f"--gaps takes whole numbers of blocks with commas between, such as 16,60, not '{text}'."
        ) from None


def evaluate_recall(
    settings: RecallSettings, models: Models, folder: Path, jobs: int, threads: int, tell: Tell
) -> list[RecallResult]:
    """All results in the order of the runs; what the folder does not have yet is made and added."""

    def told(result: RecallResult, done: list[RecallResult], missing: list[RecallRun]) -> str:
        return (
            f"{result.policy}, video {result.number}, gap {result.gap} in {result.elapsed:.1f} s, "
            f"{readable_seconds(time_left(done, missing) / jobs)} left"
        )

    return resumed(
        settings.runs(),
        folder / RESULTS,
        RecallResult,
        lambda run: recall_fingerprint(run, settings, models),
        lambda missing: made(make_recall, missing, settings, models, jobs, threads),
        told,
        tell,
    )


def time_left(done: Sequence[RecallResult], missing: Sequence[RecallRun]) -> float:
    """Seconds of work that the missing runs take, if each block takes as long as those of its policy."""
    rates: dict[str, list[float]] = {}
    for result in done:
        rates.setdefault(result.policy, []).append(result.elapsed / blocks_of(result.gap))
    usual = fmean(rate for each in rates.values() for rate in each)
    return sum(fmean(rates.get(run.policy.name, [usual])) * blocks_of(run.gap) for run in missing)


def run_recall(settings: RecallSettings, options: argparse.Namespace) -> None:
    """Evaluates, writes table, plot and JSON, and prints the table (or the JSON)."""
    models = load(settings.sources)
    folder = ready_folder(settings, models, options, RESULTS)
    results = evaluate_recall(settings, models, folder, options.jobs, options.threads, tell)
    summary = summarise_recall(settings, results)
    text = recall_table(summary, notes(settings, models))
    facts = {
        "settings": described(settings, models, options),
        "versions": versions(),
        "policies": summary,
        "differences": compared_recall(settings, results),
        "cost": {"seconds_a_block": costs(results), "threads": options.threads},
    }
    report = Report(facts, text, partial(recall_over_gaps, summary))
    write_report(report, folder, (SUMMARY, TABLE, PLOT), options.json)


def notes(settings: RecallSettings, models: Models) -> list[str]:
    """What a reader of the table must know."""
    if models.trained.state_dict is None and any(each.compressor == "trained" for each in settings.policies):
        return ["No trained compressor was given: all policies with mid blocks use the training-free one."]
    return []


def costs(results: Sequence[RecallResult]) -> dict[str, float]:
    """By policy, the seconds of work that a block took."""
    return {
        name: fmean(result.elapsed / blocks_of(result.gap) for result in results if result.policy == name)
        for name in dict.fromkeys(result.policy for result in results)
    }


def described(settings: RecallSettings, models: Models, options: argparse.Namespace) -> dict[str, Any]:
    """The settings as JSON: all that the numbers depend on."""
    longest = blocks_of(max(settings.gaps))
    shortest = min(settings.gaps)
    told = [captions_of(RecallRun(WORLD, number, shortest), False) for number in range(settings.videos)]
    world = {WORLD.name: {"description": WORLD.description}}
    return {
        "policies": world | described_policies(settings, models, lambda policy: longest),
        "gaps": list(settings.gaps),
        "videos": settings.videos,
        "unsaid": settings.unsaid,
        "places": [[captions[block] for block in (0, 2, 4)] for captions in told],
        **described_conditions(settings, models, options),
    }
