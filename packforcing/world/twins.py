"""Twins: two scenes that are the same but for one colour. A video whose prompt changes goes from one to the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .captions import GROUNDS, SKIES, Attributes, ObjectAttributes, is_held_out
from .scenes import ObjectScene, Scene, beside, landmark_colours


def twin_scene(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with another colour of one thing: of its background or its objects, of its sky or its ground.

    All that moves goes on moving as it does. Nothing that is held out of training is drawn. The scene itself where
    there is no other.
    """
    free = [each for each in changes(scene.attributes) if not is_held_out(each)]
    if not free:
        return scene
    attributes = free[rng.integers(len(free))]
    if isinstance(scene, ObjectScene):
        assert isinstance(attributes, ObjectAttributes)
        return replace(scene, attributes=attributes)
    assert not isinstance(attributes, ObjectAttributes)
    return replace(scene, attributes=attributes)


def changes(asked: Attributes) -> list[Attributes]:
    """The attributes with one colour changed, in all ways in which the parts of a scene can still be told apart."""
    if isinstance(asked, ObjectAttributes):
        behind = [replace(asked, background=each) for each in beside(asked.colour) if each != asked.background]
        return [*behind, *(replace(asked, colour=each) for each in beside(asked.background) if each != asked.colour)]
    under = [replace(asked, sky=each) for each in SKIES if each != asked.sky]
    over = [replace(asked, ground=each) for each in GROUNDS if each != asked.ground]

    def told_apart(ground: str, sky: str) -> bool:
        return all(colour in landmark_colours(kind, set(), ground, sky) for colour, kind in asked.landmarks)

    return [each for each in under + over if told_apart(each.ground, each.sky)]
