"""Which sets of weights a checkpoint holds, and the names of their tensors: the trainers', diffusers' and Wan's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from ..errors import PackForcingError
from .file_kinds import bare_name
from .weights import CHOOSE_CAUSAL_WAN, quoted, some

T = TypeVar("T")

# What trainers call the weights inside a torch file. Self-Forcing saves generator, critic and generator_ema, and its
# published DMD file holds generator_ema alone. Causal-Forcing saves generator_ema or generator; CausVid generator and
# critic; LongLive generator, generator_ema or model. The other names are those of forks.
EMA_NAMES = ("generator_ema", "ema", "model_ema", "ema_model", "state_dict_ema")
RAW_NAMES = ("generator", "model", "state_dict", "module")


# --- sets of weights -------------------------------------------------------------------------------------------


def pick_weight_set(
    checkpoint: Mapping[str, Any], which: str = "auto", source: str = "the checkpoint"
) -> dict[str, Tensor]:
    """One set of weights out of a checkpoint, under the names it has there.

    Args:
        checkpoint: what `read_state_dict` gave.
        which: "ema" (averaged weights), "raw" (the trained ones), or "auto" (EMA if there, else raw).
        source: how to call the checkpoint in an error.

    Raises:
        PackForcingError: the set is not in the checkpoint; the sentence lists what is.
    """
    return named_weight_set(checkpoint, which, source)[1]


def named_weight_set(checkpoint: Mapping[str, Any], which: str, source: str) -> tuple[str, dict[str, Tensor]]:
    """The same, with the set's name in the file before it; the name is "" where the file is one flat set."""
    wanted = {"auto": EMA_NAMES + RAW_NAMES, "ema": EMA_NAMES, "raw": RAW_NAMES}.get(which)
    if wanted is None:
        raise PackForcingError(f"There is no weight set '{which}': choose auto, ema or raw.")
    sets = {str(k): _tensors(v) for k, v in checkpoint.items() if isinstance(v, Mapping) and _tensors(v)}
    for name in wanted:
        if name in sets:
            return name, sets[name]
    flat = _tensors(checkpoint)
    if flat and not sets and which != "ema":
        return "", flat
    if flat and not sets:
        raise PackForcingError(
            f"{source} has no EMA weights to choose: found one set of {some(flat, 'tensor')}; choose auto."
        )
    known = [name for name in EMA_NAMES + RAW_NAMES if name in sets]
    if known:
        raise PackForcingError(f"{source} has no {which} weights: found {quoted(known)}; choose auto.")
    if any(name.endswith("_lora") for name in sets):  # LongLive saves generator_lora, critic_lora, step
        raise PackForcingError(
            f"{source} is a LoRA ({quoted(sets)}), not a model: load its base model, and give this "
            "file as its LoRA (lora_name of the PackForcing Model Loader, or --lora)."
        )
    raise PackForcingError(
        f"{source} holds no generator weights: found {quoted(checkpoint) or 'nothing'}; {CHOOSE_CAUSAL_WAN}."
    )


def _tensors(mapping: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of a mapping is a tensor."""
    return {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}


def transformer_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a file is the transformer, where ComfyUI saved text encoder and VAE beside it; else all of it."""
    prefix = "model.diffusion_model."
    if not any(name.startswith(f"{prefix}blocks.") for name in state_dict):
        return dict(state_dict)
    return {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


# --- names of tensors ------------------------------------------------------------------------------------------


def strip_prefixes(state_dict: Mapping[str, Tensor], source: str = "the checkpoint") -> dict[str, Tensor]:
    """The same tensors under bare names, e.g. `blocks.0.self_attn.q.weight`, whatever wrapped the module.

    Raises:
        PackForcingError: two tensors would get one name.
    """
    bare: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        short = bare_name(name)
        if short in bare:
            raise PackForcingError(
                f"{source} holds two tensors that are both '{short}' once wrappers' prefixes are removed "
                f"(one is '{name}'): keep one set of weights in the file."
            )
        bare[short] = tensor
    return bare


# diffusers' names in its WanTransformer3DModel and Wan's, as diffusers' scripts/convert_wan_to_diffusers.py pairs them.
# The script renames without touching a tensor. diffusers' norm1 and norm3 (Wan's norm2) have no weights.
_DIFFUSERS_OUTER = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
_DIFFUSERS_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    **{
        f"{theirs}.{part}": f"{ours}.{short}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for part, short in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
}


def from_diffusers(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Wan 2.1's names for a state dict that may have diffusers' names (`blocks.0.attn1.to_q.weight`)."""
    if not any(re.fullmatch(r"blocks\.\d+\.attn1\.to_q\.weight", name) for name in state_dict):
        return dict(state_dict)
    return {wan_name(name): tensor for name, tensor in state_dict.items()}


def wan_name(name: str) -> str:
    """Wan's name of one tensor or layer of diffusers; a name that diffusers does not have is left alone."""
    block = re.match(r"blocks\.\d+\.", name)
    prefix = block[0] if block else ""
    rest = name[len(prefix) :]
    for theirs, ours in (_DIFFUSERS_BLOCK if block else _DIFFUSERS_OUTER).items():
        if rest == theirs or rest.startswith(f"{theirs}."):
            return prefix + ours + rest[len(theirs) :]
    return name
