"""Metrics against ground truth: perfect videos score about 1, spoiled ones clearly less, each where it is spoiled."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import isnan

import numpy as np
import pytest
import torch

from packforcing.errors import PackForcingError
from packforcing.evaluation.landscapes import camera_positions, last_visit
from packforcing.evaluation.metrics import default_windows, evaluate_video
from packforcing.evaluation.objects import shape_features
from packforcing.evaluation.over_time import border_jump, cleanliness, moving_cells
from packforcing.evaluation.views import connected_regions, views
from packforcing.world.captions import Landmark, parse
from packforcing.world.drawing import render_uint8
from packforcing.world.scenes import FRAME, Scene, compose, evaluation_prompts, sample_scene
from packforcing.world.shapes import SHAPES, signed_distance

SQUARES = "two red squares bounce on a blue background"
PAN = "the camera pans over a landscape with a red house, a white tower and an orange tree and comes back"
FIRST, LAST = (0.0, 5.0), (15.0, 20.0)


@cache
def scene_of(caption: str) -> Scene:
    return compose(parse(caption), 3)


@cache
def truth(caption: str, seconds: int) -> np.ndarray:
    video = render_uint8(scene_of(caption), seconds * 16)
    video.flags.writeable = False
    return video


def squares_but(**changes) -> np.ndarray:
    """20 s of SQUARES that turn into something else after 10 s."""
    video = truth(SQUARES, 20).copy()
    other = compose(replace(scene_of(SQUARES).attributes, **changes), 3)
    video[160:] = render_uint8(other, 160, start=160)
    return video


def landscape_but(turned: bool = False, **changes) -> np.ndarray:
    """40 s of PAN in which attributes change after 20 s, or on every other way of the camera from the left end."""
    scene = scene_of(PAN)
    other = render_uint8(replace(scene, attributes=replace(scene.attributes, **changes)), 640)
    ways = np.floor(np.arange(640) / 16 / scene.period + scene.phase)
    changed = ways % 2 == 1 if turned else np.arange(640) >= 320
    return np.where(changed[:, None, None, None], other, truth(PAN, 40))


def soften(video: np.ndarray, blur: float, noise: float) -> np.ndarray:
    """What a small VAE does to a video: blur of `blur` pixels and noise of `noise` levels."""
    kernel = torch.exp(-(torch.arange(-4.0, 5) ** 2) / (2 * blur**2))
    kernel /= kernel.sum()
    frames = torch.from_numpy(video.copy()).permute(0, 3, 1, 2).float()
    frames = torch.nn.functional.pad(frames, (4, 4, 4, 4), mode="replicate")
    for shape in ((1, 1, 1, 9), (1, 1, 9, 1)):
        frames = torch.nn.functional.conv2d(frames, kernel.view(shape).expand(3, -1, -1, -1), groups=3)
    noisy = frames + noise * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    return noisy.clamp(0, 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def last_window(video: np.ndarray, caption: str = SQUARES, window: tuple[float, float] = LAST) -> dict:
    return evaluate_video(video, caption, windows=[window])["windows"][0]


# ---------------------------------------------------------------------- truth scores 1


@pytest.mark.parametrize(
    ("index", "is_open"), [(0, False), (1, False), (2, False), (3, False), (3, True), (8, True), (9, True)]
)
def test_a_minute_of_the_world_scores_one_in_every_window(index: int, is_open: bool) -> None:
    caption = evaluation_prompts(10, is_open)[index]
    video = render_uint8(compose(parse(caption), index), 960)
    windows = [FIRST, (55.0, 60.0), (36.0, 60.0)]
    for scores in evaluate_video(video, caption, windows=windows)["windows"]:
        assert scores["attribute_accuracy"] >= 0.97
        assert scores["memory"] >= 0.97 or not is_open
        assert abs(scores["drift"]) <= 0.03
        assert scores["background_stability"] > 0.99
        assert scores["cleanliness"] > 0.95
        assert abs(scores["saturation_drift"]) < 0.1  # other parts of a landscape have other colours
        assert scores["dynamic_degree"] > (0.01 if "blinks" in caption else 0.02)
        assert scores["moving"] > (0.3 if "blinks" in caption else 0.9)
        if scores["start"] >= 30:
            assert scores["revisit_similarity"] > 0.97
    assert 0.8 < scores["border_jump"] < 1.25  # of the last window


def test_clips_of_five_seconds_score_one() -> None:
    for seed in range(100, 110):
        scene = sample_scene(seed)
        scores = evaluate_video(render_uint8(scene, 80), scene.caption)["windows"][0]
        assert scores["attribute_accuracy"] >= 0.97, (scene.caption, scores)


def test_mild_blur_and_noise_hardly_matter() -> None:
    for seed in range(200, 205):
        scene = sample_scene(seed)
        video = soften(render_uint8(scene, 128), blur=1.5, noise=5)
        scores = last_window(video, scene.caption, (4.0, 8.0))
        assert scores["attribute_accuracy"] >= 0.95, (scene.caption, scores)
        assert isnan(scores["revisit_similarity"]) or scores["revisit_similarity"] > 0.9
        assert scores["cleanliness"] > 0.6


# ---------------------------------------------------------------------- standing still buys nothing


@pytest.mark.parametrize(("caption", "seconds"), [(SQUARES, 20), (PAN, 40)])
def test_a_frozen_video_has_no_motion_and_sees_nothing_again(caption: str, seconds: int) -> None:
    frozen = np.repeat(truth(caption, seconds)[:1], seconds * 16, axis=0)
    first, last, whole = evaluate_video(frozen, caption)["windows"]
    assert first["dynamic_degree"] == last["dynamic_degree"] == first["moving"] == last["moving"] == 0
    assert isnan(first["revisit_similarity"])
    assert last["revisit_similarity"] == whole["revisit_similarity"] == 0
    assert last["border_jump"] == 1


@pytest.mark.parametrize(("caption", "seconds"), [(SQUARES, 20), (PAN, 40)])
def test_a_video_that_freezes_halfway_sees_nothing_again_from_then_on(caption: str, seconds: int) -> None:
    video = truth(caption, seconds).copy()
    video[len(video) // 2 :] = video[len(video) // 2]
    first, last, whole = evaluate_video(video, caption)["windows"]
    assert first["dynamic_degree"] > 0.05
    assert last["dynamic_degree"] == last["revisit_similarity"] == 0
    assert whole["revisit_similarity"] < 0.65


# ---------------------------------------------------------------------- objects


@pytest.mark.parametrize(
    ("attribute", "value"), [("colour", "green"), ("shape", "star"), ("background", "black"), ("count", 1)]
)
def test_a_wrong_attribute_costs_its_share(attribute: str, value: str | int) -> None:
    scores = last_window(squares_but(**{attribute: value}))
    assert scores["attributes"].pop(attribute) == 0
    assert set(scores["attributes"].values()) == {1.0}
    assert scores["attribute_accuracy"] == 0.75
    assert scores["drift"] == 0.25


def test_size_is_measured_where_it_is_asked_for() -> None:
    for size in ("small", "large"):
        caption = f"a {size} purple star swings on a white background"
        video = render_uint8(scene_of(caption), 80)
        assert last_window(video, caption, FIRST)["attributes"]["size"] == 1
        other = caption.replace(size, {"small": "large", "large": "small"}[size])
        assert last_window(video, other, FIRST)["attributes"]["size"] == 0


def test_a_vanished_object_leaves_only_the_background() -> None:
    video = truth(SQUARES, 20).copy()
    video[160:] = render_uint8(replace(scene_of(SQUARES), tracks=()), 160)
    scores = last_window(video)
    assert scores["attributes"] == {"background": 1, "count": 0, "colour": 0, "shape": 0}
    assert scores["drift"] == 0.75
    assert scores["revisit_similarity"] == scores["dynamic_degree"] == 0


def test_what_blinks_must_come_and_go() -> None:
    caption = "two red squares bounce and blink on a blue background"
    scene = compose(parse(caption), 3)
    video = render_uint8(scene, 320)
    right = {"background": 1, "count": 1, "colour": 1, "shape": 1, "blinks": 1}
    assert last_window(video, caption)["attributes"] == right
    assert last_window(render_uint8(replace(scene, blink=None), 320), caption)["attributes"] == {**right, "blinks": 0}
    nothing = render_uint8(replace(scene, tracks=()), 320)
    assert last_window(nothing, caption)["attributes"] == {**dict.fromkeys(right, 0), "background": 1}
    green = compose(replace(scene.attributes, colour="green"), 3)
    other = np.concatenate([video[:160], render_uint8(green, 160, start=160)])
    assert last_window(other, caption)["attributes"] == {**right, "colour": 0}
    assert last_window(other, "two squares bounce and blink on a blue background")["memory"] == 0


def test_a_new_background_is_not_stable_and_not_the_same_place() -> None:
    scores = last_window(squares_but(background="green"))
    assert scores["background_stability"] < 0.3
    assert scores["revisit_similarity"] < 0.3


def test_fading_colours_are_drift() -> None:
    grey = np.linspace(0, 0.7, 320)[:, None, None, None]
    scores = last_window((truth(SQUARES, 20) * (1 - grey) + 150 * grey).astype(np.uint8))
    assert scores["saturation_drift"] < -0.2
    assert scores["background_stability"] < 0.7
    assert scores["revisit_similarity"] < 0.7
    assert scores["drift"] > 0.3


def test_noise_is_not_clean() -> None:
    video = truth(SQUARES, 20)[:80]
    noise = 40 * np.random.default_rng(0).standard_normal(video.shape, np.float32)
    noisy = np.clip(video + noise, 0, 255).astype(np.uint8)
    assert cleanliness(noisy) < 0.3
    assert cleanliness(video) > 0.95
    assert cleanliness(soften(video, blur=2, noise=0)) > 0.95  # blur is not noise


# ---------------------------------------------------------------------- landscapes


def test_other_landmarks_are_not_what_was_asked() -> None:
    others = (Landmark("purple", "house"), Landmark("black", "tower"), Landmark("green", "tree"))
    scores = last_window(landscape_but(landmarks=others), PAN, (35.0, 40.0))
    assert scores["attributes"] == {"sky": 1, "ground": 1, "landmarks": 0, "only asked": 0}


@pytest.mark.parametrize("name", ["sky", "ground"])
def test_another_sky_or_ground_costs_its_share(name: str) -> None:
    scores = last_window(landscape_but(**{name: {"sky": "purple", "ground": "red"}[name]}), PAN, (35.0, 40.0))
    assert scores["attributes"].pop(name) == 0
    assert set(scores["attributes"].values()) == {1.0}


def test_a_long_window_must_show_every_landmark() -> None:
    scene = scene_of(PAN)
    only = replace(
        scene, attributes=replace(scene.attributes, landmarks=scene.attributes.landmarks[:1]), places=(64.0,)
    )
    video = render_uint8(only, 480)
    assert last_window(video, PAN, (0.0, 30.0))["attributes"]["landmarks"] == pytest.approx(1 / 3)


def test_places_that_change_while_the_camera_is_away_are_not_the_same() -> None:
    landmarks = scene_of(PAN).attributes.landmarks
    same = last_window(truth(PAN, 40), PAN, (16.0, 40.0))["revisit_similarity"]
    swapped = last_window(landscape_but(turned=True, landmarks=landmarks[::-1]), PAN, (16.0, 40.0))
    assert same > 0.97
    assert swapped["revisit_similarity"] < 0.85
    assert swapped["attribute_accuracy"] > 0.97  # what is asked is still there: only memory failed


def test_a_camera_that_never_returns_sees_nothing_again() -> None:
    away = replace(scene_of(PAN), travel=4000.0, period=400.0, phase=0.0)
    assert last_window(render_uint8(away, 640), PAN, (30.0, 40.0))["revisit_similarity"] == 0


def test_the_camera_is_found_from_pixels() -> None:
    for seed, caption in enumerate(evaluation_prompts(8)[1::4]):
        scene = compose(parse(caption), seed)
        camera = scene.camera(np.arange(400) / 16)
        video = soften(render_uint8(scene, 400), blur=1.0, noise=4)
        assert np.abs(camera_positions(video) - (camera - camera[0])).max() < 4, caption


def test_a_visit_counts_after_the_camera_went_away() -> None:
    there_and_back = np.concatenate([np.arange(0, 100.0), np.arange(100.0, 0, -1)])
    assert last_visit(there_and_back, 190, 0) == (10, 0.0, 90.0)
    assert last_visit(there_and_back, 110, 0) is None  # 10 pixels away and back is not away
    assert last_visit(there_and_back, 190, 50) is None  # forgotten: too long ago


# ---------------------------------------------------------------------- what a caption leaves out


@pytest.mark.parametrize(
    "caption", ["two squares bounce", "two red squares bounce", "two squares bounce on a blue background"]
)
def test_colours_that_are_not_said_must_stay_those_of_the_beginning(caption: str) -> None:
    left_out = {"colour": "red" not in caption, "background": "blue" not in caption}
    assert last_window(truth(SQUARES, 20), caption)["memory"] == 1
    for attribute, value in (("colour", "green"), ("background", "black")):
        scores = last_window(squares_but(**{attribute: value}), caption)
        assert scores["attributes"][attribute] == 0
        assert scores["memory"] == 1 - left_out[attribute] / sum(left_out.values())
        assert scores["attribute_accuracy"] == (
            1 if left_out[attribute] else pytest.approx(1 - 1 / (4 - sum(left_out.values())))
        )


def test_landmarks_that_are_not_said_must_stay_those_of_the_first_way() -> None:
    caption = "the camera pans over a landscape with a house, a tower and a tree and comes back"
    late = (35.0, 40.0)
    assert last_window(truth(PAN, 40), caption, late)["memory"] == 1
    others = (Landmark("purple", "house"), Landmark("black", "tower"), Landmark("green", "tree"))
    video = truth(PAN, 40).copy()
    changed = replace(scene_of(PAN), attributes=replace(scene_of(PAN).attributes, landmarks=others))
    video[26 * 16 :] = render_uint8(changed, 14 * 16, start=26 * 16)
    scores = last_window(video, caption, late)
    assert scores["memory"] == 0
    assert scores["attribute_accuracy"] == 1  # the sky and the ground
    assert isnan(last_window(truth(PAN, 40), PAN, late)["memory"])


def test_a_video_without_landmarks_has_none_to_remember() -> None:
    caption = "the camera pans over a landscape with a house and comes back"
    empty = replace(scene_of(PAN), attributes=replace(scene_of(PAN).attributes, landmarks=()), places=())
    for window in ((35.0, 40.0), (0.0, 40.0)):
        assert last_window(render_uint8(empty, 640), caption, window)["memory"] == 0


# ---------------------------------------------------------------------- parts


def test_motion_is_the_share_of_the_frame_that_changes() -> None:
    video = np.zeros((3, FRAME, FRAME, 3), np.uint8)
    video[1, : FRAME // 4] = 200
    noise = np.random.default_rng(0).integers(0, 12, video.shape, np.uint8)
    assert moving_cells(views(video + noise)).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("block_frames", [1, 3, 4])
def test_a_jump_at_the_borders_of_blocks_is_seen_and_one_elsewhere_is_not(block_frames: int) -> None:
    smooth = truth(SQUARES, 20)[:160]
    frames = np.arange(160)
    blocks = np.maximum(0, frames + 3) // (4 * block_frames)  # the first block has three frames less
    at_borders = np.clip(smooth + (blocks % 2 * 20)[:, None, None, None], 0, 255).astype(np.uint8)
    shifted = np.clip(smooth + (np.roll(blocks, 4) % 2 * 20)[:, None, None, None], 0, 255).astype(np.uint8)
    assert border_jump(smooth, block_frames) == pytest.approx(1, abs=0.25)
    assert border_jump(at_borders, block_frames) > 3
    if block_frames > 1:
        assert border_jump(shifted, block_frames) < 1
    assert isnan(border_jump(smooth[:5], 4))


def test_regions_are_numbered_apart() -> None:
    mask = np.zeros((2, 8, 8), bool)
    mask[0, 1:4, 1:4] = mask[0, 4, 4] = mask[1, ::2] = True  # the corner at (4, 4) does not connect
    regions = connected_regions(mask)
    assert [len(np.unique(each)) - 1 for each in regions] == [2, 4]
    assert (regions > 0).tolist() == mask.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_features_of_a_shape_hold_at_any_angle_and_size(shape: str) -> None:
    y, x = np.mgrid[-32:32, -32:32] + 0.3
    found = []
    for turn, radius in ((0.0, 25.0), (0.7, 25.0), (2.1, 8.0)):
        points = np.stack([x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)], axis=-1)
        found.append(shape_features(np.clip(0.5 - signed_distance(shape, points, radius), 0, 1)))
    assert np.abs(found[0] - found[1]).max() < 0.02
    assert np.abs(found[0] - found[2]).max() < 0.08


def test_default_windows_are_the_first_the_last_and_the_whole() -> None:
    assert default_windows(60) == [(0, 5), (55, 60), (0, 60)]
    assert default_windows(5) == [(0, 5)]
    assert default_windows(3) == [(0, 3)]


def test_one_block_can_be_evaluated() -> None:
    scores = evaluate_video(truth(SQUARES, 20)[:13], SQUARES)["windows"][0]
    assert scores["attribute_accuracy"] == 1
    assert isnan(scores["border_jump"])
    assert evaluate_video(truth(PAN, 40)[:1], PAN)["windows"][0]["dynamic_degree"] == 0


def test_mistakes_are_told() -> None:
    video = truth(SQUARES, 20)
    with pytest.raises(PackForcingError, match="no scene for the caption"):
        evaluate_video(video, "a cat")
    with pytest.raises(PackForcingError, match=r"lasts 20 s: it has no frames in the window \(30, 35\)"):
        evaluate_video(video, SQUARES, windows=[(30, 35)])
    with pytest.raises(PackForcingError, match="must be uint8"):
        evaluate_video(video.astype(np.float32), SQUARES)
