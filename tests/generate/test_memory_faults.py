"""Runs in which memory runs out, at each stage: they go on, to the bit, or end with what is to be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from failing_memory import FailingMemory, device_error, held_bytes, host_error
from torch import nn
from toy_videos import CONFIG, SAMPLING, SIZE, assert_same, collect

from packforcing.config import Layout
from packforcing.devices import is_out_of_memory
from packforcing.files.state_file import StatePrompt, VideoState
from packforcing.generate import memory_faults
from packforcing.generate.long_video import Block, LongVideo, VideoModels, VideoSettings
from packforcing.generate.memory_faults import MemoryRanOutError, begun_video, lasting_blocks
from packforcing.generate.prepare import DeviceMemory, PlannedRun, memory_demand
from packforcing.generate.start import started_blocks
from packforcing.generate.state import state_of, state_start
from packforcing.model.compressor import Compressor
from packforcing.model.vae import DECODER_REACH, StreamingDecoder, init_vae

BLOCKS = 7
EVERY = 397  # allocations from one fault to the next: more than the longest stage takes, so that each can pass


@pytest.fixture
def tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go on after every fault without a change."""
    monkeypatch.setattr(memory_faults, "smaller", lambda video, on_device: "it tries again")


@pytest.mark.usefixtures("tries_again")
@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_dtype": "fp8_e4m3", "sink_frames": 0, "archive_device": "disk", "recent_frames": 4}],
    ids=str,
)
def test_whatever_allocation_fails_the_video_is_the_same(make, changes) -> None:
    config = replace(CONFIG, **changes)
    whole = make(config)
    expected = list(whole.blocks(BLOCKS))
    faults = 0
    for first in (61, 249):
        video, found = make(config), []
        with FailingMemory(range(first, 10**6, EVERY)):
            collect(found, lasting_blocks(video, None, BLOCKS, say=lambda sentence: None))
        assert_same(found, expected)
        assert same_record(video, whole)
        faults += len(video.record.notes)
    assert faults > 2 * 6


def state_so_far(video: LongVideo, blocks: list[Block]) -> VideoState:
    latents = torch.cat([block.latents for block in blocks], dim=2)
    return state_of(video, [StatePrompt(0, "", torch.zeros(1, 1, 4))], latents)


def same_record(one: LongVideo, other: LongVideo) -> bool:
    """Whether two caches have done the same, apart from when and how often."""
    assert one.record.rounding_error == other.record.rounding_error
    assert len(one.cache.archive) == len(other.cache.archive)
    return all(
        (a.selected, a.mid_slots_written, a.recent_rotated, a.bytes)
        == (b.selected, b.mid_slots_written, b.recent_rotated, b.bytes)
        for a, b in zip(one.record.blocks, other.record.blocks, strict=True)
    )


@pytest.mark.usefixtures("tries_again")
def test_a_run_that_goes_on_from_a_state_survives_faults_too(make) -> None:
    whole = make()
    expected = list(whole.blocks(BLOCKS))
    state = state_so_far(whole, expected[:6])
    start = state_start(state)
    for overlap in (False, True):
        video, found = make(overlap=overlap), []
        with FailingMemory(range(100, 10**6, EVERY)):
            collect(found, lasting_blocks(video, start, BLOCKS, say=lambda sentence: None))
        assert_same(found, expected)
        assert len(video.record.notes) > 1


# --- what it does without -----------------------------------------------------------------------------


@contextmanager
def failing(module: nn.Module, calls: set[int], error: Callable[[], Exception] = device_error) -> Iterator[list[int]]:
    """Lets some calls of a module fail, counted from 0."""
    count: list[int] = []

    def fail(*_: object) -> None:
        count.append(len(count))
        if count[-1] in calls:
            raise error()

    hook = module.register_forward_pre_hook(fail)
    try:
        yield count
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    return init_vae(8).requires_grad_(False)


@pytest.fixture(scope="module")
def expected(make, vae) -> list[Block]:
    return list(make(vae=vae).blocks(6))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("part", ["decoder", "encoder"])
@pytest.mark.parametrize("error", [device_error, host_error], ids=["device", "host"])
def test_decoding_and_encoding_that_fail_once_cost_no_bit(make, vae, expected, overlap, part, error) -> None:
    video, found, said = make(vae=vae, overlap=overlap), [], []
    with failing(getattr(vae, part).head, {1}, error):
        collect(found, lasting_blocks(video, None, 6, said.append))
    assert_same(found, expected)
    assert len(said) == 1
    assert said == video.record.notes
    if overlap:
        assert said[0].endswith("from there on blocks are decoded after their denoising, not beside the next one's.")
    else:
        where = "host memory" if error is device_error else "a file"
        assert said[0].endswith(f"from there on the archive lies in {where}.")
        held = video.cache.bytes()
        assert held["archive_device"] == 0
        assert held["archive_host" if error is device_error else "archive_disk"] > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_decoding_that_goes_on_failing_takes_a_latent_frame_at_a_time(make, vae, overlap) -> None:
    """As a run that did so from that block on, by hand."""
    at = 3
    reference = make(vae=vae, overlap=overlap)
    wanted = list(reference.blocks(at))
    video, found, said = make(vae=vae, overlap=overlap), [], []
    collect(found, video.blocks(at))
    assert reference.decoder is not None
    reference.decoder.stop_beside()
    reference.decoder._stream = StreamingDecoder(vae, 1)
    reference.decoder._stream.restore(block.latents for block in wanted)
    begin, begun = reference.decoder.begin, []

    def noted(*block: Any) -> Any:
        """The block before the first is still compressed in one pass: with overlap after the first has begun."""
        begun.append(block)
        reference.encode_frames = 1 if len(begun) > overlap else None
        return begin(*block)

    reference.decoder.begin = noted
    wanted += reference.blocks(2)

    # One call a block, and then one a latent frame; those of the blocks before come again.
    tries = 3 if overlap else 2
    fails = {0, *(n * (at + 1) for n in range(1, tries))}
    with failing(vae.decoder.head, fails):
        collect(found, lasting_blocks(video, None, at + 2, said.append))
    assert_same(found, wanted)
    assert [sentence.partition("from there on ")[2] for sentence in said] == [
        *(["blocks are decoded after their denoising, not beside the next one's."] if overlap else []),
        "the archive lies in host memory.",
        "the VAE takes one latent frame at a time.",
    ]
    assert all(sentence.startswith(f"The device's memory ran out at block {at}: ") for sentence in said)


def test_a_decoder_finds_its_place_from_the_last_forty_latent_frames(vae) -> None:
    chunks = torch.randn(1, 16, 60, 2, 2, generator=torch.Generator().manual_seed(1)).split(4, dim=2)
    whole, restored, short = (StreamingDecoder(vae) for _ in range(3))
    for chunk in chunks:
        whole.decode(chunk)
    assert DECODER_REACH == 40
    restored.restore(chunks[-10:])
    short.restore(chunks[-9:])
    nearly = dict(short.state)
    assert all(torch.equal(restored.state[name], past) for name, past in whole.state.items())
    assert not all(torch.equal(nearly[name], past) for name, past in whole.state.items())


def test_buffers_without_room_for_the_overlap_are_made_without_it(make, wan) -> None:
    settings = VideoSettings(Layout(CONFIG, SIZE, 1), SAMPLING, overlap=True)
    example = make()
    models = VideoModels(wan, example.vae, Compressor(1))
    demand = memory_demand(VideoModels(wan), settings.layout, BLOCKS)
    planned = PlannedRun(models, settings, demand, DeviceMemory("cpu", None))
    said: list[str] = []
    with FailingMemory() as counted:
        planned.video(example.story)
    for number in range(counted.count):
        with FailingMemory({number}):
            video = begun_video(planned, example.story, say=said.append)
        assert not video.decoder.beside
        assert video.cache.allocated_bytes == example.cache.allocated_bytes
    assert len(said) == counted.count
    assert set(said) == {
        "The device's memory ran out before the first block: from there on blocks are decoded after their denoising, "
        "not beside the next one's."
    }
    assert_same(list(lasting_blocks(video, None, 2)), list(example.blocks(2)))
    with FailingMemory(range(10**6)), pytest.raises(MemoryRanOutError, match=r"before the first block.*fp8_e4m3"):
        begun_video(planned, example.story, say=said.append)


# --- the end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [device_error, host_error], ids=["device", "host"])
def test_a_run_that_cannot_go_on_gives_all_it_has_and_says_what_to_change(make, error) -> None:
    complete = list(make().blocks(BLOCKS))
    before = held_bytes()
    video, found = make(overlap=True), []
    passes = 0

    def on_step(block: int, step: int) -> None:
        nonlocal passes
        if block == 5 and step == 1:
            passes += 1
            raise error()

    video.on_step = on_step
    whose = "The device's memory" if error is device_error else "Memory"
    with pytest.raises(MemoryRanOutError) as told:
        collect(found, lasting_blocks(video, None, BLOCKS, say=lambda sentence: None))
    assert str(told.value).startswith(
        f"{whose} ran out at block 5, and there is nothing left to do without; what was finished is kept: choose a "
        "smaller frame, kv_dtype fp8_e4m3, "
    )
    assert passes == 4, "once, and after each of three changes"
    assert_same(found, complete[:5])
    assert told.value.__cause__ is told.value.__context__ is None, "which would hold the failed pass"
    state = state_so_far(video, found)
    again = make()
    start = state_start(state)
    assert_same(list(started_blocks(again, start, BLOCKS)), complete)
    del video, found, state, start, again, told
    assert held_bytes() == before
    assert_same(list(make().blocks(BLOCKS)), complete)


def test_other_errors_end_a_run_at_once(make) -> None:
    for error in (KeyboardInterrupt, ValueError, RuntimeError):
        video = make()

        def on_step(block: int, step: int, error: type[BaseException] = error) -> None:
            if block == 1:
                raise error

        video.on_step = on_step
        with pytest.raises(error):
            list(lasting_blocks(video, None, 3))
        assert not video.record.notes


def test_what_memory_errors_look_like() -> None:
    assert is_out_of_memory(device_error())
    assert is_out_of_memory(host_error())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
