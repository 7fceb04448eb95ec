"""Tensor files that are whole or absent, also after a process that was killed while it wrote one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from packforcing.errors import PackForcingError
from packforcing.files import writing
from packforcing.files.writing import save_tensors


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path: Path) -> None:
    """safetensors writes under a name of its own, which nobody else knows."""
    left = tmp_path / "a.safetensors.temp"
    left.mkdir()
    (left / ".tmp1a2b3c").write_bytes(b"half")
    (tmp_path / "a.safetensors.part").write_bytes(b"half")
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {"said": "yes"}, "state")
    assert names(tmp_path) == {"a.safetensors"}
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.ones(3))


def test_a_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(3)}, None, "state")
    older = path.read_bytes()

    def half(tensors: object, file: Path, metadata: object) -> None:
        (file.parent / ".tmp1a2b3c").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", half)
    with pytest.raises(PackForcingError, match=r"The state cannot be written to .*No space left"):
        save_tensors(path, {"x": torch.zeros(3)}, None, "state")
    assert names(tmp_path) == {"a.safetensors"}
    assert path.read_bytes() == older


def test_the_longest_name_that_is_accepted_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / (250 * "a")
    writing.check_output_file(path, "state")
    save_tensors(path, {"x": torch.ones(3)}, None, "state")
    assert names(tmp_path) == {path.name}


def test_the_question_whether_a_file_can_be_written_makes_none_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may be killed at any call."""
    path = tmp_path / "a.latent"
    monkeypatch.setattr(Path, "unlink", lambda *_: None)
    writing.check_output_file(path, "latents")
    assert names(tmp_path) == {"a.latent.part"}
