"""Faults, injected for real, and what is left after each: the campaign behind docs/reliability.md.

    python benchmarks/faults.py [--short] [--only ends files numbers memory] [--mutations N] [--results FILE]

| stage | what it does |
| --- | --- |
| ends | Ends a run of `generate`: by signals at drawn moments, by a failure of the disk at each call that changes a file, \
by full disks. Reads what is left, goes on by the same command, and compares to the bit. |
| files | Damages every kind of file that is read: each ends in success or one sentence, within 5 s, and runs nothing. |
| numbers | Gives absurd values to every setting: each works or is one sentence, within 0.1 s. |
| memory | Compares the plan's bytes with what random configurations allocate. |

The first stage needs Linux and a C compiler. Everything is a function of --seed, but for the moments of signals. Seconds
are the processor's, so that other work on the machine does not count.
"""  # noqa: E501

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "references"))  # small files to damage

import torch
from campaign import disk, ends, files, memory, numbers

from packforcing.bench.result import device_name

Result = dict[str, Any]


# --- stages -----------------------------------------------------------------------------------------------------------


def run_ends(options: argparse.Namespace) -> Result:
    """Each kind of end, over all scenarios."""
    failing, generator = disk.FailingDisk(), random.Random(options.seed)
    tallies: dict[str, ends.Tally] = {}
    calls = {}
    for scenario in list(ends.SCENARIOS)[: 1 if options.short else None]:
        stage = ends.Ends(scenario, failing, generator, tallies)
        calls[scenario] = stage.reference.calls
        print(f"ends, {scenario}: {stage.reference.calls} calls change files", file=sys.stderr, flush=True)
        stage.at_steps(options.every, options.kinds)
        stage.by_signals(options.moments)
        stage.on_full_disks(options.moments)
    return {"calls_that_change_files": calls, "kinds": {kind: asdict(tally) for kind, tally in tallies.items()}}


def run_files(options: argparse.Namespace) -> Result:
    found = files.campaign(options.mutations, options.seed)
    return {"kinds": {name: asdict(damage) for name, damage in found.items()}}


def run_numbers(options: argparse.Namespace) -> Result:
    found = numbers.campaign(options.pairs, options.seed)
    return {"settings": {name: asdict(outcomes) for name, outcomes in found.items()}}


def run_memory(options: argparse.Namespace) -> Result:
    return asdict(memory.campaign(options.configurations, options.runs, options.seed))


STAGES: dict[str, Callable[[argparse.Namespace], Result]] = {
    "ends": run_ends,
    "files": run_files,
    "numbers": run_numbers,
    "memory": run_memory,
}


# --- what came of them ------------------------------------------------------------------------------------------------


def problems(results: Mapping[str, Result]) -> int:
    """How many faults ended as none may."""
    count = len(results.get("memory", {}).get("problems", []))
    count += sum(len(tally["problems"]) for tally in results.get("ends", {}).get("kinds", {}).values())
    groups = (results.get("files", {}).get("kinds", {}), results.get("numbers", {}).get("settings", {}))
    return count + sum(sum(each["problems"].values()) for group in groups for each in group.values())


def table(results: Mapping[str, Result]) -> str:
    """What was done and found, in Markdown."""
    rows = ["| fault | how often | what came of it |", "| --- | --- | --- |"]
    for kind, tally in results.get("ends", {}).get("kinds", {}).items():
        lost = f", {tally['most_missing_frames']} frames lost at most" if "SIGKILL" in kind else ""
        rows.append(f"| {kind} | {tally['runs']} | {_told(len(tally['problems']))}{lost} |")
    if damaged := results.get("files", {}).get("kinds"):
        total = {name: sum(each[name] for each in damaged.values()) for name in ("files", "read", "refused")}
        longest = max(each["longest_seconds"] for each in damaged.values())
        most = max(each["most_bytes"] for each in damaged.values())
        wrong = sum(sum(each["problems"].values()) for each in damaged.values())
        rows.append(
            f"| damaged files of {len(damaged)} kinds | {total['files']:,} | {_told(wrong)}: {total['read']:,} read, "
            f"{total['refused']:,} refused in one sentence; {longest:.1f} s and {most / 1e6:.0f} MB at most |"
        )
    if settings := results.get("numbers", {}).get("settings"):
        given, refused = (sum(each[name] for each in settings.values()) for name in ("given", "refused"))
        longest = max(each["longest_seconds"] for each in settings.values())
        wrong = sum(sum(each["problems"].values()) for each in settings.values())
        rows.append(
            f"| absurd values | {given:,} | {_told(wrong)}: {refused:,} refused in one sentence; {longest:.3f} s at "
            "most |"
        )
    if planned := results.get("memory"):
        wrong = _told(len(planned["problems"]))
        rows.append(f"| buffers against the plan | {planned['buffers']} | {wrong}: equal to the byte |")
        if planned["runs"]:
            rows.append(
                f"| whole runs against the plan | {planned['runs']} | {planned['smallest_ratio']:.3f} to "
                f"{planned['largest_ratio']:.3f} of what it says |"
            )
    return "\n".join(rows)


def _told(wrong: int) -> str:
    return f"**{wrong} wrong**" if wrong else "all as promised"


def conditions(options: argparse.Namespace) -> Result:
    """When, where, and how much."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "system": platform.platform(),
        "options": vars(options) | {"results": None},
    }


# --- the command ------------------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="some of the stages")
    parser.add_argument("--short", action="store_true", help="a few of each, in seconds, unless told otherwise")
    parser.add_argument("--every", type=int, help="ends: of the disk's calls, every which one fails; default: 1")
    parser.add_argument("--kinds", type=int, help="ends: kinds of failures at each of them, in turns; default: 6, all")
    parser.add_argument("--moments", type=int, help="ends: of each signal, and full disks; default: 10")
    parser.add_argument("--mutations", type=int, help="files: how many in all; default: 20000")
    parser.add_argument("--pairs", type=int, help="numbers: pairs of fields a setting; default: 500")
    parser.add_argument("--configurations", type=int, help="memory: configurations; default: 200")
    parser.add_argument("--runs", type=int, help="memory: of which so many are made; default: 50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="a JSON file for all that was found")
    options = parser.parse_args()
    usual = {"every": (1, 40), "kinds": (6, 1), "moments": (10, 1), "mutations": (20_000, 300), "pairs": (500, 3)}
    usual |= {"configurations": (200, 40), "runs": (50, 0)}
    for name, (full, short) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, short if options.short else full)
    return options


def main() -> int:
    options = parsed()
    torch.set_num_threads(1)
    if "ends" in options.only and not disk.is_failing():
        if sys.platform != "linux" or disk.compiler() is None:
            print("ends: not run, since it needs Linux and a C compiler", file=sys.stderr)
            options.only = [name for name in options.only if name != "ends"]
        else:
            disk.restart_on_failing_disk(Path(tempfile.mkdtemp(prefix="faults-")))
    results: dict[str, Result] = {}
    try:
        for name in options.only:
            start = time.perf_counter()
            results[name] = STAGES[name](options)
            results[name]["elapsed_seconds"] = round(time.perf_counter() - start, 1)
            if options.results is not None:  # after each: the campaign is long
                options.results.write_text(json.dumps({**conditions(options), **results}, indent=1) + "\n")
    finally:
        if disk.is_failing():
            shutil.rmtree(disk.FailingDisk().folder.parent)
    print(table(results))
    return 1 if problems(results) else 0


if __name__ == "__main__":
    sys.exit(main())
