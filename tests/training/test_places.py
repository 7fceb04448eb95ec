"""`train base` on tours through places: a caption for each block, partitions that need memory, an HR branch beside."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_clips import ToyClips, one_caption

from packforcing.cli.main import main
from packforcing.demo.models import demo_vae
from packforcing.demo.text import encode_prompt
from packforcing.errors import PackForcingError
from packforcing.model.compressor import HRBranch
from packforcing.model.vae import encode_clip, load_vae
from packforcing.model.wan_modules import SIZES, build_wan_modules
from packforcing.training import base, base_command, clips
from packforcing.training.base_samples import composed_tour, stacked
from packforcing.training.histories import HISTORIES, MIDS_ONLY, PLACE_HISTORIES, History
from packforcing.training.prompts import encoded
from packforcing.training.run_config import MicroBatch
from packforcing.world.places import parse_place, sample_tour, showings
from packforcing.world.scenes import sample_scene

TOURS = clips.ClipSet(4, size=64, places=True)
WORDS = clips.ClipCaptions(
    ("place one", "place two", "place one", "place three", "place two"),
    ("place one: a red star", "place two: a blue star", "place one", "place three: a black star", "place two"),
)


def clips_of(words: clips.ClipCaptions, places: bool) -> ToyClips:
    """Forty clips with the same captions."""
    return ToyClips(clips.ClipSet(40, size=64, places=places), words, seed=int(places))


def trainer(hr: HRBranch | None = None, **options: object) -> base.BaseTrainer:
    plain = one_caption("a red circle swings on a blue background", blocks=5)
    data = base.TrainingClips(clips_of(plain, places=False), held_out=3, places=clips_of(WORDS, places=True))
    sizes = SIZES["tiny"]
    modules = build_wan_modules(sizes, base_command.initial_state_dict(sizes, seed=0))
    modules.head.head.weight.data.normal_(std=0.1)  # or it would predict zero under any history
    return base.BaseTrainer(modules, data, base.BaseOptions(**options), PLACE_HISTORIES, hr=hr)


def test_a_clip_of_places_is_its_tour(tmp_path: Path) -> None:
    vae = load_vae(demo_vae())
    assert clips.prepare(tmp_path, TOURS, vae) == 1
    kept = clips.LatentClips(tmp_path, TOURS)
    tour = sample_tour(3, blocks=5)
    pixels = tour.pixels((13, 16, 16, 16, 16), size=64)
    latents, compressed, words = kept[3]
    wanted = encode_clip(vae, pixels[None].to(vae.dtype))[0]
    torch.testing.assert_close(latents, wanted.half().float(), rtol=0, atol=0)
    assert compressed.shape == (5, 16, 2, 2, 2)
    assert list(words.short) == tour.captions(3 * [False])
    assert list(words.long) == tour.captions(3 * [True])
    assert "places" not in replace(TOURS, places=False).as_dict()  # as runs wrote it before there were places


def test_a_clip_that_is_too_short_for_a_return_is_told() -> None:
    with pytest.raises(PackForcingError, match="at least 3 blocks"):
        clips.ClipSet(4, latent_frames=8, places=True)


def test_showings_of_a_tour() -> None:
    assert showings(WORDS.short) == ["new", "new", "return", "new", "return"]
    assert showings(("place one", "place one", "place two", "place two", "place one")) == [
        "new",
        "same",
        "new",
        "same",
        "return",
    ]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_asked_for_is_described_and_no_return_is(share: float) -> None:
    made = trainer(place_share=1.0, described=share)
    captions = [made.samples.drawn(seed).captions for seed in range(200)]
    assert {each[2] for each in captions} == {"place one"}
    assert {each[4] for each in captions} == {"place two"}
    for block in (0, 1, 3):
        found = sum(each[block] == WORDS.long[block] for each in captions) / 200
        assert abs(found - share) < 0.12
    assert all(each[0] in (WORDS.short[0], WORDS.long[0]) for each in captions)


class Numbered:
    """Clips whose latents are their number and, in the channels, the block's."""

    clips = clips.ClipSet(9, size=64)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, clips.ClipCaptions]:
        blocks = torch.stack([torch.full((16, 4, 8, 8), 10.0 * number + block) for block in range(5)], dim=1)
        small = torch.stack([torch.full((16, 2, 2, 2), 10.0 * number + block) for block in range(5)])
        words = 5 * (f"scene {number}",)
        return blocks.flatten(1, 2), small, clips.ClipCaptions(words, words)


def test_a_composed_tour_shows_blocks_of_clips_in_their_order() -> None:
    stays = []
    for seed in range(50):
        latents, small, words = composed_tour(Numbered(), 6, np.random.default_rng(seed))
        shown = latents.unflatten(1, (5, 4))[0, :, 0, 0, 0]
        assert torch.equal(shown, small[:, 0, 0, 0, 0])
        scenes = [int(number) // 10 for number in shown]
        assert set(scenes) <= set(range(6))  # the others are held out
        for scene in set(scenes):
            blocks = [int(number) % 10 for number in shown if int(number) // 10 == scene]
            first = 0 if scene == scenes[0] else 1  # a clip's first block is encoded in another way
            assert blocks == list(range(first, first + len(blocks)))
        # A name for each scene, and its description in its first stretch.
        assert len(set(zip(words.short, scenes, strict=True))) == len(set(scenes)) == len(set(words.short))
        for block, (short, long) in enumerate(zip(words.short, words.long, strict=True)):
            new = scenes[block] not in scenes[:block]
            stay = block and scenes[block] == scenes[block - 1]
            told = new or (stay and words.long[block - 1] != words.short[block - 1])
            assert long == (f"{short}: scene {scenes[block]}" if told else short)
        assert "return" in showings(words.short)
        stays += [a == b for a, b in pairwise(scenes)]
    assert 0.25 < np.mean(stays) < 0.5  # below a half, since a way needs a return


def test_too_few_clips_to_put_tours_together_are_told() -> None:
    plain = clips_of(WORDS, places=False)
    modules = build_wan_modules(SIZES["tiny"], base_command.initial_state_dict(SIZES["tiny"], seed=0))
    data = base.TrainingClips(plain, held_out=38, places=clips_of(WORDS, places=True))
    with pytest.raises(PackForcingError, match="there are 2 clips"):
        base.BaseTrainer(modules, data, base.BaseOptions(composed=0.5))
    with pytest.raises(PackForcingError, match="there are 1 telling names"):
        trainer(composed=0.5, telling_names=0.5)  # all of whose clips are of one colour


class Scenes(Numbered):
    """Clips whose captions have scenes of the world."""

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, clips.ClipCaptions]:
        latents, small, _ = super().__getitem__(number)
        words = 5 * (sample_scene(number).caption,)
        return latents, small, clips.ClipCaptions(words, words)


def test_telling_names_are_the_same_for_the_same_colours_and_others_are_not() -> None:
    for telling in (True, False):
        names: dict[str, set[str]] = {}
        for seed in range(40):
            _, _, words = composed_tour(Scenes(), 9, np.random.default_rng(seed), telling)
            assert len(set(words.short)) == len({place for place in words.long if ":" in place})
            for caption in words.long:
                name, description = parse_place(caption)
                if description:
                    names.setdefault(description, set()).add(name)
        assert len(names) > 5
        assert all((len(each) == 1) is telling for each in names.values())


def test_the_share_asked_for_is_pure_noise() -> None:
    made = trainer(place_share=1.0, pure_noise=0.4)
    levels = torch.cat([made.samples.drawn(seed).sigma for seed in range(60)])
    assert 0.3 < (levels == 1).float().mean() < 0.5
    assert (levels[levels < 1] > 0).all()


def test_tours_with_too_few_returns_are_left_out() -> None:
    made = trainer(place_share=1.0, least_returns=2)
    assert made.samples._tours == list(range(37))
    with pytest.raises(PackForcingError, match="No tour has 3 blocks"):
        trainer(least_returns=3)


def test_tours_are_the_share_of_samples_that_is_asked_for() -> None:
    for share in (0.0, 0.5, 1.0):
        made = trainer(place_share=share)
        tours = sum(len(made.samples.drawn(seed).captions) == 5 for seed in range(200)) / 200
        assert abs(tours - share) < 0.12


@pytest.mark.parametrize("text_len", [0, 16])
def test_each_sample_attends_to_its_own_prompt_as_if_it_were_alone(text_len: int) -> None:
    """Captions of several lengths in one batch: what each gives is what `embed_text` of it alone gives."""
    wan, same, tour = trainer().wan, ("a red circle",), WORDS.long
    wan.text_len = text_len
    texts = encoded([same, tour]).texts(wan)
    assert len(texts) == 5
    queries = torch.randn(2, 7, 2, 128, generator=torch.Generator().manual_seed(0))
    for i, caption in enumerate(tour):
        for number, own in enumerate((same[0], caption)):
            alone = wan.embed_text(encode_prompt(own)).attend(2, queries[number : number + 1], wan.attention)
            found = texts[i].attend(2, queries, wan.attention)[number : number + 1]
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_a_block_sees_its_own_caption_and_its_history_that_of_theirs() -> None:
    """Another caption of block 2 changes its own error, and, through its keys, later ones; not those before."""
    made = trainer(first_again=0)
    sample = made.samples.measured_places(made.data.places, 39)
    captions = (*sample.captions[:2], "place four", *sample.captions[3:])
    other = replace(sample, captions=captions, clean_captions=captions)
    weights = torch.ones(1, 1, 20, 8, 8)
    with torch.no_grad():
        one, two = (
            made.errors(stacked([each], PLACE_HISTORIES[0], made.device), weights)[:, 0] for each in (sample, other)
        )
    assert torch.equal(one[:2], two[:2])
    assert (one[2:] != two[2:]).all()
    assert (sample.sigma == 1).all()


def test_the_first_steps_see_the_whole_history() -> None:
    made = trainer(whole_steps=20)
    drawn = [made.batch(MicroBatch(step, "base", range(1), 0)).history for step in range(60)]
    assert set(drawn[:20]) == {PLACE_HISTORIES[0]}
    assert len(set(drawn[20:])) > 2


def test_an_untrained_branch_adds_nothing_and_learns() -> None:
    torch.manual_seed(0)
    made = trainer(hr=HRBranch((16, 4, 4, 4, 4, 256), 2))
    sample = made.samples.measured_places(made.data.places, 38)
    weights = torch.ones(1, 1, 20, 8, 8)
    plain, dual = (stacked([sample], MIDS_ONLY, made.device, dual) for dual in (False, True))
    errors = made.errors(dual, weights)
    assert torch.equal(errors, made.errors(plain, weights))
    errors.mean().backward()
    assert made.hr[-1].weight.grad.abs().max() > 0
    with torch.no_grad():
        made.hr[-1].weight.normal_()
        changed = made.errors(dual, weights)
    again = made.options.first_again
    assert torch.equal(changed[: again + 2], errors[: again + 2])  # the first mid block is attended by block 2
    assert (changed[again + 2 :] != errors[again + 2 :]).all()


def test_the_branch_is_in_the_share_of_batches_that_is_asked_for() -> None:
    hr = HRBranch((16, 4, 4, 4, 4, 256), 2)
    for share in (0.0, 0.5, 1.0):
        made = trainer(hr=hr, dual_share=share)
        dual = sum(made.batch(MicroBatch(step, "base", range(1), 0)).dual for step in range(100)) / 100
        assert abs(dual - share) < 0.15
    plain = trainer(dual_share=1.0)
    assert not any(plain.batch(MicroBatch(step, "base", range(1), 0)).dual for step in range(10))


def test_what_a_return_gains_from_its_history_is_measured() -> None:
    made = trainer(hr=HRBranch((16, 4, 4, 4, 4, 256), 2))
    seen: list[tuple[History, bool]] = []
    errors = made._held_out_errors

    def spied(samples: list, history: History, dual: bool = False) -> torch.Tensor:
        seen.append((history, dual))
        found = errors(samples, history, dual)
        # Each block's error is its number, so that the means tell which blocks were counted.
        again = made.options.first_again
        return (torch.arange(len(found)) - again).clamp(min=0).float()[:, None].expand_as(found)

    made._held_out_errors = spied
    found = made.evaluate(0)
    assert found["return"] == found["return_block_before"] == found["return_mids"] == (2 + 4) / 2
    assert found["new"] == (1 + 3) / 2  # the first block has no history, so it does not count
    assert [dual for _, dual in seen] == [False, False, False, False, True]
    assert "return_dual_mids" in found


def test_a_run_without_places_is_told_as_before() -> None:
    """So that a folder of an earlier version goes on."""
    plain = clips_of(WORDS, places=False)
    sizes = SIZES["tiny"]
    modules = build_wan_modules(sizes, base_command.initial_state_dict(sizes, seed=0))
    told = base.BaseTrainer(modules, base.TrainingClips(plain), base.BaseOptions(), HISTORIES).describe()
    options = {"rate", "ema", "shift", "history_noise", "clean_history", "first_again", "open_captions", "away_share"}
    options |= {"focus", "betas", "weight_decay"}
    assert told.keys() == options | {"clips", "away", "histories", "weights"}
    assert told["clips"].keys() == {"count", "latent_frames", "size", "block_frames", "temporal_stride", "away"}


def test_a_bidirectional_teacher_has_no_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bidirectional", "--place-clips", "8", "--clips", "8", "--held-out", "2", "--folder", f"{tmp_path}"]
    assert main(["train", "base", *options]) == 1
    assert "leave out --place-clips and --twin-clips, or --bidirectional" in capsys.readouterr().err
