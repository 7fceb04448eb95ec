"""The files of a run, when disks are full and folders cannot be written to."""

from __future__ import annotations

import errno
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_state import small_state

from packforcing.files.state_file import load_state
from packforcing.files.state_journal import load_journal
from packforcing.files.video import VideoWriter, probe


@pytest.fixture
def run_files(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    return import_module(f"{pack.__name__}.nodes.run_files")


def make_video(path: Path) -> None:
    with VideoWriter(path, 16, 64, 64) as writer:
        writer.write(torch.zeros(3, 9, 64, 64))


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_run_leaves_when_it_ends_early(run_files: ModuleType, tmp_path: Path):
    files, state = run_files.RunFiles(), small_state()
    make_video(files.video)
    files.journal.begin(state)
    files.keep(state.latents, lambda latents: latents, lambda latents: state)
    names = sorted(path.suffix for path in (tmp_path / "output").rglob("*") if path.is_file())
    assert names == [".latent", ".mp4", ".safetensors"]
    [kept] = (tmp_path / "output" / "packforcing_states").iterdir()
    assert load_state(kept).blocks == 4


def test_a_full_disk_at_cancel_loses_nothing_that_is_written(
    run_files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    files, state = run_files.RunFiles(), small_state()
    make_video(files.video)
    files.journal.begin(small_state())
    monkeypatch.setattr(run_files, "save_latents", full)
    monkeypatch.setattr(run_files, "save_state", full)
    files.keep(state.latents, lambda latents: latents, lambda latents: state)
    assert probe(files.video).frames == 9
    assert files.video.parent == tmp_path / "output" / "packforcing_interrupted"
    assert load_journal(files.journal.path).blocks == 4
    assert caplog.text.count("No space left on device") == 2


def test_a_run_without_an_output_folder_works_in_the_temporary_one(
    run_files: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "output").write_text("no folder")
    files = run_files.RunFiles()
    assert files.journal is None
    assert files.video.parent == tmp_path / "temp"
    assert "should the server be killed, this run is lost" in caplog.text
    make_video(files.video)
    assert probe(files.finished()).frames == 9


def test_a_finished_run_leaves_nothing_and_its_video_goes_with_the_result(run_files: ModuleType, tmp_path: Path):
    files, state = run_files.RunFiles(), small_state()
    make_video(files.video)
    files.journal.begin(state)
    path = files.finished()
    assert [file.name for file in (tmp_path / "output").rglob("*") if file.is_file()] == []
    video = run_files.TemporaryVideo(path)
    content = path.read_bytes()
    path.unlink()
    assert video.get_dimensions() == (64, 64)
    assert path.read_bytes() == content
    path.unlink()
    video.save_to(str(tmp_path / "saved.mp4"))
    assert probe(tmp_path / "saved.mp4").frames == 9
    del video
    assert not path.exists()
