"""What core nodes patch onto a MODEL or write into a conditioning: it counts, or the user is told that it does not.

With ComfyUI's own node classes in this process, and once all together in a server.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui import Client, Server
from graphs import Prompt, bare_latents, saved_latent

SHIFT = 5.0


@pytest.fixture(scope="module")
def told(pack: ModuleType) -> Callable[..., list[str]]:
    return importlib.import_module(f"{pack.__name__}.nodes.not_honoured").not_honoured


@pytest.fixture(scope="module")
def models(pack: ModuleType) -> tuple:
    """The demo's MODEL, CLIP and VAE, as its node gives them."""
    return pack.NODE_CLASS_MAPPINGS["PackForcingDemoModels"].execute().result


@pytest.fixture(scope="module")
def prompt(models: tuple) -> list:
    clip = models[1]
    return clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))


def run_node(name: str, *args: Any, **inputs: Any) -> Any:
    """The first output of a core node, as MODULE.CLASS, V3 or older."""
    module, _, class_name = name.rpartition(".")
    node = getattr(importlib.import_module(module), class_name)
    if hasattr(node, "execute"):
        defaults = {entry.id: entry.default for entry in node.define_schema().inputs if hasattr(entry, "default")}
        output = node.execute(*args, **(defaults | inputs))  # newer versions have further inputs
        return getattr(output, "result", output)[0]
    return getattr(node(), node.FUNCTION)(*args, **inputs)[0]


EXTRAS = "comfy_extras.nodes_"
ROPE = {"scale_x": 1.0, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 0.0, "scale_t": 2.0, "shift_t": 0.0}
CACHED = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
WINDOWS = {
    "context_length": 81, "context_overlap": 30, "context_schedule": "standard_static", "context_stride": 1,
    "closed_loop": False, "fuse_method": "pyramid",
}  # fmt: skip
SKIPPED = {"scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, "double_layers": "1"}
TILES = {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False}
MODEL_NODES = {
    "model_advanced.ModelSamplingSD3": ({"shift": 8.0}, "The shift 8 patched onto the MODEL changes nothing: .* 5, "),
    "easycache.EasyCacheNode": (CACHED, r"A step cache on the MODEL \(EasyCache"),
    "easycache.LazyCacheNode": (CACHED, r"A step cache on the MODEL \(EasyCache, LazyCache"),
    "rope.ScaleROPE": (ROPE, r"Scaled positions on the MODEL \(ScaleROPE\)"),
    "torch_compile.TorchCompileModel": ({"backend": "inductor"}, r"torch.compile on the MODEL \(TorchCompileModel\)"),
    "cfg.CFGZeroStar": ({}, r"Guidance patched onto the MODEL \(CFGZeroStar"),
    "slg.SkipLayerGuidanceDiT": (SKIPPED, "Guidance patched onto the MODEL .*SkipLayerGuidance"),
    "context_windows.WanContextWindowsManualNode": (WINDOWS, "Context windows on the MODEL"),
    "hypertile.HyperTile": (TILES, "Patches of the MODEL's attention"),
    "differential_diffusion.DifferentialDiffusion": ({}, "A denoise mask on the MODEL"),
}


@pytest.mark.parametrize("node", MODEL_NODES)
def test_what_a_core_node_patches_onto_a_model_is_told(told, models: tuple, prompt: list, node: str):
    inputs, sentence = MODEL_NODES[node]
    assert told(models[0], prompt, SHIFT) == []
    [found] = told(run_node(EXTRAS + node, models[0], **inputs), prompt, SHIFT)
    assert re.match(sentence, found)
    assert told(models[0], prompt, SHIFT) == []


def test_a_shift_of_0_is_the_models_own(pack: ModuleType, models: tuple, prompt: list):
    """The same latents as with ModelSamplingSD3's shift in the widget, and others than with the model's own."""
    classes = pack.NODE_CLASS_MAPPINGS
    sizes = {"block_frames": 4, "sink_frames": 4, "recent_frames": 4, "top_k": 0}
    config = classes["PackForcingCacheConfig"].execute(**sizes).result[0]

    def latents(model, shift: float) -> torch.Tensor:
        sampler = classes["PackForcingSampler"]
        made = sampler.execute(model, prompt, config, 0, 64, 64, 1.0, 16.0, 2, shift, "euler")
        return made.result[0]["samples"]

    shifted = run_node(f"{EXTRAS}model_advanced.ModelSamplingSD3", models[0], shift=3.0)
    assert torch.equal(latents(shifted, 0.0), latents(models[0], 3.0))
    own = models[0].get_model_object("model_sampling").shift
    assert torch.equal(latents(models[0], 0.0), latents(models[0], own))
    assert not torch.equal(latents(models[0], 0.0), latents(shifted, 0.0))


def test_a_shift_that_is_the_samplers_own_is_not_told(told, models: tuple, prompt: list):
    same = run_node(f"{EXTRAS}model_advanced.ModelSamplingSD3", models[0], shift=SHIFT)
    assert told(same, prompt, SHIFT) == []


def test_attention_patched_as_nag_does_it_is_told(told, models: tuple, prompt: list):
    """Core's NAGuidance (Comfy-Org/ComfyUI 0.33.0, comfy_extras/nodes_nag.py) sets such a patch and wants CFG."""
    model = models[0].clone()
    model.set_model_attn1_output_patch(lambda out, options: out)
    model.model_options["disable_cfg1_optimization"] = True
    [found] = told(model, prompt, SHIFT)
    assert "Patches of the MODEL's attention (NAG" in found


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("manual_cast_dtype", True),
        ("diffusion_model.blocks.0.self_attn.q", True),
        ("diffusion_model.blocks.0.ffn.0", True),
        ("diffusion_model.blocks.0.cross_attn.forward", False),
        ("diffusion_model.blocks.0.self_attn", False),
        ("diffusion_model.blocks.1", False),
        ("diffusion_model.forward_orig", False),
        ("diffusion_model.head", False),
        ("extra_conds", False),
    ],
)
def test_replaced_parts_count_where_the_sampler_calls_them(told, models: tuple, prompt: list, name: str, counts: bool):
    model = models[0].clone()
    model.add_object_patch(name, object())
    assert [f"The MODEL's replaced {name}" in sentence for sentence in told(model, prompt, SHIFT)] == [True] * (
        not counts
    )


def test_what_changes_a_run_is_not_told(told, models: tuple, prompt: list):
    model = run_node(f"{EXTRAS}model_advanced.ModelComputeDtype", models[0], dtype="bf16")
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda attention, *args: attention(
        *args
    )
    model.add_patches({"diffusion_model.blocks.0.self_attn.q.weight": ("diff", (torch.ones(256, 256),))})
    assert told(model, prompt, SHIFT) == []


AREA = {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}
CONDITIONING_NODES = {
    "ConditioningSetTimestepRange": ({"start": 0.0, "end": 0.5}, "timestep range"),
    "ConditioningSetArea": (AREA, "area"),
    "ConditioningSetAreaStrength": ({"strength": 0.5}, "strength"),
    "ConditioningSetMask": ({"mask": torch.ones(1, 64, 64), "set_cond_area": "default", "strength": 1.0}, "mask"),
}


@pytest.mark.parametrize("node", CONDITIONING_NODES)
def test_what_a_core_node_writes_into_a_conditioning_is_told(told, models: tuple, prompt: list, node: str):
    inputs, what = CONDITIONING_NODES[node]
    [found] = told(models[0], run_node(f"nodes.{node}", prompt, **inputs), SHIFT)
    assert found.startswith(f"The conditioning's {what} changes nothing: ")


def test_hooks_are_told_also_those_of_the_clip(told, models: tuple, prompt: list):
    hooks = importlib.import_module("comfy.hooks").HookGroup()
    hooks.add(importlib.import_module("comfy.hooks").WeightHook())
    clip = run_node(f"{EXTRAS}hooks.SetClipHooks", models[1], schedule_clip=False, apply_to_conds=True, hooks=hooks)
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    assert torch.equal(encoded[0][0], prompt[0][0])
    [found] = told(models[0], encoded, SHIFT)
    assert "The conditioning's hooks" in found


def test_a_start_image_in_a_conditioning_is_an_error(pack: ModuleType, models: tuple, prompt: list):
    check = importlib.import_module(f"{pack.__name__}.nodes.not_honoured").check_no_start_image
    check(prompt)
    picture = torch.rand(1, 64, 64, 3)
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    with_picture = run_node(
        f"{EXTRAS}wan.WanImageToVideo", positive=prompt, negative=prompt, vae=models[2], start_image=picture, **size
    )
    with pytest.raises(Exception, match="connect the picture to the sampler's start_image instead"):
        check(with_picture)


# --- in a server -----------------------------------------------------------------------------------------------------


def patched(prompt: Prompt, model: list, positive: list) -> tuple[list, list]:
    """A MODEL and a conditioning behind one core node of each kind."""
    nodes = {
        "ModelSamplingSD3": {"shift": 8.0},
        "EasyCache": CACHED,
        "ScaleROPE": ROPE,
        "CFGZeroStar": {},
        "WanContextWindowsManual": WINDOWS,
        "TorchCompileModel": {"backend": "inductor"},
    }
    for name, inputs in nodes.items():
        model = prompt.add(name, model=model, **inputs)[0]
    ranged = prompt.add("ConditioningSetTimestepRange", conditioning=positive, start=0.0, end=0.5)
    return model, prompt.add("ConditioningSetArea", conditioning=ranged[0], **AREA)[0]


def test_a_run_tells_all_in_the_log_and_on_the_node(server: Server, client: Client):
    plain = bare_latents(server, client, seconds=0.9)
    prompt = Prompt()
    demo = prompt.demo()
    words = prompt.text(demo[1])
    model, positive = patched(prompt, demo[0], words)
    sampler = prompt.sampler({"top_k": 0}, model=model, positive=positive, compressor=None, vae=None, seconds=0.9)
    saved = prompt.save_latent(sampler[0])
    before = len(server.log)
    result = client.run(prompt.nodes)
    assert torch.equal(saved_latent(server, result, saved), plain)  # they do nothing, as is said:
    shown, *blocks = result.of_type("progress_text")
    sentences = shown.data["text"].splitlines()
    assert shown.data["node"] == sampler.id
    assert len(sentences) == 8
    assert len(blocks) >= 2
    assert all(block.data["text"].splitlines()[1:] == sentences for block in blocks)  # below speed and time left
    assert all(server.log[before:].count(f"PackForcing: {sentence}") == 1 for sentence in sentences)

    prompt.nodes[sampler.id]["inputs"] |= {"model": demo[0], "positive": words, "seed": 2}
    cleared, *blocks = client.run(prompt.nodes).raise_for_status().of_type("progress_text")
    assert cleared.data == {"node": sampler.id, "text": ""}
    assert all(len(block.data["text"].splitlines()) == 1 for block in blocks)


def test_a_start_image_is_refused_before_the_run(server: Server, client: Client):
    prompt = Prompt()
    demo = prompt.demo()
    words = prompt.text(demo[1])
    picture = prompt.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFF0000)
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    start = prompt.add("WanImageToVideo", positive=words, negative=words, vae=demo[2], start_image=picture[0], **size)
    sampler = prompt.sampler({"top_k": 0}, positive=start[0], compressor=None, vae=None)
    prompt.save_latent(sampler[0])
    result = client.run(prompt.nodes)
    assert result.status == "error"
    assert result.error["node_id"] == sampler.id
    assert "connect the picture to the sampler's start_image instead" in result.error_message
    assert not result.of_type("progress_text")
