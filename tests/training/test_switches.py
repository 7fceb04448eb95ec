"""Training on changes of the prompt: a clip goes over to its twin, and the clean passes follow one way or the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_clips import ToyClips, one_caption

from packforcing.cli.main import main
from packforcing.model.wan_modules import SIZES, build_wan_modules
from packforcing.training import base, base_command, clips
from packforcing.training.base_command import mixed
from packforcing.training.base_samples import refreshed, stacked, switched
from packforcing.training.histories import HISTORIES
from packforcing.training.run_config import MicroBatch
from packforcing.world.drawing import render
from packforcing.world.scenes import FPS, sample_scene

ASKED = "a red circle swings on a blue background"
THEN = "a red circle swings on a white background"


def clips_of(caption: str, seed: int) -> ToyClips:
    """Twenty clips under one caption."""
    return ToyClips(clips.ClipSet(20, size=64, twins=caption == THEN), one_caption(caption, blocks=5), seed)


def trainer(**options: object) -> base.BaseTrainer:
    data = base.TrainingClips(clips_of(ASKED, 1), held_out=4, twins=clips_of(THEN, 2))
    modules = build_wan_modules(SIZES["tiny"], base_command.initial_state_dict(SIZES["tiny"], seed=0))
    modules.head.head.weight.data.normal_(std=0.1)  # or it would predict zero under any caption
    return base.BaseTrainer(modules, data, base.BaseOptions(**options))


def test_a_set_of_twins_shows_the_same_moments() -> None:
    plain = clips.ClipSet(4, latent_frames=4, size=64)
    for number in range(4):
        pixels, words = clips.clip_pixels(number, plain)
        other, other_words = clips.clip_pixels(number, replace(plain, twins=True))
        assert words != other_words
        same = (pixels == other).float().mean()
        assert 0.02 < same < 0.98  # something changed its colour, and all else is where it was
    rng = np.random.default_rng(3)
    scene, start = sample_scene(rng), int(rng.integers(clips.LONGEST_START))
    assert torch.equal(pixels, render(scene, 13, FPS, 64, start))
    assert replace(plain, twins=True).kind == "twins"
    assert "twins" not in plain.as_dict()  # as runs wrote it before there were any


def test_a_switched_clip_goes_from_one_to_the_other_at_a_block() -> None:
    first, second = clips_of(ASKED, 1)[3], clips_of(THEN, 2)[3]
    latents, small, captions = switched(first, second, cut=2)
    assert torch.equal(latents[:, :8], first[0][:, :8])
    assert torch.equal(latents[:, 8:], second[0][:, 8:])
    assert torch.equal(small, torch.cat([first[1][:2], second[1][2:]]))
    assert captions == (ASKED, ASKED, THEN, THEN, THEN)


def test_samples_switch_as_often_as_asked_at_any_block_and_are_refreshed_half_of_the_time() -> None:
    made = trainer(switch_share=0.5).samples
    drawn = [made.drawn(seed) for seed in range(400)]
    several = [each for each in drawn if len(set(each.captions)) == 2]
    assert 0.4 < len(several) / len(drawn) < 0.6
    cuts = [next(i for i in range(5) if each.captions[i] != each.captions[0]) for each in several]
    assert set(cuts) == {1, 2, 3, 4}
    assert {each.captions[0] for each in several} == {ASKED, THEN}  # there and back
    kept = [each.clean_captions == each.captions for each in several]
    assert 0.35 < np.mean(kept) < 0.65
    for each, cut, keep in zip(several, cuts, kept, strict=True):
        if not keep:
            assert each.clean_captions == (*each.captions[: cut - 1], *(6 - cut) * (each.captions[cut],))
    plain = trainer(switch_share=0.0).samples
    assert not any(len(set(plain.drawn(seed).captions)) > 1 for seed in range(50))


def test_the_clean_pass_of_a_refreshed_block_runs_under_the_new_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    sample = made.samples.measured_switch(0, refresh=False)
    # A refreshed sample equals one whose blocks are denoised under the old captions and written under the new ones;
    # and a block before the cut is denoised from the same history under the same caption either way.
    kept, fresh = (
        made._held_out_errors([each], HISTORIES[0])[2:, 0] for each in (sample, refreshed(sample, base.SWITCH_BLOCK))
    )
    assert torch.equal(kept[:2], fresh[:2])
    assert (kept[2:] != fresh[2:]).all()
    whole = replace(sample, captions=5 * (THEN,), clean_captions=refreshed(sample, 2).clean_captions)
    new_prompt = made._held_out_errors([whole], HISTORIES[0])[2:, 0]
    torch.testing.assert_close(new_prompt[2:], fresh[2:], rtol=0, atol=0)
    assert new_prompt[0] != fresh[0]


def test_a_batch_of_kept_and_refreshed_samples_trains_and_is_measured() -> None:
    made = trainer(switch_share=1.0)
    batch = made.batch(MicroBatch(0, "base", range(4), 0))
    assert batch.clean_prompts is not batch.prompts
    made.losses("base", batch)["loss"].backward()
    found = made.evaluate(0)
    assert {"held_out", "switch", "switch_refresh"} <= found.keys()
    assert found["switch"] != found["switch_refresh"]
    plain = stacked([made.samples.measured(0)], HISTORIES[0], made.device)
    assert plain.clean_prompts is plain.prompts


def test_exported_weights_lie_between_the_first_and_the_last() -> None:
    start, trained = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    wanted = {name: 0.25 * t + 0.75 * trained.state_dict()[name] for name, t in start.state_dict().items()}
    found = mixed(start, trained, 0.25).state_dict()
    torch.testing.assert_close(dict(found), wanted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--start-share", "0.3"], "there is no --init"),
        (["--start-share", "1.5", "--init", "w"], "from 0 to 1"),
        (["--twin-clips", "9"], "no more twins than clips"),
        (["--twin-clips", "2"], "--twin-clips is 2 and --held-out is 2"),
        (["--twin-clips", "8", "--bidirectional"], "or --bidirectional"),
    ],
)
def test_twins_that_cannot_be_are_told(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--clips", "8", "--held-out", "2", "--folder", f"{tmp_path}"]
    assert main(["train", "base", *common, *options]) == 1
    assert said in capsys.readouterr().err
