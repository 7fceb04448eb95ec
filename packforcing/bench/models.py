"""What is measured: models of the real sizes with random weights, and what stands in for a VAE.

Time does not depend on the values of weights as long as they are finite, and these keep activations near unit size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import COMPRESSED_SPACE_STRIDE, PATCH, TEXT_TOKENS, VAE_TIME_STRIDE, Layout
from ..devices import fast_dtype
from ..generate.long_video import VideoModels
from ..known_models import KNOWN_MODELS, SIZES, VAE_DIMS
from ..model.causal_wan import CausalWan, TextKV
from ..model.compressor import Compressor
from ..model.load import make_causal_wan
from ..model.vae import WanVAE, init_vae
from ..model.wan_modules import build_wan_modules, random_state_dict

SEED = 0
MODELS = tuple(KNOWN_MODELS)  # that a benchmark can name


def random_wan(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    linear_dtype: str = "model",
    compiled: bool = False,
    weights_device: str = "device",
) -> CausalWan:
    """A transformer of the sizes `model`; the random numbers are drawn on the device, where that takes no time."""
    modules = build_wan_modules(SIZES[model], random_state_dict(SIZES[model], SEED, device, dtype))
    return make_causal_wan(modules, device, dtype, linear_dtype, compiled, weights_device)


def random_vae(model: str, device: torch.device) -> WanVAE:
    """A VAE of the width that goes with `model`, in the type that is fast there."""
    return init_vae(VAE_DIMS[model], SEED).requires_grad_(False).to(device, fast_dtype(device)).eval()


def random_text(wan: CausalWan) -> TextKV:
    """A prompt of full length."""
    width = wan.modules.text_embedding[0].in_features
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        return wan.embed_text(torch.randn((1, TEXT_TOKENS, width), generator=generator))


class NoVAE:
    """Stands where `LongVideo` wants a VAE, and decodes to frames [B, 3, F, 1, 1] of zeros."""

    dtype = torch.float32

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def parameters(self) -> Iterator[nn.Parameter]:
        """It has none; a record has the digest of a VAE's."""
        return iter(())

    def decode(self, raw: Tensor, history: dict[str, Tensor]) -> Tensor:
        return raw.new_zeros((raw.shape[0], 3, VAE_TIME_STRIDE * raw.shape[2], 1, 1))


class PooledLatents(Compressor):
    """Stands in for the compressor where there is no VAE: pools the latents themselves.

    The tokens have the right shape, and the cache has its usual work. But such latents are none that the VAE would make
    (docs/method.md, section 4), so nothing but time may be measured with them.
    """

    def __init__(self, temporal_stride: int) -> None:
        super().__init__(temporal_stride, name="stand-in (pooled latents, no VAE)")

    def forward(
        self,
        latents: Tensor,
        frames: Tensor,
        layout: Layout,
        vae: object,
        patch_tokens: Callable[[Tensor], Tensor],
        frames_per_pass: int | None = None,
    ) -> Tensor:
        space = COMPRESSED_SPACE_STRIDE
        small = F.avg_pool3d(latents, (self.temporal_stride, space, space))
        rows, columns = layout.size.compressed_rows, layout.size.compressed_columns
        return patch_tokens(small[..., : PATCH * rows, : PATCH * columns])


def video_models(model: str, wan: CausalWan, temporal_stride: int, with_vae: bool) -> VideoModels:
    """The networks of a video by `wan`, of the sizes `model`: with a random VAE, or with what stands in for it."""
    if with_vae:
        return VideoModels(wan, random_vae(model, wan.device), Compressor(temporal_stride))
    return VideoModels(wan, cast(WanVAE, NoVAE(wan.device)), PooledLatents(temporal_stride))
