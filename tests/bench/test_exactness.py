"""python -m packforcing check: a CPU passes, a device that computes something else does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from packforcing.bench import exactness
from packforcing.bench.exactness import Check, Made, Way, line, made, tried
from packforcing.cli.main import main
from packforcing.errors import PackForcingError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _float32_only(monkeypatch: pytest.MonkeyPatch):
    """As on a CPU without bfloat16, where the rest would take minutes."""
    monkeypatch.setattr(exactness, "fast_dtype", lambda device: torch.float32)


def test_a_cpu_agrees_with_itself_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "check.json"
    assert main(["check", "--device", "cpu", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert told["passed"]
    assert told["device_type"] == "cpu"
    names = [check["name"] for check in told["checks"]]
    assert len(capsys.readouterr().out.splitlines()) == len(names) == 8
    exact = [check for check in told["checks"] if check["limit"] == 0]
    assert len(exact) == 4
    assert all(check["found"] == 0 for check in exact)
    rounded = next(check for check in told["checks"] if "fp8 KV" in check["name"])
    assert 0 < rounded["found"] < rounded["limit"]


def test_a_device_that_computes_something_else_is_told(monkeypatch: pytest.MonkeyPatch, capsys):
    """Videos are replaced by numbers: one way gives others, and one breaks."""
    right = Made(torch.ones(2), torch.ones(2), [[[1]]])

    def of(way: Way) -> Made:
        if way.archive_device == "host":
            raise RuntimeError("no such memory\nand more")
        return replace(right, frames=torch.tensor([1.0, torch.nan])) if way.overlap else right

    monkeypatch.setattr(exactness, "made", of)
    assert main(["check", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    failed = [told for told in out.splitlines() if told.startswith("FAIL")]
    assert failed == [
        "FAIL  float32: decoding beside the next block: numbers that differ: 1, at most 0",
        "FAIL  float32: the archive on the host: numbers that differ: inf, at most 0 (RuntimeError: no such memory)",
    ]
    assert "2 of 8 checks failed on" in err
    assert main(["check", "--device", "cpu", "--json"]) == 1
    broken = next(c for c in json.loads(capsys.readouterr().out)["checks"] if "archive" in c["name"])
    assert (broken["found"], broken["passed"]) == ("inf", False)


def test_nan_fails_and_what_a_device_lacks_does_not():
    assert not Check("x", float("nan"), 1.0).passed

    def lacks() -> float:
        raise PackForcingError("This GPU cannot multiply in fp8.")

    check = tried("fp8", 0.1, lacks)
    assert check.passed
    assert line(check) == "--    fp8: not here (This GPU cannot multiply in fp8.)"


def test_other_weights_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    """The videos depend on the weights: a check that passed for any would prove nothing."""
    monkeypatch.setattr(exactness, "BLOCKS", 1)
    usual = made(Way(CPU, torch.float32))
    other = made(Way(CPU, torch.float32, linear_dtype="fp8_e4m3"))
    assert exactness.relative(other.latents, usual.latents) > exactness.IN_FLOAT32
