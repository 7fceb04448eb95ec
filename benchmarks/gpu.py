"""Everything that only a GPU can tell, in one command: speed, its options, ten minutes, and a small card.

    python benchmarks/gpu.py [--folder benchmarks/results] [--only NAME ...] [--scale X] [-- options of bench]

Needs a checkout with torch, einops, safetensors, numpy and imageio. Each run is `python -m packforcing bench` in a
process of its own, with the real architecture at 832x480 and random weights; its JSON goes into the folder, and the
figures that this project aims at are printed beside what was measured. By count that takes some 15 minutes on an H100.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
FP8 = ["--linear-dtype", "fp8_e4m3", "--kv-dtype", "fp8_e4m3"]
SMALL_CARD_GB = 8.1  # of the 8.59 (8 GiB) that a card of 8 GB has, less CUDA's own

# Name -> seconds of video, and options.
RUNS: dict[str, tuple[float, list[str]]] = {
    "bf16": (60, []),
    "compiled": (60, ["--compile", "--no-baselines"]),
    "fp8": (60, [*FP8, "--no-baselines"]),
    "fp8-compiled": (60, [*FP8, "--compile", "--no-baselines"]),
    "ten-minutes": (615, ["--no-baselines", "--overlap", "off"]),
    "small-card": (
        60,
        [*FP8, "--archive-device", "host", "--memory-gb", str(SMALL_CARD_GB), "--no-baselines", "--overlap", "off"],
    ),
}

Results = Mapping[str, dict[str, Any]]


def best_fps(result: dict[str, Any]) -> float:
    """Frames a second end to end, with or without decoding beside the denoising."""
    overlap = result["overlap"]
    return max(result["fps_end_to_end"], overlap["fps_end_to_end"] if overlap else 0.0)


def share_of_the_method(result: dict[str, Any]) -> float:
    """Compression, selection and archive traffic as a share of a block's time."""
    stages = result["stages"]
    return sum(stages[name]["share"] for name in ("compression", "selection") if name in stages)


@dataclass(frozen=True)
class Figure:
    """One of the figures to reach: from these runs, this number, at least or at most `limit`."""

    name: str
    runs: tuple[str, ...]
    number: Callable[..., float]
    limit: float
    at_least: bool

    def line(self, results: Results) -> str:
        sign = ">=" if self.at_least else "<="
        wanted = f"| {self.name} | {sign} {self.limit:g} |"
        if any(run not in results for run in self.runs):
            return f"{wanted} not measured | |"
        found = self.number(*(results[run] for run in self.runs))
        reached = found >= self.limit if self.at_least else found <= self.limit
        return f"{wanted} {found:.4g} | {'reached' if reached else 'not reached'} |"


FIGURES = (
    Figure("frames/s end to end, bf16", ("bf16",), best_fps, 30, at_least=True),
    Figure("the same, compiled", ("compiled",), best_fps, 30, at_least=True),
    Figure("frames/s end to end, fp8, compiled", ("fp8-compiled",), best_fps, 45, at_least=True),
    Figure("cached keys and values, GB", ("ten-minutes",), lambda r: r["cached_kv_bytes"] / 1e9, 4.0, at_least=False),
    Figure(
        "block time at ten minutes over that of the start",
        ("ten-minutes",),
        lambda r: r["block_time_ratio"],
        1.02,
        False,
    ),
    Figure(
        "peak memory of ten minutes over that of one",
        ("ten-minutes", "bf16"),
        lambda long, short: long["peak_memory_bytes"] / short["peak_memory_bytes"],
        1.01,
        at_least=False,
    ),
    Figure("compression, selection, archive: share of a block", ("bf16",), share_of_the_method, 0.03, at_least=False),
    Figure(
        "peak memory with fp8 on a small card, GB",
        ("small-card",),
        lambda r: r["peak_memory_bytes"] / 1e9,
        SMALL_CARD_GB,
        at_least=False,
    ),
)


def run_bench(name: str, scale: float, folder: Path, extra: list[str]) -> dict[str, Any] | None:
    """One run's result; None when it failed, which is told and keeps nobody else from running."""
    seconds, options = RUNS[name]
    file = folder / f"gpu-{name}.json"
    command = [sys.executable, "-m", "packforcing", "bench", "--seconds", str(seconds * scale), *options, *extra]
    print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
    done = subprocess.run([*command, "--json", str(file.resolve())], cwd=REPO)
    return json.loads(file.read_text()) if done.returncode == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPO / "benchmarks" / "results", help="where the JSON files go")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the runs")
    parser.add_argument("--scale", type=float, default=1.0, help="of the videos' lengths, to try the command itself")
    parser.add_argument("bench", nargs="*", help="options for every run, after --")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = {name: run_bench(name, options.scale, options.folder, options.bench) for name in options.only}
    results = {name: result for name, result in found.items() if result is not None}
    print("\n| figure | aim | measured | |\n| --- | --- | --- | --- |")
    print("\n".join(figure.line(results) for figure in FIGURES))
    return 0 if len(results) == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
