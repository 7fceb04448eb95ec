"""The loop over blocks: seeds, prefixes, replays, archives, what the caller gets when a run stops, and the record."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_videos import (
    CELLS,
    CONFIG,
    FIRST_THAT_CHOOSES,
    FIRST_WITH_MID,
    FRAMES,
    NO_MIDS,
    SAMPLING,
    SHAPE,
    SIZE,
    StopHere,
    ToyVAE,
    assert_same,
    causal_wan,
    collect,
    latents_of,
    stop_at,
    weights,
)
from wan_reference import DIM, HEADS, TEXT_DIM, TEXT_LENGTH, ExplicitWan, Method, assert_close, seeded

from packforcing.cache.cache import Cache
from packforcing.cache.head_share import WHOLE
from packforcing.cache.rope import EAGER_ROTARY
from packforcing.config import Layout
from packforcing.errors import PackForcingError
from packforcing.generate.long_video import Block, LongVideo
from packforcing.generate.sampling import Sampling, noise_generator
from packforcing.model.compressor import Compressor, HRBranch
from packforcing.model.vae import init_vae


@pytest.fixture(scope="module")
def run(make) -> SimpleNamespace:
    """Nine blocks in one go: what the other ways of making them are compared with."""
    video = make()
    blocks = list(video.blocks(9))
    return SimpleNamespace(blocks=blocks, latents=latents_of(blocks), record=video.record)


def test_the_run_that_all_others_are_compared_with_is_worth_it(run):
    """Its blocks differ, its video is not all clamped, and it selects: blocks are left out and come back."""
    assert [tuple(block.latents.shape) for block in run.blocks] == [(1, 16, FRAMES, *CELLS)] * 9
    assert [block.frames.shape[2] for block in run.blocks] == [5] + [8] * 8
    assert all(block.latents.dtype == torch.float32 for block in run.blocks)
    assert len({block.latents.sum().item() for block in run.blocks}) == 9
    assert all((block.frames.abs() < 1).float().mean() > 0.3 for block in run.blocks)
    assert run.record.blocks[-1].selected != [[5, 6], [5, 6]], "not simply the newest"


# --- the method's loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["few-step", "euler"])
def test_the_loop_is_the_methods_by_the_letter(make, wan, update):
    """Noise, steps, selection at the first step, x0, compressor, clean pass, with the reference's transformer."""
    sampling = Sampling(seed=5, steps=3, shift=5.0, update=update)
    compressor, blocks = Compressor(1), 7
    found = list(make(sampling=sampling, compressor=compressor).blocks(blocks))

    method = Method(rows=4, columns=8, temporal_stride=1, top_k=2)
    reference = ExplicitWan(weights(), method, seeded(1, TEXT_LENGTH, TEXT_DIM, seed=2))
    levels = [1.0, 5 * (2 / 3) / (1 + 4 * (2 / 3)), 5 * (1 / 3) / (1 + 4 * (1 / 3)), 0.0]
    for block in range(blocks):
        generator = noise_generator(5, block)
        x = torch.randn((1, 16, FRAMES, *CELLS), generator=generator)
        for sigma, following in pairwise(levels):
            velocity = reference.denoise(x, sigma)
            if update == "euler":
                x = x - (sigma - following) * velocity
            else:
                noise = torch.randn(x.shape, generator=generator) if following else 0
                x = (1 - following) * (x - sigma * velocity) + following * noise
        assert_close(found[block].latents, x)
        x0, frames = found[block].latents, found[block].frames  # so that rounding does not add up over blocks
        compressed = compressor(x0, frames, Layout(CONFIG, SIZE, 1), ToyVAE(), wan.patch_tokens) if block else None
        reference.clean_pass(x0, compressed)


class StubWan:
    """A transformer of known velocity, which notes what it is asked."""

    device, dtype, shape, rotary = torch.device("cpu"), torch.float32, SHAPE, EAGER_ROTARY
    share, attention = WHOLE, None
    modules = SimpleNamespace(blocks=[], head=SimpleNamespace(modulation=torch.zeros(2)))  # its digest is in the record

    def __init__(self, velocity: Any) -> None:
        self.velocity = velocity
        self.seen: list[tuple[int, float, Tensor]] = []

    def denoise(self, x: Tensor, sigma: float, text: None, cache: Cache) -> Tensor:
        self.seen.append((cache.block, sigma, x.clone()))
        return self.velocity(x, sigma, cache.block)

    def clean_pass(self, x0: Tensor, text: None, cache: Cache, *compressed: Any) -> None:
        self.seen.append((cache.block, 0.0, x0.clone()))


STEPS = 4
LEVELS = [1.0, 0.9375, 5 / 6, 0.625, 0.0]  # docs/method.md, section 2: 4 steps at shift 5


def test_euler_integrates_a_linear_velocity(make):
    """dx/dsigma = 0.4 x: each step multiplies by 1 + 0.4 (next sigma - sigma)."""
    stub = StubWan(lambda x, sigma, block: 0.4 * x)
    (block,) = make(NO_MIDS, Sampling(seed=3, steps=STEPS, update="euler"), wan=stub, vae=None).blocks(1)
    factor = 1.0
    for sigma, following in pairwise(LEVELS):
        factor *= 1 + 0.4 * (following - sigma)
    assert_close(block.latents, factor * stub.seen[0][2], 1e-6)
    assert [sigma for _, sigma, _ in stub.seen] == pytest.approx(LEVELS[:-1])


def test_few_step_predicts_x0_and_adds_fresh_noise(make):
    """With v = 0.4 x each x0 is (1 - 0.4 sigma) x; the noise of each step is new, and at most of unit size."""
    stub = StubWan(lambda x, sigma, block: 0.4 * x)
    (block,) = make(NO_MIDS, Sampling(seed=3, steps=STEPS, update="few-step"), wan=stub, vae=None).blocks(1)
    inputs = [x for _, _, x in stub.seen]
    noises = [inputs[0]]
    for x, following, sigma, next_sigma in zip(inputs, inputs[1:], LEVELS, LEVELS[1:], strict=False):
        noises.append((following - (1 - next_sigma) * (1 - 0.4 * sigma) * x) / next_sigma)
    for i, noise in enumerate(noises):
        assert noise.std() == pytest.approx(1, abs=0.05)
        assert noise.mean() == pytest.approx(0, abs=0.05)
        assert all(abs((noise * other).mean()) < 0.05 for other in noises[:i]), "fresh"
    assert_close(block.latents, (1 - 0.4 * LEVELS[3]) * inputs[-1], 1e-6)


@pytest.mark.parametrize("update", ["few-step", "euler"])
def test_a_model_that_knows_x0_reaches_it(make, update):
    x0 = seeded(1, 16, FRAMES, *CELLS)
    stub = StubWan(lambda x, sigma, block: (x - x0) / sigma)
    for block in make(NO_MIDS, Sampling(steps=STEPS, update=update), wan=stub, vae=None).blocks(2):
        assert_close(block.latents, x0, 1e-5)


def test_a_block_is_handed_over_before_its_clean_pass_and_the_last_one_costs_none(make):
    events: list[Any] = []
    video = make(on_step=lambda block, step: events.append((block, step)))
    for block in video.blocks(3):
        events.append(f"yield {block.index}")
    assert events == [
        (0, 0), (0, 1), "yield 0", (0, 2),
        (1, 0), (1, 1), "yield 1", (1, 2),
        (2, 0), (2, 1), "yield 2",
    ]  # fmt: skip
    list(video.blocks(1))
    assert events[-3:] == [(2, 2), (3, 0), (3, 1)]


# --- decoding beside the next block -------------------------------------------------------------------


OVERLAPPED = [
    {},
    {"recent_frames": 4, "selection": "recency"},
    {"recent_frames": 0},  # a compressed block is needed at once
    {"sink_frames": 0, "archive_device": "host"},
    {"position_range": 8},
    {"rope_adjustment": False},
    {"kv_dtype": "fp8_e4m3"},
    {"top_k": 0},
]


@pytest.mark.parametrize("changes", OVERLAPPED, ids=str)
def test_decoding_beside_the_next_block_changes_no_bit(make, changes):
    config = replace(CONFIG, **changes)
    apart, beside = make(config), make(config, overlap=True)
    assert_same(list(beside.blocks(9)), list(apart.blocks(9)))
    assert beside.record.rounding_error == apart.record.rounding_error
    for a, b in zip(beside.record.blocks, apart.record.blocks, strict=True):
        assert (a.selected, a.mid_slots_written, a.recent_rotated) == (
            b.selected,
            b.mid_slots_written,
            b.recent_rotated,
        )


def test_decoding_beside_the_next_block_through_the_real_vae(make):
    vae = init_vae(8).requires_grad_(False)
    with torch.inference_mode():  # as ComfyUI runs its nodes
        apart, beside = (list(make(vae=vae, overlap=overlap).blocks(6)) for overlap in (False, True))
    assert_same(beside, apart)


class Rendezvous(ToyVAE):
    """Decodes a block only after the next one's denoising has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = [threading.Event() for _ in range(7)]
        self._next = iter(self.begun[1:])

    def decode(self, raw: Tensor, history: dict[str, Tensor]) -> Tensor:
        assert next(self._next).wait(timeout=60)
        return super().decode(raw, history)


def test_blocks_are_decoded_while_the_next_one_is_denoised(make, run):
    vae = Rendezvous()
    vae.begun[6].set()  # after the last one nothing comes
    video = make(vae=vae, overlap=True, on_step=lambda block, step: step == 0 and vae.begun[block].set())
    assert_same(list(video.blocks(6)), run.blocks[:6])
    assert video.record.blocks[3].seconds["wait"] < video.record.blocks[3].seconds["decode"]


def test_an_overlapped_block_comes_while_the_next_one_is_there_and_the_last_costs_no_clean_pass(make):
    events: list[Any] = []
    video = make(overlap=True, on_step=lambda block, step: events.append((block, step)))
    for block in video.blocks(3):
        events.append(f"yield {block.index}")
        assert video.next_block == block.index + 1
    assert events == [
        (0, 0), (0, 1), (0, 2),
        (1, 0), (1, 1), "yield 0", (1, 2),
        (2, 0), (2, 1), "yield 1", "yield 2",
    ]  # fmt: skip


def test_an_overlapped_decoder_that_fails_ends_the_run_and_says_so_again(make, run):
    class Failing(ToyVAE):
        def decode(self, raw: Tensor, history: dict[str, Tensor]) -> Tensor:
            if self.blocks == 4:
                raise torch.OutOfMemoryError("no room")
            self.blocks += 1
            return super().decode(raw, history)

        blocks = 0

    video = make(vae=Failing(), overlap=True)
    found: list[Block] = []
    with pytest.raises(torch.OutOfMemoryError):
        collect(found, video.blocks(9))
    assert_same(found, run.blocks[:4])
    with pytest.raises(torch.OutOfMemoryError):
        collect(found, video.blocks(1))
    assert len(found) == 4


def test_the_record_of_an_overlapped_run(make):
    video = make(overlap=True)
    list(video.blocks(9))
    stages = [set(entry.seconds) for entry in video.record.blocks]
    assert stages[0] == {"denoise", "decode", "wait", "clean_pass"}
    assert stages[1:7] == [{"denoise", "decode", "wait", "compression", "clean_pass"}] * 6
    assert stages[7] == {"denoise", "decode", "wait", "clean_pass"}, (
        "its compressed form comes with the next clean pass"
    )
    assert stages[8] == {"denoise", "decode", "wait"}
    held = video.record.blocks[7].bytes
    assert held["aside"] == held["recent"] + held["mid"]
    token = SHAPE.layers * 2 * DIM * 4
    assert held["archive_device"] == 6 * FRAMES * 2 * token, "blocks 1 to 6"
    assert make(overlap=True).cache.allocated_bytes - make().cache.allocated_bytes == held["aside"]


# --- noise --------------------------------------------------------------------------------------------


def test_noise_belongs_to_seed_and_block(make):
    """Not to the video's length, nor to what was made before."""

    def noises(seed: int, count: int, update: str = "few-step") -> list[Tensor]:
        stub = StubWan(lambda x, sigma, block: x)
        list(make(NO_MIDS, Sampling(seed=seed, steps=1, update=update), wan=stub, vae=None).blocks(count))
        return [x for _, sigma, x in stub.seen if sigma == 1.0]

    five, two, other = noises(7, 5), noises(7, 2), noises(8, 5)
    assert all(torch.equal(a, b) for a, b in zip(two, five, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(five, noises(7, 5, "euler"), strict=True))
    everything = torch.stack([*five, *other]).flatten(1)
    correlation = torch.corrcoef(everything) - torch.eye(10)
    assert correlation.abs().max() < 0.08


def test_noise_comes_from_the_cpu_so_that_a_seed_means_the_same_on_every_device():
    generator = noise_generator(7, 3)
    assert generator.device == torch.device("cpu")
    assert generator.initial_seed() == noise_generator(7, 3).initial_seed()
    seeds = {noise_generator(seed, block).initial_seed() for seed in range(20) for block in range(20)}
    assert len(seeds) == 400, "(3, 7) is not (7, 3)"
    noise_generator(2**64 - 1, 10**6)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(PackForcingError, match=f"but it is {seed}"):
        Sampling(seed=seed)


# --- determinism --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits(make, run):
    assert_same(list(make().blocks(9)), run.blocks)


def test_another_seed_gives_another_video(make, run):
    for other, block in zip(make(sampling=replace(SAMPLING, seed=12)).blocks(3), run.blocks, strict=False):
        assert (other.latents - block.latents).abs().mean() > 0.3


@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_longer_run_begins_with_the_shorter_one(make, run, count):
    assert_same(list(make().blocks(count)), run.blocks[:count])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("parts", [(1, 8), (4, 5), (0, 3, 3, 3)], ids=str)
def test_blocks_in_parts_are_blocks_at_once(make, run, parts, overlap):
    video = make(overlap=overlap)
    assert_same([block for part in parts for block in video.blocks(part)], run.blocks)
    assert [entry.selected for entry in video.record.blocks] == [entry.selected for entry in run.record.blocks]


def test_a_longer_run_begins_with_the_shorter_one_through_the_real_vae(make):
    """Frames come from the streaming Wan VAE, and mid blocks through its encoder."""
    config = replace(CONFIG, block_frames=1, sink_frames=1, recent_frames=1, top_k=1)

    def video() -> LongVideo:
        return make(config, replace(SAMPLING, steps=1), vae=init_vae(dim=4, seed=1).requires_grad_(False))

    longer, shorter = list(video().blocks(6)), list(video().blocks(5))
    assert [block.frames.shape[2] for block in longer] == [1, 4, 4, 4, 4, 4]
    assert_same(shorter, longer[:5])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("selection", ["affinity", "recency"])
@pytest.mark.parametrize("count", [1, 4, 6, 8])
def test_a_replayed_run_goes_on_as_if_it_had_never_stopped(make, selection, count, overlap):
    """With more mid blocks than are attended, the replay must choose what the run had chosen."""
    config = replace(CONFIG, selection=selection)
    whole = list(make(config).blocks(9))
    video = make(config, overlap=overlap)
    replayed = list(video.replay(latents_of(whole[:count])))
    assert_same(replayed + list(video.blocks(9 - count)), whole)


def test_a_replay_may_come_in_parts_and_leaves_the_same_record(make, run):
    video = make()
    for part in run.latents[:, :, : 7 * FRAMES].split([2 * FRAMES, 5 * FRAMES], dim=2):
        list(video.replay(part))
    list(video.blocks(2))
    for found, expected in zip(video.record.blocks, run.record.blocks, strict=True):
        assert found.selected == expected.selected
        assert found.bytes == expected.bytes


def test_a_replay_costs_one_pass_a_block_and_two_where_a_choice_must_be_made(make, run):
    events = []
    video = make(on_step=lambda block, step: events.append((block, step)))
    list(video.replay(run.latents[:, :, : 3 * FRAMES]))
    assert events == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0)]


@pytest.mark.parametrize("shape", [(1, 8, 4, *CELLS), (1, 16, 4, 8, 8)], ids=str)
def test_a_replay_of_other_latents_is_refused(make, shape):
    with pytest.raises(PackForcingError, match=r"must have \(channels, height, width\) \(16, 8, 16\)"):
        list(make().replay(torch.zeros(shape)))


@pytest.mark.parametrize("device", ["device", "host", "auto"])
def test_where_the_archive_lies_changes_no_bit(make, run, device):
    """With "auto" the budget of 40 kB holds two blocks, and the others lie in host memory."""
    video = make(replace(CONFIG, archive_device=device, archive_budget_gb=4e-5))
    assert_same(list(video.blocks(9)), run.blocks)
    used = video.record.blocks[-1].bytes
    assert (used["archive_device"] > 0) == (device != "host")
    assert (used["archive_host"] > 0) == (device != "device")


def test_two_videos_at_once(make):
    video = make(batch=2)
    blocks = list(video.blocks(7))
    assert all(block.latents.shape == (2, 16, FRAMES, *CELLS) for block in blocks)
    assert all(block.frames.shape[0] == 2 for block in blocks)
    assert all((block.latents[0] - block.latents[1]).abs().mean() > 0.3 for block in blocks)
    again = make(batch=2)
    assert_same(list(again.replay(latents_of(blocks[:6]))) + list(again.blocks(1)), blocks)


# --- the compressor -----------------------------------------------------------------------------------


def other_compressor() -> Compressor:
    hr = HRBranch((16, 8, 8, 8, 8, DIM), temporal_stride=1)
    hr[-1].bias.data = 2 * seeded(DIM)
    return Compressor(1, hr.requires_grad_(False))


@pytest.mark.parametrize("sinks", [0, 1, 2])
def test_full_resolution_does_not_depend_on_the_compressor_until_a_mid_block_is_attended(make, sinks):
    config = replace(CONFIG, sink_frames=FRAMES * sinks)
    one = list(make(config).blocks(sinks + 4))
    other = list(make(config, compressor=other_compressor()).blocks(sinks + 4))
    first_with_mid = sinks + 2
    same = [torch.equal(a.latents, b.latents) for a, b in zip(one, other, strict=True)]
    assert same == [block < first_with_mid for block in range(sinks + 4)]


def test_an_untrained_hr_branch_is_the_training_free_form(make, run):
    compressor = Compressor(1, HRBranch((16, 8, 8, 8, 8, DIM), temporal_stride=1).requires_grad_(False))
    assert_same(list(make(compressor=compressor).blocks(7)), run.blocks[:7])


class Untouchable:
    """Stands where something must not be used."""

    device, dtype, temporal_stride, name = torch.device("cpu"), torch.float32, 1, "untouchable"

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("used")

    denoise = clean_pass = decode = encode = embed_text = __call__

    def parameters(self) -> Iterator[Tensor]:
        """Its digest is in the record."""
        return iter(())


def test_without_mid_blocks_no_compressor_and_no_vae_is_needed_and_none_is_run(make):
    alone = list(make(NO_MIDS, compressor=None, vae=None).blocks(5))
    assert all(block.frames is None for block in alone)
    beside = list(make(NO_MIDS, compressor=Untouchable(), vae=Untouchable(), decode=False).blocks(5))
    assert torch.equal(latents_of(alone), latents_of(beside))
    decoded = list(make(NO_MIDS, compressor=Untouchable()).blocks(5))
    assert torch.equal(latents_of(alone), latents_of(decoded))
    assert [block.frames.shape[2] for block in decoded] == [5, 8, 8, 8, 8]


def test_sinks_are_never_compressed(make):
    """Blocks 0 and 1 have no compressed form, since nothing would read it."""
    seen = []

    class Watched(Compressor):
        def forward(self, latents: Tensor, *rest: Any) -> Tensor:
            seen.append(latents)
            return super().forward(latents, *rest)

    video = make(replace(CONFIG, sink_frames=2 * FRAMES), compressor=Watched(1))
    blocks = list(video.blocks(5))
    assert len(seen) == 2
    assert all(torch.equal(a, b.latents) for a, b in zip(seen, blocks[2:], strict=False))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_compressor_that_goes_through_no_pixels_needs_no_vae(make, overlap):
    """Its latents are those of a run that decodes; with a VAE, blocks are decoded only where frames are wanted."""

    class OfLatents(Compressor):
        direct, needs_vae = True, False

        def forward(self, latents: Tensor, frames: Any, layout: Layout, *_: Any) -> Tensor:
            count = layout.compressed_tokens_per_block
            return latents.flatten(2).mean(dim=1)[:, :count, None].expand(-1, -1, DIM)

    wanted = list(make(compressor=OfLatents(1)).blocks(7))
    without = make(compressor=OfLatents(1), vae=None, overlap=overlap)
    found = list(without.blocks(7))
    assert torch.equal(latents_of(found), latents_of(wanted))
    assert [block.frames for block in found] == [None] * 7
    assert wanted[0].frames is not None
    assert all("decode" not in block.seconds for block in without.record.blocks)
    assert make(compressor=OfLatents(1), decode=False).decoder is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"compressor": None}, "no compressor and top_k is 2"),
        ({"vae": None}, "needs a VAE"),
        ({"compressor": Compressor(2)}, "temporal stride of 1, but the compressor's is 2"),
    ],
    ids=["compressor", "vae", "stride"],
)
def test_what_is_missing_is_said_before_any_pass(make, given, sentence):
    wan = Untouchable()
    wan.shape = SHAPE
    with pytest.raises(PackForcingError, match=sentence):
        make(wan=wan, **given)


# --- when a run stops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("block", "step", "made"), [(0, 0, 0), (6, 0, 6), (6, 1, 6), (6, 2, 7)])
def test_an_exception_from_the_caller_ends_the_run_and_costs_nothing_that_was_made(
    make, run, block, step, made, overlap
):
    video = make(on_step=stop_at(block, step), overlap=overlap)
    found: list[Block] = []
    with pytest.raises(StopHere):
        collect(found, video.blocks(9))
    assert_same(found, run.blocks[:made])
    assert [entry.block for entry in video.record.blocks] == list(range(made))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_stopped_before_a_clean_pass_still_does_it_when_it_goes_on(make, run, overlap):
    video = make(on_step=stop_at(6, 2), overlap=overlap)
    found: list[Block] = []
    with pytest.raises(StopHere):
        collect(found, video.blocks(9))
    video.on_step = lambda block, step: None
    assert_same(found + list(video.blocks(2)), run.blocks)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_caller_that_stops_early_has_lost_nothing(make, run, overlap):
    video = make(overlap=overlap)
    found = list(islice(video.blocks(9), 4))
    assert_same(found, run.blocks[:4])
    assert video.next_block == 4
    assert_same(found + list(video.blocks(5)), run.blocks)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_block_that_is_not_finite_is_named(make, value):
    def velocity(x: Tensor, sigma: float, block: int) -> Tensor:
        out = torch.zeros_like(x)
        if block == 2 and sigma == 1.0:
            out[0, 3, 1, 2, 5] = value
        return out

    video = make(NO_MIDS, wan=StubWan(velocity))
    found: list[Block] = []
    with pytest.raises(PackForcingError, match="Block 2 came out with NaN or infinite values") as error:
        collect(found, video.blocks(5))
    assert "float32" in str(error.value), "the type it ran in"
    assert [block.index for block in found] == [0, 1]
    assert all(block.latents.isfinite().all() and block.frames.isfinite().all() for block in found)


def test_poisoned_weights_stop_the_first_block(make):
    state = weights()
    state["blocks.1.ffn.0.bias"][7] = float("nan")
    with pytest.raises(PackForcingError, match="Block 0 came out with NaN"):
        next(make(wan=causal_wan(state)).blocks(1))


# --- the record and memory ----------------------------------------------------------------------------


def test_selections_are_chronological_and_at_most_top_k_and_may_come_back(make):
    video = make(replace(CONFIG, top_k=1))
    list(video.blocks(14))
    by_layer = list(zip(*(entry.selected for entry in video.record.blocks), strict=True))
    assert len(by_layer) == SHAPE.layers
    for chosen in by_layer:
        for block, selected in enumerate(chosen):
            assert len(selected) == (1 if block >= FIRST_WITH_MID else 0)
            assert all(CONFIG.sink_blocks <= m < block - CONFIG.recent_blocks for m in selected)
    came_back = [
        m
        for chosen in by_layer
        for m in range(1, 12)
        for b in range(m + 2, 13)
        if [m] == chosen[b] and [m] != chosen[b + 1] and [m] in chosen[b + 2 :]
    ]
    assert came_back


def test_the_record_of_a_run(run):
    for block, entry in enumerate(run.record.blocks):
        mids = max(0, block - 2)
        assert all(selected == sorted(set(selected)) for selected in entry.selected)
        assert {len(selected) for selected in entry.selected} == {min(2, mids)}
        if block < FIRST_THAT_CHOOSES:
            assert entry.selected == [list(range(1, 1 + mids))] * SHAPE.layers
    written = [entry.mid_slots_written for entry in run.record.blocks]
    assert written[:FIRST_THAT_CHOOSES] == [0, 0, 0, SHAPE.layers, SHAPE.layers], "a slot that holds what it should"
    moved = [entry.recent_rotated for entry in run.record.blocks]
    assert moved == [0, 0, 0, 0, 0, 1, 1, 1, 1], "positions equal the true ones until a block is left out"


def test_the_record_counts_bytes_and_seconds(run):
    token = SHAPE.layers * 2 * DIM * 4
    full, compressed = FRAMES * 32 * token, FRAMES * 2 * token
    last = run.record.blocks[7].bytes
    assert last["sink"] == last["recent"] == last["current"] == full
    assert last["mid"] == 2 * compressed
    assert last["archive_device"] == 7 * compressed, "blocks 1 to 7"
    assert last["archive_host"] == 0
    assert last["key_sums"] >= 7 * SHAPE.layers * (HEADS // 2) * 128 * 4
    assert set(run.record.blocks[0].seconds) == {"denoise", "decode", "clean_pass"}, "a sink block is not compressed"
    for entry in run.record.blocks[1:-1]:
        assert set(entry.seconds) == {"denoise", "decode", "compression", "clean_pass"}
        assert all(seconds > 0 for seconds in entry.seconds.values())
    assert set(run.record.blocks[-1].seconds) == {"denoise", "decode"}, "its clean pass has not run"
    assert run.record.as_dict()["blocks"][7]["bytes"] == last


def test_memory_does_not_grow_with_the_video(make):
    """With the archive in host memory only the key sums do: one vector a head, layer and block."""
    video = make(replace(CONFIG, archive_device="host"), Sampling(steps=1))
    key_sum = SHAPE.layers * (HEADS // 2) * 128 * 4
    fixed, host = set(), []
    for block in video.blocks(30):
        sums = video.cache.archive.allocated_key_sum_bytes
        fixed.add(video.cache.allocated_bytes - sums)
        host.append(video.cache.bytes()["archive_host"])
        assert sums <= 2 * key_sum * max(8, block.index), "doubled as it grows, and no more"
        assert video.cache.bytes()["archive_device"] == 0
    assert len(fixed) == 1
    assert host == [max(0, block - 1) * 4 * SHAPE.layers * 2 * DIM * 4 for block in range(30)]
