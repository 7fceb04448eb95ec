"""What a file of weights is, by the names of its tensors: for the sentence that refuses it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .weights import CHOOSE_CAUSAL_WAN

PACK_COMPRESSOR = "pack_compressor."  # begins the compressor's names in a generator of PackForcing-Unofficial

# torch's wrappers leave their names wherever they wrapped a module. In the EMA of Self-Forcing and Causal-Forcing,
# a name is model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.weight.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
_OUTER = frozenset({"model", "module", "diffusion_model"})


def bare_name(name: str) -> str:
    """A tensor's name without what wrapped its module: `model._fsdp_wrapped_module.blocks.0.q` -> `blocks.0.q`."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _OUTER:
        del parts[0]
    return ".".join(parts)


class FileKind(NamedTuple):
    """What a file of weights looks like."""

    example: str  # the tensor's name that gives it away
    what: str  # e.g. "a Wan VAE"
    advice: str  # what to do where a Wan was wanted


_LORA_ADVICE = "load its base model here, and apply this file with a LoRA loader node, lora_name or --lora"

# The first match wins: a LoRA's names have those of its model's modules in them. Names are bare ones (`bare_name`).
_OTHER_FILES = [
    (re.compile(pattern), what, advice)
    for pattern, what, advice in (
        (r"\blora_?(A|B|up|down)\b|^lora_|\.lora\.|\.(hada|lokr)_w\d|\.diff$", "a LoRA", _LORA_ADVICE),
        (r"^hr\.\d+\.weight$", "a PackForcing compressor", "give it to the compressor loader"),
        (r"^blocks\.\d+\.self_attn\.q\.", "a Wan diffusion model", CHOOSE_CAUSAL_WAN),
        (r"^blocks\.\d+\.attn1\.to_q\.", "a diffusers-format Wan", CHOOSE_CAUSAL_WAN),
        (r"^(encoder\.downsamples|decoder\.upsamples)\.", "a Wan VAE", CHOOSE_CAUSAL_WAN),
        (r"^(encoder|decoder)\.(mid_block|down_blocks|up_blocks)\.", "a diffusers-format VAE", CHOOSE_CAUSAL_WAN),
        (r"^(first_stage_model\.)?decoder\.(up|mid)\.(\d|block)", "an image VAE", CHOOSE_CAUSAL_WAN),
        (r"^token_embedding\.weight$|\.SelfAttention\.q\.", "a UMT5 text encoder", CHOOSE_CAUSAL_WAN),
        (r"^(visual\.transformer|vision_model)\.", "a CLIP vision encoder", CHOOSE_CAUSAL_WAN),
        (r"^text_model\.encoder\.", "a CLIP text encoder", CHOOSE_CAUSAL_WAN),
        (r"^label_emb\.\d|^add_embedding\.", "an SDXL UNet", CHOOSE_CAUSAL_WAN),
        (r"^input_blocks\.|^down_blocks\.\d+\.resnets\.", "a Stable Diffusion UNet", CHOOSE_CAUSAL_WAN),
        (r"^txt_in\.individual_token_refiner\.", "a HunyuanVideo model", CHOOSE_CAUSAL_WAN),
        (r"^double_blocks\.|^single_transformer_blocks\.", "a Flux model", CHOOSE_CAUSAL_WAN),
        (r"^joint_blocks\.", "a Stable Diffusion 3 model", CHOOSE_CAUSAL_WAN),
        (r"^transformer_blocks\.", "another model's diffusion transformer", CHOOSE_CAUSAL_WAN),
    )
]


def looks_like(names: Iterable[str]) -> FileKind | None:
    """What a file is, by the names of its tensors; None where they are no known model's."""
    names = list(names)
    for pattern, what, advice in _OTHER_FILES:
        for name in names:
            if pattern.search(bare_name(name)):
                return FileKind(name, what, advice)
    return None
