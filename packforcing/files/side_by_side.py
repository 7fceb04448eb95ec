"""Pictures side by side under their names: videos joined into one, and a strip of frames."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..errors import PackForcingError
from ..lettering import Font, Fonts, fitted, readable, text_width
from ..pixels import from_uint8
from .video import VideoInfo, VideoWriter, frames_of, probe

BACKGROUND, INK, FAINT = (22, 24, 30), (238, 238, 238), (170, 174, 184)
GAP = 4  # pixels between pictures
LARGEST_LETTERS, LEAST_LETTERS = 40, 14  # of a label, in pixels, that has the room
SMALLEST_LETTERS = 10  # of one that does not
CHUNK_FRAMES = 8  # joined and written at a time

STRIP_WIDTH = 256  # of a strip's picture, in pixels
STRIP_LETTERS = 19
STRIP_LINES = 5  # of words below a picture


@dataclass(frozen=True)
class Labelled:
    """A video's file, and the words above it."""

    path: str | os.PathLike[str]
    label: str = ""


# --- videos -----------------------------------------------------------------------------------------------------------


def no_callback(done: int, frames: int) -> None:
    """The default `on_frames`."""


def join_side_by_side(
    videos: Sequence[Labelled],
    output: str | os.PathLike[str],
    on_frames: Callable[[int, int], None] = no_callback,
) -> int:
    """Writes one video in which the given ones run side by side, each under its label. Returns its frames.

    It ends with the longest one; a shorter one holds its last frame until then. Sound is left out. A few frames are in
    memory at a time. `on_frames` is called with the frames that are done and those that there will be; an exception
    that it raises ends the work.

    Raises PackForcingError for fewer than two videos, when they differ in size or frames a second, and when a file is
    no video or cannot be written.
    """
    if len(videos) < 2:
        raise PackForcingError(f"Side by side are two videos or more, but there is {len(videos)}: give another one.")
    infos = [probe(video.path) for video in videos]
    check_alike(videos, infos)
    first = infos[0]
    frames = max(info.frames for info in infos)
    bands = [label_band(video.label, first.width) for video in videos]
    top = beside(bands)
    height, width = top.shape[0] + first.height, top.shape[1]
    with VideoWriter(output, first.fps, width + width % 2, height + height % 2) as writer:
        joined = (framed(top, beside(row)) for row in together([frames_of(video.path) for video in videos]))
        while chunk := list(islice(joined, CHUNK_FRAMES)):
            writer.write(from_uint8(torch.from_numpy(np.stack(chunk))))
            on_frames(writer.frames, frames)
    return writer.frames


def check_alike(videos: Sequence[Labelled], infos: Sequence[VideoInfo]) -> None:
    """Raises PackForcingError unless all videos have the size and the frames a second of the first."""
    first = infos[0]
    for number, (video, info) in enumerate(zip(videos, infos, strict=True), 1):
        if (info.width, info.height, info.fps) != (first.width, first.height, first.fps):
            raise PackForcingError(
                f"Videos side by side must have one size and frame rate, but the first is {first.width}x{first.height} "
                f"at {first.fps:g} fps, and number {number} ('{video.label}') is {info.width}x{info.height} at "
                f"{info.fps:g} fps: make them with the same width, height and fps."
            )


def together(videos: Sequence[Iterator[np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """A frame of each, until the longest ends; those that ended before hold their last frame."""
    last: list[np.ndarray | None] = [None] * len(videos)
    while True:
        frames = [next(video, None) for video in videos]
        if all(frame is None for frame in frames):
            return
        last = [old if new is None else new for old, new in zip(last, frames, strict=True)]
        yield [frame for frame in last if frame is not None]


def beside(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [H, W, 3] of one height as one, with gaps between them."""
    gap = filled(pictures[0].shape[0], GAP)
    parts = [part for picture in pictures for part in (gap, picture)]
    return np.concatenate(parts[1:], axis=1)


def framed(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """One picture above another of its width, made even in both directions, as H.264 wants it."""
    picture = np.concatenate((top, bottom), axis=0)
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def filled(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def label_band(label: str, width: int) -> np.ndarray:
    """A band [H, width, 3] with a label in its middle.

    All bands of a row have one height: the letters are a tenth of the width, 14 pixels at least. A label that is too
    wide gets smaller letters, and is cut where those are too wide, too.
    """
    fonts = Fonts()
    usual = min(LARGEST_LETTERS, max(LEAST_LETTERS, width // 10))
    height = fonts.height(usual) + usual // 2
    band = Image.fromarray(filled(height, width))
    text, font = lettered(label, fonts, usual, width - 6)
    if text:
        top, bottom = font.getbbox("Mg")[1::2]
        at = ((width - text_width(text, font)) // 2, round((height - bottom - top) / 2))
        ImageDraw.Draw(band).text(at, text, font=font, fill=INK)
    return np.asarray(band)


def lettered(label: str, fonts: Fonts, largest: int, width: int) -> tuple[str, Font]:
    """A label on one line of `width` pixels, in the largest letters in which it fits, or else cut."""
    for size in range(largest, SMALLEST_LETTERS - 1, -1):
        text, font = readable(label, fonts, size)
        if text_width(text, font) <= width:
            return text, font
    return "".join(fitted(text, font, width, 1)), font


# --- strips -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """What stands below a picture of a strip."""

    head: str  # one line, such as its time
    words: str = ""


def frames_at(path: str | os.PathLike[str], numbers: Sequence[int]) -> list[np.ndarray]:
    """Frames of a video by their numbers; a number beyond its end gives the last frame."""
    found: dict[int, np.ndarray] = {}
    for number, frame in enumerate(frames_of(path)):
        last = frame
        if number in numbers:
            found[number] = frame
    return [found.get(number, last) for number in numbers]


def strip(frames: Sequence[np.ndarray], captions: Sequence[Caption]) -> Image.Image:
    """Frames [H, W, 3] of one size in a row, each above its caption.

    Words that need more lines than there are end in three dots.
    """
    fonts = Fonts()
    height = round(STRIP_WIDTH * frames[0].shape[0] / frames[0].shape[1])
    texts = [caption_lines(caption, fonts) for caption in captions]
    line = fonts.height(STRIP_LETTERS) + 3
    rows = max(len(lines) for lines in texts)
    width = len(frames) * (STRIP_WIDTH + 2 * GAP) - 2 * GAP
    picture = Image.new("RGB", (width, height + rows * line + 3 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for i, (frame, lines) in enumerate(zip(frames, texts, strict=True)):
        left = i * (STRIP_WIDTH + 2 * GAP)
        picture.paste(Image.fromarray(frame).resize((STRIP_WIDTH, height), Image.Resampling.LANCZOS), (left, 0))
        for row, (text, font) in enumerate(lines):
            draw.text((left + GAP, height + GAP + row * line), text, font=font, fill=FAINT if row else INK)
    return picture


def caption_lines(caption: Caption, fonts: Fonts) -> list[tuple[str, Font]]:
    """The lines of a caption: its head, and its words in at most STRIP_LINES lines."""
    words, font = readable(caption.words, fonts, STRIP_LETTERS)
    lines = fitted(words, font, STRIP_WIDTH - 2 * GAP, STRIP_LINES)
    return [(caption.head, fonts[STRIP_LETTERS]), *((text, font) for text in lines)]
