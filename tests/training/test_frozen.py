"""Training the HR branch alone, for a transformer that stays as it is."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_clips import ToyClips, one_caption

from packforcing.cli.main import main
from packforcing.demo.models import WEIGHTS
from packforcing.files.compressor_file import load_compressor
from packforcing.model.compressor import HRBranch
from packforcing.model.wan_modules import WanSizes, build_wan_modules
from packforcing.training import base, base_command
from packforcing.training.clips import ClipSet
from packforcing.training.histories import HISTORIES
from packforcing.training.run_config import MicroBatch

SIZES = WanSizes(dim=64, ffn_dim=96, layers=2, heads=2)


def trainer(frozen: bool) -> base.BaseTrainer:
    torch.manual_seed(0)
    modules = build_wan_modules(SIZES, base_command.initial_state_dict(SIZES, seed=0))
    modules.head.head.weight.data.normal_(std=0.1)  # or its velocities, and all gradients, would be zero
    histories = [replace(each, share=each.share if each.top_k else 0.0) for each in HISTORIES]
    clips = ToyClips(ClipSet(20, size=64), one_caption("a red circle on a blue background", blocks=5), seed=1)
    data = base.TrainingClips(clips, held_out=4)
    options = base.BaseOptions(dual_share=1.0)
    return base.BaseTrainer(modules, data, options, histories, hr=HRBranch((16, 4, 4, 4, 4, 64), 2), frozen=frozen)


def stepped(made: base.BaseTrainer) -> None:
    for step in range(2):
        batch = made.batch(MicroBatch(step, "base", range(1), 0))
        assert batch.dual
        assert batch.history.top_k
        made.losses("base", batch)["loss"].backward()
        made.learners["base"].update(rate=1.0, clip=1.0)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_branch_is_trained_and_the_transformer_stays_where_it_is_frozen(frozen: bool) -> None:
    made = trainer(frozen)
    weights = made.learners["base"].module.state_dict()  # the tensors themselves
    before = {name: tensor.clone() for name, tensor in weights.items()}
    stepped(made)
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("hr.") for name in moved)
    assert any(name.startswith("wan.") for name in moved) is not frozen


def test_a_frozen_run_goes_on_from_its_state() -> None:
    first, second = trainer(frozen=True), trainer(frozen=True)
    stepped(first)
    second.learners["base"].load(deepcopy(first.learners["base"].state()))
    stepped(first)
    stepped(second)
    found = second.learners["base"].state()["weights"]
    for name, tensor in first.learners["base"].state()["weights"].items():
        assert torch.equal(found[name], tensor), name


def test_another_run_is_told_by_its_description() -> None:
    assert trainer(frozen=True).describe()["frozen"] is True
    assert "frozen" not in trainer(frozen=False).describe()  # as runs wrote it before


def test_what_it_needs_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "base", "--frozen", "--init", "x.safetensors"]) == 1
    assert "give that by --init, and a file for the compressor by --compressor-output" in capsys.readouterr().err
    assert main(["train", "base", "--frozen", "--bidirectional"]) == 1
    assert "leave out --frozen, or --bidirectional" in capsys.readouterr().err


def test_the_command_writes_the_compressor_and_no_transformer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "c.safetensors"
    command = ["train", "base", "--frozen", "--clips", "3", "--held-out", "1", "--size", "64", "--steps", "1"]
    command += ["--batch", "1", "--threads", "1", "--folder", f"{tmp_path}", "--compressor-output", f"{output}"]
    command += ["--init", f"{WEIGHTS / 'demo_transformer.safetensors'}"]
    assert main([*command, "--latent-frames", "12"]) == 0
    assert f'"output": "{output}"' in capsys.readouterr().out
    assert load_compressor(output)[1].base_model == "demo_transformer"
    assert not (tmp_path / "base.safetensors").exists()
    assert main([*command, "--latent-frames", "8"]) == 1
    assert "a clip of 8 latent frames has no block in the middle" in capsys.readouterr().err
