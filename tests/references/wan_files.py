"""A tiny Wan's tensors, the names under which trainers save them, and the sentence of an error."""

import re

import pytest
import torch

from packforcing.errors import PackForcingError
from packforcing.files.wan_checkpoint import WanShape

TINY = WanShape(
    dim=128,
    layers=2,
    ffn_dim=8,
    in_channels=16,
    out_channels=16,
    text_dim=4,
    freq_dim=6,
    heads=1,
    patch_size=(1, 2, 2),
    has_image_branch=False,
)


def tiny_wan(layers=2, in_channels=16, out_channels=16, dtype=torch.bfloat16, fill=0.0):
    """A Wan's tensors, named here once more on purpose: the names are the checkpoints' contract."""
    d, ffn = TINY.dim, TINY.ffn_dim
    sizes = {
        "patch_embedding.weight": (d, in_channels, 1, 2, 2),
        "patch_embedding.bias": (d,),
        "text_embedding.0.weight": (d, TINY.text_dim),
        "text_embedding.0.bias": (d,),
        "text_embedding.2.weight": (d, d),
        "text_embedding.2.bias": (d,),
        "time_embedding.0.weight": (d, TINY.freq_dim),
        "time_embedding.0.bias": (d,),
        "time_embedding.2.weight": (d, d),
        "time_embedding.2.bias": (d,),
        "time_projection.1.weight": (6 * d, d),
        "time_projection.1.bias": (6 * d,),
        "head.head.weight": (4 * out_channels, d),
        "head.head.bias": (4 * out_channels,),
        "head.modulation": (1, 2, d),
    }
    for i in range(layers):
        block = {"modulation": (1, 6, d), "norm3.weight": (d,), "norm3.bias": (d,)}
        for attention in ("self_attn", "cross_attn"):
            for part in ("q", "k", "v", "o"):
                block |= {f"{attention}.{part}.weight": (d, d), f"{attention}.{part}.bias": (d,)}
            block |= {f"{attention}.norm_q.weight": (d,), f"{attention}.norm_k.weight": (d,)}
        block |= {"ffn.0.weight": (ffn, d), "ffn.0.bias": (ffn,), "ffn.2.weight": (d, ffn), "ffn.2.bias": (d,)}
        sizes |= {f"blocks.{i}.{name}": size for name, size in block.items()}
    return {name: torch.full(size, fill, dtype=dtype) for name, size in sizes.items()}


def sentence(function, *args, **kwargs):
    """The error's text, which is one line that ends in a full stop."""
    with pytest.raises(PackForcingError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 700
    return text


def with_prefix(state_dict, prefix):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def fsdp(state_dict):
    """The names of an EMA that was made over FSDP-wrapped modules (Self-Forcing, Causal-Forcing)."""
    return {
        "model._fsdp_wrapped_module." + re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", name): tensor
        for name, tensor in state_dict.items()
    }


RAW, EMA = tiny_wan(fill=1.0), tiny_wan(fill=2.0, dtype=torch.float32)
