"""The network of the Wan 2.1 VAE, as a module tree with the checkpoint's own key names.

So a state dict drops in without renaming and without a copy. Layers that look back in time take a `History`: what they
must remember of the frames before this chunk. A video that is fed in chunks of any lengths, with one history, gives
what it gives when it is fed whole, and the history never grows.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import LATENT_CHANNELS
from ..config import VAE_SPACE_STRIDE as SPACE_STRIDE
from ..config import VAE_TIME_STRIDE as TIME_STRIDE
from ..errors import PackForcingError
from .vae_convolutions import Conv2d, Conv3d
from .vae_norms import Norm, RMSNorm, on_rows, rms_norm, rms_norm_silu

History = dict[str, Tensor]
"""Layer name -> its last input frames [B, C, 1 or 2, H, W]. Empty before the video's first frame.

Layers replace entries and never write into them, so `dict(history)` is a snapshot that costs nothing.
"""


# --- layers ----------------------------------------------------------------------------------------------------------


class Temporal(nn.Module):
    """A layer that looks at earlier frames: `forward(x, history)`. All others are called with `x` alone."""


class Chain(Temporal, nn.Sequential):
    """A `Sequential` that hands the history to the layers that want it."""

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]  # takes the history, too
        for layer in self:
            x = layer(x, history) if isinstance(layer, Temporal) else layer(x)
        return x


class CausalConv3d(Temporal, Conv3d):
    """A convolution over [B, C, T, H, W] that sees no later frame, and zeros before the video's first."""

    name: str  # its path in the VAE, and so its key in the history; `WanVAE` sets it

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int], time_stride: int = 1):
        _, height, width = kernel
        padding = (0, height // 2, width // 2)
        super().__init__(in_dim, out_dim, kernel, stride=(time_stride, 1, 1), padding=padding)
        # Input frames that the next chunk's first output still reads.
        self.remembered = kernel[0] - time_stride

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]  # takes the history, too
        return self.convolved(self.with_past(x, history))

    def with_past(self, x: Tensor, history: History, norm: RMSNorm | None = None) -> Tensor:
        """What `convolved` reads, [B, C, remembered + T, H, W]: the frames that are remembered, then x or `norm(x)`."""
        whole = empty_frames(x, self.remembered + x.shape[2])
        # Taken out, so that it need not wait for what replaces it.
        whole[:, :, : self.remembered] = history.pop(self.name) if self.name in history else 0
        now = whole[:, :, self.remembered :]  # made after that: autograd knows a view by what was written before it
        if norm is None:
            now.copy_(x)
        else:
            norm.into(x, now)
        # The clone lets go of the rest, which a view would keep alive until the next chunk.
        history[self.name] = whole[:, :, -self.remembered :].clone()
        return whole

    def convolved(self, whole: Tensor) -> Tensor:
        """The convolution of what `with_past` gives, [B, C', T, H, W]."""
        return super().forward(whole)


class Normed(Temporal, nn.Sequential):
    """Norms, each followed by the causal convolution that reads what it writes."""

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]  # takes the history, too
        norms = [layer for layer in self if isinstance(layer, RMSNorm)]
        convolutions = [layer for layer in self if isinstance(layer, CausalConv3d)]
        for norm, convolution in zip(norms, convolutions, strict=True):
            whole = convolution.with_past(x, history, norm)
            del x  # else it would stay while the convolution runs, and `whole` while the next norm does
            x = convolution.convolved(whole)
            del whole
        return x


class ResidualBlock(Temporal):
    """Two convolutions, each after norm and SiLU, beside a shortcut: [B, in_dim, T, H, W] -> [B, out_dim, T, H, W]."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = Normed(
            RMSNorm(in_dim, axes=3, silu=True),
            nn.Identity(),  # SiLU in the original; keeps the numbers in the checkpoint's keys, as below
            CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            RMSNorm(out_dim, axes=3, silu=True),
            nn.Identity(),  # SiLU
            nn.Identity(),  # dropout
            CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else Conv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, history: History) -> Tensor:
        return self.shortcut(x) + self.residual(x, history)


class AttentionBlock(nn.Module):
    """Single-head attention among the positions of one frame; frames do not see each other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv = Conv2d(dim, 3 * dim, 1)
        self.proj = Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.norm(frames_of(x))
        q, k, v = rearrange(self.to_qkv(frames), "f (qkv c) h w -> qkv f 1 (h w) c", qkv=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = self.proj(rearrange(attended, "f 1 (h w) c -> f c h w", h=x.shape[3]))
        return x + clip_of(attended, batch=x.shape[0])


class Upsample(Temporal):
    """Twice the height and width, half the channels; `in_time`: also twice the frames after the video's first."""

    def __init__(self, dim: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"),
            Conv2d(dim, dim // 2, 3, padding=1),
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
        history[time_conv.name] = empty_frames(first, time_conv.remembered).zero_()
        if rest.shape[2] == 0:
            return first
        return torch.cat([first, interleave(time_conv(rest, history))], dim=2)


class Downsample(Temporal):
    """Half the height and width; `in_time`: also half the frames after the video's first."""

    def __init__(self, dim: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)),  # right and bottom only
            Conv2d(dim, dim, 3, stride=2),
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
    if memory_format(x) is torch.channels_last_3d:  # the copy lies in the same order
        return rearrange(x, "b (two c) t h w -> b (t two) h w c", two=2).movedim(-1, 1)
    return rearrange(x, "b (two c) t h w -> b c (t two) h w", two=2)


def each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A 2D layer over every frame of [B, C, T, H, W] on its own."""
    return clip_of(layer(frames_of(x)), batch=x.shape[0])


# --- the order of the axes in memory ---------------------------------------------------------------------------------
#
# All layers keep to the memory format of their input, plain or channels last. One tensor in another would decide for
# all after it: `torch.cat` of both gives the plain one, and a GPU's convolutions then copy what they read and write.


def memory_format(x: Tensor) -> torch.memory_format:
    """That of [B, C, T, H, W], or of what it is a part of: channels last, or else plain."""
    return torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format


def empty_frames(x: Tensor, count: int) -> Tensor:
    """Memory for `count` frames like those of x [B, C, T, H, W], in its memory format."""
    batch, channels, _, height, width = x.shape
    shape = batch, channels, count, height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def frames_of(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W]."""
    if memory_format(x) is torch.channels_last_3d:
        # In the order in which they lie, so that axes of length 1 get the strides by which PyTorch knows the format.
        return x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)
    return rearrange(x, "b c t h w -> (b t) c h w")


def clip_of(frames: Tensor, batch: int) -> Tensor:
    """[B T, C, H, W] -> [B, C, T, H, W]."""
    if frames.is_contiguous(memory_format=torch.channels_last):
        return frames.movedim(1, -1).unflatten(0, (batch, -1)).movedim(-1, 1)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=batch)


# --- the model -------------------------------------------------------------------------------------------------------


def middle(dim: int) -> Chain:
    """The part at the lowest resolution, alike in encoder and decoder."""
    return Chain(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(dim: int, out_dim: int) -> Normed:
    """The last layers of encoder and decoder."""
    return Normed(RMSNorm(dim, axes=3, silu=True), nn.Identity(), CausalConv3d(dim, out_dim, (3, 3, 3)))


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

    `encode` and `decode` carry gradients and work on the VAE's own (raw) latents. To generate, use `StreamingDecoder`,
    `StreamingEncoder` and `encode_clip`, which work on the diffusion model's normalised latents.
    """

    def __init__(self, dim: int = 96, z_dim: int = LATENT_CHANNELS):
        super().__init__()
        self.dim = dim
        self.encoder = Encoder(dim, 2 * z_dim)
        self.conv1 = Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim)
        for name, layer in self.named_modules():
            if isinstance(layer, CausalConv3d):
                layer.name = name

    def compile_norms(self) -> None:
        """Lets torch.compile make one kernel of a norm and its SiLU, shared by all layers and sizes."""
        compiled: dict[Norm, Norm] = {
            function: partial(on_rows, torch.compile(function, dynamic=True)) for function in (rms_norm, rms_norm_silu)
        }
        for layer in self.modules():
            if isinstance(layer, RMSNorm):
                layer.function = compiled[layer.function]

    def to_layout(self, channels_last: bool) -> WanVAE:
        """Brings the convolutions' weights into a memory format, in place; activations then follow it."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                last = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
                layout = last if channels_last else torch.contiguous_format
                layer.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's annotations
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv2.weight.device

    def encode(self, pixels: Tensor, history: History | None = None) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, F, H, W] in [-1, 1] -> (mean, log variance), raw latents of [B, 16, T, H/8, W/8] each.

        Without a history the clip is a whole video, F = 1 + 4k. With a history, the chunk goes on from what that has
        seen (then F = 4k, but 1 + 4k while it is empty), and the history is updated. Raises `PackForcingError` for
        pixels of another shape.
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
