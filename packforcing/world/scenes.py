"""A small synthetic world: captioned videos with ground truth, of any length, drawn on the fly from a seed.

Two families. *Object scenes*: one or two coloured shapes move for ever on a coloured background. *Landscapes*: a camera
pans over a landscape wider than the frame and comes back, for ever, so that places leave the view and return.

A caption says what is asked (`parse` reads it back into attributes); the rest (places, speeds, phases, the shape of the
hills) is free, and is drawn from the seed. An *open* caption leaves colours out too ("a circle bounces"): a model
chooses them in its first frames, and from then on only its memory knows them. Both families are periodic and start at a
random phase, so that clips of 5 s cover all that a video of minutes does. Where objects blink and cameras are quick,
things leave the view and come back within such a clip, so that it pays to remember them.

Lengths are in pixels of a 128x128 frame, y down; times in seconds; angles in turns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from hashlib import sha256
from math import ceil, cos, pi, sin
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import PackForcingError

FPS = 16
FRAME = 128
LONGEST_START = 400  # a clip begins at one of a scene's first frames, so that cameras and objects are anywhere

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
DEFAULT_SKY, DEFAULT_GROUND = "blue", "green"  # what a caption means that does not say

SHAPES = ("circle", "square", "triangle", "star")
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

# Circumradius of each shape over the radius of a circle that looks as large, and its corners: (tips, inner / outer).
RELATIVE_RADIUS = {"circle": 1.0, "square": 1.2, "triangle": 1.35, "star": 1.35}
CORNERS = {"square": (4, 0.5**0.5), "triangle": (3, 0.5), "star": (5, 0.45)}

TWO_OBJECTS_GAP = 6.0
# Of the camera, by the number of landmarks: each leaves the view, and none is away for 5 s, the length of a clip.
TRAVEL = {1: 112.0, 2: 128.0, 3: 192.0, 4: 240.0}
PAN_SPEEDS, SHORTEST_PERIOD = (20.0, 36.0), 8.0  # pixels a second, so that the longest period is 24 s
QUICK_SPEEDS, SHORTEST_QUICK_PERIOD = (50.0, 70.0), 3.5
SHOWN_SECONDS, HIDDEN_SECONDS = (1.0, 1.75), (1.25, 2.25)  # of what blinks
PAN_SMOOTHNESS = 0.97  # 1 turns the camera on the spot, 0 moves it as a pendulum
SUPERSAMPLES = 4  # of a landscape, a pixel and axis

HELD_OUT_SHARE = 8  # one combination in so many is never drawn for training
EVALUATION_SEED = 2603


# --- what a caption says ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectAttributes:
    """What an object scene's caption asks for. `size` is a key of SIZES, `motion` one of MOTIONS; "" is not said."""

    count: int
    size: str
    colour: str
    shape: str
    motion: str
    background: str
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
    colour: str  # "" is not said
    kind: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}".strip()


@dataclass(frozen=True)
class LandscapeAttributes:
    """What a landscape's caption asks for: landmarks from left to right, and keys of GROUNDS and SKIES."""

    landmarks: tuple[Landmark, ...]
    ground: str = DEFAULT_GROUND
    sky: str = DEFAULT_SKY
    quickly: bool = False

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


def _any(words: object) -> str:
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
        landmarks = [re.fullmatch(_LANDMARK, each) for each in re.split(r", | and ", match["landmarks"])]
        if all(landmarks):
            names = tuple(Landmark(each["colour"] or "", each["kind"]) for each in landmarks)
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
    """What an open caption of the same scene says: a `share` of its colours is left out, by chance, and one at least.

    Those of the sky and the ground are always said: without a name they have one (`DEFAULT_SKY`, `DEFAULT_GROUND`).
    """
    rng = np.random.default_rng(seed)
    if isinstance(attributes, ObjectAttributes):
        kept = _kept(rng, 2, share)
        return replace(attributes, colour=attributes.colour * kept[0], background=attributes.background * kept[1])
    kept = _kept(rng, len(attributes.landmarks), share)
    landmarks = (Landmark(colour * keep, kind) for (colour, kind), keep in zip(attributes.landmarks, kept, strict=True))
    return replace(attributes, landmarks=tuple(landmarks))


def gone_for_a_while(attributes: Attributes) -> Attributes:
    """The same, with objects that blink or a quick camera."""
    is_object = isinstance(attributes, ObjectAttributes)
    return replace(attributes, blinks=True) if is_object else replace(attributes, quickly=True)


def _kept(rng: np.random.Generator, count: int, share: float) -> list[bool]:
    """For each of `count` things whether it is kept, where a `share` of them is not; not all are."""
    while all(kept := rng.random(count) >= share):
        pass
    return kept.tolist()


# --- scenes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """The way of one object: centre + reach * wave(t / period + phase) on each axis, and a turn about itself.

    Attributes:
        centre: (x, y) in the middle of the way.
        reach: (x, y) the farthest from it.
        period: (x, y) seconds until the way repeats.
        phase: (x, y) turns.
        straight: whether the wave is a triangle's (bounces), not a sine's.
        spin: turns of the object about itself a second; 0 keeps it upright.
    """

    centre: tuple[float, float]
    reach: tuple[float, float] = (0.0, 0.0)
    period: tuple[float, float] = (1.0, 1.0)
    phase: tuple[float, float] = (0.0, 0.0)
    straight: bool = False
    spin: float = 0.0

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
    """Shapes that move for ever on a plain background, `shade` (0 to 1) darker at the bottom of the frame.

    What blinks is there for the first `shown` seconds of each `period`, and then not; `blink` is (shown, period, time
    at the start).
    """

    attributes: ObjectAttributes
    tracks: tuple[Track, ...]
    shade: float
    phrasing: int = 0
    blink: tuple[float, float, float] | None = None

    @property
    def caption(self) -> str:
        return self.attributes.caption(self.phrasing)

    @property
    def radius(self) -> float:
        """Circumradius of each object."""
        return SIZES[self.attributes.size] * RELATIVE_RADIUS[self.attributes.shape]

    def is_shown(self, times: np.ndarray) -> np.ndarray:
        """Whether the objects are there, bool [F], at `times` [F]."""
        if self.blink is None:
            return np.ones(len(times), bool)
        shown, period, start = self.blink
        return (times + start) % period < shown


@dataclass(frozen=True)
class LandscapeScene:
    """A landscape and a camera that pans over it: x counts from the left end, where the camera's way begins.

    Attributes:
        places: x of each landmark's centre.
        travel: the way of the camera; the landscape is a frame wider.
        period: seconds until the camera is back.
        phase: of the camera's way, in turns, at time 0.
        hills: (wavelength, amplitude, phase in turns) of each wave in the horizon.
        fields: the same, of the nearer, darker ground.
    """

    attributes: LandscapeAttributes
    places: tuple[float, ...]
    travel: float
    period: float
    phase: float
    hills: tuple[tuple[float, float, float], ...]
    fields: tuple[tuple[float, float, float], ...]
    phrasing: int = 0

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
    """A random scene of the training set, or of the held-out combinations. The same seed gives the same scene.

    `away`: things leave the view and come back within seconds.
    """
    rng = np.random.default_rng(seed)
    while True:
        attributes = _sample_objects(rng) if rng.random() < 0.5 else _sample_landscape(rng)
        if is_held_out(attributes) == held_out:
            attributes = gone_for_a_while(attributes) if away else attributes
            return compose(attributes, rng, phrasing=int(rng.random() < 0.25))


def compose(attributes: Attributes, seed: int | np.random.Generator, phrasing: int = 0) -> Scene:
    """A scene that shows what is asked; all that is free is drawn from the seed."""
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
    """The same attributes with a colour for everything; what was not said is drawn."""
    if isinstance(attributes, ObjectAttributes):
        colour = attributes.colour or _pick(rng, _beside(attributes.background))
        return replace(attributes, colour=colour, background=attributes.background or _pick(rng, _beside(colour)))
    landmarks = list(attributes.landmarks)
    for i, (colour, kind) in enumerate(landmarks):
        if not colour:
            taken = {landmark.colour for landmark in landmarks if landmark.colour}
            free = _landmark_colours(kind, taken, attributes.ground, attributes.sky)
            landmarks[i] = Landmark(_pick(rng, free or LANDMARK_COLOURS[kind]), kind)
    return replace(attributes, landmarks=tuple(landmarks))


def evaluation_prompts(count: int, is_open: bool = False) -> list[str]:
    """`count` different captions of held-out combinations, objects and landscapes in turn, each evenly over its kinds.

    Open ones leave out one of the object's colours or both, or all of the landmarks'; in every second eight of them,
    objects blink and cameras are quick. A longer list begins with the shorter one.
    """
    rng = np.random.default_rng(EVALUATION_SEED)
    prompts: list[str] = []
    while len(prompts) < count:
        kind, is_landscape = divmod(len(prompts), 2)
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


def _pick(rng: np.random.Generator, options: object) -> str:
    options = list(options)
    return options[rng.integers(len(options))]


def _sample_objects(rng: np.random.Generator, motion: str | None = None, count: int | None = None) -> ObjectAttributes:
    motion = motion or _pick(rng, MOTIONS)
    count = count or (2 if rng.random() < 0.25 else 1)
    shape = _pick(rng, [shape for shape in SHAPES if not (motion == "spins" and shape == "circle")])
    size = _pick(rng, ["", "", "small", "large"]) if count == 1 else _pick(rng, ["", "small"])
    colour = _pick(rng, COLOURS)
    background = _pick(rng, _beside(colour))
    return ObjectAttributes(count, size, colour, shape, motion, background)


def _sample_landscape(rng: np.random.Generator, landmarks: int | None = None) -> LandscapeAttributes:
    count = landmarks or int(rng.integers(1, 5))
    ground = DEFAULT_GROUND if rng.random() < 0.5 else _pick(rng, GROUNDS)
    sky = DEFAULT_SKY if rng.random() < 0.5 else _pick(rng, SKIES)
    chosen: list[Landmark] = []
    for kind in rng.permutation(list(LANDMARK_COLOURS))[:count]:
        taken = {landmark.colour for landmark in chosen}
        if free := _landmark_colours(kind, taken, ground, sky):
            chosen.append(Landmark(_pick(rng, free), str(kind)))
    return LandscapeAttributes(tuple(chosen), ground, sky) if len(chosen) == count else _sample_landscape(rng, count)


def _beside(colour: str) -> list[str]:
    """The colours that can be told from this one; from "", all."""
    return [each for each in COLOURS if each != colour and {each, colour} not in TOO_CLOSE]


def _landmark_colours(kind: str, taken: set[str], ground: str, sky: str) -> list[str]:
    """Landmarks have colours of their own. Only green trees and blue lakes may share their colour with the land."""
    return [
        colour
        for colour in LANDMARK_COLOURS[kind]
        if kind == "lake"
        or (kind, colour) == ("tree", "green")
        or (colour not in {*taken, ground, sky} and not any({colour, other} in TOO_CLOSE for other in taken))
    ]


def _waves(
    rng: np.random.Generator, wavelengths: tuple[int, ...], amplitude: float
) -> tuple[tuple[float, float, float], ...]:
    return tuple((length * rng.uniform(0.85, 1.15), amplitude, rng.random()) for length in wavelengths)


def _tracks(attributes: ObjectAttributes, rng: np.random.Generator) -> tuple[Track, ...]:
    """Ways of one or two objects. Two never touch: they mirror each other, or each has half of the frame."""
    radius = SIZES[attributes.size] * RELATIVE_RADIUS[attributes.shape]
    tips = _tips(attributes.shape) * radius
    half_width, up, down = tips[:, 0].max(), -tips[:, 1].min(), tips[:, 1].max()
    middle = (FRAME + up - down) / 2  # of a way from the top border to the bottom border
    two = attributes.count == 2
    phase = rng.random(2)

    if attributes.motion == "bounces":
        width = (FRAME - TWO_OBJECTS_GAP) / 2 if two else FRAME
        reach = np.array([width / 2 - half_width, (FRAME - up - down) / 2])
        period = np.maximum(2.0, 4 * reach / rng.uniform(22, 45, 2))
        way = Track((width / 2, middle), tuple(reach), tuple(period), tuple(phase), straight=True)
        mirrored = Track((FRAME - width / 2, middle), (-reach[0], reach[1]), tuple(period), tuple(phase), straight=True)
        return (way, mirrored) if two else (way,)

    if attributes.motion == "moves in circles":
        reach = min(36.0, FRAME / 2 - radius - 2)
        period = rng.uniform(4, 8) * rng.choice([-1, 1])
        ways = [
            Track((FRAME / 2, FRAME / 2), (reach, reach), (period, period), (start, start + 0.25))
            for start in (phase[0], phase[0] + 0.5)
        ]
        return tuple(ways[: attributes.count])

    if attributes.motion == "swings":
        reach = min(42.0, FRAME / 2 - half_width)
        rows = [middle - 30, middle + 30] if two else [middle + rng.uniform(-15, 15)]
        starts = [phase[0], phase[0] + 0.5]  # two swing against each other
        period = rng.uniform(4, 7)
        return tuple(
            Track((FRAME / 2, row), (reach, 0.0), (period, 1.0), (start, 0.0))
            for row, start in zip(rows, starts, strict=False)
        )

    spin = rng.choice([-1, 1]) / rng.uniform(4, 8)
    if two:
        return tuple(Track((x, FRAME / 2), phase=(phase[0], 0.0), spin=s) for x, s in ((34, spin), (94, -spin)))
    centre = FRAME / 2 + rng.uniform(-20, 20, 2)
    return (Track(tuple(centre), phase=(phase[0], 0.0), spin=spin),)


# --- drawing ---------------------------------------------------------------------------------------------------


def render(scene: Scene, frames: int, fps: float = FPS, size: int = FRAME, start: int = 0) -> Tensor:
    """Frames `start` to `start + frames` of a scene, as a model's VAE takes them: float32 [3, F, H, W] in [-1, 1]."""
    video = torch.from_numpy(render_uint8(scene, frames, fps, size, start))
    return video.permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)


def render_uint8(scene: Scene, frames: int, fps: float = FPS, size: int = FRAME, start: int = 0) -> np.ndarray:
    """Frames `start` to `start + frames` of a scene as a video file holds them: uint8 [F, H, W, 3]."""
    times = (start + np.arange(frames)) / fps
    draw = _draw_objects if isinstance(scene, ObjectScene) else _draw_landscape
    return draw(scene, times, size)


def _tips(shape: str) -> np.ndarray:
    """Outermost points [N, 2] of an upright shape of circumradius 1."""
    count = CORNERS[shape][0] if shape in CORNERS else 64
    turn = (np.arange(count) + (0.5 if shape == "square" else 0)) / count
    return np.stack([np.sin(2 * pi * turn), -np.cos(2 * pi * turn)], axis=-1)


def signed_distance(shape: str, points: np.ndarray, radius: float) -> np.ndarray:
    """Distance [...] of points [..., 2] to the edge of an upright shape, negative inside (near the edge; not at tips).

    Polygons are folded about their symmetry axes onto the wedge from a tip to the corner beside it: there the edge is
    one line.
    """
    x, y = points[..., 0], points[..., 1]
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance - radius
    tips, inner = CORNERS[shape]
    wedge = pi / tips
    angle = np.arctan2(x, -y) - (wedge if shape == "square" else 0)
    angle = np.abs((angle + wedge) % (2 * wedge) - wedge)
    corner = (inner * cos(wedge), inner * sin(wedge))
    along = np.array([corner[0] - 1, corner[1]])
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    return (distance * np.cos(angle) - radius) * normal[0] + distance * np.sin(angle) * normal[1]


def _draw_objects(scene: ObjectScene, times: np.ndarray, size: int) -> np.ndarray:
    """uint8 [F, size, size, 3]. Each object is drawn only in the square around it."""
    attributes, scale = scene.attributes, size / FRAME
    shade = 1 - scene.shade * (np.arange(size) + 0.5) / size
    background = np.rint(shade[:, None] * np.array(COLOURS[attributes.background])).astype(np.uint8)
    video = np.empty((len(times), size, size, 3), np.uint8)
    video[:] = background[None, :, None]
    colour = np.array(COLOURS[attributes.colour], np.float32)

    radius = scene.radius * scale
    side = min(size, 2 * ceil(radius) + 4)
    for track in scene.tracks:
        centres = track.positions(times) * scale
        corners = np.clip(np.floor(centres - side / 2).astype(int), 0, size - side)  # [F, 2], x and y
        columns, rows = (corners[:, axis, None] + np.arange(side) for axis in (0, 1))  # [F, side]
        x = (columns + 0.5 - centres[:, :1]).astype(np.float32)[:, None, :]
        y = (rows + 0.5 - centres[:, 1:]).astype(np.float32)[:, :, None]
        turn = 2 * pi * track.angles(times).astype(np.float32)[:, None, None]
        points = np.stack([x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)], axis=-1)
        cover = np.clip(0.5 - signed_distance(attributes.shape, points, radius), 0, 1)[..., None]

        place = (np.arange(len(times))[:, None, None], rows[:, :, None], columns[:, None, :])
        under = video[place]
        video[place] = np.rint(under + cover * (colour - under)).astype(np.uint8)
    video[~scene.is_shown(times)] = background[:, None]
    return video


def _draw_landscape(scene: LandscapeScene, times: np.ndarray, size: int) -> np.ndarray:
    """uint8 [F, size, size, 3]. A pixel is the mean of the panorama between its edges: sums of columns, subtracted."""
    panorama = _panorama(scene, size)
    sums = np.zeros((size, panorama.shape[1] + 1, 3), np.float32)
    np.cumsum(panorama, axis=1, dtype=np.float32, out=sums[:, 1:])
    video = np.empty((len(times), size, size, 3), np.uint8)
    for frame, left in zip(video, scene.camera(times) * SUPERSAMPLES * size / FRAME, strict=True):
        column, part = int(left), np.float32(left % 1)
        edges = slice(column, column + size * SUPERSAMPLES + 1, SUPERSAMPLES)
        until = sums[:, edges] + part * (sums[:, 1:][:, edges] - sums[:, edges])
        frame[:] = (until[:, 1:] - until[:, :-1]) / SUPERSAMPLES + 0.5
    return video


def _panorama(scene: LandscapeScene, size: int) -> np.ndarray:
    """The whole landscape, uint8 [size, columns, 3], with SUPERSAMPLES columns a pixel."""
    zoom = SUPERSAMPLES * size / FRAME  # both axes are drawn at this scale; rows are averaged at the end
    width, height = ceil((scene.travel + FRAME) * zoom) + SUPERSAMPLES, SUPERSAMPLES * size
    sky = np.array(SKIES[scene.attributes.sky], float)
    ground = np.array(GROUNDS[scene.attributes.ground], float)
    rows = (np.arange(height) + 0.5) / height
    brighter = np.clip(rows / 0.6, 0, 1)[:, None] * 0.35  # towards the horizon
    backdrop = np.rint(sky + (255 - sky) * brighter).astype(np.uint8)
    image = Image.fromarray(np.repeat(backdrop[:, None], width, axis=1))
    draw = ImageDraw.Draw(image)

    x = np.arange(0, width + SUPERSAMPLES, SUPERSAMPLES)
    for level, waves, light in ((72, scene.hills, 1.0), (108, scene.fields, 0.85)):
        heights = level + sum(a * np.sin(2 * pi * (x / zoom / length + phase)) for length, a, phase in waves)
        outline = [*zip(x.tolist(), (heights * zoom).tolist(), strict=True), (width, height), (0, height)]
        draw.polygon(outline, fill=tuple(np.rint(ground * light).astype(int).tolist()))
    for landmark, place in zip(scene.attributes.landmarks, scene.places, strict=True):
        _draw_landmark(draw, landmark, place, zoom)
    return np.asarray(image.reduce((1, SUPERSAMPLES)))


def _draw_landmark(draw: ImageDraw.ImageDraw, landmark: Landmark, place: float, zoom: float) -> None:
    """Draw a landmark whose middle stands at x = `place`. Its parts are darker shades of its colour."""

    def shaded(light: float) -> Colour:
        return tuple(round(light * part) for part in COLOURS[landmark.colour])

    def box(left: float, top: float, right: float, bottom: float, light: float = 1.0) -> None:
        corners = [(place + left) * zoom, top * zoom, (place + right) * zoom - 1, bottom * zoom - 1]
        draw.rectangle(corners, fill=shaded(light))

    def ellipse(middle: float, half_width: float, half_height: float) -> None:
        corners = [(place - half_width) * zoom, (middle - half_height) * zoom]
        draw.ellipse([*corners, (place + half_width) * zoom, (middle + half_height) * zoom], fill=shaded(1.0))

    if landmark.kind == "house":
        box(-21, 62, 21, 94)
        roof = [(-27, 62), (0, 38), (27, 62)]
        draw.polygon([((place + x) * zoom, y * zoom) for x, y in roof], fill=shaded(0.8))
        box(-5, 76, 5, 94, 0.55)
    elif landmark.kind == "tree":
        draw.rectangle([(place - 4) * zoom, 60 * zoom, (place + 4) * zoom, 94 * zoom], fill=(115, 75, 45))
        ellipse(48, 21, 21)
    elif landmark.kind == "tower":
        box(-12, 30, 12, 94)
        for left in (-14, -4, 6):
            box(left, 22, left + 8, 31)
        box(-3, 44, 3, 56, 0.55)
    else:
        ellipse(97, 34, 9)
