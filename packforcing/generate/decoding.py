"""Decoding a video's blocks in their order: at once, or beside other work; and again, when it failed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..model.vae import DECODER_REACH, StreamingDecoder, WanVAE
from .side_stream import SideStream
from .stopwatch import Stopwatch


@dataclass
class Decoding:
    """A block that is decoded, is being decoded, or waits for it."""

    latents: Tensor  # [B, 16, T, h, w], normalised
    seconds: dict[str, float]  # to which its time is added
    running: Future[tuple[Tensor, float]] | None = None  # on the side stream
    frames: Tensor | None = None  # [B, 3, F, H, W] in [-1, 1], once it is done


class BlockDecoder:
    """Decodes blocks in the order in which they are begun.

    A decoder that fails within a block, for want of memory say, has lost its place in the video. It finds it again from
    the latents that went before, of which this keeps as many as that takes: 40 frames, which are 16 MB at 832x480. They
    stay on the device, since the loop would wait for each copy of them.

    Args:
        frames_per_pass: latent frames that are decoded at a time; None: a whole block. It can be changed.
        side: where blocks are decoded beside other work; None: when their frames are asked for.
    """

    def __init__(
        self,
        vae: WanVAE,
        frames_per_pass: int | None,
        block_frames: int,
        side: SideStream | None,
        stopwatch: Stopwatch,
    ) -> None:
        self._side = side
        self._stream = StreamingDecoder(vae, frames_per_pass)
        self._stopwatch = stopwatch
        self._waiting: deque[Decoding] = deque()
        self._past: deque[Tensor] = deque(maxlen=-(-DECODER_REACH // block_frames))

    @property
    def beside(self) -> bool:
        """Whether blocks are decoded beside other work."""
        return self._side is not None

    @property
    def frames_per_pass(self) -> int | None:
        """Latent frames that are decoded at a time; None: a whole block."""
        return self._stream.frames_per_pass

    @frames_per_pass.setter
    def frames_per_pass(self, frames: int) -> None:
        self._stream.frames_per_pass = frames

    def begin(self, latents: Tensor, seconds: dict[str, float]) -> Decoding:
        """Takes the next block. Nothing is decoded here, so nothing fails."""
        running = None if self._side is None else self._side.submit(partial(self._stream.decode, latents))
        decoding = Decoding(latents, seconds, running)
        self._waiting.append(decoding)
        return decoding

    def frames(self, decoding: Decoding) -> Tensor:
        """The frames of a block; waits for them, or decodes it and those before it. After a failure it tries again."""
        while decoding.frames is None:
            first = self._waiting[0]
            try:
                first.frames = self._decoded(first)
            except BaseException:
                self._forget_failed()
                raise
            first.running = None
            self._past.append(first.latents)
            self._waiting.popleft()
        return decoding.frames

    def stop_beside(self) -> None:
        """From now on blocks are decoded when their frames are asked for. Waits for those that are being decoded."""
        self._forget_failed()
        self._side = None

    def _decoded(self, block: Decoding) -> Tensor:
        if block.running is not None:
            frames, block.seconds["decode"] = block.running.result()
            if frames.is_cuda:
                # Made on another stream, which must not take their memory back while this one reads them.
                frames.record_stream(torch.cuda.current_stream(frames.device))
            return frames
        with self._stopwatch.stretch(block.seconds, "decode"):
            if self._stream.lost:
                self._stream.restore(self._past)
            return self._stream.decode(block.latents)

    def _forget_failed(self) -> None:
        """Of blocks on the side stream, waits for all, and lets those that failed be decoded anew."""
        running = [block for block in self._waiting if block.running is not None]
        wait([block.running for block in running if block.running is not None])
        for block in running:
            if block.running is not None and block.running.exception() is not None:
                block.running = None
