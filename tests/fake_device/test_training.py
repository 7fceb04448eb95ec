"""A step of each trainer on a CUDA device: nothing lies on the wrong one, and the losses are the CPU's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from device_videos import DeviceVAE, toy_wan
from fake_device import FakeDevice
from toy_videos import CONFIG, SAMPLING, SIZE, weights
from wan_reference import DIM, FFN_DIM, HEADS, TEXT_DIM, TEXT_LENGTH, seeded

from packforcing.config import Layout
from packforcing.model.compressor import HRBranch
from packforcing.model.wan_modules import WanModules, WanSizes, build_wan_modules
from packforcing.training import base, clips, rollouts
from packforcing.training import vae as train_vae
from packforcing.training.compressor import CompressorOptions, CompressorTrainer
from packforcing.training.forcing import ForcingTrainer
from packforcing.training.forcing_batch import ForcingOptions, Prompts
from packforcing.training.histories import History
from packforcing.training.loop import Trainer, _one_step
from packforcing.training.networks import ForcingModels, Placement
from packforcing.training.run_config import RunConfig

LAYOUT = Layout(CONFIG, SIZE, temporal_stride=1)
BLOCKS = 5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def modules() -> WanModules:
    return build_wan_modules(WanSizes(dim=DIM, ffn_dim=FFN_DIM, layers=2, heads=HEADS, text_dim=TEXT_DIM), weights())


def branch() -> HRBranch:
    torch.manual_seed(3)
    return HRBranch([16, 4, 4, 4, 4, DIM], 1)


def compressor_trainer(device: str) -> Trainer:
    """With two rollouts that were made on the device."""
    wan, vae = toy_wan(device), DeviceVAE().to(device)
    shape = rollouts.RolloutShape(BLOCKS, SIZE, CONFIG, SAMPLING, temporal_stride=1)
    made = []
    for seed in range(2):
        tensors = rollouts.make(wan, vae, seeded(TEXT_LENGTH, TEXT_DIM, seed=seed), shape, seed)
        assert not any(tensor.is_cuda for tensor in tensors.values())
        made.append(rollouts.Rollout(*(tensors[name].float() for name in ("latents", "reduced", "context"))))
    return CompressorTrainer(wan, branch(), made, LAYOUT, CompressorOptions(held_out=1))


def forcing_trainer(device: str) -> Trainer:
    prompts = Prompts(lambda seed: seeded(TEXT_LENGTH, TEXT_DIM, seed=seed % 100), seeded(3, TEXT_DIM, seed=7))
    options = ForcingOptions(blocks=BLOCKS, gradient_blocks=2, critic_turns=1, steps=2)
    models = ForcingModels(modules(), branch(), modules(), modules(), DeviceVAE().to(device))
    return ForcingTrainer(models, LAYOUT, prompts, options, Placement(torch.device(device), recompute=True))


class Clips(Sequence[Any]):
    """Twenty clips of three blocks, in place of `LatentClips`."""

    def __init__(self) -> None:
        words = tuple(3 * ["a red circle swings on a blue background"])
        self.words, self.clips = clips.ClipCaptions(words, words), clips.ClipSet(20, latent_frames=3 * 4, size=64)
        self.captions, self.latents = 20 * [self.words], seeded(20, 16, 12, 8, 8, seed=4)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> Any:
        blocks = self.latents[number].unflatten(1, (3, 4)).transpose(0, 1)
        return self.latents[number], blocks[:, :, ::2, ::4, ::4], self.words


def base_trainer(device: str) -> Trainer:
    sizes = WanSizes(dim=DIM, ffn_dim=FFN_DIM, layers=2, heads=HEADS)
    torch.manual_seed(5)
    tree = WanModules(sizes)
    histories = (History(sink_frames=0, recent_frames=4, top_k=16, share=1.0),)
    hr = HRBranch([16, 4, 4, 4, 4, DIM], 2)
    data = base.TrainingClips(Clips(), held_out=2)
    trainer = base.BaseTrainer(tree, data, base.BaseOptions(), histories, 0, device, hr=hr)
    for group in trainer.learners["base"].optimizer.parts[0].param_groups:
        group["ns_steps"] = 1  # of Muon; it multiplies in bfloat16, which takes a CPU long
    return trainer


def vae_trainer(device: str) -> Trainer:
    return train_vae.VAETrainer(dim=8, image_steps=0, device=device, held_out=1)


TRAINERS: dict[str, Callable[[str], Trainer]] = {
    "base": base_trainer,
    "compressor": compressor_trainer,
    "forcing": forcing_trainer,
    "vae": vae_trainer,
}
# Where a batch is made on the host and sent.
BATCH = {
    f"packforcing/training/{place}"
    for place in (
        "base_samples.py:stacked",
        "prompts.py:<genexpr>",
        "compressor.py:_batch",
        "forcing_batch.py:draw_batch",
        "vae.py:<genexpr>",
    )
}
# Beside that the host waits for two numbers a turn: the gradient's norm, and the mean losses.
READ_BACK = {"packforcing/training/learner.py:clip_gradients", "packforcing/training/loop.py:_one_turn"}


@pytest.mark.parametrize("part", TRAINERS)
def test_a_step_on_the_device_is_that_of_the_cpu(part: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_vae, "CLIPS", (train_vae.ClipShape(frames=5, crop=16, size=64, clips=1),))
    config = RunConfig("unused", steps=2, micro_batch=2)
    wanted = _one_step(TRAINERS[part]("cpu"), config, 0)
    with FakeDevice() as fake:
        trainer = TRAINERS[part]("cuda")
        before = len(fake.waits)
        found = _one_step(trainer, config, 0)
        waits = Counter(wait.where for wait in fake.waits[before:])
        for learner in trainer.learners.values():
            learner.state()
    assert found == pytest.approx(wanted, rel=2e-3)
    sent = {wait.where for wait in fake.waits[before:] if "to the device" in wait.what}
    assert sent <= BATCH
    assert set(waits) - sent == READ_BACK
    assert all(waits[where] == len(trainer.turns(0)) for where in READ_BACK)
