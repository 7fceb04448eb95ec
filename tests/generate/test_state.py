"""A video that goes on from its state's file equals one that was made in one go, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_videos import CONFIG, NO_MIDS, SIZE, ToyVAE, assert_same, causal_wan, latents_of, weights
from wan_reference import TEXT_DIM, TEXT_LENGTH, seeded

from packforcing.config import FrameSize, Layout, ModelShape
from packforcing.errors import PackForcingError
from packforcing.files.state_file import StatePrompt, VideoState, load_state, save_state
from packforcing.generate.long_video import VideoModels
from packforcing.generate.sampling import Sampling
from packforcing.generate.start import Start, started_blocks
from packforcing.generate.state import check_fits, model_digest, prompts_after, selected_of, state_of, story_from
from packforcing.model.causal_wan import CausalWan
from packforcing.model.compressor import Compressor


def told(*starts: int) -> tuple[StatePrompt, ...]:
    return tuple(StatePrompt(s, f"from {s}", seeded(1, TEXT_LENGTH, TEXT_DIM, seed=2 + s)) for s in starts)


def made(make, wan, prompts, blocks: int, switch: str = "keep", state: VideoState | None = None, **given):
    """A video of that many blocks and its state, from the beginning or from a state."""
    all_prompts = prompts_after(state, prompts, switch, 2)
    video = make(wan=wan, text=story_from(all_prompts, wan.embed_text, switch, 2), **given)
    start = None
    if state is not None:
        check_fits(state, VideoModels(wan, video.vae, video.compressor), video.layout)
        start = Start("The state", state.latents.shape[2], lambda vae: state.latents, selected_of(state))
    found = list(started_blocks(video, start, blocks))
    return found, state_of(video, all_prompts, latents_of(found))


CASES = [
    ({}, "keep"),
    ({"overlap": True}, "keep"),
    ({"config": replace(CONFIG, kv_dtype="fp8_e4m3")}, "refresh"),
    ({"config": replace(CONFIG, sink_frames=0, archive_device="host"), "overlap": True}, "refresh"),
    ({}, "blend"),
    ({"config": NO_MIDS, "compressor": None}, "keep"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("given", "switch"), CASES, ids=str)
def test_a_video_goes_on_from_a_file_as_if_it_had_never_stopped(make, tmp_path, given, switch, dtype):
    """Stopped in the middle of a blend, and after blocks that had to choose; with a story that has a switch to come."""
    wan = CausalWan(causal_wan(weights()).modules.to(dtype), dtype=dtype)
    story, path = told(0, 5, 8), tmp_path / "a.safetensors"
    whole, _ = made(make, wan, story, 9, switch, **given)
    first, state = made(make, wan, told(0, 5), 6, switch, **given)
    save_state(path, state)
    again, later = made(make, wan, story, 9, switch, load_state(path), **given)
    assert_same(first, whole[:6])
    assert_same(again, whole)
    assert [prompt.start for prompt in later.prompts] == [0, 5, 8]


@pytest.mark.parametrize("switch", ["keep", "refresh"])
def test_another_prompt_rules_from_where_the_state_ends(make, wan, tmp_path, switch):
    a, b = told(0)[0], told(3)[0]
    whole, _ = made(make, wan, (a, replace(b, start=6)), 9, switch)
    _, state = made(make, wan, (a,), 6)
    again, later = made(make, wan, (replace(b, start=0),), 9, switch, state)
    assert_same(again, whole)
    assert [(prompt.start, prompt.prompt) for prompt in later.prompts] == [(0, "from 0"), (6, "from 3")]


def test_another_seed_changes_only_what_comes_after(make, wan):
    """And a state of both seeds goes on to the bit, too."""
    _, first = made(make, wan, told(0), 6)
    same, _ = made(make, wan, told(0), 11, state=first)
    sampling = Sampling(seed=12, steps=3)
    other, _ = made(make, wan, told(0), 11, state=first, sampling=sampling)
    assert_same(other[:6], same[:6])
    assert not torch.allclose(other[6].latents, same[6].latents, atol=1e-2)
    _, second = made(make, wan, told(0), 9, state=first, sampling=sampling)
    again, _ = made(make, wan, told(0), 11, state=second, sampling=sampling)
    assert_same(again, other)


def test_a_block_of_a_state_costs_one_pass(make, wan, monkeypatch):
    """Which mid blocks it attended to is known: also those that had to choose do not choose again."""
    _, state = made(make, wan, told(0), 9)
    seen = []
    video = make(text=story_from(told(0), wan.embed_text), on_step=lambda block, step: seen.append((block, step)))
    with monkeypatch.context() as patch:
        patch.setattr(wan, "denoise", None)
        list(video.replay(state.latents, selected_of(state)))
    assert len(seen) == 2 * 9 - 1
    assert [block.selected for block in video.record.blocks] == selected_of(state)


def test_a_state_lies_in_host_memory_and_comes_back_whole(make, wan, tmp_path):
    _, state = made(make, wan, told(0, 2), 3)
    save_state(tmp_path / "a.safetensors", state)
    read = load_state(tmp_path / "a.safetensors")
    for name in ("model", "digest", "dtype", "compressor", "config", "size", "temporal_stride"):
        assert getattr(read, name) == getattr(state, name), name
    assert torch.equal(read.latents, state.latents)
    assert torch.equal(read.selected, state.selected)
    assert read.blocks == 3
    assert all(torch.equal(a.context, b.context) for a, b in zip(read.prompts, state.prompts, strict=True))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"], "no half file"


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(make, wan) -> VideoState:
    return made(make, wan, told(0), 3)[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": ModelShape(2, 512, 4)}, "the model of 2 layers and width 512, but this run has of 2 layers"),
        ({"digest": "0" * 16}, "the model's weights 0000000000000000, but this run has "),
        ({"dtype": "bfloat16"}, "the type bfloat16, but this run has float32"),
        ({"compressor": "mine.safetensors"}, "the compressor mine.safetensors, but this run has training-free"),
        ({"config": replace(CONFIG, head_fraction=1.0)}, r"head_fraction 1\.0, but this run has 0\.5"),
        ({"temporal_stride": 2}, "a temporal stride of 2, but this run has 1"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_run_that_differs_is_told_what_differs(state, wan, changes, sentence):
    models, layout = VideoModels(wan, ToyVAE(), Compressor(1)), Layout(CONFIG, SIZE, 1)
    check_fits(replace(state, config=replace(CONFIG, archive_device="host")), models, layout)
    with pytest.raises(PackForcingError, match=sentence):
        check_fits(replace(state, **changes), models, layout)


def test_another_size_is_told(state, wan):
    models = VideoModels(wan, ToyVAE(), Compressor(1))
    with pytest.raises(PackForcingError, match="the size 128x64, but this run has 64x64"):
        check_fits(state, models, Layout(CONFIG, FrameSize(64, 64), 1))


def test_another_kind_of_switch_is_told(state):
    several = replace(state, prompts=told(0, 1), prompt_switch="blend", blend_blocks=3)
    with pytest.raises(
        PackForcingError, match="made with the prompt switch blend over 3 blocks, but this run has keep"
    ):
        prompts_after(several, told(0), "keep", 3)


def test_the_digest_is_that_of_the_weights_in_any_type(wan):
    digest = model_digest(wan)
    assert len(digest) == 16
    assert model_digest(causal_wan({name: tensor.bfloat16() for name, tensor in weights().items()})) == digest
    other = weights()
    other["blocks.1.modulation"] *= 1.1
    assert model_digest(causal_wan(other)) != digest
