"""The campaign of faults in its short form, and that each of its checks can fail."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import damage, files, kinds, memory, numbers
from campaign.disk import compiler

from packforcing.errors import PackForcingError

COMMAND = Path(__file__).resolve().parents[1] / "benchmarks" / "faults.py"


@pytest.mark.skipif(sys.platform != "linux" or compiler() is None, reason="the failing disk is Linux's, and compiled")
def test_the_short_form_finds_nothing_wrong(tmp_path: Path):
    results = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--short", "--results", str(results)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["ends"]["calls_that_change_files"]["prompt"] > 40
    assert {"SIGKILL", "SIGTERM", "SIGHUP", "RLIMIT_FSIZE", "SIGKILL at a step"} <= found["ends"]["kinds"].keys()
    assert sum(kind["files"] for kind in found["files"]["kinds"].values()) == 300
    assert found["memory"]["buffers"] == 40
    assert "| SIGTERM | 1 | all as promised |" in done.stdout


WHOLE = b"0123456789" * 10


def write(path: Path) -> None:
    path.write_bytes(WHOLE)


def raising(error: type[Exception]) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        if path.read_bytes() != WHOLE:
            raise error("damaged")
        return path

    return read


def busy(path: Path) -> None:
    while path.read_bytes() != WHOLE:
        time.process_time()


def running_code(path: Path) -> None:
    if path.read_bytes() != WHOLE:
        Path(damage.CANARY).mkdir()


def hungry(path: Path) -> int:
    return len(b"x" * (2**30 if path.read_bytes() != WHOLE else 1))


def dying(path: Path) -> None:
    if path.read_bytes() != WHOLE:
        os._exit(3)


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (raising(PackForcingError), ""),
        (raising(KeyError), "KeyError at ?"),
        (busy, "took too long"),
        (running_code, "RAN CODE"),
        (hungry, "took more than 512 MB"),
        (dying, "the process ended with 3"),
    ],
)
def test_what_a_damaged_file_must_not_do_is_found(read: Callable[[Path], object], problem: str, monkeypatch):
    if read is busy:  # which is all that waits for it
        monkeypatch.setattr(files, "LONGEST", 0.5)
    found = files.damage_of(kinds.Kind("x", "x.bin", "bytes", write, read), 3, seed=0)
    assert found.files == 3
    if problem:
        assert any(told.startswith(problem) for told in found.problems), found
    else:
        assert found.refused + found.read == 3
        assert not found.problems


def test_values_that_are_no_sentence_are_found():
    found = numbers.Outcomes()
    found.add("good", lambda: None)
    found.add("refused", lambda: numbers.FrameSize(5, 5))
    found.add("raw", lambda: [][1])
    assert (found.given, found.worked, found.refused) == (3, 1, 1)
    assert list(found.problems) == ["raw: IndexError: list index out of range"]


def test_buffers_that_the_plan_does_not_count_are_found(monkeypatch: pytest.MonkeyPatch):
    assert not memory.campaign(5, 0, seed=1).problems
    monkeypatch.setattr(memory, "planned_buffer_bytes", lambda *_: 5)
    assert len(memory.campaign(5, 0, seed=1).problems) == 5


def test_code_in_a_file_is_not_run_by_the_campaign_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`damage` makes files that would run code, and runs none while it does."""
    monkeypatch.chdir(tmp_path)
    kind = next(kind for kind in kinds.KINDS if kind.form == "torch")
    path = tmp_path / kind.file
    kind.write(path)
    for number in range(8):
        damage.with_code(path.read_bytes(), random.Random(number))
    assert not (tmp_path / damage.CANARY).exists()
