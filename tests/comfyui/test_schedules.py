"""Noise levels, flavours and presets in ComfyUI: the sampler's schedule, and the nodes that give one."""

from __future__ import annotations

import json

import torch
from comfyui import Client, Server
from graphs import Prompt, bare_latents, output_file, write_model
from safetensors.torch import load_file

from packforcing.demo.models import demo_transformer
from packforcing.presets import PRESETS

BARE = {"compressor": None, "vae": None, "seconds": 0.75}  # three blocks of one latent frame
CUSTOM = {"flavour": "custom", "timesteps": "1000, 500", "first_block_timesteps": "", "shift": 1.0, "warp": True}


def timesteps(prompt: Prompt, **changes: object) -> list:
    return prompt.add("PackForcingTimesteps", **(CUSTOM | changes))[0]


def test_a_list_is_the_same_as_its_even_steps_and_puts_steps_and_shift_aside(server: Server, client: Client):
    """Without a shift, two even steps are 1000 and 500 to the bit."""
    prompt = Prompt()
    found = bare_latents(server, client, prompt, schedule=timesteps(prompt), seconds=0.75)
    assert torch.equal(found, bare_latents(server, client, steps=2, shift=1.0, seconds=0.75))


def test_the_first_blocks_own_steps_are_made_counted_and_reported(server: Server, client: Client):
    """In one prompt with SIGMAS of a core node, which the sampler takes as well."""
    prompt = Prompt()
    schedule = timesteps(prompt, flavour="causal-forcing-2step")
    sampler = prompt.sampler({"top_k": 0}, schedule=schedule, **BARE)
    sigmas = prompt.add("BasicScheduler", model=prompt.demo()[0], scheduler="simple", steps=3, denoise=1.0)[0]
    core = prompt.sampler({"top_k": 0}, schedule=sigmas, **BARE)
    saved = [prompt.save_latent(each[0]) for each in (sampler, core)]
    reports = [prompt.add("PackForcingCacheInspector", record=each[2]) for each in (sampler, core)]
    result = client.run(prompt.nodes).raise_for_status()
    events = [event.data for event in result.of_type("progress") if event.data["node"] == sampler.id]
    passes = 3 * (2 + 1) - 1 + 2  # two steps and a clean pass a block, but for the last; two more in the first block
    assert {event["max"] for event in events} == {passes}
    assert {event["value"] for event in events} == set(range(passes + 1))
    told = [result.outputs[report.id]["text"][0] for report in reports]
    assert "few-step, t = 1000, 833.33; first block 1000, 937.5, 833.33, 625" in told[0]
    assert "few-step, t = 1000, " in told[1]
    assert "first block" not in told[1]
    for node in saved:
        [file] = result.outputs[node.id]["latents"]
        assert load_file(output_file(server, file))["latent_tensor"].isfinite().all()


def test_a_preset_is_a_cache_config(server: Server, client: Client):
    """Two blocks under each preset, in one prompt, so that only the sizes matter."""
    prompt = Prompt()
    storage = {"archive_device": "host", "archive_budget_gb": 0.5, "kv_dtype": "fp8_e4m3"}
    reports = {}
    for preset in (PRESETS[0], PRESETS[2]):
        config = prompt.add("PackForcingCachePreset", preset=preset.name, **storage)[0]
        sampler = prompt.sampler(cache_config=config, steps=1, seconds=0.5)
        reports[preset] = prompt.add("PackForcingCacheInspector", record=sampler[2])
    result = client.run(prompt.nodes).raise_for_status()
    for preset, report in reports.items():
        text, c = result.outputs[report.id]["text"][0], preset.config
        assert f"{c.sink_frames} and {c.recent_frames} latent frames at full resolution" in text
        assert f"within {c.position_range} latent frames" in text
        assert "fp8_e4m3" in text
    offered = client.object_info()["PackForcingCachePreset"]["input"]["required"]["preset"]
    assert all(preset.name in json.dumps(offered) for preset in PRESETS)


def test_what_departs_from_a_known_checkpoints_training_is_told_also_behind_a_lora_loader(
    server: Server, client: Client
):
    name = write_model(server, "diffusion_models", "self_forcing_dmd-tiny.safetensors", demo_transformer())
    lora = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 256),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(256, 4),
    }
    write_model(server, "loras", "nothing.safetensors", lora)
    before = len(server.log)
    prompt = Prompt()
    patched = prompt.add(
        "LoraLoaderModelOnly", model=prompt.model(name), lora_name="nothing.safetensors", strength_model=1
    )
    bare_latents(server, client, prompt, model=patched[0], seconds=0.5)
    told = server.log[before:]
    assert "The model's file is one of self-forcing, but block_frames is 1, and it was trained with 3." in told
    assert "but the timesteps are 1000, 833.33, and it was trained with 1000, 937.5, 833.33, 625." in told
    before = len(server.log)
    prompt = Prompt()
    bare_latents(
        server,
        client,
        prompt,
        model=prompt.model(name),
        seconds=0.5,
        schedule=timesteps(prompt, flavour="self-forcing"),
    )
    assert "but the timesteps" not in server.log[before:]
