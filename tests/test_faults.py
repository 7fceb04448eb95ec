"""The campaign of faults in its short form, and that each of its checks can fail."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import damage, files, kinds, left, memory, numbers
from campaign.disk import compiler
from small_options import SMALL_VIDEO

from packforcing.cli.main import main
from packforcing.errors import PackForcingError
from packforcing.files.latent_file import load_latents
from packforcing.files.video import read_video
from packforcing.files.writing import PART

COMMAND = Path(__file__).resolve().parents[1] / "benchmarks" / "faults.py"


@pytest.mark.skipif(sys.platform != "linux" or compiler() is None, reason="the failing disk is Linux's, and compiled")
def test_the_short_form_finds_nothing_wrong(tmp_path: Path):
    results = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--short", "--results", str(results)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["ends"]["calls_that_change_files"]["prompt"] > 40
    assert {"SIGKILL", "SIGTERM", "SIGHUP", "RLIMIT_FSIZE", "SIGKILL at a step"} <= found["ends"]["kinds"].keys()
    assert sum(kind["files"] for kind in found["files"]["kinds"].values()) == 300
    assert found["memory"]["buffers"] == 40
    assert "| SIGTERM | 1 | all as promised |" in done.stdout


# --- what is left after an end ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, left.Reference]:
    """The folder of a run of three blocks that nothing happened to, and what it holds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    named = {"--output": left.VIDEO, "--save-state": left.STATE, "--latents": left.LATENTS, "--report": left.REPORT}
    files = [word for option, name in named.items() for word in (option, str(folder / name))]
    command = ["generate", "--model", "tiny", "--prompt", "a red circle", *SMALL_VIDEO, "--seconds", "0.75"]
    assert main([*command, *files]) == 0
    video, names = folder / left.VIDEO, frozenset(file.name for file in folder.iterdir())
    frames, latents = read_video(video)[0], load_latents(folder / left.LATENTS)
    return folder, left.Reference(video.read_bytes(), frames, latents, names, calls=1, seconds=1.0)


def cut_off(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def of_another_seed(folder: Path) -> None:
    command = ["generate", "--model", "tiny", "--prompt", "a red circle", *SMALL_VIDEO, "--seconds", "0.75"]
    named = ["--output", f"{folder / left.VIDEO}", "--save-state", f"{folder / left.STATE}", "--seed", "5"]
    assert main([*command, *named, "--latents", f"{folder / left.LATENTS}"]) == 0


ENDED = left.End(0, "block 3 of 3", 1.0)
KILLED = left.End(-signal.SIGKILL, "block 3 of 3", 1.0)


@pytest.mark.parametrize(
    ("end", "spoil", "problems"),
    [
        (ENDED, lambda folder: None, []),
        (KILLED, lambda folder: None, []),
        (left.End(-signal.SIGTERM, "", 1.0), lambda folder: None, []),
        (left.End(-signal.SIGSEGV, "", 1.0), lambda folder: None, ["it ended with -11: "]),
        (left.End(1, "oh", 1.0), lambda folder: None, ["it failed without a sentence: oh"]),
        (left.End(1, "Traceback\nerror: oh", 1.0), lambda folder: None, ["a traceback: Traceback\nerror: oh"]),
        (ENDED, lambda folder: cut_off(folder / left.VIDEO, 0), ["the video has 0 bytes"]),
        (ENDED, lambda folder: cut_off(folder / left.VIDEO, 0.1), ["the video does not play"]),
        (ENDED, lambda folder: cut_off(folder / left.STATE, 0.5), ["the state cannot be read: "]),
        (ENDED, lambda folder: cut_off(folder / left.LATENTS, 0.5), [f"{left.LATENTS} is damaged"]),
        (ENDED, lambda folder: cut_off(folder / left.REPORT, 0.5), [f"{left.REPORT} is damaged"]),
        (ENDED, lambda folder: (folder / f"x{PART}").touch(), [f"x{PART} is left"]),
        (KILLED, lambda folder: (folder / f"x{PART}").touch(), []),
        (ENDED, lambda folder: (folder / left.VIDEO).rename(folder / f"{left.VIDEO}{PART}"), []),
        (ENDED, lambda folder: shutil.copy(folder / left.VIDEO, folder / f"{left.VIDEO}{PART}"),
         [f"{left.VIDEO}{PART} is left"]),
        (ENDED, of_another_seed, ["the state's latents differ", "the video's frames differ"]),
        (KILLED, lambda folder: (folder / left.STATE).unlink(), ["3 blocks were told, and the state has 0"]),
        (left.End(left.STOPPED, "block 3 of 3", 1.0), lambda folder: (folder / left.STATE).unlink(),
         ["it was stopped after 0 blocks, and the video has 9 frames"]),
    ],
)  # fmt: skip
def test_what_an_end_must_not_leave_is_found(
    end: left.End,
    spoil: Callable[[Path], None],
    problems: list[str],
    undisturbed: tuple[Path, left.Reference],
    tmp_path: Path,
):
    folder = shutil.copytree(undisturbed[0], tmp_path / "folder")
    spoil(folder)
    found = left.what_is_left(folder, end, undisturbed[1]).problems
    assert len(found) == len(problems), found
    assert all(told.startswith(start) for told, start in zip(found, problems, strict=True)), found


def test_frames_that_a_killed_run_lost_are_counted(undisturbed: tuple[Path, left.Reference], tmp_path: Path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "folder")
    told_more = left.End(-signal.SIGKILL, "block 6 of 9", 1.0)
    found = left.what_is_left(folder, told_more, undisturbed[1])
    assert found.missing_frames == 21 - 9
    assert found.problems == ["6 blocks were told, and the state has 3"]
    (folder / left.VIDEO).write_bytes(left.OLDER)
    found = left.what_is_left(folder, told_more, undisturbed[1])
    assert found.problems[1:] == ["6 blocks were told, and the video has 0 frames"]
    assert left.what_is_left(folder, told_more, undisturbed[1], power=True).problems == found.problems[:1]


def test_what_differs_after_going_on_is_found(undisturbed: tuple[Path, left.Reference], tmp_path: Path):
    folder, reference = shutil.copytree(undisturbed[0], tmp_path / "folder"), undisturbed[1]
    assert left.after_going_on(folder, ENDED, reference) == []
    assert left.after_going_on(folder, left.End(1, "oh", 1.0), reference) == ["the same command ended with 1: oh"]
    of_another_seed(folder)
    (folder / "more").touch()
    assert left.after_going_on(folder, ENDED, reference) == [
        "the video differs after going on",
        "the latents differ after going on",
        "after going on there are ['more']",
    ]


# --- damaged files, absurd values, memory -----------------------------------------------------------------------

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
