"""The command for GPUs, tried on a CPU with the tiny model."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
COMMAND = REPO / "benchmarks" / "gpu.py"
CHEAP = shlex.split(
    "--device cpu --model tiny --size 64x64 --block 1 --sink 1 --recent 1 --top-k 2 --steps 2 --repeats 1"
)


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", COMMAND)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_runs_write_their_results_and_the_figures_are_told(tmp_path: Path):
    names = ["bf16", "ten-minutes"]
    options = ["--folder", str(tmp_path), "--scale", "0.02", "--only", *names, "--", *CHEAP, "--baseline-blocks", "3"]
    done = subprocess.run([sys.executable, str(COMMAND), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = {name: json.loads((tmp_path / f"gpu-{name}.json").read_text()) for name in names}
    assert results["bf16"]["overlap"]["fps_end_to_end"] > 0
    assert results["ten-minutes"]["overlap"] is None
    ratio = results["ten-minutes"]["block_time_ratio"]
    verdict = "reached" if ratio <= 1.02 else "not reached"
    assert f"| block time at ten minutes over that of the start | <= 1.02 | {ratio:.4g} | {verdict} |" in done.stdout
    assert "| frames/s end to end, fp8, compiled | >= 45 | not measured | |" in done.stdout


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path):
    """Weights alone are more than nothing."""
    options = ["--folder", str(tmp_path), "--scale", "0.02", "--only", "ten-minutes", "--", *CHEAP]
    done = subprocess.run(
        [sys.executable, str(COMMAND), *options, "--memory-gb", "0.001"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "A video of 64x64 needs about" in done.stderr
    assert "over that of the start | <= 1.02 | not measured" in done.stdout


def test_figures_are_reached_at_their_limits(gpu):
    results = {
        "bf16": {"fps_end_to_end": 20.0, "overlap": {"fps_end_to_end": 30.0}, "peak_memory_bytes": 100},
        "ten-minutes": {"block_time_ratio": 1.021, "peak_memory_bytes": 101, "cached_kv_bytes": 3.99e9},
    }
    speed, *_ = gpu.FIGURES
    assert speed.line(results) == "| frames/s end to end, bf16 | >= 30 | 30 | reached |"
    lines = {figure.name: figure.line(results) for figure in gpu.FIGURES if "ten-minutes" in figure.runs}
    assert lines["block time at ten minutes over that of the start"].endswith("| 1.021 | not reached |")
    assert lines["peak memory of ten minutes over that of one"].endswith("| 1.01 | reached |")
    results["bf16"]["overlap"] = None
    assert speed.line(results).endswith("| 20 | not reached |")
