"""What a caption of the synthetic world says: attributes, the grammar, held-out combinations, open captions.

`parse` reads a caption back into attributes, and `attributes.caption()` writes them. An *open* caption leaves colours
out ("a circle bounces"): a model chooses them in its first frames, and from then on only its memory knows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple, TypeAlias

import numpy as np

from ..errors import PackForcingError
from .shapes import SHAPES

Colour: TypeAlias = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (215, 30, 40),
    "green": (35, 150, 60),
    "blue": (45, 85, 225),
    "yellow": (250, 225, 50),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "orange": (250, 130, 0),
    "purple": (145, 55, 175),
}
# Landscapes are pale, so that landmarks stand out and a green tree is not a green meadow.
SKIES: dict[str, Colour] = {"blue": (150, 205, 250), "orange": (255, 195, 140), "purple": (190, 165, 230)}
GROUNDS: dict[str, Colour] = {"green": (155, 205, 110), "yellow": (225, 205, 150), "red": (205, 130, 110)}
DEFAULT_SKY, DEFAULT_GROUND = "blue", "green"  # where a caption names none

SIZES = {"small": 11.0, "": 17.0, "large": 25.0}  # radius of a circle; other shapes get about its area
MOTIONS = {"bounces": "bounce", "moves in circles": "move in circles", "swings": "swing", "spins": "spin"}
# Colours that blur or noise would confuse are not put beside each other.
TOO_CLOSE = [{"orange", "red"}, {"orange", "yellow"}, {"blue", "purple"}, {"white", "yellow"}]
LANDMARK_COLOURS = {
    "house": ("red", "yellow", "white", "purple", "orange"),
    "tree": ("green", "orange"),
    "tower": ("yellow", "white", "black", "red", "purple"),
    "lake": ("blue",),
}

HELD_OUT_SHARE = 8  # one combination in so many is never drawn for training


@dataclass(frozen=True)
class ObjectAttributes:
    """What an object scene's caption asks for. A word that the caption leaves out is ""."""

    count: int  # 1 or 2
    size: str  # a key of SIZES
    colour: str  # a key of COLOURS, or ""
    shape: str  # one of SHAPES
    motion: str  # a key of MOTIONS
    background: str  # a key of COLOURS, or ""
    blinks: bool = False

    def caption(self, phrasing: int = 0) -> str:
        what = " ".join(filter(None, [self.size, self.colour, self.shape]))
        subject = f"two {what}s {MOTIONS[self.motion]}" if self.count == 2 else f"{_a(what)} {self.motion}"
        if self.blinks:
            subject += " and blink" if self.count == 2 else " and blinks"
        if not self.background:
            return subject
        place = f"on {_a(self.background)} background"
        return f"{subject} {place}" if phrasing == 0 else f"{place}, {subject}"

    @property
    def combination(self) -> str:
        """What decides whether the scene is held out of training."""
        return f"{self.colour} {self.shape} {self.background}"


class Landmark(NamedTuple):
    colour: str  # a key of COLOURS; "" where the caption leaves it out
    kind: str  # a key of LANDMARK_COLOURS

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}".strip()


@dataclass(frozen=True)
class LandscapeAttributes:
    """What a landscape's caption asks for."""

    landmarks: tuple[Landmark, ...]  # from left to right
    ground: str = DEFAULT_GROUND  # a key of GROUNDS
    sky: str = DEFAULT_SKY  # a key of SKIES
    quickly: bool = False  # whether the camera is quick

    def caption(self, phrasing: int = 0) -> str:
        """Phrasing 1 says ground and sky even where they are the default ones."""
        ground = "" if phrasing == 0 and self.ground == DEFAULT_GROUND else f"{self.ground} "
        sky = "" if phrasing == 0 and self.sky == DEFAULT_SKY else f" under {_a(self.sky)} sky"
        *first, last = [_a(str(landmark)) for landmark in self.landmarks]
        landmarks = f"{', '.join(first)} and {last}" if first else last
        pans = "pans quickly" if self.quickly else "pans"
        return f"the camera {pans} over {_a(ground + 'landscape')} with {landmarks}{sky} and comes back"

    @property
    def combination(self) -> str:
        """What decides whether the scene is held out of training."""
        return f"{', '.join(map(str, self.landmarks))}, {self.ground}, {self.sky}"


Attributes: TypeAlias = ObjectAttributes | LandscapeAttributes


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _any(words: Iterable[str]) -> str:
    """A regular expression for any of the words; the longest come first, so that none hides a longer one."""
    return "|".join(sorted(filter(None, words), key=len, reverse=True))


_SUBJECT = (
    rf"(?P<count>an?|two) (?:(?P<size>{_any(SIZES)}) )?(?:(?P<colour>{_any(COLOURS)}) )?(?P<shape>{_any(SHAPES)})s? "
    rf"(?P<motion>{_any([*MOTIONS, *MOTIONS.values()])})(?P<blinks> and blinks?)?"
)
_PLACE = rf"on an? (?P<background>{_any(COLOURS)}) background"
_LANDMARK = rf"an? (?:(?P<colour>{_any(COLOURS)}) )?(?P<kind>{_any(LANDMARK_COLOURS)})"
_OBJECTS = [re.compile(f"{_SUBJECT}(?: {_PLACE})?"), re.compile(f"{_PLACE}, {_SUBJECT}")]
_LANDSCAPE = re.compile(
    rf"the camera pans (?P<quickly>quickly )?over an? (?:(?P<ground>{_any(GROUNDS)}) )?landscape "
    r"with (?P<landmarks>.+?)"
    rf"(?: under an? (?P<sky>{_any(SKIES)}) sky)? and comes back"
)


def parse(caption: str) -> Attributes:
    """The attributes that a caption asks for. Raises PackForcingError for a caption outside of the grammar."""
    text = " ".join(caption.lower().strip(" .").split())
    for pattern in _OBJECTS:
        if match := pattern.fullmatch(text):
            said = match.groupdict()
            motion = next(one for one, many in MOTIONS.items() if said["motion"] in (one, many))
            count = 2 if said["count"] == "two" else 1
            size, colour, background = (said[key] or "" for key in ("size", "colour", "background"))
            return ObjectAttributes(count, size, colour, said["shape"], motion, background, bool(said["blinks"]))
    if match := _LANDSCAPE.fullmatch(text):
        listed = re.split(r", | and ", match["landmarks"])
        found = [landmark for each in listed if (landmark := re.fullmatch(_LANDMARK, each))]
        if len(found) == len(listed):
            names = tuple(Landmark(each["colour"] or "", each["kind"]) for each in found)
            ground, sky = match["ground"] or DEFAULT_GROUND, match["sky"] or DEFAULT_SKY
            return LandscapeAttributes(names, ground, sky, bool(match["quickly"]))
    raise PackForcingError(
        f"The synthetic world has no scene for the caption '{caption}': use one such as 'a red circle bounces on a "
        f"blue background' or 'the camera pans over a landscape with a red house and comes back'."
    )


def is_held_out(attributes: Attributes) -> bool:
    """Whether a combination of attributes is kept away from training, for evaluation."""
    return sha256(attributes.combination.encode()).digest()[0] % HELD_OUT_SHARE == 0


def opened(attributes: Attributes, seed: int | np.random.Generator, share: float = 0.5) -> Attributes:
    """The attributes with colours left out: each one with the probability `share`, and at least one of them.

    The colours of sky and ground are never left out, because a caption without them means the default ones
    (`DEFAULT_SKY`, `DEFAULT_GROUND`).
    """
    rng = np.random.default_rng(seed)
    if isinstance(attributes, ObjectAttributes):
        kept = _kept(rng, 2, share)
        return replace(attributes, colour=attributes.colour * kept[0], background=attributes.background * kept[1])
    kept = _kept(rng, len(attributes.landmarks), share)
    landmarks = (Landmark(colour * keep, kind) for (colour, kind), keep in zip(attributes.landmarks, kept, strict=True))
    return replace(attributes, landmarks=tuple(landmarks))


def gone_for_a_while(attributes: Attributes) -> Attributes:
    """The same attributes, but objects blink, or the camera is quick: things leave the view and soon come back."""
    if isinstance(attributes, ObjectAttributes):
        return replace(attributes, blinks=True)
    return replace(attributes, quickly=True)


def _kept(rng: np.random.Generator, count: int, share: float) -> list[bool]:
    """For each of `count` things, whether it is kept: each is dropped with the probability `share`, at least one is."""
    while all(kept := rng.random(count) >= share):
        pass
    return kept.tolist()
