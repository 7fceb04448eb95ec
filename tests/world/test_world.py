"""The synthetic world: captions say what is drawn, and the ground truth is where the pixels are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing.demo.text import words
from packforcing.errors import PackForcingError
from packforcing.evaluation.metrics import not_asked
from packforcing.evaluation.runs import MOST_PROMPTS
from packforcing.world.captions import (
    COLOURS,
    MOTIONS,
    Landmark,
    LandscapeAttributes,
    ObjectAttributes,
    is_held_out,
    opened,
    parse,
)
from packforcing.world.drawing import render, render_uint8
from packforcing.world.scenes import FRAME, LandscapeScene, ObjectScene, compose, evaluation_prompts, sample_scene
from packforcing.world.shapes import SHAPES

SCENES = [sample_scene(seed) for seed in range(400)]
LANDSCAPE = "the camera pans over a landscape with a red house, a white tower and an orange tree and comes back"


def cover(scene: ObjectScene, frame: np.ndarray) -> np.ndarray:
    """Share of each pixel [H, W] that shows the object's colour and not the background's."""
    colour, background = (np.array(COLOURS[c], float) for c in (scene.attributes.colour, scene.attributes.background))
    axis = colour - background
    return np.clip((frame - background) @ axis / (axis @ axis), 0, 1)


# ---------------------------------------------------------------------- captions


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_a_caption_is_read_back_as_what_it_was_made_of(seed: int) -> None:
    scene = sample_scene(seed)
    assert parse(scene.caption) == scene.attributes
    assert all(parse(scene.attributes.caption(phrasing)) == scene.attributes for phrasing in (0, 1))


def test_captions_of_the_issue_are_understood() -> None:
    assert parse("a red circle bounces on a blue background") == ObjectAttributes(
        1, "", "red", "circle", "bounces", "blue"
    )
    assert parse("Two white squares bounce on a black background.") == ObjectAttributes(
        2, "", "white", "square", "bounces", "black"
    )
    assert parse("a large yellow star spins on a green background").size == "large"
    assert parse("the camera pans over a landscape with a red house and comes back") == LandscapeAttributes(
        (Landmark("red", "house"),), "green", "blue"
    )


@pytest.mark.parametrize("caption", ["", "a cat plays the piano", "a red circle", "a pink circle spins on a"])
def test_a_caption_outside_of_the_world_is_refused_with_an_example(caption: str) -> None:
    with pytest.raises(PackForcingError, match="a red circle bounces on a blue background"):
        parse(caption)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 1.0]))
def test_an_open_caption_leaves_colours_out_and_a_scene_chooses_them(seed: int, share: float) -> None:
    said = sample_scene(seed).attributes
    asked = opened(said, seed, share)
    assert parse(asked.caption()) == parse(asked.caption(phrasing=1)) == asked
    assert asked == opened(said, seed, share)
    shown = compose(asked, seed).attributes
    before, left, after = (
        [(each.colour, each.background)] if isinstance(each, ObjectAttributes) else each.landmarks
        for each in (said, asked, shown)
    )
    assert [[bool(word) for word in each] for each in after] == [[True, True]] * len(before)
    for was, is_said, is_shown in zip(before, left, after, strict=True):
        assert all(word in ("", old) for word, old in zip(is_said, was, strict=True))
        assert all(word in ("", new) for word, new in zip(is_said, is_shown, strict=True))
    assert said.caption() != asked.caption()
    if share == 1:
        assert not any(each[0] for each in left)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_what_goes_away_is_back_within_a_clip(seed: int) -> None:
    scene = sample_scene(seed, away=True)
    assert parse(scene.caption) == scene.attributes
    times = np.arange(80) / 16
    if isinstance(scene, ObjectScene):
        shown = scene.is_shown(times)
        assert " blink" in scene.caption
        assert (np.diff(shown.astype(int)) == 1).any()
        assert 0.19 <= shown.mean() <= 0.75  # 1 s of 5 s at least, twice 1.75 s and a quarter at most
        video = render_uint8(replace(scene, attributes=replace(scene.attributes, blinks=False)), 80)
        empty = (video == video[np.argmin(shown)]).all(axis=(1, 2, 3))
        assert (empty == ~shown).all()
    else:
        assert "pans quickly" in scene.caption
        assert 3.5 <= scene.period <= 2 * scene.travel / 50 + 1e-6


def test_open_captions_are_understood() -> None:
    assert parse("two small stars swing") == ObjectAttributes(2, "small", "", "star", "swings", "")
    assert parse("on a blue background, a circle bounces") == ObjectAttributes(1, "", "", "circle", "bounces", "blue")
    assert parse("the camera pans over a landscape with a house and a blue lake and comes back") == LandscapeAttributes(
        (Landmark("", "house"), Landmark("blue", "lake"))
    )


def test_the_vocabulary_is_small_and_every_word_is_common() -> None:
    vocabulary = {word for scene in SCENES for word in words(scene.caption)}
    assert len(vocabulary) < 60
    assert {"star", "orange", "swing", "swings", "lake", "sky", "large"} <= vocabulary


# ---------------------------------------------------------------------- sampling


def test_a_seed_gives_one_scene_and_one_video() -> None:
    for seed in range(6):
        assert sample_scene(seed) == sample_scene(seed)
        assert np.array_equal(render_uint8(sample_scene(seed), 3), render_uint8(sample_scene(seed), 3))
    rng = np.random.default_rng(0)
    assert sample_scene(rng) != sample_scene(rng)


def test_families_and_attributes_are_balanced() -> None:
    landscapes = [scene for scene in SCENES if isinstance(scene, LandscapeScene)]
    objects = [scene.attributes for scene in SCENES if isinstance(scene, ObjectScene)]
    assert 150 < len(landscapes) < 250
    for values, name in ((MOTIONS, "motion"), (SHAPES, "shape"), (COLOURS, "colour"), (COLOURS, "background")):
        counts = [sum(getattr(each, name) == value for each in objects) for value in values]
        assert min(counts) > 0.3 * len(objects) / len(values), name
    assert not any(each.shape == "circle" and each.motion == "spins" for each in objects)  # it could not be seen


def test_periods_are_of_8_to_24_seconds_and_landmarks_leave_the_view() -> None:
    for scene in SCENES:
        if isinstance(scene, LandscapeScene):
            assert 8 <= scene.period <= 24
            camera = scene.camera(np.arange(0, scene.period, 0.1))
            assert camera.min() == pytest.approx(0, abs=0.5)
            assert camera.max() == pytest.approx(scene.travel, abs=0.5)
            assert all((np.abs(place - camera - FRAME / 2) > FRAME / 2).any() for place in scene.places)


@pytest.mark.parametrize("is_open", [False, True])
def test_evaluation_prompts_are_held_out_of_training(is_open: bool) -> None:
    prompts = evaluation_prompts(32, is_open)
    assert len(set(prompts)) == 32
    assert evaluation_prompts(10, is_open) == prompts[:10]
    attributes = [parse(prompt) for prompt in prompts]
    assert sum(isinstance(each, ObjectAttributes) for each in attributes) == 16
    assert {each.motion for each in attributes[:8:2]} == set(MOTIONS)
    assert {len(each.landmarks) for each in attributes[1:8:2]} == {1, 2, 3, 4}
    assert [bool(not_asked(each)) for each in attributes] == [is_open] * 32
    gone = [" blink" in prompt or " quickly " in prompt for prompt in prompts]
    assert gone == ([False] * 8 + [is_open] * 8) * 2
    if not is_open:
        trained = {scene.attributes.combination for scene in SCENES}
        assert all(is_held_out(each) and each.combination not in trained for each in attributes)
    assert is_held_out(sample_scene(0, held_out=True).attributes)
    assert len(set(evaluation_prompts(MOST_PROMPTS, is_open))) == MOST_PROMPTS


# ---------------------------------------------------------------------- drawing


def test_a_clip_is_what_a_vae_takes() -> None:
    clip = render(SCENES[0], 77)
    assert clip.shape == (3, 77, 128, 128)
    assert clip.dtype == torch.float32
    assert clip.is_contiguous()
    assert -1 <= clip.min() < clip.max() <= 1
    frames = torch.from_numpy(render_uint8(SCENES[0], 77)).permute(3, 0, 1, 2)
    torch.testing.assert_close((clip + 1) * 127.5, frames.float(), rtol=0, atol=1e-4)


def test_a_video_may_begin_anywhere_and_a_longer_one_begins_with_the_shorter() -> None:
    for scene in SCENES[:6]:
        whole = render_uint8(scene, 40)
        assert np.array_equal(render_uint8(scene, 10, start=25), whole[25:35])
        assert np.array_equal(render_uint8(scene, 10), whole[:10])


@pytest.mark.parametrize("size", [64, 256])
def test_the_frame_may_have_another_size(size: int) -> None:
    for scene in SCENES[:4]:
        usual, other = render_uint8(scene, 2).astype(float), render_uint8(scene, 2, size=size).astype(float)
        assert other.shape == (2, size, size, 3)
        small = min(size, FRAME)
        usual, other = (
            v.reshape(2, small, v.shape[1] // small, small, v.shape[1] // small, 3).mean((2, 4)) for v in (usual, other)
        )
        assert np.abs(usual - other).mean() < 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_objects_are_where_their_tracks_say_and_whole(shape: str, motion: str) -> None:
    for count in (1, 2):
        scene = compose(ObjectAttributes(count, "", "white", shape, motion, "black"), seed=3)
        scene = replace(scene, shade=0.0)
        video, times = render_uint8(scene, 80), np.arange(80) / 16
        areas = np.array([cover(scene, frame).sum() for frame in video])
        assert np.ptp(areas) < 0.02 * areas.mean()  # never cut by a border, never over each other
        centres = np.mean([track.positions(times) for track in scene.tracks], axis=0)
        x = np.arange(FRAME) + 0.5
        found = [(cover(scene, f).sum(0) @ x / a, cover(scene, f).sum(1) @ x / a) for f, a in zip(video, areas)]  # noqa: B905
        assert np.abs(np.array(found) - centres).max() < 0.3


def test_bouncing_objects_touch_the_borders() -> None:
    scene = compose(ObjectAttributes(1, "", "white", "circle", "bounces", "black"), seed=3)
    seen = np.max([cover(scene, frame) for frame in render_uint8(scene, 600)], axis=0) > 0.5
    assert seen[:2].any()
    assert seen[-2:].any()
    assert seen[:, :2].any()
    assert seen[:, -2:].any()


def test_edges_are_antialiased() -> None:
    scene = replace(compose(ObjectAttributes(1, "", "white", "circle", "swings", "black"), seed=1), shade=0.0)
    part = cover(scene, render_uint8(scene, 1)[0])
    assert part.sum() == pytest.approx(np.pi * scene.radius**2, rel=0.005)
    assert ((part > 0.05) & (part < 0.95)).sum() > scene.radius


def test_the_same_place_looks_the_same_when_the_camera_returns() -> None:
    scene = replace(compose(parse(LANDSCAPE), seed=0), phase=0.0, period=16.0)
    camera = scene.camera(np.arange(257) / 16)
    assert np.allclose(camera, camera[::-1], atol=1e-9)
    video = render_uint8(scene, 257)
    assert np.abs(video.astype(int) - video[::-1]).max() <= 1
    assert not np.array_equal(video[0], video[128])
    still = scene.camera(np.array([4.0, 4.0 + 1 / 16]))
    assert 1 < still[1] - still[0] < 3  # pixels a frame


def test_panning_moves_the_picture_by_the_cameras_way() -> None:
    scene = replace(compose(parse(LANDSCAPE), seed=0), phase=0.0)
    frames = np.arange(64)
    way = scene.camera(frames / 16)
    far = int(np.argmin(np.abs(way - way[20] - 30)))
    before, after = render_uint8(scene, 64)[[20, far]].astype(int)
    assert np.abs(before[:, 30:] - after[:, :-30]).mean() < 3 < np.abs(before - after).mean()
