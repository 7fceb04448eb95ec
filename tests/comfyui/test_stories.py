"""Stories in a real ComfyUI server: prompts over time as CONDITIONING, and videos side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui import REPO, Client, Event, Preview, Server, workflow_to_prompt
from graphs import (
    TINY_BLOCKS,
    TINY_SAMPLER,
    Node,
    Prompt,
    bare_latents,
    forget,
    make_latents,
    output_file,
    save_input_latent,
    saved_frames,
)
from safetensors.torch import load_file
from torch import Tensor

from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.demo.models import demo_transformer
from packforcing.demo.text import encode_prompt
from packforcing.files.video import probe, read_video
from packforcing.generate.long_video import LongVideo, VideoModels, VideoSettings
from packforcing.generate.sampling import Sampling
from packforcing.generate.story import Story, Stretch
from packforcing.known_models import SIZES, TINY
from packforcing.model.load import make_causal_wan
from packforcing.model.wan_modules import build_wan_modules

FIRST, SECOND = "a red circle", "a blue square"
SWITCH = 2  # the block that begins with frame 5 of 16 a second, 0.3125 s
TIME = "0:00.3"
STORY = f"0:00 {FIRST}\n\n# then\n{TIME} {SECOND}"
OLD_QUICKSTART = REPO / "tests" / "references" / "quickstart-0.1.json"


def schedule(prompt: Prompt, text: str = STORY) -> list:
    return prompt.add("PackForcingPromptSchedule", clip=prompt.demo()[1], text=text)[0]


def at(prompt: Prompt, words: str, start: str, text: str | None = None) -> list:
    conditioning = prompt.text(prompt.demo()[1], words)
    return prompt.add("PackForcingConditioningAt", conditioning=conditioning, start=start, text=text)[0]


def combined(prompt: Prompt, first: list, second: list) -> list:
    return prompt.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)[0]


def scheduled_latents(server: Server, client: Client, text: str = STORY, **inputs) -> Tensor:
    prompt = Prompt()
    return bare_latents(server, client, prompt, positive=schedule(prompt, text), **inputs)


def same_blocks(a: Tensor, b: Tensor) -> list[bool]:
    return [torch.equal(a[:, :, block], b[:, :, block]) for block in range(a.shape[2])]


@pytest.fixture(scope="module")
def plain(server: Server) -> Tensor:
    """One prompt, as it always was."""
    with server.client() as client:
        forget(server, client)  # another file may just have run the same prompt
        return bare_latents(server, client)


@pytest.fixture(scope="module")
def story(server: Server) -> Tensor:
    with server.client() as client:
        return scheduled_latents(server, client)


def test_a_schedule_of_one_prompt_is_that_prompt(server: Server, client: Client, plain: Tensor):
    assert torch.equal(scheduled_latents(server, client, f"0 {FIRST}"), plain)
    assert torch.equal(scheduled_latents(server, client, f"0 {FIRST}", prompt_switch="refresh"), plain)


def test_the_second_prompt_rules_from_its_block_on(plain: Tensor, story: Tensor):
    assert same_blocks(story, plain) == [block < SWITCH for block in range(TINY_BLOCKS)]


def test_the_story_is_the_librarys_own(story: Tensor, plain: Tensor):
    """The server's latents, against the library's loop over stretches that are written out."""
    wan = make_causal_wan(build_wan_modules(SIZES[TINY], demo_transformer()), "cpu", torch.float32)
    layout = Layout(CacheConfig(block_frames=1, sink_frames=1, recent_frames=1, top_k=0), FrameSize(64, 64), 1)
    sampling = Sampling(*(TINY_SAMPLER[name] for name in ("seed", "steps", "shift", "update")))
    stretches = [
        Stretch(start, wan.embed_text(encode_prompt(words))) for start, words in ((0, FIRST), (SWITCH, SECOND))
    ]

    def made(text) -> Tensor:
        video = LongVideo(VideoModels(wan), text, VideoSettings(layout, sampling))
        return torch.cat([block.latents for block in video.blocks(TINY_BLOCKS)], dim=2)

    # ComfyUI's convention scales and shifts each channel: taken from the plain run, which has the same first blocks.
    own, told = made(stretches[0].text), made(Story(tuple(stretches)))
    moved = (story - plain).double()
    scale = [(channel.std() / other.std()).item() for channel, other in zip(plain[0], own[0], strict=True)]
    expected = (told - own).double() * torch.tensor(scale).view(1, 16, 1, 1, 1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-3)
    assert moved[:, :, SWITCH:].abs().mean() > 0.05


@pytest.mark.parametrize("order", [0, 1])
def test_combined_conditionings_are_the_same_story_in_any_order(
    server: Server, client: Client, story: Tensor, order: int
):
    prompt = Prompt()
    pair = (prompt.text(prompt.demo()[1], FIRST), at(prompt, SECOND, TIME))  # the first has no start: 0:00
    assert torch.equal(bare_latents(server, client, prompt, positive=combined(prompt, *pair[:: 1 - 2 * order])), story)


def test_a_schedule_goes_on_with_a_conditioning(server: Server, client: Client, story: Tensor):
    prompt = Prompt()
    both = combined(prompt, schedule(prompt), at(prompt, "a green star", "1.1"))
    longer = bare_latents(server, client, prompt, positive=both)
    assert same_blocks(longer, story) == [True] * 5 + [False]


def test_switches_differ_from_the_switch_on(server: Server, client: Client, story: Tensor):
    assert torch.equal(scheduled_latents(server, client, prompt_switch="keep", blend_blocks=7), story)
    refreshed = scheduled_latents(server, client, prompt_switch="refresh")
    blended = scheduled_latents(server, client, prompt_switch="blend")
    changed = [block < SWITCH for block in range(TINY_BLOCKS)]
    assert same_blocks(refreshed, story) == same_blocks(blended, story) == same_blocks(refreshed, blended) == changed
    assert torch.equal(scheduled_latents(server, client, prompt_switch="blend", blend_blocks=2), blended)  # the default
    assert not torch.equal(scheduled_latents(server, client, prompt_switch="blend", blend_blocks=1), blended)


def test_core_samplers_take_the_conditioning_as_it_is(server: Server, client: Client):
    """The pack's keys mean nothing to them."""
    prompt = Prompt()
    demo = prompt.demo()
    empty = prompt.add("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)[0]
    settings = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    negative = prompt.text(demo[1], "")
    saved = []
    for positive in (prompt.text(demo[1], FIRST), at(prompt, FIRST, "0:20", "words")):
        made = prompt.add(
            "KSampler", model=demo[0], positive=positive, negative=negative, latent_image=empty, **settings
        )
        saved.append(prompt.save_latent(made[0]))
    result = client.run(prompt.nodes).raise_for_status()
    a, b = (load_file(output_file(server, result.outputs[node.id]["latents"][0]))["latent_tensor"] for node in saved)
    assert torch.equal(a, b)


def test_progress_counts_refreshed_blocks_and_the_record_tells_the_story(server: Server, client: Client):
    prompt = Prompt()
    positive = schedule(prompt, f"{STORY}\n0:01 {FIRST}")  # comes back in block 5
    sampler = prompt.sampler(
        {"top_k": 0, "recent_frames": 2}, positive=positive, compressor=None, vae=None, prompt_switch="refresh"
    )
    inspector = prompt.add("PackForcingCacheInspector", record=sampler[2])
    result = client.run(prompt.nodes).raise_for_status()
    events = [event.data for event in result.of_type("progress") if event.data["node"] == sampler.id]
    recent = 1 + 2  # before block 2 block 1, since block 0 is a sink; before block 5 blocks 3 and 4
    passes = TINY_BLOCKS * (TINY_SAMPLER["steps"] + 1) - 1 + recent
    assert {event["max"] for event in events} == {passes}
    assert {event["value"] for event in events} == set(range(passes + 1))
    [report] = result.outputs[inspector.id]["text"]
    assert "3 stretches of 2 prompts, 1 return; the history at a switch: refresh" in report
    assert f"'{FIRST}' returns" in report


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "blocks", "overlap"), [("keep", 1, "off"), ("refresh", 2, "on"), ("blend", 3, "off")]
)
def test_a_story_goes_on_as_if_it_had_never_stopped(
    server: Server, client: Client, switch: str, blocks: int, overlap: str
):
    """Stopped before, at and after the switch; with mid blocks, decoded beside the next block and not."""

    def latents(**inputs) -> Tensor:
        prompt = Prompt()
        given = inputs.pop("latent_file", None)
        start = prompt.add("LoadLatent", latent=given)[0] if given else None
        sampler = prompt.sampler(
            positive=schedule(prompt), prompt_switch=switch, overlap=overlap, continue_from=start, **inputs
        )
        return make_latents(server, client, prompt, sampler)

    whole = latents()
    name = f"story-{switch}.latent"
    save_input_latent(server, name, whole[:, :, :blocks])
    # As in test_pack.py, ComfyUI's latent format keeps all but the last bits. Here a model that reads its history makes
    # more of them: 9e-4 was seen after a switch. Another prompt, or another history, changes latents by about 1.
    torch.testing.assert_close(latents(latent_file=name), whole, rtol=0, atol=5e-3)


def test_overlap_gives_the_same_story(server: Server, client: Client):
    made = []
    for overlap in ("off", "on"):
        prompt = Prompt()
        sampler = prompt.sampler(positive=schedule(prompt), prompt_switch="refresh", overlap=overlap)
        made.append(make_latents(server, client, prompt, sampler))
    assert torch.equal(*made)


def test_a_cancelled_story_is_kept_and_goes_on(server: Server, client: Client):
    rescued = server.base_dir / "output" / "packforcing_interrupted"
    before = set(rescued.glob("*"))
    cache = {"block_frames": 4, "sink_frames": 4, "recent_frames": 4, "top_k": 0}
    settings = {"width": 128, "height": 128, "steps": 6, "prompt_switch": "refresh"}
    text = f"0:00 {FIRST}\n0:02 {SECOND}"  # from block 2 on, before which block 1 is refreshed
    asked: list[int] = []

    def cancel_in_the_third_block(event: Event | Preview) -> None:
        if isinstance(event, Event) and event.type == "progress" and not asked and event.data["value"] >= 2 * 7 + 3:
            client.interrupt()
            asked.append(event.data["value"])

    prompt = Prompt()
    sampler = prompt.sampler(cache, positive=schedule(prompt, text), seconds=3600, **settings)
    prompt.save_latent(sampler[0])
    assert client.run(prompt.nodes, on_event=cancel_in_the_third_block).status == "interrupted"
    latent, mp4 = sorted(set(rescued.glob("*")) - before)
    kept = load_file(latent)["latent_tensor"]
    done = kept.shape[2] // 4
    assert done >= 2
    assert len(read_video(mp4)[0]) == 16 * done - 3

    def finished(start: str | None) -> Tensor:
        prompt = Prompt()
        given = prompt.add("LoadLatent", latent=start)[0] if start else None
        seconds = done + 1
        return make_latents(
            server,
            client,
            prompt,
            prompt.sampler(cache, positive=schedule(prompt, text), seconds=seconds, continue_from=given, **settings),
        )

    whole = finished(None)
    assert torch.equal(whole[:, :, : 4 * done], kept)
    name = shutil.copy(latent, server.base_dir / "input" / "story-rescued.latent").name
    torch.testing.assert_close(finished(name), whole, rtol=0, atol=1e-4)


# --- old graphs ------------------------------------------------------------------------------------------------------


def test_the_first_quickstart_still_runs(server: Server, client: Client):
    """Its file was saved before the sampler had the last two widgets."""
    workflow = json.loads(OLD_QUICKSTART.read_text())
    prompt = Prompt(workflow_to_prompt(workflow, client.object_info()))
    [sampler] = [Node(name) for name, node in prompt.nodes.items() if node["class_type"] == "PackForcingSampler"]
    inputs = prompt.nodes[sampler.id]["inputs"]
    assert (inputs["overlap"], inputs["prompt_switch"], inputs["blend_blocks"]) == ("auto", "keep", 2)
    inputs.update(seconds=1, width=64, height=64)
    latents = make_latents(server, client, prompt, sampler)
    assert latents.shape == (1, 16, 4, 8, 8)
    # As a client saved it that knew nothing of them, for the API.
    del inputs["prompt_switch"], inputs["blend_blocks"], inputs["overlap"]
    inputs["seconds"] = 0.9  # not answered from the server's memory; as many blocks
    assert torch.equal(make_latents(server, client, prompt, sampler), latents)


# --- side by side ----------------------------------------------------------------------------------------------------


def coloured(prompt: Prompt, frames: int, colour: int, fps: float = 8.0) -> list:
    """A core VIDEO of one colour, 64x48."""
    images = prompt.add("EmptyImage", width=64, height=48, batch_size=frames, color=colour)[0]
    return prompt.add("CreateVideo", images=images, fps=fps)[0]


def joined_video(server: Server, client: Client, prompt: Prompt, **inputs) -> np.ndarray:
    saved = prompt.save_video(prompt.add("PackForcingSideBySide", **inputs)[0])
    return saved_frames(server, client.run(prompt.nodes).raise_for_status(), saved.id)


def test_core_videos_stand_side_by_side(server: Server, client: Client):
    prompt = Prompt()
    colours = (0xC82828, 0x28A028, 0x2828C8)
    videos = {f"video_{n}": coloured(prompt, 6 + 3 * n, colour) for n, colour in zip((1, 2, 4), colours, strict=True)}
    labels = {"label_1": "one", "label_2": "two", "label_4": "four"}
    frames = joined_video(server, client, prompt, **videos, **labels)
    assert frames.shape[0] == 18  # the longest
    assert frames.shape[2] == 3 * 64 + 2 * 4
    for left, colour in zip((0, 68, 136), colours, strict=True):
        middle = frames[:, -40:-8, left + 8 : left + 56].reshape(18, -1, 3).mean(1)
        assert np.abs(middle - np.array([colour >> 16, colour >> 8 & 255, colour & 255])).max() < 8
    leftovers = [probe(path) for path in Path(server.base_dir / "temp").rglob("packforcing_*.mp4")]
    sizes = [(info.frames, info.height, info.width) for info in leftovers]
    assert sizes.count(frames.shape[:3]) == 1
    assert not any(size[1:] == (48, 64) for size in sizes)  # copies of the inputs are gone


def test_the_samplers_videos_stand_side_by_side(server: Server, client: Client):
    prompt = Prompt()
    videos = [prompt.sampler(seed=seed)[1] for seed in (1, 2)]
    saved = [prompt.save_video(video) for video in videos]
    both = prompt.save_video(
        prompt.add("PackForcingSideBySide", video_1=videos[0], video_2=videos[1], label_1="a", label_2="")[0]
    )
    result = client.run(prompt.nodes).raise_for_status()
    frames = [saved_frames(server, result, node.id) for node in (*saved, both)]
    left, right = frames[2][:, -64:, :64], frames[2][:, -64:, -64:]
    for alone, beside, other in ((frames[0], left, frames[1]), (frames[1], right, frames[0])):
        error = np.abs(alone.astype(int) - beside).mean()
        assert error < 6
        assert error < np.abs(other.astype(int) - beside).mean() / 3
