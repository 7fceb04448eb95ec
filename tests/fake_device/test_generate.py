"""The loop over blocks on a CUDA device: nothing lies on the wrong one, the video is the CPU's to the bit, and the host
waits no more often than docs/performance.md says."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_videos import dual, toy_video, with_waits
from fake_device import FakeDevice, on_host
from toy_videos import CONFIG, FIRST_THAT_CHOOSES, FRAMES, NO_MIDS, SHAPE, SIZE, latents_of, prompt
from wan_reference import TEXT_DIM, TEXT_LENGTH, seeded

from packforcing.config import CacheConfig
from packforcing.files.state_file import StatePrompt
from packforcing.generate.long_video import Block
from packforcing.generate.record import CacheRecord
from packforcing.generate.sampling import Sampling
from packforcing.generate.start import pixel_start, started_blocks
from packforcing.generate.state import selected_of, state_of, state_start
from packforcing.generate.story import Story, Stretch
from packforcing.model.causal_wan import CausalWan
from packforcing.model.vae import init_vae

BLOCKS = 7


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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
    """A case's blocks and record; made once, since `test_mutations.py` asks for the same ones again."""
    video = toy_video("cpu", **CASES[case])
    return list(video.blocks(BLOCKS)), video.record


@pytest.mark.parametrize("case", CASES)
def test_a_video_on_the_device_is_that_of_the_cpu(case: str):
    wanted, wanted_record = on_cpu(case)
    waits: dict[int, Counter[str]] = {}
    with FakeDevice() as fake:
        video = toy_video("cuda", **CASES[case])
        found = []
        for block, waited in with_waits(fake, video.blocks(BLOCKS)):
            found.append(block)
            waits[block.index] = waited
        assert all(block.latents.is_cuda for block in found)
        assert video.record.device == "cuda"
    for a, b, record, other in zip(found, wanted, video.record.blocks, wanted_record.blocks, strict=True):
        assert torch.equal(on_host(a.latents), b.latents), f"latents of block {a.index}"
        assert (a.frames is None) == (b.frames is None)
        assert a.frames is None or torch.equal(on_host(a.frames), b.frames), f"frames of block {a.index}"
        assert record.selected == other.selected
        assert record.bytes == other.bytes
    if CASES[case].get("overlap"):  # a block comes when the next one is made, and waits are counted there
        assert sum(waits.values(), Counter()) == sum((expected(case, i) for i in range(BLOCKS)), Counter())
        assert sum(wait.beside for wait in fake.waits) == BLOCKS, "the side stream: once a block"
    else:
        assert waits == {i: expected(case, i) for i in range(BLOCKS)}


def told(wan: CausalWan, *starts: int) -> tuple[StatePrompt, ...]:
    return tuple(StatePrompt(s, f"from {s}", seeded(1, TEXT_LENGTH, TEXT_DIM, seed=2 + s)) for s in starts)


def test_a_state_goes_on_without_waiting():
    """A block of a state is sent and passed through the model; no choice is read back."""
    first = toy_video("cpu")
    made = list(first.blocks(BLOCKS))
    state = state_of(first, told(first.wan, 0), latents_of(made[:6]))
    with FakeDevice() as fake:
        video = toy_video("cuda")
        found = list(with_waits(fake, started_blocks(video, state_start(state), BLOCKS)))
        again = state_of(video, told(video.wan, 0), latents_of([block for block, _ in found]))
    assert all(torch.equal(on_host(a.latents), b.latents) for (a, _), b in zip(found, made, strict=True))
    assert [waited for _, waited in found[:6]] == [Counter({"finite": 1, "decode": 1})] * 6
    assert selected_of(again)[:6] == selected_of(state)
    assert not again.latents.is_cuda
    assert again.digest == state.digest


def test_latents_are_continued_from_by_choosing_again():
    """Without what was selected, and ending within a block: the rest of it is made on the device."""
    made = latents_of(list(toy_video("cpu").blocks(6)))[:, :, :-1]
    wanted_video = toy_video("cpu")
    wanted = [*wanted_video.replay(made), *wanted_video.blocks(1)]
    with FakeDevice() as fake:
        video = toy_video("cuda")
        waits = {block.index: waited for block, waited in with_waits(fake, video.replay(made))}
        (last,) = video.blocks(1)
    assert torch.equal(on_host(last.latents), wanted[-1].latents)
    assert waits[5] == Counter({"choice": SHAPE.layers, "finite": 1, "decode": 1})


def test_prompts_that_are_said_while_the_video_is_made_are_sent_without_waiting():
    with FakeDevice() as fake:
        video = toy_video("cuda", overlap=True)
        blocks = with_waits(fake, video.blocks(4))
        next(blocks)
        before = len(fake.waits)
        video.tell(prompt(video.wan, seed=9), "another")
        assert all(wait.beside for wait in fake.waits[before:])
        assert len(list(blocks)) == 3


def test_a_start_image_is_encoded_on_the_device():
    """By the real VAE, which decodes as well."""
    frames = torch.rand(1, 40, 70, 3)
    start = pixel_start("The start image", lambda: iter(frames), 1, SIZE)

    def made(device: str, overlap: bool) -> torch.Tensor:
        video = toy_video(device, overlap=overlap, vae=lambda device: init_vae(4, seed=1).to(device))
        return torch.cat([on_host(block.decoded) for block in started_blocks(video, start, 2)], dim=2)

    with FakeDevice():
        found = made("cuda", overlap=True)
    torch.testing.assert_close(found, made("cpu", overlap=False), rtol=0, atol=1e-3)


def test_frames_may_be_dropped_while_the_device_reads_them():
    """They were made in another stream, whose allocator must not give their memory away too soon."""
    with FakeDevice():
        video = toy_video("cuda", overlap=True, config=NO_MIDS, compressor=lambda device: None)
        for block in video.blocks(3):
            block.decoded.mean()
            del block
