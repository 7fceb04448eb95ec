"""The dual-branch compressor: a latent block to N_c hidden tokens, about 32 times fewer (docs/method.md, section 4).

    HR branch: the block's latents through strided 3D convolutions.
    LR branch: the block's pixels, pooled 2x4x4, through the frozen VAE's encoder and the model's own patch embedding.

Tokens are the element-wise sum of both. The LR branch alone needs no new weights: that is the training-free form. The
HR branch's last layer starts at zero, so training starts from that form too.

`LatentCompressor` is that of another project, PackForcing-Unofficial, whose checkpoints bring it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import (
    COMPRESSED_SPACE_STRIDE,
    PATCH,
    VAE_SPACE_STRIDE,
    VAE_TIME_STRIDE,
    CacheConfig,
    FrameSize,
    Layout,
    default_temporal_stride,
)
from ..errors import PackForcingError
from ..files.compressor_file import LATENT_NET, CompressorMetadata
from .vae import WanVAE, encode_clip

PAPER_CHANNELS = (32, 128, 512, 2048)
TRAINING_FREE_NAME = "training-free (LR branch)"  # in reports, in the nodes, and in saved workflows

Kernel = tuple[int, int, int]


def hr_strides(temporal_stride: int) -> tuple[Kernel, ...]:
    """Strides of the HR branch's convolutions: the temporal one, three that halve height and width, the projection."""
    return ((temporal_stride, 1, 1), *[(1, 2, 2)] * 3, (1, 1, 1))


def hr_kernels(temporal_stride: int) -> tuple[Kernel, ...]:
    """This project's kernels (the paper gives channels and strides only): overlapping in space, not in time."""
    return ((temporal_stride, 3, 3), *[(1, 4, 4)] * 3, (1, 1, 1))


def floor_padding(kernel: Kernel, stride: Kernel) -> Kernel:
    """Padding with which a convolution's output size is floor(size / stride) for every size.

    Raises PackForcingError when there is none: kernel minus stride must be even and not negative.
    """
    spare = [k - s for k, s in zip(kernel, stride, strict=True)]
    if any(n < 0 or n % 2 for n in spare):
        raise PackForcingError(
            f"The compressor has a convolution with kernel {kernel} at stride {stride}, which cannot floor sizes: "
            "kernel minus stride must be even and not negative on every axis."
        )
    t, h, w = (n // 2 for n in spare)
    return t, h, w


class HRBranch(nn.ModuleList):
    """Latents [B, 16, T, h, w] -> token grid [B, d, floor(T / stride), floor(h / 8), floor(w / 8)].

    Five convolutions with SiLU between (paper, section 3.3). Their channels are 16 -> 32 -> 128 -> 512 -> 2048 -> d.
    The first has the temporal stride, the next three halve height and width, and the last is 1x1x1. It starts at zero,
    so an untrained branch adds nothing.

    Args:
        channels: of the latent, of the four hidden layers, and the model's width: six numbers.
        kernels: of the five convolutions; the default is `hr_kernels`.
    """

    def __init__(self, channels: Sequence[int], temporal_stride: int, kernels: Sequence[Kernel] | None = None) -> None:
        super().__init__()
        self.temporal_stride = temporal_stride
        strides = hr_strides(temporal_stride)
        if len(channels) != len(strides) + 1:
            raise PackForcingError(
                f"The HR branch has {len(strides)} convolutions and so {len(strides) + 1} channel counts, but "
                f"{len(channels)} were given."
            )
        kernels = hr_kernels(temporal_stride) if kernels is None else kernels
        for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            padding = floor_padding(kernel, stride)
            self.append(nn.Conv3d(channels[i], channels[i + 1], kernel, stride=stride, padding=padding))
        for parameter in self[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, latents: Tensor) -> Tensor:
        *hidden, last = self  # not self[:-1], which would construct another branch
        x = latents
        for layer in hidden:
            x = F.silu(layer(x))
        tokens: Tensor = last(x)
        return tokens


def hr_branch(state_dict: Mapping[str, Tensor], temporal_stride: int) -> HRBranch:
    """The branch over the tensors `hr.{i}.weight`, `hr.{i}.bias` of a compressor file; sizes are read from them.

    Raises PackForcingError for the tensors of another compressor.
    """
    if "hr.0.weight" not in state_dict:
        raise PackForcingError(
            "The compressor has no HR branch beside an LR branch, as one from PackForcing-Unofficial: choose a "
            "dual-branch compressor that this project trained."
        )
    weights = [state_dict[f"hr.{i}.weight"] for i in range(len(hr_strides(temporal_stride)))]
    channels = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    kernels = [(int(t), int(h), int(w)) for t, h, w in (weight.shape[2:] for weight in weights)]
    with torch.device("meta"):
        branch = HRBranch(channels, temporal_stride, kernels)
    branch.load_state_dict({name.removeprefix("hr."): tensor for name, tensor in state_dict.items()}, assign=True)
    return branch.requires_grad_(False).eval()


def whole_block(frames: Tensor, latent_frames: int) -> Tensor:
    """Video frames [B, 3, F, H, W] of a block, with 4 for each latent frame.

    The first block of a video has 3 fewer, since its first latent frame holds one frame: that one is repeated.
    """
    missing = VAE_TIME_STRIDE * latent_frames - frames.shape[2]
    return torch.cat((frames[:, :, :1].expand(-1, -1, missing, -1, -1), frames), dim=2) if missing else frames


def pooled_frames(frames: Tensor, temporal_stride: int) -> Tensor:
    """3D average pooling of frames [B, 3, F, H, W] by the temporal stride and by 4 in each space axis."""
    space = COMPRESSED_SPACE_STRIDE
    return F.avg_pool3d(frames.float(), kernel_size=(temporal_stride, space, space)).to(frames.dtype)


def lr_latents(frames: Tensor, vae: WanVAE, temporal_stride: int, frames_per_pass: int | None = None) -> Tensor:
    """A block's video frames [B, 3, F, H, W] in [-1, 1] -> normalised latents of the pooled video, [B, 16, T', h', w'].

    The pooled frames are encoded on their own. The causal encoder's first latent frame holds a single video frame: the
    first frame is repeated in front for it, and that latent frame is dropped. Frames, rows and columns that do not fill
    a latent cell are cropped.
    """
    pooled = pooled_frames(frames, temporal_stride)
    whole = pooled.shape[2] // VAE_TIME_STRIDE * VAE_TIME_STRIDE
    height, width = (side // VAE_SPACE_STRIDE * VAE_SPACE_STRIDE for side in pooled.shape[-2:])
    pooled = pooled[:, :, :whole, :height, :width]
    return encode_clip(vae, torch.cat((pooled[:, :, :1], pooled), dim=2), frames_per_pass)[:, :, 1:]


class Compressor(nn.Module):
    """Makes the compressed form of a block, with an HR branch or (training-free) without.

    `direct` says how its tokens enter the cache, see `Layout`; `needs_vae`, whether a run must have a VAE for it.

    Args:
        temporal_stride: latent frames that a token spans, 1 or 2.
        hr: the trained branch; None is the training-free form.
        name: what reports call it.
    """

    direct = False
    needs_vae = True
    decoded_elsewhere = False  # whether another process decodes the blocks

    def __init__(self, temporal_stride: int, hr: HRBranch | None = None, name: str = TRAINING_FREE_NAME) -> None:
        super().__init__()
        if hr is not None and hr.temporal_stride != temporal_stride:
            raise ValueError("the HR branch has another temporal stride")
        self.temporal_stride = temporal_stride
        self.hr = hr
        self.name = name

    def forward(
        self,
        latents: Tensor,
        frames: Tensor,
        layout: Layout,
        vae: WanVAE,
        patch_tokens: Callable[[Tensor], Tensor],
        frames_per_pass: int | None = None,
    ) -> Tensor:
        """Hidden tokens [B, N_c, d] of a block.

        Args:
            latents: the finished block, normalised [B, 16, T, h, w].
            frames: its video frames [B, 3, F, H, W] in [-1, 1]; F is 4T, or 4T - 3 for the first block of a video.
            vae: the frozen VAE that encodes the pooled frames.
            patch_tokens: the model's own patch embedding, normalised latents -> tokens.
            frames_per_pass: latent frames that the VAE encodes at a time; None: all.
        """
        small = lr_latents(whole_block(frames, latents.shape[2]), vae, self.temporal_stride, frames_per_pass)
        rows, columns = layout.size.compressed_rows, layout.size.compressed_columns
        tokens = patch_tokens(small[..., : PATCH * rows, : PATCH * columns])
        if self.hr is not None:
            hr = self.hr(latents.to(next(self.hr.parameters())))
            tokens = tokens + rearrange(hr, "b d t h w -> b (t h w) d").to(tokens)
        return tokens


class LatentCompressor(Compressor):
    """The compressor inside checkpoints of PackForcing-Unofficial: latents alone, a token frame for each latent frame.

    Three 1x3x3 convolutions that halve height and width (rounding up), SiLU after each, and a 1x1x1 projection. What
    comes out is averaged to floor(h / 8) rows and floor(w / 8) columns. Its tokens are not hidden tokens of the first
    layer: each layer takes its keys and values straight from them (`direct`). At 832x480 and 3 frames they are 273.
    Source: github.com/AshadowZ/PackForcing-Unofficial, wan/modules/pack_compressor.py and causal_model_packforcing.py.

    Args:
        channels: of the latent, of the three hidden layers (there 64, 256, 1024), and the model's width.
    """

    direct = True
    needs_vae = False

    def __init__(self, channels: Sequence[int], name: str) -> None:
        super().__init__(temporal_stride=1, name=name)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels[:-1]):
            layers += [nn.Conv3d(before, after, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Conv3d(channels[-2], channels[-1], 1))

    def forward(
        self,
        latents: Tensor,
        frames: Tensor | None,
        layout: Layout,
        vae: WanVAE | None,
        patch_tokens: Callable[[Tensor], Tensor],
        frames_per_pass: int | None = None,
    ) -> Tensor:
        """Tokens [B, N_c, d] of a block's normalised latents [B, 16, T, h, w]; nothing else that is given is used."""
        grid = self.net(latents.to(next(self.net.parameters())))
        size = layout.size
        pooled = F.adaptive_avg_pool3d(grid, (latents.shape[2], size.compressed_rows, size.compressed_columns))
        return rearrange(pooled, "b d t h w -> b (t h w) d")


def latent_compressor(state_dict: Mapping[str, Tensor], metadata: CompressorMetadata, name: str) -> LatentCompressor:
    """The compressor over the tensors `net.{i}.weight`, `net.{i}.bias` of a checkpoint of PackForcing-Unofficial."""
    with torch.device("meta"):
        compressor = LatentCompressor(metadata.channels, name)
    compressor.load_state_dict(dict(state_dict), assign=True)
    return compressor.requires_grad_(False).eval()


@dataclass(frozen=True)
class CompressorChoice:
    """Which compressor a run uses, before model and block size are known: the training-free one, or a file's."""

    name: str  # what reports call it
    state_dict: Mapping[str, Tensor] | None = None  # the weights of its networks; None: training-free
    metadata: CompressorMetadata | None = None  # the file's

    def temporal_stride(self, block_frames: int) -> int:
        """Latent frames that a token of it spans, 1 or 2."""
        return default_temporal_stride(block_frames) if self.metadata is None else self.metadata.temporal_stride

    @property
    def direct(self) -> bool:
        """How its tokens enter the cache, see `Layout`."""
        return self.state_dict is not None and any(name.startswith(LATENT_NET) for name in self.state_dict)

    def layout(self, config: CacheConfig, size: FrameSize) -> Layout:
        """The layout of a run with this compressor."""
        return Layout(config, size, self.temporal_stride(config.block_frames), self.direct)

    def build(self, block_frames: int, model_dim: int, device: torch.device | str = "cpu") -> Compressor:
        """The compressor for a model `model_dim` wide; raises PackForcingError when its weights have another width."""
        stride = self.temporal_stride(block_frames)
        if self.state_dict is None or self.metadata is None:
            return Compressor(stride, name=self.name)
        if self.metadata.model_dim != model_dim:
            raise PackForcingError(
                f"The compressor {self.name} was trained for a model {self.metadata.model_dim} wide "
                f"({self.metadata.base_model or 'base model not named'}), but the connected model is {model_dim} wide: "
                "choose a compressor of this model, or the training-free one."
            )
        if self.direct:
            return latent_compressor(self.state_dict, self.metadata, self.name).to(device)
        return Compressor(stride, hr_branch(self.state_dict, stride).to(device), self.name)


TRAINING_FREE = CompressorChoice(TRAINING_FREE_NAME)
