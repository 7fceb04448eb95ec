"""Faults, injected for real, and what is left after each: the campaign behind docs/reliability.md.

    python benchmarks/faults.py [--short] [--only ends files numbers memory] [--mutations N] [--results FILE]

| stage | what it does |
| --- | --- |
| ends | ends a run of `generate` by signals at drawn moments, by a failure of the disk at each call that changes a file, \
by full disks; reads what is left, goes on by the same command, and compares to the bit |
| files | damages every kind of file that is read: each ends in success or in one sentence, within 5 s, and runs nothing |
| numbers | gives absurd values to every setting: each works or is one sentence, within 0.1 s |
| memory | compares the plan's bytes with what runs of random configurations allocate |

The first stage needs Linux and a C compiler. Each stage is a function of --seed, but for the moments of signals.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests" / "references")]  # the references make the small files to damage

import torch
from campaign import ends
from campaign.disk import FailingDisk, restart_on_failing_disk

STAGES = ("ends", "files", "numbers", "memory")


def run_ends(options: argparse.Namespace) -> dict[str, Any]:
    """The stage of that name: a table of the kinds of ends."""
    disk = FailingDisk()
    generator = random.Random(options.seed)
    scenarios = list(ends.SCENARIOS)[: 1 if options.short else None]
    found: dict[str, Any] = {}
    for scenario in scenarios:
        stage = ends.Ends(scenario, disk, generator)
        print(f"ends, {scenario}: {stage.reference.calls} calls change files", file=sys.stderr, flush=True)
        stage.at_steps(options.every, options.kinds)
        stage.by_signals(options.moments)
        stage.on_full_disks(options.moments)
        found[scenario] = {kind: asdict(tally) for kind, tally in stage.tallies.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="some of the stages")
    parser.add_argument("--short", action="store_true", help="a few of each kind, in seconds")
    parser.add_argument("--every", type=int, default=1, help="of the disk's calls, every which one fails once")
    parser.add_argument("--kinds", type=int, default=6, help="kinds of failures at each of them")
    parser.add_argument("--moments", type=int, default=10, help="drawn moments of each signal, and full disks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "LD_PRELOAD" not in os.environ:
        base = Path(tempfile.mkdtemp(prefix="faults-"))
        (base / "runs").mkdir()
        restart_on_failing_disk(base, base / "runs")
    print(json.dumps(run_ends(options), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
