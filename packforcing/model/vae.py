"""The Wan 2.1 VAE, one chunk of video at a time.

    vae_latents   normalised and raw latents
    vae_norms     the norms
    vae_modules   the network, with the checkpoint's key names
    vae_weights   from a state dict, or random
    vae           the streams: latents to pixels and back, chunk by chunk

Other rooms import from here.

Units: a *frame* is a pixel frame [3, 8h, 8w] in [-1, 1]; a *latent frame* is [16, h, w]. The causal VAE maps
the video's first frame to its first latent frame, and every 4 frames after it to one latent frame more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..config import LATENT_CHANNELS
from ..config import VAE_SPACE_STRIDE as SPACE_STRIDE
from ..config import VAE_TIME_STRIDE as TIME_STRIDE
from ..errors import PackForcingError
from .vae_latents import LATENT_MEAN, LATENT_STD, denormalise, normalise
from .vae_modules import CausalConv3d, Downsample, History, Upsample, WanVAE, check_pixels
from .vae_weights import init_vae, load_vae

__all__ = [
    "DECODER_REACH", "LATENT_CHANNELS", "LATENT_MEAN", "LATENT_STD", "SPACE_STRIDE", "Downsample", "History",
    "StreamingDecoder", "StreamingEncoder", "Upsample", "WanVAE", "denormalise", "encode_clip", "init_vae", "load_vae",
    "normalise",
]  # fmt: skip

S = TypeVar("S", bound="_Stream")

# Latent frames before it on which a decoder's history depends: what its causal convolutions see, one over the other.
DECODER_REACH = 40


class _Stream:
    """What encoder and decoder streams share: the VAE, the history, and the length of a pass."""

    _part: str  # "encoder" or "decoder": the half of the VAE that this stream runs

    def __init__(self, vae: WanVAE, frames_per_pass: int | None = None):
        if frames_per_pass is not None and frames_per_pass < 1:
            raise PackForcingError(
                f"frames_per_pass counts latent frames and is at least 1, but {frames_per_pass} was given; "
                f"leave it None to process each chunk in one pass."
            )
        self.vae = vae
        self.frames_per_pass = frames_per_pass
        self._history: History | None = {}  # None while a chunk goes through, and after one that failed

    @property
    def started(self) -> bool:
        """Whether the video's first frame has gone through."""
        return bool(self._past)

    @property
    def _past(self) -> History:
        if self._history is None:
            raise PackForcingError(
                "This stream failed within a chunk and has lost its place in the video: call reset() to start another "
                "video, or assign an earlier state."
            )
        return self._history

    @property
    def lost(self) -> bool:
        """Whether it failed within a chunk."""
        return self._history is None

    def reset(self) -> None:
        """Forget the video: the next call starts a new one."""
        self._history = {}

    @property
    def state(self) -> History:
        """All that the next call needs of the past, as named tensors; empty before the first call.

        It is a snapshot: later calls do not change it. Its size depends on the size of a frame, not on the length of
        the video. To go on from there, assign it to a stream over the same weights.
        """
        return dict(self._past)

    @state.setter
    def state(self, state: Mapping[str, Tensor]) -> None:
        expected = set(self._layers())
        if state and set(state) != expected:
            odd = min(set(state) ^ expected)
            raise PackForcingError(
                f"This state is not one of a Wan 2.1 {self._part} stream: it holds {len(state)} tensors instead "
                f"of {len(expected)}, and they disagree on {odd!r}; assign what the `state` of such a stream was."
            )
        self._history = dict(state)

    def clone(self: S) -> S:
        """A second stream at the same point of the video, over the same VAE; the two go on independently."""
        twin = type(self)(self.vae, self.frames_per_pass)
        twin._history = dict(self._past)
        return twin

    def _layers(self) -> Iterator[str]:
        """Names of the layers that have an entry in the history."""
        for layer in self.vae.modules():
            if isinstance(layer, CausalConv3d) and layer.name.startswith(f"{self._part}."):
                yield layer.name

    def _take_history(self, chunk: Tensor) -> History:
        """The history, on the VAE's device; the caller puts it back into `_history` when the chunk is through.

        The chunk replaces its entries one by one. No copy is kept for the case that the chunk fails, since that would
        hold 1.9 GB more (Wan 2.1 at 832x480 in bfloat16): after a failure `_history` is None. The entries are moved
        here because the VAE may have been moved, or the state read from a file. Raises `PackForcingError` for a chunk
        [B, C, T, H, W] of another batch or size than the video's.
        """
        history = self._past
        if history:
            batch, _, _, height, width = history[f"{self._part}.conv1"].shape
            if (batch, height, width) != (chunk.shape[0], *chunk.shape[3:]):
                raise PackForcingError(
                    f"This stream's video has batch {batch} and {height} x {width} (height x width) at the "
                    f"{self._part}'s input, but the chunk is {list(chunk.shape)}; go on with the same size, "
                    f"or call reset() to start another video."
                )
        for name, past in history.items():
            history[name] = past.to(self.vae.device, self.vae.dtype)
        self._history = None
        return history


class StreamingDecoder(_Stream):
    """Latents to pixels, chunk by chunk: `decode` takes the video's next latent frames.

    `frames_per_pass` bounds memory: a chunk is decoded that many latent frames at a time. The result is the same, but
    for floating-point rounding. None, the default, decodes each chunk in one pass.
    """

    _part = "decoder"

    def restore(self, past: Iterable[Tensor]) -> None:
        """Finds a place in a video again, to the bit as if it had never been lost.

        Args:
            past: the chunks [B, 16, t, h, w] before that place, as they were decoded: all, or at least the last
                DECODER_REACH latent frames.
        """
        self.reset()
        for chunk in past:
            self.decode(chunk)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The next latent frames [B, 16, T, h, w], normalised -> their frames [B, 3, F, 8h, 8w] in [-1, 1].

        F = 4T - 3 for the call that starts the video, 4T after it. The frames have the VAE's dtype and device.
        Raises `PackForcingError` for a tensor of another shape; the stream then stays where it was. After any other
        failure, such as memory that has run out, the stream has lost its place in the video.
        """
        raw = denormalise(z.float()).to(self.vae.device, self.vae.dtype)
        if raw.shape[2] == 0:
            raise PackForcingError("There is nothing to decode: the latents hold 0 frames; pass at least 1.")
        history = self._take_history(raw)
        passes = raw.split(self.frames_per_pass or raw.shape[2], dim=2)
        frames = [self.vae.decode(chunk, history).clamp_(-1, 1) for chunk in passes]
        self._history = history
        return _join(frames)


class StreamingEncoder(_Stream):
    """Pixels to latents, chunk by chunk: `encode` takes the video's next frames.

    `frames_per_pass` counts latent frames, as in `StreamingDecoder`.
    """

    _part = "encoder"

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The next frames [B, 3, F, H, W] in [-1, 1] -> their latents [B, 16, T, H/8, W/8]: means, normalised.

        F = 1 + 4k for the call that starts the video (T = 1 + k), 4k after it (T = k). The latents have the VAE's
        dtype and device. Raises `PackForcingError` for any other shape; the stream then stays where it was. After any
        other failure the stream has lost its place in the video.
        """
        check_pixels(pixels, self.started)
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        passes = self._passes(pixels)
        history = self._take_history(pixels)
        latents = [self.vae.encode(chunk, history)[0] for chunk in passes]
        self._history = history
        return normalise(_join(latents))

    def _passes(self, pixels: Tensor) -> tuple[Tensor, ...]:
        if self.frames_per_pass is None:
            return (pixels,)
        size = TIME_STRIDE * self.frames_per_pass
        # The video's first latent frame is one frame only.
        opening = size if self.started else size - TIME_STRIDE + 1
        return pixels.tensor_split(tuple(range(opening, pixels.shape[2], size)), dim=2)


def _join(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)


def encode_clip(vae: WanVAE, pixels: Tensor, frames_per_pass: int | None = None) -> Tensor:
    """A whole clip [B, 3, 1 + 4k, H, W] in [-1, 1] -> normalised mean latents [B, 16, 1 + k, H/8, W/8].

    No gradients (for those, `WanVAE.encode`). Errors and `frames_per_pass` are those of `StreamingEncoder`.
    """
    return StreamingEncoder(vae, frames_per_pass).encode(pixels)
