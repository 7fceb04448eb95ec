"""What a user can get wrong in ComfyUI: each gives one sentence that says what, what was found, and what to do.

Before any sampling, and the server lives on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comfyui import Client, PromptRejected, Result, Server
from graphs import Node, Prompt, bare_latents, save_input_latent, write_model
from safetensors.torch import load_file, save

from packforcing.demo.models import demo_transformer
from packforcing.files.compressor_file import CompressorMetadata, save_compressor
from packforcing.model.compressor import HRBranch

# --- bad files, made once --------------------------------------------------------------------------------------------


def sd_unet() -> dict[str, torch.Tensor]:
    """Enough of a Stable Diffusion UNet to be taken for one."""
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.zeros(320, 320),
    }


def lora() -> dict[str, torch.Tensor]:
    return {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 256),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(256, 4),
    }


def with_bad_head(value: float) -> dict[str, torch.Tensor]:
    state = demo_transformer()
    state["head.head.weight"][3] = value  # not a bias, which is looked at when the file is loaded
    return state


@pytest.fixture(scope="module", autouse=True)
def bad_files(server: Server) -> None:
    write_model(server, "diffusion_models", "sd15.safetensors", sd_unet())
    write_model(server, "diffusion_models", "lora.safetensors", lora())
    write_model(server, "diffusion_models", "nan.safetensors", with_bad_head(float("nan")))
    write_model(server, "diffusion_models", "inf.safetensors", with_bad_head(float("inf")))
    clip = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3072, 768)}
    write_model(server, "text_encoders", "clip_l.safetensors", clip)
    models = server.base_dir / "models"
    whole = save(demo_transformer())
    (models / "diffusion_models" / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (models / "diffusion_models" / "page.safetensors").write_text("<!DOCTYPE html><html>Access denied</html>")
    (models / "diffusion_models" / "empty.pt").write_bytes(b"")
    write_model(server, "packforcing", "lora.safetensors", lora())
    narrow = HRBranch((16, 8, 8, 8, 8, 128), temporal_stride=1)
    save_compressor(
        models / "packforcing" / "narrow.safetensors",
        {f"hr.{name}": tensor for name, tensor in narrow.state_dict().items()},
        CompressorMetadata(
            model_dim=128, temporal_stride=1, hidden_channels=(8, 8, 8, 8), block_frames=1, base_model="half a tiny"
        ),
    )
    (models.parent / "secret.safetensors").write_bytes(whole)


# --- the prompts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A prompt that must fail in one node with a sentence that holds all of `told`."""

    name: str
    build: Callable[[Prompt], Node]  # adds to a prompt, returns the sampler
    node: str  # the class that says so
    told: tuple[str, ...]


def sampler(cache: dict[str, Any] | None = None, **inputs: Any) -> Callable[[Prompt], Node]:
    return lambda prompt: prompt.sampler(cache, **inputs)


def with_model(name: str, weights: str = "auto") -> Callable[[Prompt], Node]:
    return lambda prompt: prompt.sampler(model=prompt.model(name, weights))


def with_compressor(name: str) -> Callable[[Prompt], Node]:
    return lambda prompt: prompt.sampler(compressor=prompt.compressor(name))


def with_pixel_space_vae(prompt: Prompt) -> Node:
    return prompt.sampler(vae=prompt.add("VAELoader", vae_name="pixel_space")[0])


def with_two_prompts(prompt: Prompt) -> Node:
    clip = prompt.demo()[1]
    both = prompt.add("ConditioningCombine", conditioning_1=prompt.text(clip, "a"), conditioning_2=prompt.text(clip))
    return prompt.sampler(positive=both[0])


def with_story(text: str, **inputs: Any) -> Callable[[Prompt], Node]:
    def build(prompt: Prompt) -> Node:
        story = prompt.add("PackForcingPromptSchedule", clip=prompt.demo()[1], text=text)
        return prompt.sampler(positive=story[0], **inputs)

    return build


def with_starts(*starts: str) -> Callable[[Prompt], Node]:
    """Prompts with a start each, combined; the start of one without is ""."""

    def build(prompt: Prompt) -> Node:
        clip = prompt.demo()[1]
        parts = [prompt.text(clip, f"prompt {i}") for i in range(len(starts))]
        for i, start in enumerate(starts):
            if start:
                parts[i] = prompt.add("PackForcingConditioningAt", conditioning=parts[i], start=start)[0]
        both = parts[0]
        for part in parts[1:]:
            both = prompt.add("ConditioningCombine", conditioning_1=both, conditioning_2=part)[0]
        return prompt.sampler(positive=both)

    return build


def with_json_name(name: str) -> Callable[[Prompt], Node]:
    """A sampler with an inspector that saves under a name."""

    def build(prompt: Prompt) -> Node:
        made = prompt.sampler()
        prompt.add("PackForcingCacheInspector", record=made[2], save_json=name)
        return made

    return build


def with_a_start_for_two(prompt: Prompt) -> Node:
    clip = prompt.demo()[1]
    both = prompt.add("ConditioningCombine", conditioning_1=prompt.text(clip, "a"), conditioning_2=prompt.text(clip))
    return prompt.sampler(positive=prompt.add("PackForcingConditioningAt", conditioning=both[0], start="0:01")[0])


def with_timesteps(timesteps: str, first: str = "") -> Callable[[Prompt], Node]:
    def build(prompt: Prompt) -> Node:
        own = {"flavour": "custom", "timesteps": timesteps, "first_block_timesteps": first, "shift": 5.0, "warp": True}
        return prompt.sampler(schedule=prompt.add("PackForcingTimesteps", **own)[0])

    return build


def with_karras_sigmas(prompt: Prompt) -> Node:
    """Noise levels of an older kind of model, from 14 down."""
    levels = {"steps": 4, "sigma_max": 14.6, "sigma_min": 0.03, "rho": 7.0}
    return prompt.sampler(schedule=prompt.add("KarrasScheduler", **levels)[0])


def with_unlike_videos(prompt: Prompt) -> None:
    a, b = prompt.sampler(seconds=0.2), prompt.sampler(seconds=0.2, width=80)
    both = prompt.add("PackForcingSideBySide", video_1=a[1], video_2=b[1], label_1="small", label_2="large")
    prompt.save_video(both[0])


def with_image_latent(prompt: Prompt) -> Node:
    return prompt.sampler(latent=prompt.add("EmptyLatentImage", width=64, height=64, batch_size=1)[0])


def with_many_videos(prompt: Prompt) -> Node:
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 2}
    return prompt.sampler(latent=prompt.add("EmptyHunyuanLatentVideo", **size)[0])


def with_odd_latent(prompt: Prompt) -> Node:
    """Whole latent columns, but not whole tokens."""
    size = {"width": 72, "height": 64, "length": 5, "batch_size": 1}
    return prompt.sampler(latent=prompt.add("EmptyHunyuanLatentVideo", **size)[0])


def with_clip_prompt(prompt: Prompt) -> Node:
    """A text encoder of Stable Diffusion: 768 wide. All but one of its weights are missing, which is its own matter."""
    clip = prompt.add("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion", device="default")
    return prompt.sampler(positive=prompt.text(clip[0]))


def going_on_from(width: int, length: int) -> Callable[[Prompt], Node]:
    def build(prompt: Prompt) -> Node:
        size = {"width": width, "height": 64, "length": length, "batch_size": 1}
        return prompt.sampler(continue_from=prompt.add("EmptyHunyuanLatentVideo", **size)[0])

    return build


SAMPLER, MODEL, COMPRESSOR = "PackForcingSampler", "PackForcingModelLoader", "PackForcingCompressorLoader"

RUN_MISTAKES = [
    Mistake(
        "not a Wan file",
        with_model("sd15.safetensors"),
        MODEL,
        ("sd15.safetensors is not a Wan 2.1 text-to-video model", "a Stable Diffusion UNet", "choose a causal Wan"),
    ),
    Mistake(
        "truncated file",
        with_model("cut.safetensors"),
        MODEL,
        ("cut.safetensors is damaged, incomplete", "bytes", "download the file again"),
    ),
    Mistake(
        "web page",
        with_model("page.safetensors"),
        MODEL,
        ("page.safetensors is a web page, not weights", "download the file itself"),
    ),
    Mistake("empty file", with_model("empty.pt"), MODEL, ("empty.pt is empty (0 bytes)", "download the file again")),
    Mistake(
        "LoRA as a model",
        with_model("lora.safetensors"),
        MODEL,
        ("lora.safetensors is not a Wan 2.1 text-to-video model", "a LoRA", "apply this file with a LoRA loader node"),
    ),
    Mistake(
        "weights that are not in the file",
        with_model("nan.safetensors", "ema"),
        MODEL,
        ("nan.safetensors has no EMA weights", "found one set of", "choose auto"),
    ),
    Mistake(
        "compressor of another width",
        with_compressor("narrow.safetensors"),
        SAMPLER,
        (
            "The compressor narrow.safetensors was trained for a model 128 wide (half a tiny)",
            "the connected model is 256 wide",
            "choose a compressor of this model, or the training-free one",
        ),
    ),
    Mistake(
        "compressor file that is none",
        with_compressor("lora.safetensors"),
        COMPRESSOR,
        ("lora.safetensors is not a PackForcing compressor", "which is a LoRA", "choose a file that PackForcing's"),
    ),
    Mistake(
        "no VAE for the LR branch",
        sampler(vae=None),
        SAMPLER,
        ("LR branch goes through pixels and needs a VAE, but there is none", "connect the Wan 2.1 VAE", "top_k to 0"),
    ),
    Mistake(
        "no compressor",
        sampler(compressor=None),
        SAMPLER,
        ("there is no compressor and top_k is 2", "connect a PackForcing Compressor Loader, or set top_k to 0"),
    ),
    Mistake(
        "wrong VAE",
        with_pixel_space_vae,
        SAMPLER,
        ("This is not a Wan 2.1 VAE", "'pixel_space_vae'", "VAE"),
    ),
    Mistake(
        "two prompts",
        with_two_prompts,
        SAMPLER,
        (
            "follows one prompt at a time, but the conditioning has 2 entries without a start",
            "give each its own by PackForcing Conditioning At",
            "without Conditioning (Combine)",
        ),
    ),
    Mistake(
        "a prompt beyond the video's end",
        with_story("0:00 a\n0:02 it rains"),
        SAMPLER,
        ("The prompt at 0:02, 'it rains', has no block of its own before the video's end at 0:01.312", "earlier time"),
    ),
    Mistake(
        "a conditioning beyond the video's end",
        with_starts("", "1:00"),
        SAMPLER,
        ("The prompt at 1:00 has no block of its own before the video's end at 0:01.312: move it",),
    ),
    Mistake(
        "prompts in the same block",
        with_story("0:00 a\n0:00.02 b"),
        SAMPLER,
        ("The prompts at 0:00 and 0:00.02 fall into the same block, which begins at 0:00: put them at least 0:00.25",),
    ),
    Mistake(
        "prompts at the same time",
        with_starts("", "0:01", "1"),
        SAMPLER,
        ("Two prompts start at 0:01: give one of them another start",),
    ),
    Mistake(
        "two prompts at the beginning",
        with_starts("", "0:00"),
        SAMPLER,
        ("Two prompts start at 0:00 (a prompt without a start has that one, too): give one of them another start",),
    ),
    Mistake(
        "no prompt at the beginning",
        with_starts("0:01"),
        SAMPLER,
        ("The first prompt starts at 0:01, but one must start at 0:00: combine it with a CLIP Text Encode node",),
    ),
    Mistake(
        "a start for two prompts",
        with_a_start_for_two,
        "PackForcingConditioningAt",
        ("A start is given to one prompt, but the conditioning has 2 entries: connect one before",),
    ),
    Mistake(
        "a prompt of another width",
        with_clip_prompt,
        SAMPLER,
        ("was encoded 768 wide, but the model takes text embeddings 4096 wide", "UMT5-XXL for Wan 2.1"),
    ),
    Mistake(
        "an image's latent",
        with_image_latent,
        SAMPLER,
        ("must be one Wan 2.1 video", "[1, 4, 8, 8]", "EmptyHunyuanLatentVideo"),
    ),
    Mistake(
        "two videos at once",
        with_many_videos,
        SAMPLER,
        ("must be one Wan 2.1 video", "[2, 16, 2, 8, 8]", "batch size of 1"),
    ),
    Mistake(
        "a latent whose size is no multiple of 16",
        with_odd_latent,
        SAMPLER,
        ("The width must be a positive multiple of 16 pixels, but it is 72", "set it to"),
    ),
    Mistake(
        "a frame too small for mid blocks",
        sampler(width=64, height=48),
        SAMPLER,
        ("at least 64x64 pixels, but the video is 64x48", "enlarge it, or set top_k to 0"),
    ),
    Mistake(
        "a video that no machine can hold",
        sampler({"sink_frames": 4000}, width=16384, height=16384),
        SAMPLER,
        ("A video of 16384x16384 needs about ", " beside the model's weights, but cpu has ", " takes "),
    ),
    Mistake(
        "sigmas of another kind of model",
        with_karras_sigmas,
        SAMPLER,
        ("must lie above 0 and at most at 1, but one is 14.6", "use those of a flow model such as Wan"),
    ),
    Mistake(
        "a latent of another size to go on from",
        going_on_from(width=96, length=5),
        SAMPLER,
        ("must be 64x64 pixels, but it is 96x64: set width and height to that",),
    ),
    Mistake(
        "a latent to go on from that is long enough already",
        going_on_from(width=64, length=21),
        SAMPLER,
        ("has 6 blocks already, but the video is to have 6 in all", "ask for more seconds"),
    ),
]


@pytest.mark.parametrize("mistake", RUN_MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_told_in_one_sentence_before_sampling(client: Client, mistake: Mistake):
    prompt = Prompt()
    prompt.save_latent(mistake.build(prompt)[0])
    result = client.run(prompt.nodes)
    assert result.status == "error"
    assert result.error["node_type"] == mistake.node
    assert result.error["exception_type"].endswith("PackForcingError")
    message = result.error["exception_message"].strip()
    assert_one_sentence(message)
    for phrase in mistake.told:
        assert phrase in message
    assert not sampled(result)


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 600  # a file's path is in some


def sampled(result: Result) -> bool:
    """Whether the sampler came as far as its progress bar."""
    return any(event.data["max"] > 1 for event in result.of_type("progress"))


REFUSED = [
    ("width", sampler(width=100), SAMPLER, "The width must be a positive multiple of 16 pixels, but it is 100: set it"),
    ("height", sampler(height=0), SAMPLER, "The height must be a positive multiple of 16 pixels, but it is 0: set it"),
    ("length 0", sampler(seconds=0.0), SAMPLER, "length must be above 0 and at most 10,000,000 seconds, but it is 0.0"),
    (
        "negative length",
        sampler(seconds=-3.0),
        SAMPLER,
        "length must be above 0 and at most 10,000,000 seconds, but it is -3.0",
    ),
    (
        "sink of broken blocks",
        sampler({"block_frames": 4, "sink_frames": 6, "recent_frames": 4}),
        "PackForcingCacheConfig",
        "sink_frames must be whole blocks of 4 latent frames, but it is 6: set it to 4 or 8.",
    ),
    (
        "recent of broken blocks",
        sampler({"block_frames": 3, "sink_frames": 6, "recent_frames": 4}),
        "PackForcingCacheConfig",
        "recent_frames must be whole blocks of 3 latent frames, but it is 4: set it to 3 or 6.",
    ),
    (
        "a line without a time",
        with_story("0:00 a\n0:xx b"),
        "PackForcingPromptSchedule",
        "Line 2 of the story, '0:xx b', must begin with a time such as 0:20, 1:02:03 or 20, but \"0:xx\" is none",
    ),
    (
        "times out of order",
        with_story("0:00 a\n0:20 b\n0:10 c"),
        "PackForcingPromptSchedule",
        "Line 3 of the story, '0:10 c', must start after the prompt before it, which starts at 0:20: put them",
    ),
    (
        "a line without a prompt",
        with_story("0:00"),
        "PackForcingPromptSchedule",
        "Line 1 of the story, '0:00', has a time but no prompt: write the prompt after it.",
    ),
    (
        "a story that begins late",
        with_story("0:05 a"),
        "PackForcingPromptSchedule",
        "Line 1 of the story, '0:05 a', is the first prompt and must start at 0:00.",
    ),
    ("empty story", with_story(" \n"), "PackForcingPromptSchedule", "The story has no prompt: write a line such as"),
    (
        "a start that is no time",
        with_starts("", "soon"),
        "PackForcingConditioningAt",
        "The start must be a time such as 0:20, 1:02:03 or 20, but it is 'soon'.",
    ),
    (
        "a name outside the output folder",
        with_json_name("../secret"),
        "PackForcingCacheInspector",
        "The name of a file in the output folder is like packforcing/cache, but it is '../secret': use letters",
    ),
    ("blend of 0 blocks", sampler(blend_blocks=0), SAMPLER, "blend_blocks"),
    (
        "rising timesteps",
        with_timesteps("500, 1000"),
        "PackForcingTimesteps",
        "Timesteps must fall from step to step, but 1000 follows 500: put them in order.",
    ),
    (
        "words for timesteps",
        with_timesteps("1000", "fast"),
        "PackForcingTimesteps",
        "Timesteps are numbers with commas between, such as 1000, 757, 522, but they are 'fast'.",
    ),
    ("no timesteps", with_timesteps(" "), "PackForcingTimesteps", "Denoising takes at least 1 step, but 0 were asked"),
    (
        "a timestep out of range",
        with_timesteps("2000, 500"),
        "PackForcingTimesteps",
        "A timestep must lie above 0 and at most at 1000, but one is 2000.",
    ),
    ("unknown switch", sampler(prompt_switch="fade"), SAMPLER, "fade"),
    ("block 0", sampler({"block_frames": 0}), "PackForcingCacheConfig", "A block needs at least 1 latent frame, but"),
    (
        "position range",
        sampler({"position_range": 2}),
        "PackForcingCacheConfig",
        "position_range must be 0 (off) or at least 4 latent frames (sink, recent and current block, and one for the",
    ),
]


@pytest.mark.parametrize(("build", "node", "told"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_wrong_number_is_refused_at_once(client: Client, build: Callable[[Prompt], Node], node: str, told: str):
    [(fault_node, message)] = refused(client, build)  # told once, not once for every input
    assert fault_node == node
    assert told in message


def refused(client: Client, build: Callable[[Prompt], Node]) -> list[tuple[str, str]]:
    """(class of the node, what the server holds against it) for each fault of a prompt that it refuses."""
    prompt = Prompt()
    prompt.save_latent(build(prompt)[0])
    with pytest.raises(PromptRejected) as caught:
        client.run(prompt.nodes)
    nodes = caught.value.details["node_errors"].values()
    return [
        (node["class_type"], f"{fault['message']}: {fault['details']}") for node in nodes for fault in node["errors"]
    ]


@pytest.mark.parametrize("name", ["model", "positive", "cache_config"])
def test_a_missing_connection_is_named(client: Client, name: str):
    assert refused(client, sampler(**{name: None})) == [(SAMPLER, f"Required input is missing: {name}")]


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "..\\..\\secret.safetensors", "/etc/passwd", "gone.safetensors"]
)
@pytest.mark.parametrize("loader", [MODEL, COMPRESSOR])
def test_only_listed_files_are_opened(client: Client, loader: str, name: str):
    faults = refused(client, with_model(name) if loader == MODEL else with_compressor(name))
    [(node, told)] = faults
    assert node == loader
    assert f"There is no file '{name}' in models/" in told
    assert "choose one of the list" in told


def test_videos_that_differ_are_told_before_they_are_joined(client: Client):
    prompt = Prompt()
    with_unlike_videos(prompt)
    result = client.run(prompt.nodes)
    assert result.status == "error"
    assert result.error["node_type"] == "PackForcingSideBySide"
    message = result.error["exception_message"].strip()
    assert_one_sentence(message)
    assert "the first is 64x64 at 16 fps, and number 2 ('large') is 80x64 at 16 fps: make them with the same" in message


@pytest.mark.parametrize("name", ["nan.safetensors", "inf.safetensors"])
def test_a_model_that_breaks_is_told_with_its_block(client: Client, name: str):
    prompt = Prompt()
    video = prompt.sampler({"top_k": 0}, model=prompt.model(name), compressor=None, vae=None)
    prompt.save_latent(video[0])
    result = client.run(prompt.nodes)
    assert result.status == "error"
    assert_one_sentence(result.error["exception_message"].strip())
    assert "Block 0 came out with NaN or infinite values, so the run stopped there" in result.error_message
    assert "it ran in float32" in result.error_message


def test_what_came_before_a_broken_block_is_kept(server: Server, client: Client):
    latents = torch.zeros(1, 16, 4, 8, 8)
    latents[0, 0, 2, 0, 0] = float("nan")
    save_input_latent(server, "broken.latent", latents)
    rescued = server.base_dir / "output" / "packforcing_interrupted"
    before = set(rescued.glob("*"))
    prompt = Prompt()
    start = prompt.add("LoadLatent", latent="broken.latent")[0]
    prompt.save_latent(prompt.sampler(continue_from=start)[0])
    result = client.run(prompt.nodes)
    assert "Block 2 came out with NaN or infinite values" in result.error_message
    [latent] = [path for path in rescued.glob("*.latent") if path not in before]
    assert load_file(latent)["latent_tensor"].shape[2] == 2


def test_the_server_lives_on(server: Server, client: Client):
    """Last: after all of the above."""
    assert client.request("/queue") == {"queue_running": [], "queue_pending": []}
    assert bare_latents(server, client).isfinite().all()
