"""What both kinds of evaluation share: names and folders from the command line, the loop over runs, what they write."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from ..config import FrameSize
from ..errors import PackForcingError
from ..files.writing import check_output_file
from ..generate.sampling import Sampling
from ..plots import available
from ..telling import tell
from .models import Models, Sources
from .policies import Policy
from .runs import BLOCK_FRAMES, add_result, read_results

Tell = Callable[[str], None]


class Keyed(Protocol):
    """A run, or the result of one."""

    @property
    def key(self) -> Hashable: ...


class Done(Keyed, Protocol):
    """The result of a run."""

    @property
    def fingerprint(self) -> str: ...


R = TypeVar("R", bound=Keyed)  # a run
D = TypeVar("D", bound=Done)  # its result


class AnySettings(Protocol):
    """What the settings of both kinds of evaluation have."""

    @property
    def policies(self) -> tuple[Policy, ...]: ...
    @property
    def size(self) -> FrameSize: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def sources(self) -> Sources: ...


def unique(text: str) -> list[str]:
    """Names with commas between, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def readable_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def output_folder(path: str, results: str) -> Path:
    """The folder with its file of `results`, made if missing. Raises PackForcingError when it cannot be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / results).touch()
    except OSError as error:
        raise PackForcingError(
            f"Results cannot be written to {folder} ({error.strerror}): choose another --output."
        ) from None
    return folder


def ready_folder(settings: AnySettings, models: Models, options: argparse.Namespace, results: str) -> Path:
    """The folder of results. Raises PackForcingError, before anything runs, for what would fail at the end."""
    for each in settings.policies:
        models.compressor(each.compressor, BLOCK_FRAMES)  # one that does not fit is told here
    check_output_file(None if options.json == "-" else options.json, "results")
    return output_folder(options.output, results)


def completed(
    runs: Sequence[R],
    found: dict[Any, D],
    make: Callable[[list[R]], Iterator[D]],
    told: Callable[[D, list[D], list[R]], str],
    tell: Tell,
) -> list[D]:
    """The results of all runs, in order; those that are not `found` are made.

    `told` says in words that a result has come, beside all results so far and the runs that are still missing.
    """
    missing = {one.key: one for one in runs if one.key not in found}
    tell(f"{len(runs)} runs, {len(found)} of them done before")
    for result in make(list(missing.values())):
        found[result.key] = result
        del missing[result.key]
        tell(f"{len(found)} of {len(runs)}: {told(result, list(found.values()), list(missing.values()))}")
    return [found[one.key] for one in runs]


def resumed(
    runs: Sequence[R],
    path: Path,
    kind: type[D],
    fingerprint: Callable[[R], str],
    make: Callable[[list[R]], Iterator[D]],
    told: Callable[[D, list[D], list[R]], str],
    tell: Tell,
) -> list[D]:
    """`completed`, with the results of a file of JSON lines: those of the same `fingerprint` are taken from it, and
    those that are made are added to it."""
    kept = {(result.key, result.fingerprint): result for result in read_results(path, kind)}
    identities = {run.key: (run.key, fingerprint(run)) for run in runs}
    found = {key: kept[identity] for key, identity in identities.items() if identity in kept}

    def added(missing: list[R]) -> Iterator[D]:
        for result in make(missing):
            add_result(path, result)
            yield result

    return completed(runs, found, added, told, tell)


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    facts: Mapping[str, Any]  # the JSON
    text: str  # the tables
    draw: Callable[[Path], None]  # the picture


def write_report(report: Report, folder: Path, names: tuple[str, str, str], to_json: str | None) -> None:
    """Writes JSON, table and picture under their `names` into the folder; prints the table, or for "-" the JSON."""
    summary, table, picture = names
    (folder / table).write_text(report.text)
    line = json.dumps(report.facts, allow_nan=False)
    for path in (folder / summary, *([Path(to_json)] if to_json not in (None, "-") else [])):
        path.write_text(line + "\n")
    if available():
        report.draw(folder / picture)
    else:
        tell("matplotlib is not installed, so there is no plot: `pip install matplotlib` and start again")
    print(line if to_json == "-" else report.text)


def described_policies(settings: AnySettings, models: Models, blocks: Callable[[Policy], int]) -> dict[str, Any]:
    """The policies as JSON; `blocks` says how long a policy's longest video is."""
    chosen = {each.compressor: models.choice(each.compressor) for each in settings.policies}
    return {
        each.name: {
            "description": each.description,
            "compressor": choice.name if (choice := chosen[each.compressor]) else None,
            "cache": asdict(each.config(blocks(each))),
        }
        for each in settings.policies
    }


def described_conditions(settings: AnySettings, models: Models, options: argparse.Namespace) -> dict[str, Any]:
    """As JSON, how videos are made, whatever they show."""
    return {
        "size": asdict(settings.size),
        "block_frames": BLOCK_FRAMES,
        "sampling": {k: v for k, v in asdict(settings.sampling).items() if k != "seed" and v is not None},
        "sources": {key: value or "demo" for key, value in asdict(settings.sources).items()},
        "weights": models.digests,
        "jobs": options.jobs,
        "threads": options.threads,
    }
