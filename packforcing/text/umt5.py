"""UMT5's encoder, run a layer at a time, so that one layer's weights are all that it holds.

UMT5 is T5 1.1 with positions of its own in every layer (arXiv 2304.09151): pre-norm by root mean square, attention
without scaling but with a learnt bias for the distance of two tokens, and a gated feed-forward layer. UMT5-XXL's
encoder has 5.7 billion weights. Run in the usual way they would fill a GPU for less than a second's work, just before
the transformer needs it. Here a layer is read from the file, all prompts pass through it, and it is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .umt5_files import EMBEDDING, UMT5File

EPSILON = 1e-6
BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
FARTHEST = 128  # tokens; distances beyond share a bucket


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, on the device where it runs."""

    norm1: Tensor  # [d]
    q: Tensor  # [H * D, d], as are k and v
    k: Tensor
    v: Tensor
    o: Tensor  # [d, H * D]
    bias: Tensor  # [buckets, H]
    norm2: Tensor  # [d]
    gate: Tensor  # [f, d], as is up
    up: Tensor
    down: Tensor  # [d, f]


def layer_of(file: UMT5File, number: int, device: torch.device, dtype: torch.dtype) -> Layer:
    """Reads a layer."""

    def weight(name: str) -> Tensor:
        return file.weight(f"encoder.block.{number}.layer.{name}.weight", device, dtype)

    attention, ffn = "0.SelfAttention", "1.DenseReluDense"
    return Layer(
        norm1=weight("0.layer_norm"),
        q=weight(f"{attention}.q"),
        k=weight(f"{attention}.k"),
        v=weight(f"{attention}.v"),
        o=weight(f"{attention}.o"),
        bias=weight(f"{attention}.relative_attention_bias"),
        norm2=weight("1.layer_norm"),
        gate=weight(f"{ffn}.wi_0"),
        up=weight(f"{ffn}.wi_1"),
        down=weight(f"{ffn}.wo"),
    )


def layer_bytes(file: UMT5File, dtype: torch.dtype) -> int:
    """Bytes of one layer's weights."""
    names = [name for name in file.tensors if name.startswith("encoder.block.0.")]
    return dtype.itemsize * sum(file.tensors[name].numel() for name in names)


def distance_buckets(length: int, buckets: int) -> Tensor:
    """The bucket of each pair of tokens, by how far the second stands behind the first: [length, length].

    Half of the buckets are for tokens behind. Of each half, half are for one distance each, and the others' widths grow
    with the logarithm of the distance.
    """
    places = torch.arange(length)
    ahead = places[None] - places[:, None]
    half = buckets // 2
    single = half // 2
    distance = ahead.abs()
    grown = torch.log(distance.clamp_min(1) / single) / torch.log(torch.tensor(FARTHEST / single)) * (half - single)
    far = (single + grown.long()).clamp_max(half - 1)
    return half * (ahead > 0) + torch.where(distance < single, distance, far)


def through_layer(layer: Layer, x: Tensor, bias: Tensor) -> Tensor:
    """A prompt's hidden states [L, d] through one layer; `bias` is its attention's [H, L, L]."""
    heads = bias.shape[0]
    normed = F.rms_norm(x, layer.norm1.shape, layer.norm1, EPSILON)
    q, k, v = (rearrange(normed @ each.T, "l (h d) -> 1 h l d", h=heads) for each in (layer.q, layer.k, layer.v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0)
    x = x + rearrange(attended, "1 h l d -> l (h d)") @ layer.o.T
    normed = F.rms_norm(x, layer.norm2.shape, layer.norm2, EPSILON)
    return x + (F.gelu(normed @ layer.gate.T, approximate="tanh") * (normed @ layer.up.T)) @ layer.down.T


@torch.no_grad()
def encode_tokens(
    file: UMT5File, prompts: Sequence[Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Token ids [L] of each prompt -> its embeddings [L, d] on the CPU, in `dtype`.

    Each prompt is on its own, so none is padded and nothing is masked.
    """
    hidden = [file.rows(EMBEDDING, ids, device, dtype) for ids in prompts]
    longest = max((len(ids) for ids in prompts), default=0)
    buckets = distance_buckets(longest, file.tensors[f"encoder.block.0.{BIAS}"].shape[0]).to(device)
    for number in range(file.layers):
        layer = layer_of(file, number, device, dtype)
        bias = rearrange(layer.bias[buckets], "q k h -> h q k").contiguous()
        hidden = [through_layer(layer, x, bias[:, : len(x), : len(x)]) for x in hidden]
    norm = file.weight("encoder.final_layer_norm.weight", device, dtype)
    return [F.rms_norm(x, norm.shape, norm, EPSILON).cpu() for x in hidden]
