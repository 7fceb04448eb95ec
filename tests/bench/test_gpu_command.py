"""The command for GPUs, tried on a CPU with the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gpu
import pytest

from packforcing.bench import exactness


def test_every_stage_runs_on_a_cpu_and_every_figure_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # The checks have a test of their own, and take the longest.
    monkeypatch.setattr(exactness, "checks", lambda device: iter([exactness.Check("one", 0.0, 0.0)]))
    assert gpu.main(["--device", "cpu", "--tiny", "--one-process", "--folder", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == [stage.name for stage in gpu.STAGES]
    assert {outcome["status"] for outcome in found.values()} == {"done"}
    assert found["small-card"]["result"]["config"]["archive_device"] == "host"
    alone = [found[name]["result"] for name in ("fp8-weights", "fp8-kv")]
    assert [result["linear_dtype"] for result in alone] == ["fp8_e4m3", "model"]
    assert [result["config"]["kv_dtype"] for result in alone] == ["model", "fp8_e4m3"]
    assert found["streamed"]["result"]["weights_device"] == "host"
    assert "decode" not in found["ten-minutes"]["result"]["stages"]
    written = (tmp_path / "gpu.md").read_text()
    assert "Tiny models: this tries the command" in written
    assert "not measured" not in written
    assert written in capsys.readouterr().out


def test_stages_are_processes_and_one_that_fails_or_hangs_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = tmp_path / "packforcing" / "__main__.py"
    program.parent.mkdir()
    program.write_text(
        "import json, sys, time\n"
        "name, file = sys.argv[1], sys.argv[-1]\n"
        "if name == 'hang': time.sleep(60)\n"
        "open(file, 'w').write(json.dumps({'name': name}))\n"
        "sys.exit(3 if name == 'fail' else 0)\n"
    )
    monkeypatch.setattr(gpu, "REPO", tmp_path)
    monkeypatch.setattr(gpu, "table", lambda outcomes: "")
    stages = [gpu.Stage(name, 1, 1) for name in ("fail", "hang", "work")]
    commands = {stage.name: [stage.name] for stage in stages}
    found = gpu.run_all(stages, commands, tmp_path, 600, gpu.in_a_process)
    assert [outcome.status for outcome in found.values()] == ["failed", "out of time", "done"]
    assert found["fail"].why == "exit code 3"
    assert found["fail"].result == {"name": "fail"}, "what it wrote before it failed is kept"
    assert found["work"].result == {"name": "work"}


def test_what_no_longer_fits_is_skipped_and_results_are_written_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 0.0
    written: list[list[str]] = []

    def clock() -> float:
        return now

    def runner(arguments: list[str], seconds: float) -> int:
        nonlocal now
        now += 100.0
        written.append(list(json.loads(file.read_text())) if (file := tmp_path / "gpu.json").exists() else [])
        return 0

    stages = [gpu.Stage("a", 90, 1), gpu.Stage("long", 120, 1), gpu.Stage("b", 90, 1), gpu.Stage("c", 90, 1)]
    found = gpu.run_all(stages, {stage.name: [] for stage in stages}, tmp_path, 210, runner, clock)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "a": "done",
        "long": "skipped",
        "b": "done",
        "c": "skipped",
    }
    assert found["c"].why == "takes about 90 s, 10 s are left"
    assert written == [[], ["a", "long"]]
    assert "== long: skipped, takes about 120 s, 110 s are left" in capsys.readouterr().out


def test_the_first_stages_fit_into_a_quarter_of_an_hour_and_what_matters_most_is_first():
    names = [stage.name for stage in gpu.STAGES]
    assert names[:2] == ["exactness", "bf16"]
    until_ten_minutes = gpu.STAGES[: names.index("ten-minutes") + 1]
    assert sum(stage.expected for stage in until_ten_minutes) <= 14 * 60
    for stage in gpu.STAGES:
        command = stage.command("cuda", tiny=False, extra=["--steps", "3"])
        assert command[0] == ("check" if stage.name == "exactness" else "bench")
        assert "tiny" not in command


def lines(results: dict) -> Iterator[str]:
    outcomes = {name: gpu.Outcome("done", result=result) for name, result in results.items()}
    outcomes["fp8-kv"] = gpu.Outcome("skipped")
    for figure in gpu.FIGURES:
        yield figure.line(outcomes)


def test_figures_are_reached_at_their_limits():
    found = list(
        lines(
            {
                "bf16": {"fps_end_to_end": 30.0, "fps_denoise_and_compression": 40.0, "cached_kv_bytes": 3.99e9},
                "compiled": {"fps_end_to_end": 29.9, "fps_denoise_and_compression": 40.0},
                "ten-minutes": {"block_time_ratio": 1.021, "memory_ratio": 1.01},
                "overlap": {"overlap": None},
            },
        )
    )
    for line in (
        "| frames/s end to end, bf16 | >= 30 | 30 | reached |",
        "| without decoding, bf16 |  | 40 |  |",
        "| frames/s end to end, bf16, compiled | >= 30 | 29.9 | not reached |",
        "| block time at ten minutes over the start's | <= 1.02 | 1.021 | not reached |",
        "| peak memory at ten minutes over the start's | <= 1.01 | 1.01 | reached |",
        "| compression, selection, archive: share of a block | <= 0.03 | not measured | see its notes |",
        "| frames/s end to end, bf16, overlapped | >= 30 | not measured | see its notes |",
        "| without decoding, fp8 KV alone, compiled |  | not measured | skipped |",
        "| frames/s end to end, 14B |  | not measured |  |",
    ):
        assert line in found


def test_the_command_itself_tries_one_stage_in_a_process(tmp_path: Path):
    options = ["--device", "cpu", "--tiny", "--only", "bf16", "--folder", str(tmp_path)]
    # Weights alone are more than nothing: it fails, in one sentence, and so does the command.
    done = subprocess.run(
        [sys.executable, gpu.__file__, *options, "--", "--memory-gb", "0.001"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "A video of 64x64 needs about" in done.stderr
    assert "| bf16 | failed |" in done.stdout
