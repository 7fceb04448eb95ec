"""`evaluate`: cache policies on the same prompts and seeds, measured from pixels.

Each finished run is added to FOLDER/runs.jsonl at once; an evaluation that is started again takes from there what was
made with the same weights and settings. `--jobs` changes results in their last digits at most, because every process
uses as many threads as a single one would.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..command_options import frame_size
from ..demo.models import SAMPLING
from ..errors import PackForcingError
from ..generate.sampling import Sampling
from ..generate.schedule import UPDATES
from ..telling import tell
from .models import DTYPES, Models, Sources, load
from .plots import quality_over_time
from .policies import POLICIES, Policy, policy
from .processes import made
from .recall_command import DEFAULTS as RECALL_DEFAULTS
from .recall_command import add_recall_arguments, gaps_of, recall_policies, run_recall
from .recall_runs import RecallSettings
from .reporting import (
    Report,
    Tell,
    completed,
    described_conditions,
    described_policies,
    readable_seconds,
    ready_folder,
    unique,
    versions,
    write_report,
)
from .runs import Result, Run, Settings, add_result, blocks, fingerprint, make, read_results
from .summary import compared, costs, notes, summarise, table
from .switches import SwitchSettings, run_switches

RESULTS, SUMMARY, TABLE, PLOT = "runs.jsonl", "evaluation.json", "table.md", "quality.png"
# Of the options that an evaluation of recall does not have.
DEFAULTS = {"seconds": "5,30,60,120", "prompts": 4, "open_prompts": False, "seeds": 1}

# --- options ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `evaluate`."""
    parser.add_argument(
        "--policies",
        help=f"with commas between: {', '.join(POLICIES)}, sink-N, range-N (latent frames), top-N (mid blocks); "
        "NAME@SECONDS for no longer than that (full, whose cost grows, is full@30 unless told otherwise)",
    )
    parser.add_argument("--seconds", default=DEFAULTS["seconds"], help="durations of video, with commas between")
    parser.add_argument("--prompts", type=int, default=DEFAULTS["prompts"], help="how many captions of held-out scenes")
    parser.add_argument(
        "--open-prompts", action="store_true", help="prompts that leave colours out: only the history knows them"
    )
    parser.add_argument("--seeds", type=int, default=DEFAULTS["seeds"], help="how many seeds, from 0")
    parser.add_argument("--size", default="128x128", help="WIDTHxHEIGHT in pixels, multiples of 16")
    parser.add_argument(
        "--model", default="", help="a transformer trained with the demo's text encoder; default: the demo"
    )
    parser.add_argument("--vae", default="", help="a Wan 2.1 VAE's file; default: the demo's")
    parser.add_argument("--compressor", default="", help="default: the demo's, if trained, else training-free")
    parser.add_argument("--steps", type=int, default=SAMPLING.steps, help="denoising steps a block")
    parser.add_argument("--shift", type=float, default=SAMPLING.shift, help="flow shift")
    parser.add_argument("--update", default=SAMPLING.update, choices=UPDATES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the transformer")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make videos at the same time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--output", default="out/evaluate", help="folder of results; an earlier evaluation goes on")
    parser.add_argument("--json", nargs="?", const="-", help="print JSON, or write it to a file; FOLDER has it anyway")
    add_recall_arguments(parser)
    parser.add_argument(
        "--switches",
        action="store_true",
        help="instead, how soon a change of the prompt is seen, with each --prompt-switch of generate",
    )
    parser.set_defaults(run=run)


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises PackForcingError for anything that cannot be evaluated."""
    check_unused(options, RECALL_DEFAULTS, "only has a meaning with --recall")
    return Settings(
        policies=tuple(
            policy(name) for name in unique(",".join(POLICIES) if options.policies is None else options.policies)
        ),
        seconds=durations(options.seconds),
        prompts=options.prompts,
        open_prompts=options.open_prompts,
        seeds=options.seeds,
        **shared_settings(options),
    )


def recall_settings_of(options: argparse.Namespace) -> RecallSettings:
    """Raises PackForcingError for anything that cannot be evaluated."""
    check_unused(options, DEFAULTS, "has no meaning with --recall")
    return RecallSettings(
        policies=recall_policies(options.policies),
        gaps=gaps_of(options.gaps),
        videos=options.videos,
        unsaid=options.unsaid,
        **shared_settings(options),
    )


def switch_settings_of(options: argparse.Namespace) -> SwitchSettings:
    """Raises PackForcingError for anything that cannot be evaluated."""
    check_unused(options, DEFAULTS, "has no meaning with --switches")
    check_unused(
        options, {name: RECALL_DEFAULTS[name] for name in ("gaps", "unsaid")}, "has no meaning with --switches"
    )
    names = unique("packforcing" if options.policies is None else options.policies)
    return SwitchSettings(tuple(map(policy, names)), options.videos, **shared_settings(options))


def shared_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of both kinds of evaluation. Raises PackForcingError for impossible ones."""
    for name in ("jobs", "threads"):
        if getattr(options, name) < 1:
            raise PackForcingError(f"--{name} must be at least 1, but it is {getattr(options, name)}.")
    return {
        "size": frame_size(options.size, f"--size takes a width and a height, such as 128x128, not '{options.size}'."),
        "sampling": Sampling(0, options.steps, options.shift, options.update),
        "sources": Sources(options.model, options.vae, options.compressor, options.device, options.dtype),
    }


def check_unused(options: argparse.Namespace, defaults: Mapping[str, Any], why: str) -> None:
    """Raises PackForcingError when one of these options is given, which belong to the other kind of evaluation."""
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise PackForcingError(f"--{name.replace('_', '-')} {why}: leave one of them away.")


def durations(text: str) -> tuple[float, ...]:
    """Durations with commas between, shortest first. Raises PackForcingError for what is no number."""
    try:
        return tuple(sorted({float(each) for each in unique(text)}))
    except ValueError:
        raise PackForcingError(f"--seconds takes numbers with commas between, such as 5,30,60, not '{text}'.") from None


# --- many runs -------------------------------------------------------------------------------------------------


def evaluate(settings: Settings, models: Models, folder: Path, jobs: int, threads: int, tell: Tell) -> list[Result]:
    """All results of an evaluation, in the order of its runs; what the folder does not have yet is made and added."""
    runs = settings.runs()

    def finished(missing: list[Run]) -> Iterator[Result]:
        for result in made(make, missing, settings, models, jobs, threads):
            add_result(folder / RESULTS, result)
            yield result

    def told(result: Result, done: list[Result], missing: list[Run]) -> str:
        return (
            f"{result.policy}, seed {result.seed}, {result.video_seconds:g} s in {result.elapsed:.1f} s, "
            f"{readable_seconds(time_left(done, missing, jobs))} left ({result.prompt})"
        )

    return completed(runs, stored(runs, settings, models, folder), finished, told, tell)


def stored(runs: Sequence[Run], settings: Settings, models: Models, folder: Path) -> dict[tuple[str, str, int], Result]:
    """Results that the folder has of these runs, under the same weights and settings, by their keys."""
    results = read_results(folder / RESULTS, Result)
    found = {}
    for one in runs:
        mine = fingerprint(one, settings, models)
        fitting = [result for result in results if result.covers(one, mine)]
        if fitting:
            found[one.key] = fitting[-1]
    return found


def time_left(results: Sequence[Result], missing: Sequence[Run], jobs: int) -> float:
    """Seconds until all missing runs are done, if they take as long a second of video as those of their policy."""
    rates = costs(results)
    usual = fmean(rates.values())
    return sum(rates.get(one.policy.name, usual) * max(one.seconds) for one in missing) / jobs


# --- the command -----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Evaluates, writes table, plot and JSON, and prints the table (or the JSON)."""
    if options.recall and options.switches:
        raise PackForcingError("--recall and --switches are two evaluations: ask for one of them.")
    if options.recall:
        run_recall(recall_settings_of(options), options)
        return
    if options.switches:
        run_switches(switch_settings_of(options), options)
        return
    settings = settings_of(options)
    models = load(settings.sources)
    folder = ready_folder(settings, models, options, RESULTS)
    results = evaluate(settings, models, folder, options.jobs, options.threads, tell)
    summary = summarise(settings, results)
    differences = compared(settings, results)
    text = table(summary, notes(settings, trained=models.trained.state_dict is not None), differences)
    facts = {
        "settings": described(settings, models, options),
        "versions": versions(),
        "policies": summary,
        "differences": differences,
        "cost": {"seconds_a_video_second": costs(results), "threads": options.threads},
    }
    report = Report(facts, text, partial(quality_over_time, summary))
    write_report(report, folder, (SUMMARY, TABLE, PLOT), options.json)


def described(settings: Settings, models: Models, options: argparse.Namespace) -> dict[str, Any]:
    """The settings as JSON: all that the numbers depend on."""
    longest = blocks(max(settings.seconds))

    def length(policy: Policy) -> int:
        return blocks(max(settings.durations(policy), default=0) or longest)

    return {
        "policies": described_policies(settings, models, length),
        "seconds": list(settings.seconds),
        "prompts": list(dict.fromkeys(one.prompt for one in settings.runs())),
        "seeds": settings.seeds,
        **described_conditions(settings, models, options),
    }
