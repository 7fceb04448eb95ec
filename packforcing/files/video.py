"""Writing a video file while the video is still being made, and reading one back.

Frames go to the file as they come, in a thread of their own: the whole video is never in memory, and the sampler does
not wait for it. While it grows, the file is a *fragmented* MP4. Every quarter of a second is complete on disk, so that
a killed process leaves a file that plays; it gets its name with the first of them, so no file under that name is ever
empty. A clean close makes it an ordinary MP4 with its index in front, in which every player and browser can seek. That
copies packets, and encodes nothing again.

Reading goes through imageio. Writing uses `av`, on which imageio builds and which ComfyUI itself requires. imageio's
pyav plugin cannot write such a file: it opens the encoder before its options reach it (its log says "Some options were
not used: {'crf': '18', ...}"), so that it sets neither quality nor colour tags, and it cannot copy packets.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
import torch

from ..devices import from_device
from ..errors import PackForcingError
from ..pixels import to_uint8
from .growing_file import GrowingFile
from .writing import check_output_file, part_of, target_of

log = logging.getLogger(__name__)

CHUNK_FRAMES = 16  # frames converted and queued at a time: one block of the paper's model
QUEUE_CHUNKS = 4  # chunks that may wait for the encoder before `write` blocks
ENCODER_THREADS = 4  # each holds a frame back, and the sampler needs the other cores
CRF = 21  # without the macroblock trees it is as good as 18 was with them
FRAGMENT_SECONDS = 0.25
KEYFRAME_SECONDS = 2
SMALLEST_FREE_BYTES = 16 * 2**20

FRAGMENTED = "frag_keyframe+empty_moov+default_base_moof+use_metadata_tags"
ORDINARY = "faststart+use_metadata_tags"
MP4_BRANDS = ("major_brand", "minor_version", "compatible_brands")  # of the container, though read as tags


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds in a file."""

    frames: int
    fps: float  # frames a second
    width: int  # pixels
    height: int
    seconds: float


class VideoWriter:
    """An H.264 MP4 that grows with the video; use it as a context manager, or call `close`.

    Whatever ends the `with` body, an error too, the file is finished and plays what was written until then. A file that
    got no frame is removed. Until the first quarter of a second is on the disk, the file has `.part` behind its name,
    and an older file of its name stays.

    Args:
        path: the file to write; its folder must exist.
        fps: frames a second; it is stored as an exact fraction.
        width, height: size in pixels, both even.
        crf: x264's quality, 0 (lossless) to 51; the default looks like the source.
        metadata: tags of the file, e.g. {"comment": prompt}; a value that is not a string is stored as JSON.

    Raises PackForcingError at once when the values make no video or the file cannot be written. When writing fails
    later, on a full disk for example, the next `write` or `close` raises it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        width: int,
        height: int,
        crf: int = CRF,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.width, self.height = width, height
        self._rate = _exact_rate(fps)
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise PackForcingError(
                f"An H.264 video needs a width and a height that are even, but the size is {width}x{height}: "
                "use multiples of 16."
            )
        if not 0 <= crf <= 51:
            raise PackForcingError(
                f"crf must lie in 0 (lossless) to 51 (worst), but it is {crf}: {CRF} looks like the source."
            )
        check_video_path(self.path)
        self._tags: dict[str, str] = {}
        self.tag(**(metadata or {}))
        self._file = GrowingFile(self.path)
        self._encoder = _Encoder(self._file.path, self._rate, width, height, crf, self._tags)
        self._frames = 0
        self._closed = False
        self._error: Exception | None = None
        # What reads the frames of a chunk: the thread waits for their copy from the device, and not the caller.
        self._queue: Queue[Callable[[], torch.Tensor] | None] = Queue(maxsize=QUEUE_CHUNKS)
        # A daemon: a program that forgets to close its writer must still be able to end.
        self._thread = Thread(target=self._run, name=f"write {self.path.name}", daemon=True)
        self._thread.start()

    @property
    def frames(self) -> int:
        """Frames accepted by `write` so far."""
        return self._frames

    def tag(self, **tags: Any) -> None:
        """Add tags to the file. What is added after the first frame reaches it when it is closed."""
        self._tags |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in tags.items()}

    def write(self, frames: torch.Tensor) -> None:
        """Append frames [3, F, H, W] or [1, 3, F, H, W] in [-1, 1], of any dtype and on any device.

        Returns as soon as the frames are queued; blocks while the queue is full.
        """
        if self._closed:
            raise PackForcingError(f"The video {self.path} is closed already, so no frame can be added to it.")
        self._raise_error()
        if frames.ndim == 5 and frames.shape[0] == 1:
            frames = frames[0]
        if frames.ndim != 4 or frames.shape[0] != 3 or tuple(frames.shape[2:]) != (self.height, self.width):
            raise PackForcingError(
                f"A batch of frames must have the shape [3, F, {self.height}, {self.width}], but it has "
                f"{list(frames.shape)}: give one video's RGB frames at the writer's size."
            )
        for chunk in frames.split(CHUNK_FRAMES, dim=1):
            if chunk.shape[1] == 0:  # an empty tensor splits into one empty chunk
                continue
            self._queue.put(from_device(to_uint8(chunk)))
            self._frames += chunk.shape[1]
            self._raise_error()

    def close(self) -> None:
        """Write what is queued and finish the file; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._raise_error()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except PackForcingError as error:
            if kind is None:
                raise
            # The body has raised already, perhaps this very error from `write`: its exception is the one to tell.
            log.error("%s", error)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise PackForcingError(
                f"Writing the video {self.path} stopped ({self._error}); what had reached the disk is kept: "
                "free some space, or choose another folder."
            ) from self._error

    def _run(self) -> None:
        """The thread's work: encode chunk by chunk. After an error it only empties the queue: `write` never hangs."""
        while (read := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._encoder.encode(read().numpy())
                    self._file.show()
                except Exception as error:
                    self._error = error
        try:
            self._encoder.finish()
            self._file.show()
            if self._error is None and self._encoder.frames:
                _make_seekable(self._file.path, self._tags)
        except Exception as error:
            self._error = self._error or error
        try:
            self._file.end()
        except OSError as error:
            self._error = self._error or error


class _Encoder:
    """A fragmented H.264 MP4 that takes uint8 frames; the file is opened with the first of them."""

    def __init__(self, path: Path, rate: Fraction, width: int, height: int, crf: int, tags: dict[str, str]) -> None:
        self.frames = 0
        self._failed = False
        self._time_base = 1 / rate
        self._container = av.open(
            str(path),
            "w",
            format="mp4",
            container_options={
                "movflags": FRAGMENTED,
                "frag_duration": str(round(FRAGMENT_SECONDS * 1e6)),
                "flush_packets": "1",  # a packet leaves the process as soon as it is muxed
            },
        )
        self._tags = tags
        try:
            self._stream = self._container.add_stream("libx264", rate=rate)
        except Exception as error:
            raise PackForcingError(
                f"The installed PyAV cannot encode H.264 ({error}): reinstall it with 'pip install --upgrade av'."
            ) from error
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.time_base = self._time_base
        self._stream.codec_context.thread_count = ENCODER_THREADS
        self._stream.codec_context.gop_size = max(1, round(KEYFRAME_SECONDS * rate))
        # swscale converts RGB with the BT.601 matrix unless told otherwise. Readers that ignore tags, ComfyUI's among
        # them, convert back the same way, and these tags make all other players agree with them.
        self._stream.options = {
            "crf": str(crf),
            # x264's look-ahead by macroblock trees reads memory that was never written, so that equal frames can give
            # other bytes. Without it the encoder holds 4 frames back, and not 17.
            "mbtree": "0",
            "colorspace": "smpte170m",
            "color_primaries": "bt709",
            "color_trc": "bt709",
            "color_range": "tv",
        }

    def encode(self, frames: np.ndarray) -> None:
        """Add uint8 frames [F, H, W, 3]."""
        if not self.frames:
            self._container.metadata.update(self._tags)
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = self.frames, self._time_base
            self.frames += 1
            self._mux(frame)

    def finish(self) -> None:
        """Write the frames that the encoder holds back, and close the file."""
        try:
            if self.frames and not self._failed:
                self._mux(None)
        finally:
            self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        """Encode a frame (None: all that are held back) and write the packets that come out."""
        try:
            self._container.mux(self._stream.encode(frame))
        except Exception:
            self._failed = True  # no packet may follow a header that failed: libavformat would crash the process
            raise


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """All frames of a video, uint8 [F, H, W, 3], and its frames a second.

    A file that breaks off, because its writer was killed or the disk was full, gives the frames before the break.
    Raises PackForcingError when the file is missing or holds no frame.
    """
    rate = probe(path).fps
    return np.stack(list(frames_of(path))), rate


def frames_of(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The frames of a video, one after another, uint8 [H, W, 3]: one at a time is in memory.

    A file that breaks off gives the frames before the break. Raises PackForcingError when there is none.
    """
    count, size = 0, None
    try:
        for frame in iio.imiter(str(target_of(path)), plugin="pyav", format="rgb24"):
            if frame.shape != (size := size or frame.shape):
                raise ValueError("its frames change their size")
            count += 1
            yield frame
    except (av.error.FFmpegError, ValueError, TypeError, AttributeError) as error:
        log.warning("The video %s breaks off: %s", path, error)
    if not count:
        raise PackForcingError(f"The video {path} holds no frame that can be decoded.")


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Frames, frames a second, size and duration of a video, without decoding it.

    Raises PackForcingError when the file is missing or is no video.
    """
    with _open_video(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        try:
            # A fragmented file has no count in its header.
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            seconds = float(stream.duration * stream.time_base) if stream.duration else float(frames / rate)
            return VideoInfo(frames, float(rate), stream.width, stream.height, seconds)
        # The others are of a video without a codec or a rate.
        except (av.error.FFmpegError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise PackForcingError(f"The video {path} is damaged ({error}): choose another.") from error


def tags_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The tags of a video file. Raises PackForcingError when the file is missing or is no video."""
    with _open_video(path) as container:
        return dict(container.metadata)


def _exact_rate(fps: float) -> Fraction:
    """The fraction that a number means: 16 -> 16, 23.976 -> 2997/125, 24000 / 1001 -> 24000/1001."""
    if not (isfinite(fps) and 0 < fps <= 1000):
        raise PackForcingError(f"The frame rate must be above 0 and at most 1000 frames a second, but it is {fps}.")
    rate = Fraction(fps).limit_denominator(65535)
    if rate == 0:
        raise PackForcingError(f"The frame rate is too small to be stored: it is {fps} frames a second.")
    return rate


def check_video_path(path: Path) -> None:
    """Raises PackForcingError when no video can be written there; leaves an existing file as it is."""
    check_output_file(path, "video")
    free = shutil.disk_usage(target_of(path).parent).free
    if free < SMALLEST_FREE_BYTES:
        raise PackForcingError(
            f"The video cannot be written to {path}: its disk has {free / 2**20:.1f} MiB free, free some space first."
        )


def _make_seekable(path: Path, tags: dict[str, str]) -> None:
    """Turn the fragmented file into an ordinary one by copying its packets; if that fails, the old file stays."""
    copy = part_of(path)
    try:
        _copy_packets(path, copy, tags)
        _decode_first_frame(copy)  # look before the copy replaces the only file that there is
        os.replace(copy, path)
    except Exception as error:
        # No reason to fail a finished run: the fragmented file has every frame, and it plays.
        copy.unlink(missing_ok=True)
        log.warning("The video %s is complete, but could not be made seekable (%s).", path, error)


def _copy_packets(source: Path, target: Path, tags: dict[str, str]) -> None:
    with av.open(str(source)) as old:
        stream = old.streams.video[0]
        units = str(stream.time_base.denominator)
        # The defaults, 1/1000 and 1/90000 s, cannot express the times of frames at 23.976 frames a second exactly.
        options = {"movflags": ORDINARY, "movie_timescale": units, "video_track_timescale": units}
        with av.open(str(target), "w", format="mp4", container_options=options) as new:
            # Without `opaque`, PyAV 14 opens an encoder, whose header replaces the one that the packets need.
            copy = new.add_stream_from_template(stream, opaque=True)
            new.metadata.update({key: value for key, value in old.metadata.items() if key not in MP4_BRANDS} | tags)
            start = None
            for packet in old.demux(stream):
                if packet.dts is None:  # the empty packet at the end
                    continue
                # B-frames delay a fragmented file's first picture by two frames. The ordinary file starts at 0.
                start = packet.pts if start is None else start
                packet.pts, packet.dts = packet.pts - start, packet.dts - start
                packet.stream = copy
                new.mux(packet)


def _decode_first_frame(path: Path) -> None:
    with av.open(str(path)) as container:
        next(container.decode(video=0))


def _open_video(path: str | os.PathLike[str]) -> av.container.InputContainer:
    try:
        container = av.open(str(target_of(path)))  # an absolute name: FFmpeg takes "take:1.mp4" for an address
    except (OSError, av.error.FFmpegError, UnicodeDecodeError) as error:  # the last for tags that are no text
        raise PackForcingError(
            f"The video {path} cannot be opened ({error}): check the path, and that it is a video."
        ) from error
    if not container.streams.video:
        container.close()
        raise PackForcingError(f"The file {path} holds no video stream.")
    return container
