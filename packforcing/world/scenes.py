"""Scenes of the synthetic world: what a caption asks for, with all that it leaves free drawn from a seed.

There are two families. In *object scenes* one or two coloured shapes move for ever on a coloured background. In
*landscapes* a camera pans over a landscape wider than the frame and comes back, for ever, so that places leave the view
and return. Free are places, speeds, phases, the shape of the hills, and the colours that an open caption leaves out.

Both families are periodic and start at a random phase, so that clips of 5 s cover all that a video of minutes does.
Where objects blink and cameras are quick, things leave the view and come back within such a clip, so that it pays to
remember them.

Lengths are in pixels of a 128x128 frame, y down; times in seconds; angles in turns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import pi
from typing import TypeAlias

import numpy as np

from .captions import (
    COLOURS,
    DEFAULT_GROUND,
    DEFAULT_SKY,
    GROUNDS,
    LANDMARK_COLOURS,
    MOTIONS,
    SIZES,
    SKIES,
    TOO_CLOSE,
    Attributes,
    Landmark,
    LandscapeAttributes,
    ObjectAttributes,
    gone_for_a_while,
    is_held_out,
    opened,
)
from .shapes import RELATIVE_RADIUS, SHAPES, tips

FPS = 16
FRAME = 128
LONGEST_START = 400  # a clip begins at one of a scene's first frames, so that cameras and objects are anywhere

Wave: TypeAlias = tuple[float, float, float]  # wavelength, amplitude, phase in turns

TWO_OBJECTS_GAP = 6.0
# The length of the camera's way, by the number of landmarks: each of them leaves the view, and none is away for 5 s,
# the length of a clip.
TRAVEL = {1: 112.0, 2: 128.0, 3: 192.0, 4: 240.0}
PAN_SPEEDS, SHORTEST_PERIOD = (20.0, 36.0), 8.0  # pixels a second, so that the longest period is 24 s
QUICK_SPEEDS, SHORTEST_QUICK_PERIOD = (50.0, 70.0), 3.5
SHOWN_SECONDS, HIDDEN_SECONDS = (1.0, 1.75), (1.25, 2.25)  # of what blinks
PAN_SMOOTHNESS = 0.97  # 1 turns the camera on the spot, 0 moves it as a pendulum
EVALUATION_SEED = 2603


@dataclass(frozen=True)
class Track:
    """The way of one object, and its turning about itself.

    On each axis its centre is at `centre - reach * wave(t / period + phase)`; pairs are (x, y).
    """

    centre: tuple[float, float]  # the middle of the way
    reach: tuple[float, float] = (0.0, 0.0)  # the farthest from the middle
    period: tuple[float, float] = (1.0, 1.0)  # seconds until the way repeats
    phase: tuple[float, float] = (0.0, 0.0)  # turns
    straight: bool = False  # the wave is a triangle wave (the object bounces), not a sine
    spin: float = 0.0  # turns about itself a second; 0 keeps the object upright

    def positions(self, times: np.ndarray) -> np.ndarray:
        """Centres of the object [F, 2] at `times` [F]."""
        rotary = times[:, None] / np.array(self.period) + np.array(self.phase)
        wave = 1 - 4 * np.abs((rotary + 0.25) % 1 - 0.5) if self.straight else np.sin(2 * pi * rotary)
        return np.array(self.centre) - np.array(self.reach) * wave

    def angles(self, times: np.ndarray) -> np.ndarray:
        """Turns of the object about itself [F] at `times` [F]."""
        return self.spin * times + (self.phase[0] if self.spin else 0.0)


@dataclass(frozen=True)
class ObjectScene:
    """Shapes that move for ever on a plain background.

    Objects that blink are there for the first `shown` seconds of each `period`, and not for the rest of it.
    """

    attributes: ObjectAttributes  # with a colour for everything
    tracks: tuple[Track, ...]  # one an object
    shade: float  # how much darker the background is at the bottom of the frame, 0 to 1
    phrasing: int = 0  # of the caption: see `ObjectAttributes.caption`
    blink: tuple[float, float, float] | None = None  # (shown, period, time in the period at the start), seconds

    @property
    def caption(self) -> str:
        return self.attributes.caption(self.phrasing)

    @property
    def radius(self) -> float:
        """Circumradius of each object."""
        return SIZES[self.attributes.size] * RELATIVE_RADIUS[self.attributes.shape]

    def is_shown(self, times: np.ndarray) -> np.ndarray:
        """Whether the objects are there: bool [F], at `times` [F]."""
        if self.blink is None:
            return np.ones(len(times), bool)
        shown, period, start = self.blink
        return (times + start) % period < shown


@dataclass(frozen=True)
class LandscapeScene:
    """A landscape and a camera that pans over it. x counts from the landscape's left end, where the camera turns."""

    attributes: LandscapeAttributes  # with a colour for everything
    places: tuple[float, ...]  # x of each landmark's centre
    travel: float  # the length of the camera's way; the landscape is one frame wider
    period: float  # seconds until the camera is back
    phase: float  # of the camera's way at time 0, turns
    hills: tuple[Wave, ...]  # of the horizon
    fields: tuple[Wave, ...]  # of the nearer, darker ground
    phrasing: int = 0  # of the caption: see `LandscapeAttributes.caption`

    @property
    def caption(self) -> str:
        return self.attributes.caption(self.phrasing)

    def camera(self, times: np.ndarray) -> np.ndarray:
        """x of the frame's left edge [F] at `times` [F], from 0 to `travel`: there and back, turning softly."""
        rotary = times / self.period + self.phase - 0.25
        wave = np.arcsin(PAN_SMOOTHNESS * np.sin(2 * pi * rotary)) / np.arcsin(PAN_SMOOTHNESS)
        return self.travel * (1 + wave) / 2


Scene: TypeAlias = ObjectScene | LandscapeScene


def sample_scene(seed: int | np.random.Generator, held_out: bool = False, away: bool = False) -> Scene:
    """A random scene: the same seed gives the same scene.

    Args:
        seed: or a generator, from which is drawn.
        held_out: whether it is one of the held-out combinations, or of the training set.
        away: whether things leave the view and come back within seconds.
    """
    rng = np.random.default_rng(seed)
    while True:
        attributes: Attributes = _sample_objects(rng) if rng.random() < 0.5 else _sample_landscape(rng)
        if is_held_out(attributes) == held_out:
            attributes = gone_for_a_while(attributes) if away else attributes
            return compose(attributes, rng, phrasing=int(rng.random() < 0.25))


def compose(attributes: Attributes, seed: int | np.random.Generator, phrasing: int = 0) -> Scene:
    """A scene that shows what is asked for; all that is left free is drawn from the seed."""
    rng = np.random.default_rng(seed)
    attributes = _closed(attributes, rng)
    if isinstance(attributes, ObjectAttributes):
        tracks, shade = _tracks(attributes, rng), rng.uniform(0, 0.2)
        return ObjectScene(attributes, tracks, shade, phrasing, _blink(rng) if attributes.blinks else None)
    count = len(attributes.landmarks)
    travel = TRAVEL[count]
    speeds, shortest = (QUICK_SPEEDS, SHORTEST_QUICK_PERIOD) if attributes.quickly else (PAN_SPEEDS, SHORTEST_PERIOD)
    places = FRAME / 2 + np.linspace(0, travel, count) + rng.uniform(-6, 6, count)
    return LandscapeScene(
        attributes,
        tuple(places.tolist()),
        travel,
        period=max(shortest, 2 * travel / rng.uniform(*speeds)),
        phase=rng.random(),
        hills=_waves(rng, (60, 95, 150), 4.5),
        fields=_waves(rng, (45, 80), 3.5),
        phrasing=phrasing,
    )


def _closed(attributes: Attributes, rng: np.random.Generator) -> Attributes:
    """The same attributes with a colour for everything: those that are left out are drawn."""
    if isinstance(attributes, ObjectAttributes):
        colour = attributes.colour or _pick(rng, beside(attributes.background))
        return replace(attributes, colour=colour, background=attributes.background or _pick(rng, beside(colour)))
    landmarks = list(attributes.landmarks)
    for i, (colour, kind) in enumerate(landmarks):
        if not colour:
            taken = {landmark.colour for landmark in landmarks if landmark.colour}
            free = landmark_colours(kind, taken, attributes.ground, attributes.sky)
            landmarks[i] = Landmark(_pick(rng, free or LANDMARK_COLOURS[kind]), kind)
    return replace(attributes, landmarks=tuple(landmarks))


def evaluation_prompts(count: int, is_open: bool = False) -> list[str]:
    """`count` different captions of held-out combinations; a longer list begins with the shorter one.

    Object scenes and landscapes come in turn, and each family goes evenly through its kinds. Open captions leave out
    one or both of the object's colours, or the colours of all landmarks. In every second eight of them, objects blink
    and cameras are quick.
    """
    rng = np.random.default_rng(EVALUATION_SEED)
    prompts: list[str] = []
    while len(prompts) < count:
        kind, is_landscape = divmod(len(prompts), 2)
        attributes: Attributes
        if is_landscape:
            attributes = _sample_landscape(rng, landmarks=1 + kind % 4)
        else:
            attributes = _sample_objects(rng, motion=list(MOTIONS)[kind % 4], count=2 if kind % 3 == 2 else 1)
        if not is_held_out(attributes):
            continue
        if is_open:
            attributes = opened(attributes, rng, share=1 if is_landscape else 0.5)
            attributes = gone_for_a_while(attributes) if kind // 4 % 2 else attributes
        if attributes.caption() not in prompts:
            prompts.append(attributes.caption())
    return prompts


def _blink(rng: np.random.Generator) -> tuple[float, float, float]:
    shown = rng.uniform(*SHOWN_SECONDS)
    period = shown + rng.uniform(*HIDDEN_SECONDS)
    return shown, period, rng.uniform(0, period)


def _pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    listed = list(options)
    return listed[rng.integers(len(listed))]


def _sample_objects(rng: np.random.Generator, motion: str | None = None, count: int | None = None) -> ObjectAttributes:
    motion = motion or _pick(rng, MOTIONS)
    count = count or (2 if rng.random() < 0.25 else 1)
    shape = _pick(rng, [shape for shape in SHAPES if not (motion == "spins" and shape == "circle")])
    size = _pick(rng, ["", "", "small", "large"]) if count == 1 else _pick(rng, ["", "small"])
    colour = _pick(rng, COLOURS)
    background = _pick(rng, beside(colour))
    return ObjectAttributes(count, size, colour, shape, motion, background)


def _sample_landscape(rng: np.random.Generator, landmarks: int | None = None) -> LandscapeAttributes:
    count = landmarks or int(rng.integers(1, 5))
    ground = DEFAULT_GROUND if rng.random() < 0.5 else _pick(rng, GROUNDS)
    sky = DEFAULT_SKY if rng.random() < 0.5 else _pick(rng, SKIES)
    chosen: list[Landmark] = []
    for kind in rng.permutation(list(LANDMARK_COLOURS))[:count]:
        taken = {landmark.colour for landmark in chosen}
        if free := landmark_colours(kind, taken, ground, sky):
            chosen.append(Landmark(_pick(rng, free), str(kind)))
    return LandscapeAttributes(tuple(chosen), ground, sky) if len(chosen) == count else _sample_landscape(rng, count)


def beside(colour: str) -> list[str]:
    """The colours that can be told from this one; all of them for ""."""
    return [each for each in COLOURS if each != colour and {each, colour} not in TOO_CLOSE]


def landmark_colours(kind: str, taken: set[str], ground: str, sky: str) -> list[str]:
    """The colours that a landmark may have beside those that are `taken` by others.

    Each landmark has a colour of its own. Only green trees and blue lakes may share theirs with the land.
    """
    return [
        colour
        for colour in LANDMARK_COLOURS[kind]
        if kind == "lake"
        or (kind, colour) == ("tree", "green")
        or (colour not in {*taken, ground, sky} and not any({colour, other} in TOO_CLOSE for other in taken))
    ]


def _waves(rng: np.random.Generator, wavelengths: tuple[int, ...], amplitude: float) -> tuple[Wave, ...]:
    return tuple((length * rng.uniform(0.85, 1.15), amplitude, rng.random()) for length in wavelengths)


def _tracks(attributes: ObjectAttributes, rng: np.random.Generator) -> tuple[Track, ...]:
    """Ways of one or two objects. Two never touch: they mirror each other, or each has half of the frame."""
    radius = SIZES[attributes.size] * RELATIVE_RADIUS[attributes.shape]
    outline = tips(attributes.shape) * radius
    phase = rng.random(2)
    if attributes.motion == "bounces":
        return _bouncing(attributes.count, outline, phase, rng)
    if attributes.motion == "moves in circles":
        return _circling(attributes.count, radius, phase, rng)
    if attributes.motion == "swings":
        return _swinging(attributes.count, outline, phase, rng)
    return _spinning(attributes.count, phase, rng)


def _bouncing(count: int, outline: np.ndarray, phase: np.ndarray, rng: np.random.Generator) -> tuple[Track, ...]:
    """Ways from border to border; `outline` [N, 2] has the object's outermost points, `phase` [2] its turns by axis."""
    half_width, up, down = outline[:, 0].max(), -outline[:, 1].min(), outline[:, 1].max()
    width = (FRAME - TWO_OBJECTS_GAP) / 2 if count == 2 else FRAME
    middle = (FRAME + up - down) / 2
    reach = np.array([width / 2 - half_width, (FRAME - up - down) / 2])
    period = np.maximum(2.0, 4 * reach / rng.uniform(22, 45, 2))
    way = Track((width / 2, middle), tuple(reach), tuple(period), tuple(phase), straight=True)
    mirrored = Track((FRAME - width / 2, middle), (-reach[0], reach[1]), tuple(period), tuple(phase), straight=True)
    return (way, mirrored)[:count]


def _circling(count: int, radius: float, phase: np.ndarray, rng: np.random.Generator) -> tuple[Track, ...]:
    """Circles about the frame's middle; two objects stand opposite each other."""
    reach = min(36.0, FRAME / 2 - radius - 2)
    period = rng.uniform(4, 8) * rng.choice([-1, 1])
    ways = [
        Track((FRAME / 2, FRAME / 2), (reach, reach), (period, period), (start, start + 0.25))
        for start in (phase[0], phase[0] + 0.5)
    ]
    return tuple(ways[:count])


def _swinging(count: int, outline: np.ndarray, phase: np.ndarray, rng: np.random.Generator) -> tuple[Track, ...]:
    """Ways from side to side in one row; two objects have a row each, and swing against each other."""
    half_width, up, down = outline[:, 0].max(), -outline[:, 1].min(), outline[:, 1].max()
    middle = (FRAME + up - down) / 2
    reach = min(42.0, FRAME / 2 - half_width)
    rows = [middle - 30, middle + 30] if count == 2 else [middle + rng.uniform(-15, 15)]
    starts = [phase[0], phase[0] + 0.5]
    period = rng.uniform(4, 7)
    return tuple(
        Track((FRAME / 2, row), (reach, 0.0), (period, 1.0), (start, 0.0))
        for row, start in zip(rows, starts, strict=False)
    )


def _spinning(count: int, phase: np.ndarray, rng: np.random.Generator) -> tuple[Track, ...]:
    """Objects that turn on the spot; two of them turn against each other."""
    spin = rng.choice([-1, 1]) / rng.uniform(4, 8)
    if count == 2:
        return tuple(Track((x, FRAME / 2), phase=(phase[0], 0.0), spin=s) for x, s in ((34, spin), (94, -spin)))
    centre = FRAME / 2 + rng.uniform(-20, 20, 2)
    return (Track(tuple(centre), phase=(phase[0], 0.0), spin=spin),)
