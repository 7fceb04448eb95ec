"""Places: scenes under a name, which a video leaves and comes back to.

A *tour* is a way through a few places, block by block. A place's clock stands still while it is not shown, so it comes
back as it was left. The caption of a stretch of blocks names its place ("place two"). The first time it may also
describe it ("place two: a red circle bounces on a blue background"); later only the history knows what the place looks
like.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, cat

from ..errors import PackForcingError
from .captions import TOO_CLOSE, Attributes, ObjectAttributes
from .drawing import render
from .scenes import EVALUATION_SEED, FPS, FRAME, LONGEST_START, LandscapeScene, Scene, sample_scene

NAMES = ("one", "two", "three", "four")
MOST_PLACES = 3  # in a tour
FEWEST_BLOCKS = 3  # of a tour with a return
STAY = 0.2  # how often a block shows the same place as the block before
CANDIDATES = 48  # scenes from which each place of a held-out tour is chosen

_PLACE = re.compile(rf"place (?P<name>{'|'.join(NAMES)})(?:: (?P<description>.+))?")


def place_caption(name: str, description: str = "") -> str:
    """The caption of a place: "place two", or with a description "place two: a red circle bounces ..."."""
    return f"place {name}: {description}" if description else f"place {name}"


def parse_place(caption: str) -> tuple[str, str]:
    """The name and the description ("" if there is none) of a place's caption.

    Raises PackForcingError for a caption that names no place.
    """
    match = _PLACE.fullmatch(" ".join(caption.lower().strip(" .").split()))
    if match is None:
        raise PackForcingError(
            f"The caption '{caption}' names no place: begin with one of {', '.join(map(place_caption, NAMES))}, and "
            "describe it after a colon, if you like."
        )
    return match["name"], match["description"] or ""


# A name for each colour of a background, or of a landscape's ground.
TELLING_NAMES = {
    "red": "one",
    "orange": "one",
    "yellow": "two",
    "white": "two",
    "green": "three",
    "black": "three",
    "blue": "four",
    "purple": "four",
}


def telling_name(attributes: Attributes) -> str:
    """The one of NAMES that tells a scene's largest colour.

    Names that tell nothing are soon ignored, and what is ignored cannot be learnt to be looked up in the history. So
    training begins with names that tell something.
    """
    large = attributes.background if isinstance(attributes, ObjectAttributes) else attributes.ground
    return TELLING_NAMES[large]


@dataclass(frozen=True)
class Place:
    """A scene under a name."""

    name: str  # one of NAMES
    scene: Scene
    start: int = 0  # frame of the scene that is shown first


@dataclass(frozen=True)
class Tour:
    """A way through places: `way` has the number of the place that each block shows."""

    places: tuple[Place, ...]
    way: tuple[int, ...]

    def captions(self, described: Sequence[bool]) -> list[str]:
        """The caption of each block. `described` says for each place whether its first stretch describes it."""
        said = [place.scene.caption * told for place, told in zip(self.places, described, strict=True)]
        return tour_captions([place.name for place in self.places], said, self.way)

    @property
    def returns(self) -> tuple[int, ...]:
        """The blocks that show a place again which the block before did not show."""
        return tuple(block for block, shows in enumerate(showings(self.way)) if shows == "return")

    def pixels(self, block_frames: Sequence[int], size: int = FRAME) -> Tensor:
        """The tour's frames [3, F, size, size] in [-1, 1]; `block_frames` are the video frames of each block."""
        clock = [place.start for place in self.places]
        parts = []
        for number, frames in zip(self.way, block_frames, strict=True):
            parts.append(render(self.places[number].scene, frames, FPS, size, clock[number]))
            clock[number] += frames
        return cat(parts, dim=1)


def showings(way: Sequence[int] | Sequence[str]) -> list[str]:
    """What each block of a way shows, by its place's number or short caption.

    It is a "new" place, the "same" as in the block before, or a "return".
    """
    return [
        "new" if place not in way[:block] else "same" if place == way[block - 1] else "return"
        for block, place in enumerate(way)
    ]


def tour_captions(names: Sequence[str], descriptions: Sequence[str], way: Sequence[int]) -> list[str]:
    """The caption of each block of a way through places. A place's first stretch has its description, if not ""."""
    seen: set[int] = set()
    captions: list[str] = []
    for block, number in enumerate(way):
        if block and number == way[block - 1]:
            captions.append(captions[-1])
            continue
        captions.append(place_caption(names[number], "" if number in seen else descriptions[number]))
        seen.add(number)
    return captions


def sample_way(rng: np.random.Generator, blocks: int, stay: float = STAY) -> tuple[int, ...]:
    """A random way of `blocks` blocks (FEWEST_BLOCKS or more) through two or three places, one of which comes back.

    `stay`: how often a block shows the same place as the block before.
    """
    while True:
        way = [0]
        while len(way) < blocks:
            known = max(way) + 1
            others = [number for number in range(min(known + 1, MOST_PLACES)) if number != way[-1]]
            way.append(way[-1] if rng.random() < stay else others[rng.integers(len(others))])
        if "return" in showings(way):
            return tuple(way)


def sample_tour(seed: int | np.random.Generator, blocks: int) -> Tour:
    """A random tour of `blocks` blocks through scenes of the training set, under names drawn anew."""
    rng = np.random.default_rng(seed)
    way = sample_way(rng, blocks)
    names = rng.permutation(NAMES)[: max(way) + 1]
    places = [Place(str(name), sample_scene(rng), int(rng.integers(LONGEST_START))) for name in names]
    return Tour(tuple(places), way)


# --- held-out tours ---------------------------------------------------------------------------------------------------

Look = tuple[str, ...]  # the colours of large areas: an object scene's background; a landscape's sky and ground


def look(scene: Scene) -> Look:
    """The names of the colours that fill most of a scene's frames."""
    if isinstance(scene, LandscapeScene):
        return scene.attributes.sky, scene.attributes.ground
    return (scene.attributes.background,)


def alike(one: Look, other: Look) -> bool:
    """Whether two looks share a colour, or have one each that could be taken for the other's."""
    if len(one) != len(other):
        return False
    return any(a == b or {a, b} in TOO_CLOSE for a, b in zip(one, other, strict=True))


def held_out_tours(count: int, way: Sequence[int]) -> list[Tour]:
    """Tours on one way through scenes that training never sees; a longer list begins with the shorter one.

    No two places of a tour look alike, and each is chosen to have the look that the places before had most seldom, so
    that places differ from tour to tour as well. Landscapes say their sky and their ground. Places are named in order.
    """
    rng = np.random.default_rng(EVALUATION_SEED)
    used: Counter[Look] = Counter()
    return [Tour(_held_out_places(rng, max(way) + 1, used), tuple(way)) for _ in range(count)]


def _held_out_places(rng: np.random.Generator, count: int, used: Counter[Look]) -> tuple[Place, ...]:
    """The places of one tour; their looks are added to those that are `used`."""
    places: list[Place] = []
    while len(places) < count:
        scenes = [sample_scene(rng, held_out=True) for _ in range(CANDIDATES)]
        fitting = [scene for scene in scenes if not any(alike(look(scene), look(place.scene)) for place in places)]
        if not fitting:
            continue
        scene = min(fitting, key=lambda scene: used[look(scene)])
        used[look(scene)] += 1
        said = replace(scene, phrasing=1) if isinstance(scene, LandscapeScene) else scene
        places.append(Place(NAMES[len(places)], said, int(rng.integers(LONGEST_START))))
    return tuple(places)
