"""The Wan 2.1 VAE, one chunk of video at a time.

The module tree carries the checkpoint's own key names, so a state dict drops in without renaming and without
a copy. Every layer that looks back in time takes a `History`: what it must remember of the frames before this
chunk. Feeding a video in chunks of any lengths, with one history, gives what feeding it whole gives, and the
history never grows.

Units: a *frame* is a pixel frame [3, 8h, 8w] in [-1, 1]; a *latent frame* is [16, h, w]. The causal VAE maps
the video's first frame to its first latent frame, and every 4 frames after it to one latent frame more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import LATENT_CHANNELS
from ..config import VAE_SPACE_STRIDE as SPACE_STRIDE
from ..config import VAE_TIME_STRIDE as TIME_STRIDE
from ..devices import to_device
from ..errors import PackForcingError

LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

History = dict[str, Tensor]
"""Layer name -> its last input frames [B, C, 1 or 2, H, W]. Empty before the video's first frame.

Layers replace entries and never write into them, so `dict(history)` is a snapshot that costs nothing.
"""


# --- latent convention ----------------------------------------------------------------------------


def normalise(raw: Tensor) -> Tensor:
    """The VAE's own latents [B, 16, T, h, w] -> the diffusion model's: mean 0, variance 1 in each channel."""
    mean, std = _latent_statistics(raw)
    return ((raw - mean) / std).to(raw.dtype)


def denormalise(z: Tensor) -> Tensor:
    """The inverse of `normalise`: the diffusion model's latents [B, 16, T, h, w] -> the VAE's own."""
    mean, std = _latent_statistics(z)
    return (z * std + mean).to(z.dtype)


def _latent_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std [16, 1, 1, 1] in float32, so that half-precision latents are rounded only once."""
    if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS:
        raise PackForcingError(
            f"Wan 2.1 latents have the shape [batch, {LATENT_CHANNELS}, frames, height, width], but these "
            f"are {list(latents.shape)}; pass video latents made for a Wan 2.1 model."
        )
    statistics = to_device(torch.tensor([LATENT_MEAN, LATENT_STD]), latents.device)
    mean, std = rearrange(statistics, "two c -> two c 1 1 1")
    return mean, std


# --- layers ---------------------------------------------------------------------------------------


class Temporal(nn.Module):
    """A layer that looks at earlier frames: `forward(x, history)`. All others are called with `x` alone."""


class Chain(Temporal, nn.Sequential):
    """A `Sequential` that hands the history to the layers that want it."""

    def forward(self, x: Tensor, history: History) -> Tensor:
        for layer in self:
            x = layer(x, history) if isinstance(layer, Temporal) else layer(x)
        return x


class CausalConv3d(Temporal, nn.Conv3d):
    """A convolution over [B, C, T, H, W] that sees no later frame, and zeros before the video's first."""

    name: str  # its path in the VAE, and so its key in the history; `WanVAE` sets it

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int], time_stride: int = 1):
        _, height, width = kernel
        padding = (0, height // 2, width // 2)
        super().__init__(in_dim, out_dim, kernel, stride=(time_stride, 1, 1), padding=padding)
        # Input frames that the next chunk's first output still reads.
        self.remembered = kernel[0] - time_stride

    def forward(self, x: Tensor, history: History) -> Tensor:
        if self.remembered:
            past = history[self.name] if self.name in history else self.silence(x)
            x = torch.cat([past, x], dim=2)
            # The clone lets go of the rest of x, which a view would keep alive until the next chunk.
            history[self.name] = x[:, :, -self.remembered :].clone()
        return super().forward(x)

    def silence(self, x: Tensor) -> Tensor:
        """The zeros that stand before the first frame of x."""
        batch, channels, _, height, width = x.shape
        return x.new_zeros(batch, channels, self.remembered, height, width)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """The channel vector of each position of [B, C, ...] brought to length sqrt(C), times gamma [C, ...]."""
    # Squared and summed rather than by vector_norm, which takes 1.2 (float32) to 1.6 times (bfloat16) as long for a
    # whole decode on a CPU. The squares are summed in float32; those of float16 would overflow before that.
    squares = (x.float() if x.dtype == torch.float16 else x).square().sum(dim=1, keepdim=True, dtype=torch.float32)
    # The floor is one that x's type can hold: in float16 the usual 1e-12 would round to zero, and turn an all-zero
    # pixel into nan. Under the root, where its gradient is finite.
    floor = max(1e-12, torch.finfo(x.dtype).tiny)
    length = squares.clamp_min(floor**2).sqrt()
    return x / length.to(x.dtype) * (gamma * math.sqrt(x.shape[1])).to(x.dtype)


def rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """`rms_norm`, then SiLU."""
    return F.silu(rms_norm(x, gamma))


# Orders of the axes of [B, C, H, W] and [B, C, T, H, W] in memory that occur: plain, frame by frame, channels last.
ORDERS = {4: ((0, 1, 2, 3), (0, 2, 3, 1)), 5: ((0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (0, 2, 3, 4, 1))}


def on_rows(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, gamma: Tensor) -> Tensor:
    """One of the two functions above on [N, C, M] with the positions of x as N and M, as they lie in memory.

    A compiled function then sees few kinds of shapes, where it would else be compiled for each kind of strides. Without
    gradients.
    """
    for order in ORDERS[x.ndim]:
        moved = x.permute(order)
        if moved.is_contiguous():
            break
    else:
        order, moved = ORDERS[x.ndim][0], x.contiguous()
    at = order.index(1)
    shape = moved.shape
    rows = moved.view(math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :]))
    back = [order.index(axis) for axis in range(x.ndim)]
    # As plain tensors: of a view, torch.compile also looks at what it is a view of.
    return function(rows.data, gamma.view(-1, 1).data).view(shape).permute(back)


class RMSNorm(nn.Module):
    """`rms_norm` of [B, C, ...] with so many `axes` after C; with `silu`, SiLU too: one function, to be compiled."""

    def __init__(self, dim: int, axes: int, silu: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))
        self.function = rms_norm_silu if silu else rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.gamma[:])  # a view, since torch.compile would take a parameter's shape for fixed


class ResidualBlock(Temporal):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = Chain(
            RMSNorm(in_dim, axes=3, silu=True),
            nn.Identity(),  # holds the checkpoint's place, as below: SiLU
            CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            RMSNorm(out_dim, axes=3, silu=True),
            nn.Identity(),  # SiLU
            nn.Identity(),  # dropout, in the original's training
            CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else nn.Conv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, history: History) -> Tensor:
        return self.shortcut(x) + self.residual(x, history)


class AttentionBlock(nn.Module):
    """Single-head attention among the positions of one frame; frames do not see each other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, _ = x.shape
        frames = self.norm(rearrange(x, "b c t h w -> (b t) c h w"))
        q, k, v = rearrange(self.to_qkv(frames), "f (qkv c) h w -> qkv f 1 (h w) c", qkv=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = self.proj(rearrange(attended, "f 1 (h w) c -> f c h w", h=height))
        return x + rearrange(attended, "(b t) c h w -> b c t h w", b=batch)


class Upsample(Temporal):
    """Twice the height and width, half the channels; `in_time`: also twice the frames after the video's first."""

    def __init__(self, dim: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"),
            nn.Conv2d(dim, dim // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        if self.time_conv is not None:
            x = self.double_frames(x, self.time_conv, history)
        return each_frame(self.resample, x)

    @staticmethod
    def double_frames(x: Tensor, time_conv: CausalConv3d, history: History) -> Tensor:
        if time_conv.name in history:
            return interleave(time_conv(x, history))
        # The video's first frame stays one frame, and the convolution never sees it: zeros stand in its place.
        first, rest = x[:, :, :1], x[:, :, 1:]
        history[time_conv.name] = time_conv.silence(first)
        if rest.shape[2] == 0:
            return first
        return torch.cat([first, interleave(time_conv(rest, history))], dim=2)


class Downsample(Temporal):
    """Half the height and width; `in_time`: also half the frames after the video's first."""

    def __init__(self, dim: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)),  # right and bottom only
            nn.Conv2d(dim, dim, 3, stride=2),
        )
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), time_stride=2) if in_time else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = each_frame(self.resample, x)
        return x if self.time_conv is None else self.halve_frames(x, self.time_conv, history)

    @staticmethod
    def halve_frames(x: Tensor, time_conv: CausalConv3d, history: History) -> Tensor:
        if time_conv.name in history:
            return time_conv(x, history)
        # The video's first frame stays as it is, and is the past of the frames after it.
        first, rest = x[:, :, :1], x[:, :, 1:]
        history[time_conv.name] = first.clone()
        if rest.shape[2] == 0:
            return first
        return torch.cat([first, time_conv(rest, history)], dim=2)


def interleave(x: Tensor) -> Tensor:
    """[B, 2C, T, H, W] -> [B, C, 2T, H, W]: the channels' first half are even frames, the second odd ones."""
    return rearrange(x, "b (two c) t h w -> b c (t two) h w", two=2)


def each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A 2D layer over every frame of [B, C, T, H, W] on its own."""
    frames = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


# --- the model ------------------------------------------------------------------------------------


def middle(dim: int) -> Chain:
    return Chain(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(dim: int, out_dim: int) -> Chain:
    return Chain(RMSNorm(dim, axes=3, silu=True), nn.Identity(), CausalConv3d(dim, out_dim, (3, 3, 3)))


class Encoder(Temporal):
    """Pixels [B, 3, F, H, W] -> moments [B, out_dim, T, H/8, W/8]."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv1 = CausalConv3d(3, dim, (3, 3, 3))
        self.downsamples = Chain(
            ResidualBlock(dim, dim),
            ResidualBlock(dim, dim),
            Downsample(dim, in_time=False),
            ResidualBlock(dim, 2 * dim),
            ResidualBlock(2 * dim, 2 * dim),
            Downsample(2 * dim, in_time=True),
            ResidualBlock(2 * dim, 4 * dim),
            ResidualBlock(4 * dim, 4 * dim),
            Downsample(4 * dim, in_time=True),
            ResidualBlock(4 * dim, 4 * dim),
            ResidualBlock(4 * dim, 4 * dim),
        )
        self.middle = middle(4 * dim)
        self.head = head(4 * dim, out_dim)

    def forward(self, x: Tensor, history: History) -> Tensor:
        for part in (self.conv1, self.downsamples, self.middle, self.head):
            x = part(x, history)
        return x


class Decoder(Temporal):
    """Latents [B, z_dim, T, h, w] -> pixels [B, 3, F, 8h, 8w]."""

    def __init__(self, dim: int, z_dim: int):
        super().__init__()
        self.conv1 = CausalConv3d(z_dim, 4 * dim, (3, 3, 3))
        self.middle = middle(4 * dim)
        self.upsamples = Chain(
            ResidualBlock(4 * dim, 4 * dim),
            ResidualBlock(4 * dim, 4 * dim),
            ResidualBlock(4 * dim, 4 * dim),
            Upsample(4 * dim, in_time=True),
            ResidualBlock(2 * dim, 4 * dim),
            ResidualBlock(4 * dim, 4 * dim),
            ResidualBlock(4 * dim, 4 * dim),
            Upsample(4 * dim, in_time=True),
            ResidualBlock(2 * dim, 2 * dim),
            ResidualBlock(2 * dim, 2 * dim),
            ResidualBlock(2 * dim, 2 * dim),
            Upsample(2 * dim, in_time=False),
            ResidualBlock(dim, dim),
            ResidualBlock(dim, dim),
            ResidualBlock(dim, dim),
        )
        self.head = head(dim, 3)

    def forward(self, x: Tensor, history: History) -> Tensor:
        for part in (self.conv1, self.middle, self.upsamples, self.head):
            x = part(x, history)
        return x


def check_pixels(pixels: Tensor, started: bool) -> None:
    """Raise `PackForcingError` unless these are frames the encoder can take; `started`: not the video's first."""
    if pixels.ndim != 5 or pixels.shape[1] != 3:
        raise PackForcingError(
            f"The encoder takes pixels of the shape [batch, 3, frames, height, width], but these are "
            f"{list(pixels.shape)}; move the colour channels to the second place and drop any alpha channel."
        )
    frames, height, width = pixels.shape[2:]
    if height % SPACE_STRIDE or width % SPACE_STRIDE or 0 in (height, width):
        raise PackForcingError(
            f"Height and width must be multiples of {SPACE_STRIDE}, but the frames are {height} x {width} "
            f"(height x width); crop or resize them first."
        )
    if started and (frames == 0 or frames % TIME_STRIDE):
        raise PackForcingError(
            f"After the start of a video the encoder takes {TIME_STRIDE}k frames (4, 8, 12, ...), but {frames} "
            f"were given; pass whole groups of {TIME_STRIDE}, or call reset() to start another video."
        )
    if not started and frames % TIME_STRIDE != 1:
        raise PackForcingError(
            f"A video starts with 1 + {TIME_STRIDE}k frames (1, 5, 9, ...), but {frames} were given; "
            f"drop or repeat frames to reach such a number."
        )


class WanVAE(nn.Module):
    """The Wan 2.1 VAE. `dim`: its width, 96 in the released one, 8 to 16 in a tiny one; `z_dim`: latent channels.

    `encode` and `decode` are the differentiable core, in the VAE's own (raw) latents; for generating use
    `StreamingDecoder`, `StreamingEncoder` and `encode_clip`, which speak the diffusion model's latents.
    """

    def __init__(self, dim: int = 96, z_dim: int = LATENT_CHANNELS):
        super().__init__()
        self.dim = dim
        self.encoder = Encoder(dim, 2 * z_dim)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim)
        for name, layer in self.named_modules():
            if isinstance(layer, CausalConv3d):
                layer.name = name

    def compile_norms(self) -> None:
        """Has torch.compile make one kernel of each norm and its SiLU, for all layers and sizes."""
        compiled = {
            function: partial(on_rows, torch.compile(function, dynamic=True)) for function in (rms_norm, rms_norm_silu)
        }
        for layer in self.modules():
            if isinstance(layer, RMSNorm):
                layer.function = compiled[layer.function]

    def to_layout(self, channels_last: bool) -> WanVAE:
        """Brings the convolutions' weights into a memory format, which activations then follow."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                layer.to(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)
            elif isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv2.weight.device

    def encode(self, pixels: Tensor, history: History | None = None) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, F, H, W] in [-1, 1] -> (mean, log variance), raw latents of [B, 16, T, H/8, W/8] each.

        Without a history the clip is a whole video, F = 1 + 4k. With one, the chunk follows what the history
        has seen (F = 4k once it has seen something) and the history is brought up to date. Raises
        `PackForcingError` for pixels of another shape.
        """
        history = {} if history is None else history
        check_pixels(pixels, started="encoder.conv1" in history)
        moments = self.conv1(self.encoder(pixels, history))
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def decode(self, raw: Tensor, history: History | None = None) -> Tensor:
        """Raw latents [B, 16, T, h, w] -> pixels [B, 3, F, 8h, 8w] around [-1, 1], not clamped.

        F = 4T - 3 at the start of a video and 4T after it; the history is as in `encode`.
        """
        return self.decoder(self.conv2(raw), {} if history is None else history)


# --- streams --------------------------------------------------------------------------------------


S = TypeVar("S", bound="_Stream")


class _Stream:
    """What the two directions share: the VAE, the history, and how long a pass may be."""

    _part: str  # the VAE's half that this stream runs

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

    def reset(self) -> None:
        """Forget the video: the next call starts a new one."""
        self._history = {}

    @property
    def state(self) -> History:
        """All that the next call needs of the past, as named tensors; empty before the first call.

        It is a snapshot: later calls do not change it. Its size depends on the frame size only, not on the
        length of the video. Assign it to a stream over the same weights to go on from there.
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
        """Names of the layers that remember."""
        for layer in self.vae.modules():
            if isinstance(layer, CausalConv3d) and layer.name.startswith(f"{self._part}."):
                yield layer.name

    def _take_history(self, chunk: Tensor) -> History:
        """The history, for a chunk to bring up to date; whoever takes it gives it back when the chunk is through.

        There is only one, whose entries are replaced one by one: a copy to fall back on would hold 1.9 GB more (Wan 2.1
        at 832x480 in bfloat16). It lies where the VAE is now: the VAE may have been moved, or the state read from a
        file.
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

    `frames_per_pass` bounds memory: the chunk goes through that many latent frames at a time, with the same
    result (floating-point rounding aside); None, the default, takes each chunk whole.
    """

    _part = "decoder"

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The next latent frames [B, 16, T, h, w], normalised -> their frames [B, 3, F, 8h, 8w] in [-1, 1].

        F = 4T - 3 for the call that starts the video, 4T after it. The frames have the VAE's dtype and device.
        Raises `PackForcingError` for a tensor of another shape, and then the stream stays where it was; after any
        other failure (out of memory, say) it has lost its place.
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

        F = 1 + 4k for the call that starts the video (T = 1 + k), 4k after it (T = k). The latents have the
        VAE's dtype and device. Raises `PackForcingError` for any other shape, and then the stream stays where it
        was; after any other failure it has lost its place.
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


# --- weights --------------------------------------------------------------------------------------


def load_vae(
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> WanVAE:
    """A VAE over the tensors of a Wan 2.1 VAE's state dict, of any width; frozen (`requires_grad_` thaws it).

    The tensors are shared, not copied, except those that `dtype` or `device` changes. Raises `PackForcingError`
    if the state dict is not exactly a Wan 2.1 VAE's.
    """
    _check_is_wan21(state_dict)
    with torch.device("meta"):
        vae = WanVAE(dim=state_dict["decoder.head.0.gamma"].numel())
    _check_tensors(state_dict, vae.state_dict())
    # Frozen before the tensors come in: they belong to whoever loaded them, and may be inference tensors.
    vae.requires_grad_(False)
    vae.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state_dict.items()}, assign=True)
    return vae.eval()


_WANTED = "connect a Wan 2.1 VAE (for example wan_2.1_vae.safetensors)"

# A key that gives a relative of the Wan 2.1 VAE away -> what that file is.
_RELATIVES = {
    "decoder.upsamples.0.upsamples.0.residual.2.weight": "the Wan 2.2 VAE (48 latent channels)",
    "decoder.22.bias": "a TAEHV / lightTAE preview VAE",
    "decoder.up_blocks.0.resnets.0.conv1.weight": "a VAE with diffusers' key names",
    "decoder.conv_in.weight": "an image VAE (Stable Diffusion or Flux family)",
    "decoder.conv_in.conv.weight": "another video VAE (Hunyuan or LTX family)",
}


def _check_is_wan21(state_dict: Mapping[str, Tensor]) -> None:
    for key, kind in _RELATIVES.items():
        if key in state_dict:
            raise PackForcingError(f"PackForcing needs the Wan 2.1 VAE, but this is {kind}; {_WANTED}.")
    gamma = state_dict.get("decoder.head.0.gamma")
    if gamma is None:
        found = f"the first is {next(iter(state_dict))!r}" if state_dict else "it is empty"
        raise PackForcingError(
            f"This is not a Wan 2.1 VAE: among its {len(state_dict)} tensors there is no "
            f"'decoder.head.0.gamma' ({found}); {_WANTED}."
        )


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if missing := [name for name in expected if name not in found]:
        raise PackForcingError(
            f"This Wan 2.1 VAE is incomplete: {len(missing)} of its {len(expected)} tensors are missing, "
            f"{missing[0]!r} first; download the file again, or {_WANTED}."
        )
    if unknown := [name for name in found if name not in expected]:
        raise PackForcingError(
            f"This is not a plain Wan 2.1 VAE: it has {len(unknown)} tensors too many, {unknown[0]!r} first; {_WANTED}."
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise PackForcingError(
                f"This is not a Wan 2.1 VAE: {name!r} has the shape {list(found[name].shape)} where "
                f"{list(tensor.shape)} is expected; {_WANTED}."
            )


def init_vae(dim: int = 8, seed: int = 0) -> WanVAE:
    """A small VAE with random float32 weights that keep activations near unit size, for tests and demos.

    The same seed gives the same bits on every machine: the numbers are uniform ones from a local CPU generator,
    in module order (torch's normal numbers depend on the processor's vector unit).
    """
    with torch.device("meta"):
        vae = WanVAE(dim)
    vae.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, std: float) -> None:
        tensor.copy_((2 * torch.rand(tensor.shape, generator=generator) - 1) * (math.sqrt(3) * std))

    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, RMSNorm):
                layer.gamma.fill_(1)
            elif isinstance(layer, nn.Conv2d | nn.Conv3d):
                fill(layer.weight, std=layer.weight[0].numel() ** -0.5)
                fill(layer.bias, std=0.1)
    return vae
