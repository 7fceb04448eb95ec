"""What is patched onto a MODEL, or said by a conditioning, and does nothing in the long-video sampler.

ComfyUI's samplers call a model's `forward` in each step. This one calls the model's layers itself, block by block and
without a negative prompt. So LoRAs, quantised weights, compute types, attention overrides and replaced layers work.
What wraps the forward pass, the guidance or the sampling loop does not. Each such thing is told in a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..packforcing.errors import PackForcingError
from .conditioning import Conditioning

OWN_PASS = "the sampler calls the model's layers itself"
NO_NEGATIVE = "the sampler has no negative prompt to guide away from"

OPTIONS = {  # key of `model_options` -> what does nothing, and why
    "sampler_cfg_function": ("Guidance patched onto the MODEL", NO_NEGATIVE),
    "sampler_pre_cfg_function": ("Guidance patched onto the MODEL", NO_NEGATIVE),
    "sampler_post_cfg_function": ("Guidance patched onto the MODEL (CFGZeroStar, SkipLayerGuidance, ...)", NO_NEGATIVE),
    "sampler_calc_cond_batch_function": ("Guidance patched onto the MODEL", NO_NEGATIVE),
    "context_handler": ("Context windows on the MODEL", "the sampler's cache config says what a block attends to"),
    "denoise_mask_function": ("A denoise mask on the MODEL", "the sampler takes no mask"),
    "model_function_wrapper": ("A function wrapped around the MODEL", OWN_PASS),
}
TRANSFORMER_OPTIONS = {  # the same, of `model_options["transformer_options"]`
    "easycache": ("A step cache on the MODEL (EasyCache, LazyCache)", OWN_PASS),
    "rope_options": ("Scaled positions on the MODEL (ScaleROPE)", "the sampler's cache makes the positions"),
    "patches": ("Patches of the MODEL's attention (NAG, ...)", OWN_PASS),
    "patches_replace": ("Replaced attention or blocks of the MODEL", OWN_PASS),
}
WRAPPERS = {  # a wrapper's name -> what its node is called
    "torch.compile": "torch.compile on the MODEL (TorchCompileModel)",
}
TOLD_ABOVE = ("easycache", "lazycache", "ContextWindows_")  # wrappers whose nodes set an option as well

# The sampler reads these patched objects, or calls the layers that are patched into the tree.
HONOURED_OBJECTS = ("manual_cast_dtype", "latent_format", "diffusion_model.")
# Inside the tree, it never calls these: forward passes, and modules whose layers it calls one by one.
UNCALLED = re.compile(r"(.*\.)?\w*forward\w*|diffusion_model\.(blocks\.\d+(\.(self|cross)_attn)?|head)")

CONDITIONS = {  # key of a conditioning -> what it is called
    "start_percent": "timestep range",
    "end_percent": "timestep range",
    "area": "area",
    "mask": "mask",
    "hooks": "hooks (LoRA or model hooks)",
    "control": "ControlNet",
    "clip_vision_output": "CLIP Vision image",
    "reference_latents": "reference images",
    "time_dim_concat": "reference video",
    "vace_frames": "VACE video",
    "control_video": "control video",
    "camera_conditions": "camera path",
    "audio_embed": "audio",
}
START_IMAGE = "concat_latent_image"


def check_no_start_image(conditioning: Conditioning) -> None:
    """Raises PackForcingError for a start image in a conditioning: a video without it is not what was asked for."""
    if any(START_IMAGE in entry[1] for entry in conditioning):
        raise PackForcingError(
            "The conditioning holds a start image (from WanImageToVideo or the like), which a causal text-to-video "
            "model does not read from there: connect the picture to the sampler's start_image instead."
        )


def not_honoured(model, conditioning: Conditioning, shift: float | None) -> list[str]:
    """A sentence for each thing on a MODEL (a ModelPatcher) or in a conditioning that changes nothing in a run.

    `shift` is the sampler's own, which counts; None where its schedule does.
    """
    options: Mapping[str, Any] = model.model_options
    inner: Mapping[str, Any] = options.get("transformer_options", {})
    sentences = [
        *_of_sampling(model.object_patches.get("model_sampling"), shift),
        *_of_options(OPTIONS, options),
        *_of_options(TRANSFORMER_OPTIONS, inner),
        *_of_wrappers([*model.wrappers.values(), *inner.get("wrappers", {}).values()]),
        *_of_objects(model.object_patches),
        *_of_conditioning(conditioning),
    ]
    return list(dict.fromkeys(sentences))


def _of_sampling(sampling, shift: float | None) -> list[str]:
    """The noise schedule that is patched onto a MODEL, by ModelSamplingSD3 say; None without."""
    found = getattr(sampling, "shift", None)
    if sampling is None or found == shift:
        return []
    what = "The noise schedule" if found is None else f"The shift {found:g}"
    counts = "schedule" if shift is None else f"shift, {shift:g},"
    return [f"{what} patched onto the MODEL changes nothing: the sampler's own {counts} counts."]


def _of_options(known: Mapping[str, tuple[str, str]], options: Mapping[str, Any]) -> list[str]:
    return [f"{what} changes nothing: {why}." for key, (what, why) in known.items() if options.get(key)]


def _of_wrappers(kinds: list[Mapping[Any, list]]) -> list[str]:
    """Wrappers around the forward pass or the sampling loop: of each kind, a list under each node's own name."""
    names = sorted({str(name) for kind in kinds for name, wrappers in kind.items() if wrappers})
    untold = [name for name in names if not name.startswith(TOLD_ABOVE)]
    shown = (WRAPPERS.get(name, f"The wrapper {name!r} on the MODEL") for name in untold)
    return [f"{what} changes nothing: {OWN_PASS}." for what in shown]


def _of_objects(patches: Mapping[str, Any]) -> list[str]:
    names = (name for name in patches if name != "model_sampling")
    uncalled = [name for name in names if not name.startswith(HONOURED_OBJECTS) or UNCALLED.fullmatch(name)]
    if not uncalled:
        return []
    more = f" (and {len(uncalled) - 1} more)" if len(uncalled) > 1 else ""
    return [f"The MODEL's replaced {uncalled[0]}{more} changes nothing: {OWN_PASS}."]


def _of_conditioning(conditioning: Conditioning) -> list[str]:
    said = [entry[1] for entry in conditioning]
    found = [what for key, what in CONDITIONS.items() if any(key in values for values in said)]
    if any(values.get("strength", 1.0) != 1.0 for values in said):
        found.append("strength")
    why = "the sampler takes a prompt's words and its start, and nothing else"
    return [f"The conditioning's {what} changes nothing: {why}." for what in found]
