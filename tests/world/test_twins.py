"""Twins differ in one colour, in nothing else, and stay in the training set."""

from __future__ import annotations

import numpy as np
import torch

from packforcing.world.captions import ObjectAttributes, is_held_out, parse
from packforcing.world.drawing import render
from packforcing.world.scenes import ObjectScene, compose, sample_scene
from packforcing.world.twins import changes, twin_scene


def colours(attributes: object) -> list[str]:
    """Everything that a caption says, word by word."""
    if isinstance(attributes, ObjectAttributes):
        return [attributes.background, attributes.colour, *map(str, (attributes.shape, attributes.motion))]
    return [attributes.sky, attributes.ground, *map(str, attributes.landmarks)]


def test_a_twin_differs_in_one_colour_and_is_not_held_out() -> None:
    changed, alone = set(), 0
    for seed in range(300):
        scene = sample_scene(seed)
        twin = twin_scene(scene, np.random.default_rng(seed))
        pairs = list(zip(colours(scene.attributes), colours(twin.attributes), strict=True))
        differing = [i for i, (a, b) in enumerate(pairs) if a != b]
        if not differing:
            alone += 1
            continue
        assert len(differing) == 1
        changed.add((type(scene), differing[0]))
        assert not is_held_out(twin.attributes)
        assert parse(twin.caption) == twin.attributes
        left = {name: value for name, value in vars(scene).items() if name != "attributes"}
        assert left == {name: value for name, value in vars(twin).items() if name != "attributes"}
    assert len(changed) == 4  # background and objects, sky and ground
    assert alone < 15  # scenes of four landmarks under no other sky and on no other ground


def test_what_is_not_changed_is_drawn_pixel_by_pixel_as_before() -> None:
    asked = parse("a red circle bounces on a blue background")
    assert isinstance(asked, ObjectAttributes)
    scene = compose(asked, 5)
    twin = next(each for each in changes(asked) if isinstance(each, ObjectAttributes) and each.background == "white")
    assert isinstance(scene, ObjectScene)
    other = ObjectScene(twin, scene.tracks, scene.shade)
    first, second = (render(each, 9) for each in (scene, other))
    same = (first == second).all(dim=0)
    red = (first - torch.tensor([215, 30, 40]).view(3, 1, 1, 1) / 127.5 + 1).abs().amax(dim=0) < 0.01
    assert red.sum() > 500
    assert (same != red).float().mean() < 1e-3  # pixels at the edge are mixed, and may be rounded to the same


def test_things_that_could_not_be_told_apart_are_not_made() -> None:
    found = changes(parse("the camera pans over a landscape with an orange tree and a red tower and comes back"))
    assert {(each.sky, each.ground) for each in found} == {("purple", "green"), ("blue", "yellow")}
