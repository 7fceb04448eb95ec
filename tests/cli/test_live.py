"""`generate --live`: lines from a pipe rule from the next block on, and the story that comes of them makes it again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_options import SMALL_VIDEO

from packforcing.cli.live import hear
from packforcing.cli.main import main
from packforcing.generate.live import Mailbox

REPO = Path(__file__).resolve().parents[2]
GENERATE = ["generate", *SMALL_VIDEO, "--seconds", "4", "--prompt-switch", "refresh", "--json"]
FILES = ["--output", "out.mp4", "--report", "report.json", "--save-state", "state.safetensors"]


def test_lines_from_a_pipe_steer_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The pipe stays open to the end: a thread that waits for a line must not keep the program from ending."""
    program = subprocess.Popen(
        [sys.executable, "-m", "packforcing", *GENERATE, *FILES, "--prompt", "a red circle", "--live"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPO), "PATH": "", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdin is not None
    assert program.stderr is not None
    assert program.stdout is not None
    seen = b""
    while b"block 2 of" not in seen:
        byte = program.stderr.read(1)
        assert byte, seen.decode()
        seen += byte
    program.stdin.write(b"\n\xff\n  a  blue square\n")
    program.stdin.flush()
    rest = program.stderr.read().decode()
    assert program.wait(timeout=60) == 0, rest
    assert "not taken: the line is no text in UTF-8" in rest
    summary = json.loads(program.stdout.read())
    record = json.loads((tmp_path / "report.json").read_text())
    [first, said] = record["prompts"]
    assert (first, said["prompt"]) == ({"start": 0, "prompt": "a red circle"}, "a blue square")
    assert f"from block {said['start']} at " in rest
    assert [block["block"] for block in record["blocks"] if "refresh" in block["seconds"]] == [said["start"]]
    assert summary["story"] == record["summary"]["story"]

    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text(summary["story"])
    files = ["--output", "again.mp4", "--save-state", "again.safetensors"]
    assert main([*GENERATE, *files, "--story", "story.txt"]) == 0
    live, told = load_file("state.safetensors"), load_file("again.safetensors")
    assert live.keys() == told.keys()
    assert all(torch.equal(live[name], told[name]) for name in live)


def test_of_several_lines_the_last_waits(capsys: pytest.CaptureFixture[str]):
    box = Mailbox()
    hear([b"a cat\n", b"it rains\r\n", b"  \n", b"\xff\n", b"a" * 20_000], box)
    assert box.take() == "it rains"
    told = capsys.readouterr().err
    assert told.count("not taken: ") == 2
    assert "20,000 letters" in told


def test_live_needs_the_text_encoder_of_a_real_model(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    real = ["--model", "wan.safetensors", "--vae", "vae.safetensors", "--text-embedding", "a.safetensors", "--live"]
    assert main(["generate", *SMALL_VIDEO, *real, "--output", str(tmp_path / "out.mp4")]) == 1
    assert "error: --live encodes what is typed, and for that needs the text encoder" in capsys.readouterr().err


def test_live_needs_somebody_who_types(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", *SMALL_VIDEO, "--prompt", "a", "--live"]) == 1
    assert "error: --live reads from standard input, but it is closed" in capsys.readouterr().err
