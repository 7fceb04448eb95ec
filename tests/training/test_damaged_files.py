"""Prepared files and checkpoints that are damaged: each is one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from packforcing.config import CacheConfig, FrameSize
from packforcing.errors import PackForcingError
from packforcing.generate.sampling import Sampling
from packforcing.training.checkpoints import FORMAT, Checkpoints
from packforcing.training.clips import ClipSet, LatentClips, read_shard, shard_path
from packforcing.training.learner import Learner
from packforcing.training.log import read_log
from packforcing.training.loop import _resume
from packforcing.training.rollouts import Rollouts, RolloutShape, read_rollout, rollout_path


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), "text", {}])
def test_a_checkpoint_that_holds_something_else(tmp_path: Path, content: object):
    checkpoints = Checkpoints(tmp_path)
    torch.save(content, tmp_path / "step-00000001.pt")
    with pytest.raises(PackForcingError, match="is not a checkpoint of this version's trainers"):
        checkpoints.load_newest()


@pytest.mark.parametrize("learners", [None, {}, {"base": 5}, {"base": {"weights": {}}}])
def test_a_checkpoint_whose_learners_are_damaged(tmp_path: Path, learners: object):
    layer = torch.nn.Linear(2, 2)
    trainer = SimpleNamespace(learners={"base": Learner(layer, torch.optim.SGD(layer.parameters(), lr=1.0))})
    checkpoints = Checkpoints(tmp_path)
    for identity in ({"steps": 1}, [1], "x"):
        state = {"format": FORMAT, "identity": identity, "minutes": 0.0, "learners": learners, "step": 1}
        checkpoints.save(1, state)
        with pytest.raises(
            PackForcingError, match=r"step-00000001\.pt is damaged or of another trainer \(.*\); delete"
        ):
            _resume(trainer, checkpoints, {"steps": 1})


def test_a_log_with_lines_that_are_no_entries(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    good = '{"step": 1, "loss": 0.5}'
    bad = ["", "5", "[" * 100_000, '{"loss": 1}', '{"step": "1"}', '{"step": 2, "loss": [1]}', '{"step": 1, "lo']
    path.write_bytes("\n".join([*bad, good, *bad]).encode() + b"\xff\n")
    assert read_log(path) == [{"step": 1, "loss": 0.5}]


def test_clips_and_rollouts_of_other_shapes(tmp_path: Path):
    clips = ClipSet(2, latent_frames=4, size=16)
    path = shard_path(tmp_path, clips, 0)
    tensors = {"latents": torch.zeros(2, 16, 4, 2, 2), "reduced": torch.zeros(2, 1, 16, 2, 1, 1)}
    save_file(tensors, path, metadata={"captions": '["a cat", "a dog"]'})
    assert len(LatentClips(tmp_path, clips)) == 2
    for changed, captions in (
        ({"latents": torch.zeros(2, 16, 4, 2)}, '["a", "b"]'),
        ({"latents": torch.full((2, 16, 4, 2, 2), torch.nan)}, '["a", "b"]'),
        ({"reduced": torch.zeros(2, 3)}, '["a", "b"]'),
        ({}, '["a"]'),
        ({}, "5"),
        ({}, '["a", {"short": ["b"]}]'),
        ({}, '["a", {"short": ["b"], "long": ["c", "d"]}]'),
    ):
        save_file({**tensors, **changed}, path, metadata={"captions": captions})
        with pytest.raises(PackForcingError, match="are not those that are wanted, or damaged: delete the file"):
            LatentClips(tmp_path, clips)
    shape = RolloutShape(1, FrameSize(64, 64), CacheConfig(), Sampling())
    save_file(
        {"latents": torch.zeros(16, 4, 8, 8), "reduced": torch.zeros(2), "context": torch.zeros(2)},
        rollout_path(tmp_path, 0),
    )
    with pytest.raises(PackForcingError, match=r"rollout-00000\.safetensors is damaged: delete it"):
        Rollouts(tmp_path, 1, shape)


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
