"""Drawing scenes of the synthetic world into frames."""

from __future__ import annotations

from math import ceil, pi

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..pixels import from_uint8
from .captions import COLOURS, GROUNDS, SKIES, Colour, Landmark
from .scenes import FPS, FRAME, LandscapeScene, ObjectScene, Scene
from .shapes import signed_distance

SUPERSAMPLES = 4  # of a landscape, a pixel and axis
TRUNK_COLOUR: Colour = (115, 75, 45)


def render(scene: Scene, frames: int, fps: float = FPS, size: int = FRAME, start: int = 0) -> Tensor:
    """Frames `start` to `start + frames` of a scene, as a model's VAE takes them: float32 [3, F, H, W] in [-1, 1]."""
    video = torch.from_numpy(render_uint8(scene, frames, fps, size, start))
    return from_uint8(video).contiguous()


def render_uint8(scene: Scene, frames: int, fps: float = FPS, size: int = FRAME, start: int = 0) -> np.ndarray:
    """Frames `start` to `start + frames` of a scene as a video file holds them: uint8 [F, H, W, 3]."""
    times = (start + np.arange(frames)) / fps
    if isinstance(scene, ObjectScene):
        return _draw_objects(scene, times, size)
    return _draw_landscape(scene, times, size)


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
    """uint8 [F, size, size, 3]. A pixel is the mean of the panorama between its left and its right edge.

    The mean is the difference of two running sums over the panorama's columns.
    """
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
        swells = (height * np.sin(2 * pi * (x / zoom / length + phase)) for length, height, phase in waves)
        heights = level + sum(swells, np.zeros(len(x)))
        outline = [*zip(x.tolist(), (heights * zoom).tolist(), strict=True), (width, height), (0, height)]
        draw.polygon(outline, fill=tuple(np.rint(ground * light).astype(int).tolist()))
    for landmark, place in zip(scene.attributes.landmarks, scene.places, strict=True):
        _draw_landmark(draw, landmark, place, zoom)
    return np.asarray(image.reduce((1, SUPERSAMPLES)))


def _draw_landmark(draw: ImageDraw.ImageDraw, landmark: Landmark, place: float, zoom: float) -> None:
    """Draw a landmark whose middle stands at x = `place`. Its parts are darker shades of its colour."""

    def shaded(light: float) -> Colour:
        red, green, blue = COLOURS[landmark.colour]
        return round(light * red), round(light * green), round(light * blue)

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
        draw.rectangle([(place - 4) * zoom, 60 * zoom, (place + 4) * zoom, 94 * zoom], fill=TRUNK_COLOUR)
        ellipse(48, 21, 21)
    elif landmark.kind == "tower":
        box(-12, 30, 12, 94)
        for left in (-14, -4, 6):
            box(left, 22, left + 8, 31)
        box(-3, 44, 3, 56, 0.55)
    else:
        ellipse(97, 34, 9)
