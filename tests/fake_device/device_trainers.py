"""Small trainers on any device, and what a step of each gives on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest.mock import patch

import torch
from device_videos import DeviceVAE, toy_wan
from toy_clips import ToyClips, one_caption
from toy_videos import CONFIG, SAMPLING, SIZE, SIZES, weights
from wan_reference import DIM, FFN_DIM, HEADS, TEXT_DIM, TEXT_LENGTH, seeded

from packforcing.config import Layout
from packforcing.model.compressor import HRBranch
from packforcing.model.wan_modules import WanModules, WanSizes, build_wan_modules
from packforcing.training import base, rollouts
from packforcing.training import vae as train_vae
from packforcing.training.clips import ClipSet
from packforcing.training.compressor import CompressorOptions, CompressorTrainer
from packforcing.training.forcing import ForcingTrainer
from packforcing.training.forcing_batch import ForcingOptions, Prompts
from packforcing.training.histories import History
from packforcing.training.loop import Trainer, _one_step
from packforcing.training.networks import ForcingModels, Placement
from packforcing.training.run_config import RunConfig

LAYOUT = Layout(CONFIG, SIZE, temporal_stride=1)
BLOCKS = 5


def modules() -> WanModules:
    return build_wan_modules(SIZES, weights())


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


def base_trainer(device: str) -> Trainer:
    sizes = WanSizes(dim=DIM, ffn_dim=FFN_DIM, layers=2, heads=HEADS)
    torch.manual_seed(5)
    tree = WanModules(sizes)
    histories = (History(sink_frames=0, recent_frames=4, top_k=16, share=1.0),)
    hr = HRBranch([16, 4, 4, 4, 4, DIM], 2)
    words = one_caption("a red circle swings on a blue background", blocks=3)
    clips = ToyClips(ClipSet(20, latent_frames=3 * 4, size=64), words, seed=4)
    data = base.TrainingClips(clips, held_out=2)
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
VAE_CLIPS = (train_vae.ClipShape(frames=5, crop=16, size=64, clips=1),)


def one_step(trainer: Trainer) -> dict[str, float]:
    """What the trainer logs of its first step."""
    with patch.object(train_vae, "CLIPS", VAE_CLIPS):
        return _one_step(trainer, RunConfig("unused", steps=2, micro_batch=2), 0)


@functools.cache
def step_on_cpu(part: str) -> dict[str, float]:
    return one_step(TRAINERS[part]("cpu"))
