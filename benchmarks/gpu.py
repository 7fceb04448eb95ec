"""Everything that only a GPU can tell, in one command and a quarter of an hour: the most important first.

    python benchmarks/gpu.py [--minutes 14] [--folder benchmarks/results] [--only NAME ...] [-- options of bench]

Needs a checkout with torch, einops, safetensors, numpy and imageio. Each stage is a process of its own, so that one
that fails or hangs ends no other; a stage that no longer fits into the time is skipped, and told. After every stage the
results so far are written: `gpu.json` has them all, `gpu.md` the figures that this project aims at beside what was
measured. Models have the real sizes and random weights, frames are 832x480.

    python benchmarks/gpu.py --device cpu --tiny      tries the command itself, on any machine
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
FP8_WEIGHTS = ("--linear-dtype", "fp8_e4m3")
FP8_KV = ("--kv-dtype", "fp8_e4m3")
FP8 = (*FP8_WEIGHTS, *FP8_KV)
ALONE = ("--no-baselines", "--overlap", "off")  # only what the stage is about
SMALL_CARD_GB = 8.1  # of the 8.59 (8 GiB) that a card of 8 GB has, less CUDA's own
PATIENCE = 3.0  # a stage that takes so many times what was expected is ended
TINY_SCALE = 0.02  # of the videos' lengths
TINY = (
    *("--model", "tiny", "--size", "64x64", "--block", "1", "--sink", "1", "--recent", "1", "--top-k", "2"),
    *("--steps", "2", "--repeats", "1"),
)


@dataclass(frozen=True)
class Stage:
    """One thing to find out."""

    name: str
    expected: float  # seconds that it takes on an H100, counted
    video: float  # seconds of video; 0: it is no benchmark but the command `check`
    options: tuple[str, ...] = ()

    def command(self, device: str | None, tiny: bool, extra: Sequence[str]) -> list[str]:
        """The arguments of `python -m packforcing`, without the result's file."""
        chosen = ["--device", device] if device else []
        if not self.video:
            return ["check", *chosen]
        scale = TINY_SCALE if tiny else 1.0
        options = [*self.options]
        if tiny:
            options = [*TINY_OPTIONS.get(self.name, without_compiler(options)), *TINY]
        return ["bench", "--seconds", f"{max(1.0, self.video * scale):g}", *chosen, *options, *extra]


def without_compiler(options: Iterable[str]) -> list[str]:
    return [option for option in options if option != "--compile"]


STAGES = (
    Stage("exactness", 45, 0),
    Stage("bf16", 70, 32, ALONE),
    Stage("compiled", 100, 32, ("--compile", *ALONE)),
    Stage("fp8-compiled", 100, 32, (*FP8, "--compile", *ALONE)),
    Stage("overlap", 80, 40, ("--no-baselines", "--overlap", "on")),
    Stage("small-card", 80, 32, (*FP8, "--archive-device", "host", "--memory-gb", str(SMALL_CARD_GB), *ALONE)),
    Stage("peers", 60, 8, ("--overlap", "off", "--baseline-blocks", "60")),
    Stage("ten-minutes", 280, 615, ("--no-vae", *ALONE)),
    Stage("14b", 120, 24, ("--model", "wan2.1-14b", *ALONE)),
    Stage("fp8-weights", 60, 24, (*FP8_WEIGHTS, "--compile", "--no-vae", *ALONE)),
    Stage("fp8-kv", 60, 24, (*FP8_KV, "--compile", "--no-vae", *ALONE)),
    Stage("streamed", 80, 24, ("--weights-device", "host", *ALONE)),
)
# What a stage is about in the tiny size, where that has other options.
TINY_OPTIONS = {"14b": list(ALONE), "peers": ["--overlap", "off", "--baseline-blocks", "6"]}


@dataclass
class Outcome:
    """What became of a stage."""

    status: str  # "done", "failed", "out of time", or "skipped"
    seconds: float = 0.0
    why: str = ""
    command: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None  # what the command wrote; of a failed check too


# ---------------------------------------------------------------------- the figures


def share_of_the_method(result: dict[str, Any]) -> float:
    """Compression, selection and archive traffic as a share of a block's time."""
    stages = result["stages"]
    return sum(stages[name]["share"] for name in ("compression", "selection") if name in stages)


def over_ours(name: str) -> Callable[[dict[str, Any]], float]:
    """The time of a baseline over ours, at the last block compared."""

    def ratio(result: dict[str, Any]) -> float:
        return next(entry["speedup"] for entry in result["baselines"] if entry["name"] == name)

    return ratio


@dataclass(frozen=True)
class Figure:
    """A number of one stage's result, and what it should be at least or at most; None: it is only told."""

    name: str
    stage: str
    number: Callable[[dict[str, Any]], float | None]
    at_least: float | None = None
    at_most: float | None = None

    def line(self, outcomes: Mapping[str, Outcome]) -> str:
        aim = "" if self.at_least is None else f">= {self.at_least:g}"
        aim = aim if self.at_most is None else f"<= {self.at_most:g}"
        outcome = outcomes.get(self.stage)
        if outcome is None or outcome.result is None:
            return f"| {self.name} | {aim} | not measured | {'' if outcome is None else outcome.status} |"
        try:
            found = self.number(outcome.result)
        except (KeyError, TypeError):  # that part was not measured, which the result's notes explain
            found = None
        if found is None:
            return f"| {self.name} | {aim} | not measured | see its notes |"
        verdict = ""
        if self.at_least is not None:
            verdict = "reached" if found >= self.at_least else "not reached"
        if self.at_most is not None:
            verdict = "reached" if found <= self.at_most else "not reached"
        return f"| {self.name} | {aim} | {found:.4g} | {verdict} |"


def end_to_end(result: dict[str, Any]) -> float:
    return float(result["fps_end_to_end"])


def without_decoding(result: dict[str, Any]) -> float:
    return float(result["fps_denoise_and_compression"])


FIGURES = (
    Figure(
        "checks against the CPU that failed",
        "exactness",
        lambda r: sum(not check["passed"] for check in r["checks"]),
        at_most=0,
    ),
    Figure("frames/s end to end, bf16", "bf16", end_to_end, at_least=30),
    Figure("without decoding, bf16", "bf16", without_decoding),
    Figure("frames/s end to end, bf16, compiled", "compiled", end_to_end, at_least=30),
    Figure("without decoding, bf16, compiled", "compiled", without_decoding),
    Figure("frames/s end to end, fp8, compiled", "fp8-compiled", end_to_end, at_least=45),
    Figure("without decoding, fp8, compiled", "fp8-compiled", without_decoding),
    Figure("frames/s end to end, bf16, overlapped", "overlap", lambda r: r["overlap"]["fps_end_to_end"], at_least=30),
    Figure("block, one after the other over overlapped", "overlap", lambda r: r["overlap"]["speedup"]),
    Figure("cached keys and values, GB", "bf16", lambda r: r["cached_kv_bytes"] / 1e9, at_most=4.0),
    Figure("compression, selection, archive: share of a block", "bf16", share_of_the_method, at_most=0.03),
    Figure(
        "peak memory on a small card, GB", "small-card", lambda r: r["peak_memory_bytes"] / 1e9, None, SMALL_CARD_GB
    ),
    Figure("frames/s end to end, small card", "small-card", end_to_end),
    Figure("time of Self-Forcing's rolling window over ours", "peers", over_ours("self-forcing-rolling-window")),
    Figure("time of the unbounded cache over ours", "peers", over_ours("unbounded-full-cache")),
    Figure("time of torch.cat over ours", "peers", over_ours("concatenating-three-partition")),
    Figure("block time at ten minutes over the start's", "ten-minutes", lambda r: r["block_time_ratio"], at_most=1.02),
    Figure("peak memory at ten minutes over the start's", "ten-minutes", lambda r: r["memory_ratio"], at_most=1.01),
    Figure("frames/s end to end, 14B", "14b", end_to_end),
    Figure("without decoding, fp8 weights alone, compiled", "fp8-weights", without_decoding),
    Figure("without decoding, fp8 KV alone, compiled", "fp8-kv", without_decoding),
    Figure("frames/s end to end, weights on the host", "streamed", end_to_end),
)


def table(outcomes: Mapping[str, Outcome]) -> str:
    """The figures as Markdown, below the machine that they hold for."""
    results = [outcome.result for outcome in outcomes.values() if outcome.result]
    tiny = any(result.get("model") == "tiny" for result in results)
    where = "Nothing was measured."
    if results:
        first = results[0]
        cuda = f", CUDA {first['versions']['cuda']}" if first["versions"]["cuda"] else ""
        where = f"Measured on {first['device']}, torch {first['versions']['torch']}{cuda}, {first['date']}."
    stages = [
        f"| {name} | {outcome.status} | {outcome.seconds:.0f} | {outcome.why} |" for name, outcome in outcomes.items()
    ]
    if tiny:
        where += " Tiny models: this tries the command, and says nothing of its aims."
    return "\n".join(
        [where, "", "| figure | aim | measured | |", "| --- | --- | --- | --- |"]
        + [figure.line(outcomes) for figure in FIGURES]
        + ["", "| stage | | seconds | |", "| --- | --- | --- | --- |", *stages]
    )


def write(folder: Path, outcomes: Mapping[str, Outcome]) -> None:
    """All results so far."""
    results = {name: asdict(outcome) for name, outcome in outcomes.items()}
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "gpu.md").write_text(table(outcomes) + "\n")


# ---------------------------------------------------------------------- running

Runner = Callable[[list[str], float], int]  # arguments of `python -m packforcing`, seconds -> exit code


def in_a_process(arguments: list[str], seconds: float) -> int:
    """Raises subprocess.TimeoutExpired, after it has ended the process."""
    return subprocess.run([sys.executable, "-m", "packforcing", *arguments], cwd=REPO, timeout=seconds).returncode


def in_this_process(arguments: list[str], seconds: float) -> int:
    """The same where a process for each stage would cost more than the stage; nothing is ended."""
    sys.path.insert(0, str(REPO))
    try:
        from packforcing.cli.main import main as command

        return command(arguments)
    finally:
        sys.path.remove(str(REPO))


def run_stage(stage: Stage, arguments: list[str], seconds: float, runner: Runner) -> Outcome:
    """What becomes of one stage, which is ended after so many seconds."""
    print(f"\n== {stage.name}: python -m packforcing {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        try:
            code = runner([*arguments, "--json", str(file)], seconds)
            outcome = Outcome("done") if code == 0 else Outcome("failed", why=f"exit code {code}")
        except subprocess.TimeoutExpired:
            outcome = Outcome("out of time", why=f"ended after {seconds:.0f} s")
        except Exception as error:
            outcome = Outcome("failed", why=f"{type(error).__name__}: {error}".partition("\n")[0])
        if file.exists():
            outcome.result = json.loads(file.read_text())
    outcome.seconds, outcome.command = time.monotonic() - start, arguments
    return outcome


def run_all(
    stages: Sequence[Stage],
    commands: Mapping[str, list[str]],
    folder: Path,
    seconds: float,
    runner: Runner,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Outcome]:
    """Runs stages in their order, as far as they fit into so many seconds, and writes after each."""
    outcomes: dict[str, Outcome] = {}
    end = clock() + seconds
    for stage in stages:
        left = end - clock()
        if stage.expected > left:
            why = f"takes about {stage.expected:.0f} s, {max(0.0, left):.0f} s are left"
            print(f"\n== {stage.name}: skipped, {why}", flush=True)
            outcomes[stage.name] = Outcome("skipped", why=why)
        else:
            patience = min(left, PATIENCE * stage.expected)
            outcomes[stage.name] = run_stage(stage, commands[stage.name], patience, runner)
        write(folder, outcomes)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14.0, help="that all may take; what no longer fits is skipped")
    parser.add_argument("--folder", type=Path, default=REPO / "benchmarks" / "results", help="for gpu.json and gpu.md")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the stages, in their order")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="tiny models, short videos, nothing compiled")
    parser.add_argument("--one-process", action="store_true", help="for all stages: quick, but one can end the others")
    parser.add_argument("bench", nargs="*", help="options for every benchmark, after --")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if stage.name in options.only]
    commands = {stage.name: stage.command(options.device, options.tiny, options.bench) for stage in stages}
    runner = in_this_process if options.one_process else in_a_process
    outcomes = run_all(stages, commands, options.folder, 60 * options.minutes, runner)
    print("\n" + table(outcomes))
    return 0 if all(outcome.status in ("done", "skipped") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
