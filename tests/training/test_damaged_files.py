"""Prepared files and checkpoints that are damaged: each is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from packforcing.errors import PackForcingError
from packforcing.training.checkpoints import Checkpoints
from packforcing.training.clips import read_shard
from packforcing.training.rollouts import read_rollout


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), "text", {}])
def test_a_checkpoint_that_holds_something_else(tmp_path: Path, content: object):
    checkpoints = Checkpoints(tmp_path)
    torch.save(content, tmp_path / "step-00000001.pt")
    with pytest.raises(PackForcingError, match="is not a checkpoint of this version's trainers"):
        checkpoints.load_newest()


def test_clips_that_are_cut_or_name_no_captions(tmp_path: Path):
    path = tmp_path / "clips.safetensors"
    tensors = {"latents": torch.zeros(2, 3), "reduced": torch.zeros(2, 3)}
    for captions in (None, "[", "[" * 100_000):
        save_file(tensors, path, metadata=None if captions is None else {"captions": captions})
        with pytest.raises(PackForcingError, match=r"clips\.safetensors are damaged \(.*\): delete the file"):
            read_shard(path)
    save_file(tensors, path, metadata={"captions": '["a cat"]', "vae": "1"})
    assert read_shard(path)[1] == {"captions": ["a cat"], "vae": "1"}
    whole = path.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PackForcingError, match="are damaged"):
            read_shard(path)


def test_a_rollout_that_is_cut_or_lacks_a_tensor(tmp_path: Path):
    path = tmp_path / "rollout.safetensors"
    save_file({"latents": torch.zeros(2), "reduced": torch.zeros(2)}, path)
    with pytest.raises(PackForcingError, match=r"rollout\.safetensors is damaged \(.*context.*\): delete it"):
        read_rollout(path)
    save_file({name: torch.zeros(2) for name in ("latents", "reduced", "context")}, path)
    whole = path.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PackForcingError, match="is damaged"):
            read_rollout(path)
