"""Going on after memory has run out in the middle of a run: with the same block, and holding less.

What a video holds can become smaller while it is made. Each of these is taken once, in this order, until a block
passes:

    decode after the denoising, not beside it         the same video, to the bit
    archive off the device, into host memory          the same video, to the bit
      (into a file, where host memory may be short)
    VAE: one latent frame at a time                   from there on the same to rounding
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..config import CacheConfig
from ..devices import is_out_of_memory, release_unused_memory
from ..errors import PackForcingError
from ..model.causal_wan import TextKV
from .long_video import Block, LongVideo, no_callback
from .prepare import PlannedRun
from .start import Start, started_blocks
from .story import Story

log = logging.getLogger(__name__)


class MemoryRanOutError(PackForcingError):
    """Memory ran out, and nothing is left that a run could do without."""


def log_warning(sentence: str) -> None:
    """The default `say`."""
    log.warning("PackForcing: %s", sentence)


def no_room() -> None:
    """The default `make_room`."""


@contextmanager
def weights_told() -> Iterator[None]:
    """Raises MemoryRanOutError when there is no memory for weights that are loaded within it."""
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        on_device = _is_devices(error)
    raise MemoryRanOutError(
        f"{_whose(on_device)} ran out while the weights were loaded: choose a smaller model or one in fp8, or close "
        "other programs."
    )


def begun_video(
    planned: PlannedRun,
    text: TextKV | Story,
    on_step: Callable[[int, int], None] = no_callback,
    say: Callable[[str], None] = log_warning,
) -> LongVideo:
    """`planned.video`; without decoding beside the denoising, where the device has no memory for the buffers of that.

    Raises MemoryRanOutError when it has none for the others either.
    """
    device, settings = planned.models.wan.device, planned.settings
    try:
        return planned.video(text, on_step)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        on_device = _is_devices(error)
    release_unused_memory(device)
    if not settings.overlap:
        raise _ran_out("before the first block", on_device, settings.layout.config)
    video = begun_video(replace(planned, settings=replace(settings, overlap=False)), text, on_step, say)
    _tell(video, "before the first block", on_device, DECODED_AFTER, say)
    return video


def lasting_blocks(
    video: LongVideo,
    start: Start | None,
    blocks: int,
    say: Callable[[str], None] = log_warning,
    make_room: Callable[[], None] = no_room,
) -> Iterator[Block]:
    """`started_blocks`, which go on after memory has run out.

    Args:
        say: called with a sentence for each thing that the video does without from then on; the record has it too.
        make_room: called then, when nothing is being decoded: it may move weights.

    Raises MemoryRanOutError when nothing is left to do without. The finished blocks were all given by then.
    """
    while True:
        try:
            yield from started_blocks(video, start, blocks)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            on_device = _is_devices(error)
        # Here the exception is gone, and with it what its frames held.
        where = f"at block {video.next_block}"
        release_unused_memory(video.wan.device)
        change = smaller(video, on_device)
        if change is None:
            raise _ran_out(where, on_device, video.layout.config)
        release_unused_memory(video.wan.device)
        make_room()
        _tell(video, where, on_device, change, say)


# --- what a video can do without --------------------------------------------------------------------------------------

DECODED_AFTER = "blocks are decoded after their denoising, not beside the next one's"
IN_HOST_MEMORY = "the archive lies in host memory"
IN_A_FILE = "the archive lies in a file"
FRAME_BY_FRAME = "the VAE takes one latent frame at a time"


def smaller(video: LongVideo, on_device: bool) -> str | None:
    """Lets a video hold less from now on. Returns what has changed, in words; None when it holds no more than it must.

    Args:
        on_device: whether it is the device's memory that is short, and not the machine's own.
    """
    for change in (_decode_after, _move_archive, _frame_by_frame):
        try:
            if (told := change(video, on_device)) is not None:
                return told
        except PackForcingError as error:  # the disk has no room for the archive either
            log_warning(str(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    return None


def _decode_after(video: LongVideo, on_device: bool) -> str | None:
    if video.decoder is None or not video.decoder.beside:
        return None
    video.decoder.stop_beside()
    return DECODED_AFTER


def _move_archive(video: LongVideo, on_device: bool) -> str | None:
    archive = video.cache.archive
    if on_device:
        return IN_HOST_MEMORY if archive.leave_device() else None
    return IN_A_FILE if video.layout.config.top_k and archive.leave_memory() else None


def _frame_by_frame(video: LongVideo, on_device: bool) -> str | None:
    if video.decoder is None or (video.decoder.frames_per_pass, video.encode_frames) == (1, 1):
        return None
    video.decoder.frames_per_pass = video.encode_frames = 1
    return FRAME_BY_FRAME


# --- words ------------------------------------------------------------------------------------------------------------


def _is_devices(error: Exception) -> bool:
    """Whether it is the device's allocator that has no more. Other errors may be about the machine's own memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError)


def _whose(on_device: bool) -> str:
    return "The device's memory" if on_device else "Memory"


def _tell(video: LongVideo, where: str, on_device: bool, change: str, say: Callable[[str], None]) -> None:
    sentence = f"{_whose(on_device)} ran out {where}: from there on {change}."
    video.record.notes.append(sentence)
    say(sentence)


def _ran_out(where: str, on_device: bool, config: CacheConfig) -> MemoryRanOutError:
    changes = ["a smaller frame"]
    if config.kv_dtype == "model":
        changes.append("kv_dtype fp8_e4m3")
    changes.append("fewer sink_frames and recent_frames" if on_device else "a shorter video")
    return MemoryRanOutError(
        f"{_whose(on_device)} ran out {where}, and there is nothing left to do without; what was finished is kept: "
        f"choose {', '.join(changes)}, or close other programs."
    )
