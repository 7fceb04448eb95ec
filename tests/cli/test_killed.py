"""python -m packforcing generate, killed: what is left, and how the same command goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_options import SMALL_VIDEO

from packforcing.cli import generate
from packforcing.cli.main import main
from packforcing.files.latent_file import load_latents, save_latents
from packforcing.files.state_journal import read_state
from packforcing.files.video import probe
from packforcing.files.weights import read_state_dict

COMMAND = [sys.executable, "-m", "packforcing", "generate", "--model", "tiny", "--prompt", "a red circle", *SMALL_VIDEO]
KEPT = ["--save-state", "s.safetensors", "--continue-from", "s.safetensors", "--latents", "l.latent"]


def started(folder: Path, *options: str, **streams: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([*COMMAND, *options], cwd=folder, env=environment, text=True, **streams)


def kill_after(process: subprocess.Popen[str], block: int) -> int:
    """Kills a run as soon as it tells that this block is made; returns how many blocks it has told."""
    assert process.stderr is not None
    told = ""
    while f"block {block} of" not in told:
        character = process.stderr.read(1)
        assert character, told
        told += character
    process.send_signal(signal.SIGKILL)
    told += process.stderr.read()
    assert process.wait() == -signal.SIGKILL
    return told.count("block ")


def test_a_killed_command_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same command twice, of which the first is killed; against one that nothing happened to."""
    monkeypatch.chdir(tmp_path)
    made = kill_after(started(tmp_path, *KEPT, "--seconds", "600", stderr=subprocess.PIPE), 6)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.mp4", "s.safetensors.unfinished"]
    state = read_state("s.safetensors.unfinished")
    assert made <= state.blocks <= made + 1
    waiting = 4 + 5  # in the encoder, and for the fragment's end
    assert probe("out.mp4").frames >= 4 * (made - 1) - 3 - waiting
    length = ["--seconds", str((state.blocks + 2) / 4)]
    assert main([*COMMAND[3:], *KEPT, *length]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["l.latent", "out.mp4", "s.safetensors"]
    assert read_state("s.safetensors").blocks == state.blocks + 2
    assert main([*COMMAND[3:], *length, "--latents", "whole.latent", "--output", "whole.mp4"]) == 0
    assert torch.equal(load_latents("l.latent"), load_latents("whole.latent"))
    assert Path("out.mp4").read_bytes() == Path("whole.mp4").read_bytes()


def test_the_same_command_once_more_makes_the_same_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that is killed at its very end may have its whole state, and lack its last frames."""
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND[3:], *KEPT, "--seconds", "1", "--report", "r.json"]
    assert main(command) == 0
    kept, state = {name: Path(name).read_bytes() for name in ("out.mp4", "l.latent")}, content("s.safetensors")
    Path("out.mp4").write_bytes(kept["out.mp4"][:5000])
    Path("l.latent").unlink()
    assert main(command) == 0
    assert {name: Path(name).read_bytes() for name in kept} == kept
    assert content("s.safetensors") == state


def content(path: str) -> tuple[dict[str, str], dict[str, bytes]]:
    """What a safetensors file says and holds: its metadata is written in any order."""
    tensors, metadata = read_state_dict(path)
    return metadata, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_last_files_are_written_leaves_them_whole(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    def signalled(path: str, latents: torch.Tensor) -> None:
        os.kill(os.getpid(), number)
        save_latents(path, latents)

    monkeypatch.setattr(generate, "save_latents", signalled)
    assert main([*COMMAND[3:], *KEPT, "--seconds", "1"]) == 0
    assert probe("out.mp4").frames == 13
    assert sorted(file.name for file in tmp_path.iterdir()) == ["l.latent", "out.mp4", "s.safetensors"]


def test_a_run_whose_readers_are_gone_makes_its_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), open(writing, "w") as gone, monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "stdout", gone)
        patch.setattr(sys, "stderr", gone)
        assert main([*COMMAND[3:], "--seconds", "1"]) == 0
    assert probe(tmp_path / "out.mp4").frames == 13
