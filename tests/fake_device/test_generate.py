"""The loop over blocks on a CUDA device: nothing lies on the wrong one, the video is the CPU's to the bit, and the host
waits no more often than docs/performance.md says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from device_cases import BLOCKS, CASES, expected, on_cpu, started, started_on_cpu, state_on_cpu, told
from device_videos import toy_video, with_waits
from fake_device import FakeDevice, on_host
from toy_videos import NO_MIDS, SHAPE, latents_of, prompt

from packforcing.generate.start import started_blocks
from packforcing.generate.state import selected_of, state_of, state_start


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


def test_a_state_goes_on_without_waiting():
    """A block of a state is sent and passed through the model; no choice is read back."""
    made, state = state_on_cpu()
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
    made = latents_of(on_cpu("plain")[0][:6])[:, :, :-1]
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
    with FakeDevice():
        found = started("cuda", overlap=True)
    torch.testing.assert_close(found, started_on_cpu(), rtol=0, atol=1e-3)


def test_frames_may_be_dropped_while_the_device_reads_them():
    """They were made in another stream, whose allocator must not give their memory away too soon."""
    with FakeDevice():
        video = toy_video("cuda", overlap=True, config=NO_MIDS, compressor=lambda device: None)
        for block in video.blocks(3):
            block.decoded.mean()
            del block
