"""The ways through the loop over blocks, what each waits for, and what the CPU gives: the references that a wrong
placement (`test_mutations.py`) must not touch, each made once."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from device_videos import dual, toy_video
from fake_device import on_host
from torch import Tensor
from toy_videos import CONFIG, FIRST_THAT_CHOOSES, FRAMES, NO_MIDS, SHAPE, SIZE, latents_of, prompt
from wan_reference import TEXT_DIM, TEXT_LENGTH, seeded

from packforcing.config import CacheConfig
from packforcing.files.state_file import StatePrompt, VideoState
from packforcing.generate.long_video import Block
from packforcing.generate.record import CacheRecord
from packforcing.generate.sampling import Sampling
from packforcing.generate.start import pixel_start, started_blocks
from packforcing.generate.state import state_of
from packforcing.generate.story import Story, Stretch
from packforcing.model.causal_wan import CausalWan
from packforcing.model.vae import init_vae

BLOCKS = 7


def story(switch: str) -> Any:
    def of(wan: CausalWan) -> Story:
        stretches = (Stretch(start, prompt(wan, seed=20 + start), str(start)) for start in (0, 4, 6))
        return Story(tuple(stretches), switch)

    return of


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": {"overlap": True},
    "archive on the host": {"config": replace(CONFIG, archive_device="host")},
    "archive on both": {"config": replace(CONFIG, archive_budget_gb=5e-5), "overlap": True},
    "fp8": {"config": replace(CONFIG, kv_dtype="fp8_e4m3")},
    "fp8, overlap": {"config": replace(CONFIG, kv_dtype="fp8_e4m3", archive_device="host"), "overlap": True},
    "dual": {"compressor": dual},
    "dual, overlap": {"compressor": dual, "overlap": True},
    "two at once": {"batch": 2},
    "two recent": {"config": replace(CONFIG, recent_frames=2 * FRAMES)},
    "euler, a frame at a time": {"sampling": Sampling(seed=3, steps=2, update="euler"), "decode_frames": 1},
    "refresh": {"text": story("refresh")},
    "blend, overlap": {"text": story("blend"), "overlap": True},
    "by recency, own positions": {"config": replace(CONFIG, selection="recency", rope_adjustment=False)},
    "no mids, no vae": {"config": NO_MIDS, "vae": lambda device: None, "compressor": lambda device: None},
}


def choices(config: CacheConfig) -> int:
    """How often the host waits for a choice of mid blocks, in a block that chooses: once a layer."""
    return SHAPE.layers if config.top_k and config.selection == "affinity" else 0


def expected(case: str, index: int) -> Counter[str]:
    """What the host waits for in a block, in the loop's own thread."""
    given = CASES[case]
    config, decoded = given.get("config", CONFIG), "no vae" not in case
    found = Counter({"finite": 1})
    if decoded and not given.get("overlap"):
        found["decode"] = 1
    if index >= FIRST_THAT_CHOOSES + config.recent_blocks - CONFIG.recent_blocks:
        found["choice"] = choices(config)
    if case == "refresh" and index == 6:  # block 5 chooses again, under the new prompt
        found["choice"] += choices(config)
    if index == 1 and config.kv_dtype != "model":
        found["rounding"] = 1  # of the first block, in its clean pass
    return +found


@functools.cache
def on_cpu(case: str) -> tuple[list[Block], CacheRecord]:
    """A case's blocks and record."""
    video = toy_video("cpu", **CASES[case])
    return list(video.blocks(BLOCKS)), video.record


def told(wan: CausalWan, *starts: int) -> tuple[StatePrompt, ...]:
    return tuple(StatePrompt(s, f"from {s}", seeded(1, TEXT_LENGTH, TEXT_DIM, seed=2 + s)) for s in starts)


@functools.cache
def state_on_cpu() -> tuple[list[Block], VideoState]:
    """The plain case's blocks, and the state after six of them."""
    video = toy_video("cpu")
    made = list(video.blocks(BLOCKS))
    return made, state_of(video, told(video.wan, 0), latents_of(made[:6]))


def started(device: str, overlap: bool) -> Tensor:
    """What the real VAE makes of two blocks after a start image, which it encodes as well."""
    frames = torch.rand(1, 40, 70, 3, generator=torch.Generator().manual_seed(0))
    start = pixel_start("The start image", lambda: iter(frames), 1, SIZE)
    video = toy_video(device, overlap=overlap, vae=lambda device: init_vae(4, seed=1).to(device))
    return torch.cat([on_host(block.decoded) for block in started_blocks(video, start, 2)], dim=2)


@functools.cache
def started_on_cpu() -> Tensor:
    return started("cpu", overlap=False)
