"""The pack in a real ComfyUI server: what a user's graph gives, and what stays the same when it runs again."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui import REPO, Client, Event, Preview, Result, Server, set_widget, workflow_to_prompt
from einops import reduce
from graphs import (
    TINY_BLOCKS,
    Node,
    Prompt,
    bare_latents,
    fetch,
    forget,
    make_latents,
    output_file,
    saved_latent,
    tiny_latents,
    write_model,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from packforcing.demo.models import demo_transformer, demo_vae
from packforcing.files.compressor_file import CompressorMetadata, save_compressor
from packforcing.files.state_file import load_state
from packforcing.files.video import probe, read_video
from packforcing.model.compressor import HRBranch
from packforcing.model.latent_preview import mean_colours
from packforcing.model.vae import StreamingDecoder, load_vae, normalise
from packforcing.pixels import to_uint8

NODES = {
    "PackForcingModelLoader",
    "PackForcingCompressorLoader",
    "PackForcingCacheConfig",
    "PackForcingSampler",
    "PackForcingCacheInspector",
    "PackForcingDemoModels",
    "PackForcingPromptSchedule",
    "PackForcingConditioningAt",
    "PackForcingSideBySide",
    "PackForcingCachePreset",
    "PackForcingTimesteps",
    "PackForcingSaveState",
    "PackForcingLoadState",
    "PackForcingLivePrompt",
}
INSPECTOR = "PackForcingCacheInspector"
WORKFLOWS = sorted(path.stem for path in (REPO / "workflows").glob("*.json"))
FIRST_BLOCK_WITH_MID = 3  # of the tiny video: block 0 is the sink, block 2 is recent, so block 1 is a mid block


# --- what ComfyUI and Manager find -----------------------------------------------------------------------------------


def test_the_pack_loads_without_a_complaint_under_an_odd_folder_name(server: Server):
    assert not server.pack.name.isidentifier()
    started = server.log.partition("To see the GUI")[0]
    imports = started.partition("Import times for custom nodes")[2]
    assert f"seconds: {server.pack}" in imports
    assert "IMPORT FAILED" not in started
    for word in ("warning", "error", "traceback", "deprecat"):
        guilty = [line for line in started.lower().splitlines() if word in line and "pack" in line]
        assert not guilty, started


def test_all_nodes_are_listed_under_one_category(client: Client):
    info = {name: node for name, node in client.object_info().items() if "packforcing" in name.lower()}
    assert set(info) == NODES
    assert {node["category"] for node in info.values()} == {"PackForcing"}
    assert all(node["display_name"].startswith("PackForcing ") and node["description"] for node in info.values())


def test_every_input_has_a_tooltip_or_says_itself_what_it_is(client: Client):
    plain = {"seed", "cache_config"}
    for name in NODES:
        inputs = client.object_info()[name]["input"]
        for group in ("required", "optional"):
            for key, spec in inputs.get(group, {}).items():
                assert key in plain or spec[1].get("tooltip"), f"{name}.{key}"


def test_manager_can_read_the_mappings_without_running_them(client: Client):
    assigned = {
        statement.targets[0].id: statement.value
        for statement in ast.parse((REPO / "__init__.py").read_text()).body
        if isinstance(statement, ast.Assign)
    }
    keys = [ast.literal_eval(key) for key in assigned["NODE_CLASS_MAPPINGS"].keys]
    assert set(keys) == NODES
    names = ast.literal_eval(assigned["NODE_DISPLAY_NAME_MAPPINGS"])
    assert names == {name: client.object_info()[name]["display_name"] for name in keys}


@pytest.mark.parametrize("node", sorted(NODES))
def test_every_node_has_a_help_page(client: Client, server: Server, node: str):
    page = REPO / "web" / "docs" / f"{node}.md"
    assert len(page.read_text()) > 200
    served = fetch(client, f"/extensions/{server.pack.name}/docs/{node}.md")
    assert served == page.read_bytes()


def test_requirements_leave_comfyuis_torch_alone():
    lines = [line.partition("#")[0].strip() for line in (REPO / "requirements.txt").read_text().splitlines()]
    names = {line.split(">")[0].split("=")[0].split("<")[0].strip() for line in lines if line}
    # imageio itself requires numpy and pillow alone, which ComfyUI requires too.
    assert names == {"imageio"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_are_offered_as_templates_with_a_thumbnail(client: Client, server: Server, name: str):
    assert name in client.request("/workflow_templates")[server.pack.name]
    folder = f"/api/workflow_templates/{server.pack.name}"
    assert json.loads(fetch(client, f"{folder}/{name}.json"))["nodes"]
    picture = fetch(client, f"{folder}/{name}.jpg")
    assert picture.startswith(b"\xff\xd8\xff")


# --- the quick start -------------------------------------------------------------------------------------------------

SECONDS, WIDTH, HEIGHT = 4.2, 96, 64  # rounded up to five blocks: sink, sink, mid, recent, current
BLOCKS, LATENT_FRAMES, FRAMES = 5, 20, 77
STORY = "0:00 a red circle bounces on a blue background\n0:02 two white stars spin on a green background"


@dataclass(frozen=True)
class Quickstart:
    """One run of the quick start's graph in a small size, with its latents saved and decoded by core nodes as well."""

    prompt: Prompt
    result: Result
    latent: Tensor
    pictures: list[Path]  # core VAE Decode's
    video: Path


@pytest.fixture(scope="module")
def quickstart(server: Server) -> Quickstart:
    with server.client() as client:
        info = client.object_info()
        workflow = json.loads((REPO / "workflows" / "quickstart.json").read_text())
        node = next(node for node in workflow["nodes"] if node["type"] == "PackForcingSampler")
        for name, value in {"seconds": SECONDS, "width": WIDTH, "height": HEIGHT}.items():
            set_widget(node, info["PackForcingSampler"], name, value)
        node = next(node for node in workflow["nodes"] if node["type"] == "PackForcingPromptSchedule")
        set_widget(node, info["PackForcingPromptSchedule"], "text", STORY)
        prompt = Prompt(workflow_to_prompt(workflow, info))
        sampler, demo = find(prompt, "PackForcingSampler"), find(prompt, "PackForcingDemoModels")
        saved = prompt.save_latent(sampler[0])
        inspector = find(prompt, "PackForcingCacheInspector")
        prompt.nodes[inspector.id]["inputs"]["save_json"] = "cache/run"
        prompt.add("PackForcingCacheInspector", record=inspector[3], show="everything")
        decoded = prompt.add("VAEDecode", samples=sampler[0], vae=demo[2])
        pictures = prompt.add("SaveImage", images=decoded[0], filename_prefix="decoded")
        result = client.run(prompt.nodes).raise_for_status()
    [video] = result.outputs[find(prompt, "SaveVideo").id]["images"]
    return Quickstart(
        prompt,
        result,
        saved_latent(server, result, saved),
        [output_file(server, shown) for shown in result.outputs[pictures.id]["images"]],
        output_file(server, video),
    )


def find(prompt: Prompt, class_type: str) -> Node:
    """The only node of a type in a prompt."""
    [name] = [name for name, node in prompt.nodes.items() if node["class_type"] == class_type]
    return Node(name)


def test_progress_rises_to_its_maximum(quickstart: Quickstart):
    sampler = find(quickstart.prompt, "PackForcingSampler")
    events = [event.data for event in quickstart.result.of_type("progress") if event.data["node"] == sampler.id]
    values = [event["value"] for event in events]
    steps = quickstart.prompt.nodes[sampler.id]["inputs"]["steps"]
    passes = BLOCKS * (steps + 1) - 1  # the steps and a clean pass, which the last block does without
    assert {event["max"] for event in events} == {passes}
    assert values == sorted(values)
    assert set(values) == set(range(passes + 1))


def test_a_preview_comes_for_every_block(quickstart: Quickstart):
    sampler = find(quickstart.prompt, "PackForcingSampler")
    previews = [preview for preview in quickstart.result.previews if preview.metadata["node_id"] == sampler.id]
    assert len(previews) == BLOCKS
    assert len({preview.image for preview in previews}) == BLOCKS
    for preview in previews:
        with Image.open(io.BytesIO(preview.image)) as picture:
            assert picture.width / picture.height == pytest.approx(WIDTH / HEIGHT, rel=0.01)
            assert picture.format == "WEBP"
            assert picture.n_frames > 1  # it moves


def test_the_video_has_exactly_the_frames_size_and_rate_that_were_asked_for(quickstart: Quickstart):
    assert quickstart.latent.shape == (1, 16, LATENT_FRAMES, HEIGHT // 8, WIDTH // 8)
    assert quickstart.latent.dtype == torch.float32
    assert FRAMES == 4 * LATENT_FRAMES - 3
    frames, fps = read_video(quickstart.video)
    assert (frames.shape, fps) == ((FRAMES, HEIGHT, WIDTH, 3), 16.0)
    info = probe(quickstart.video)
    assert (info.frames, info.width, info.height) == (FRAMES, WIDTH, HEIGHT)
    assert info.seconds == pytest.approx(FRAMES / 16, abs=1e-3)  # MP4 counts a movie's length in milliseconds


def test_core_vae_decode_gives_the_pictures_of_the_video(quickstart: Quickstart):
    pictures = coarse(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in quickstart.pictures]))
    frames = coarse(read_video(quickstart.video)[0])
    assert pictures.shape == frames.shape
    assert np.abs(pictures - frames).mean(axis=(1, 2, 3)).max() < 6
    # What changes from frame to frame changes in both at the same time, so nothing is shifted.
    changes, shown = np.diff(pictures, axis=0), np.diff(frames, axis=0)
    together = np.corrcoef(changes.ravel(), shown.ravel())[0, 1]
    shifted = [
        np.corrcoef(changes[a:b].ravel(), shown[c:d].ravel())[0, 1]
        for a, b, c, d in ((1, None, 0, -1), (0, -1, 1, None))
    ]
    assert together > max(shifted) + 0.2


def coarse(frames: np.ndarray) -> np.ndarray:
    """Means over 4x4 pixels, uint8 [F, H, W, 3] -> [F, H/4, W/4, 3]: H.264 keeps those even of noisy pictures."""
    return reduce(frames.astype(np.float64), "f (h 4) (w 4) c -> f h w c", "mean")


def test_the_inspector_shows_its_report_and_its_picture(quickstart: Quickstart, client: Client):
    first, second = [id for id, node in quickstart.prompt.nodes.items() if node["class_type"] == INSPECTOR]
    shown = quickstart.result.outputs[first]
    [text] = shown["text"]
    assert text.startswith(f"PackForcing cache: {BLOCKS} blocks, {FRAMES} frames, 4.8 s at 16 fps")
    assert f"{WIDTH}x{HEIGHT}" in text
    assert text.endswith("saved in the output folder: cache/run_00001.json\n")
    [file] = shown["files"]
    assert file == {"filename": "run_00001.json", "subfolder": "cache", "type": "output"}
    numbers = json.loads(client.download(file))
    assert (numbers["format"], numbers["version"]) == ("packforcing-cache-record", 2)
    assert numbers["summary"]["frames"] == FRAMES
    assert numbers["prompts"][0]["prompt"] in STORY
    again = quickstart.result.outputs[second]  # from the record that the first one passes on
    assert again["text"] == [text.partition("\nsaved")[0]]
    for output, width in ((shown, 800), (again, 1600)):
        [picture] = output["images"]
        with Image.open(io.BytesIO(client.download(picture))) as image:
            assert image.width == width
            assert image.height > 400
            assert len(image.getcolors(1 << 20)) > 10


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(server: Server) -> Tensor:
    """The demo models' latents, to compare with: [1, 16, 6, 8, 8]."""
    with server.client() as client:
        latents = tiny_latents(server, client)
    assert latents.shape == (1, 16, TINY_BLOCKS, 8, 8)
    assert latents.isfinite().all()
    assert latents.std() > 0.1
    return latents


@pytest.fixture(scope="module")
def bare(server: Server) -> Tensor:
    """The same without mid blocks and VAE, for what has nothing to do with them."""
    with server.client() as client:
        return bare_latents(server, client)


def test_the_same_prompt_gives_the_same_bits(server: Server, client: Client, tiny: Tensor):
    forget(server, client)
    assert torch.equal(tiny_latents(server, client), tiny)


def test_decoding_beside_the_next_block_gives_the_same_bits(server: Server, client: Client, tiny: Tensor):
    assert torch.equal(tiny_latents(server, client, overlap="on"), tiny)


def test_another_seed_or_prompt_gives_another_video(server: Server, client: Client, bare: Tensor):
    assert not torch.equal(bare_latents(server, client, seed=2), bare)
    prompt = Prompt()
    text = prompt.text(prompt.demo()[1], "a blue square")
    assert not torch.equal(bare_latents(server, client, prompt, positive=text), bare)


def test_a_longer_video_starts_with_the_shorter_one(server: Server, client: Client, tiny: Tensor):
    longer = tiny_latents(server, client, seconds=2.5)
    assert longer.shape[2] == 10
    assert torch.equal(longer[:, :, :TINY_BLOCKS], tiny)


@pytest.mark.parametrize("blocks", [2, 5])  # before any mid block, and after one was dropped from the selection
def test_a_video_goes_on_from_its_saved_latent(server: Server, client: Client, tiny: Tensor, blocks: int):
    prompt = Prompt()
    sampler = prompt.sampler(seconds=blocks / 4)
    saved = prompt.save_latent(sampler[0])
    [shown] = client.run(prompt.nodes).raise_for_status().outputs[saved.id]["latents"]
    name = shutil.copy(output_file(server, shown), server.base_dir / "input" / f"start-{blocks}.latent").name

    prompt = Prompt()
    continued = make_latents(
        server, client, prompt, prompt.sampler(continue_from=prompt.add("LoadLatent", latent=name)[0])
    )
    # ComfyUI's latent format scales and shifts the numbers (up to 12), so all but the last bits of float32 survive, and
    # blocks that are made from them differ by a few times as much.
    torch.testing.assert_close(continued, tiny, rtol=0, atol=4e-5)


# --- Cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_interrupt_stops_within_a_step_and_keeps_what_is_finished(server: Server, client: Client, overlap: str):
    # Blocks and steps large enough that a step takes longer than a request.
    cache = {"block_frames": 4, "sink_frames": 4, "recent_frames": 4, "top_k": 0}
    settings = {"width": 128, "height": 128, "steps": 12, "overlap": overlap}
    rescued = server.base_dir / "output" / "packforcing_interrupted"
    before = set(rescued.glob("*"))
    asked: list[int] = []  # the progress at which the user pressed Cancel
    seen: list[int] = []

    def cancel_in_the_second_block(event: Event | Preview) -> None:
        if isinstance(event, Event) and event.type == "progress":
            seen.append(event.data["value"])
            if not asked and event.data["value"] >= 13 + 4:
                client.interrupt()
                asked.append(event.data["value"])

    prompt = Prompt()
    sampler = prompt.sampler(cache, seconds=3600, **settings)
    saved, video = prompt.save_latent(sampler[0]), prompt.save_video(sampler[1])
    result = client.run(prompt.nodes, on_event=cancel_in_the_second_block)
    assert result.status == "interrupted"
    assert seen[-1] <= asked[0] + 3  # one step, and what was already on the way
    assert saved.id not in result.outputs
    assert video.id not in result.outputs

    latent, mp4 = sorted(set(rescued.glob("*")) - before)
    assert (latent.suffix, mp4.suffix) == (".latent", ".mp4")
    assert read_video(mp4)[0].shape == (13, 128, 128, 3)
    kept = load_file(latent)["latent_tensor"]
    [*_, told] = [line for line in server.log.splitlines() if "its finished part is kept: " in line]
    assert latent.name in told
    assert mp4.name in told
    state = load_state(server.base_dir / "output" / "packforcing_states" / f"interrupted {latent.stem}.safetensors")
    assert state.blocks == 1

    again = tiny_latents(server, client, cache, seconds=1, **settings)  # the next prompt works
    assert torch.equal(kept, again)
    # A core node reads the file.
    name = shutil.copy(latent, server.base_dir / "input" / "rescued.latent").name
    prompt = Prompt()
    saved = prompt.save_latent(prompt.add("LoadLatent", latent=name)[0])
    assert torch.equal(saved_latent(server, client.run(prompt.nodes), saved), kept)


# --- models from everywhere ------------------------------------------------------------------------------------------


def test_a_core_lora_loader_changes_the_result_and_leaves_the_base_alone(server: Server, client: Client, bare: Tensor):
    generator = torch.Generator().manual_seed(0)
    lora: dict[str, Tensor] = {}
    for layer, part in ((0, "self_attn.q"), (3, "cross_attn.v")):
        lora[f"diffusion_model.blocks.{layer}.{part}.lora_A.weight"] = torch.randn(4, 256, generator=generator)
        lora[f"diffusion_model.blocks.{layer}.{part}.lora_B.weight"] = torch.randn(256, 4, generator=generator)
    name = write_model(server, "loras", "tiny-lora.safetensors", lora)

    def with_lora(strength: float) -> Tensor:
        prompt = Prompt()
        demo = prompt.demo()
        patched = prompt.add("LoraLoaderModelOnly", model=demo[0], lora_name=name, strength_model=strength)
        return bare_latents(server, client, prompt, model=patched[0])

    assert torch.equal(bare_latents(server, client, seconds=1.49), bare)  # the model is loaded now
    changed = with_lora(1.0)
    assert not torch.allclose(changed, bare, atol=1e-2)
    assert changed.isfinite().all()
    assert not torch.allclose(with_lora(0.5), changed, atol=1e-2)
    assert torch.equal(bare_latents(server, client), bare)
    assert "lora key not loaded" not in server.log


def test_a_model_from_the_core_loader_gives_the_same_bits(server: Server, client: Client, bare: Tensor):
    name = write_model(server, "diffusion_models", "tiny.safetensors", demo_transformer())
    prompt = Prompt()
    model = prompt.add("UNETLoader", unet_name=name, weight_dtype="default")[0]
    assert torch.equal(bare_latents(server, client, prompt, model=model), bare)
    prompt = Prompt()
    assert torch.equal(bare_latents(server, client, prompt, model=prompt.model(name)), bare)


def test_a_training_checkpoint_holds_two_weight_sets(server: Server, client: Client, bare: Tensor):
    raw = demo_transformer()
    ema = {f"model._fsdp_wrapped_module.{wrapped(name)}": 0.9 * tensor for name, tensor in raw.items()}
    raw = {f"model.{name}": tensor for name, tensor in raw.items()}
    name = write_model(server, "diffusion_models", "self_forcing.pt", {"generator": raw, "generator_ema": ema})

    def chosen(weights: str) -> Tensor:
        prompt = Prompt()
        return bare_latents(server, client, prompt, model=prompt.model(name, weights))

    assert torch.equal(chosen("raw"), bare)
    averaged = chosen("ema")
    assert not torch.allclose(averaged, bare, atol=1e-2)
    assert torch.equal(chosen("auto"), averaged)


def wrapped(name: str) -> str:
    """A tensor's name as FSDP leaves it: every layer is wrapped on its own."""
    block, _, rest = name.partition(".")[2].partition(".")
    return f"blocks.{block}._fsdp_wrapped_module.{rest}" if name.startswith("blocks.") else name


@pytest.mark.parametrize(("dtype", "loses"), [("bf16", False), ("fp8_e4m3fn", True)])
def test_smaller_types_run_and_come_close(server: Server, client: Client, bare: Tensor, dtype: str, loses: bool):
    name = write_model(server, "diffusion_models", "tiny.safetensors", demo_transformer())
    prompt = Prompt()
    latents = bare_latents(server, client, prompt, model=prompt.model(name, dtype=dtype))
    first, expected = latents[:, :, 0], bare[:, :, 0]  # later blocks drift apart
    assert latents.isfinite().all()
    assert torch.equal(first, expected) != loses  # the demo's weights are bfloat16 numbers
    assert torch.corrcoef(torch.stack((first.flatten(), expected.flatten())))[0, 1] > 0.9


def write_compressor(server: Server, name: str, branch: HRBranch, model_dim: int = 256) -> str:
    """A compressor file for blocks of one latent frame."""
    path = server.base_dir / "models" / "packforcing" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = CompressorMetadata(
        model_dim=model_dim, temporal_stride=1, hidden_channels=(8, 8, 8, 8), block_frames=1, base_model="tiny"
    )
    save_compressor(path, {f"hr.{key}": tensor for key, tensor in branch.state_dict().items()}, metadata)
    return name


def test_a_dual_branch_compressor_matters_only_once_mid_blocks_are_attended(
    server: Server, client: Client, tiny: Tensor
):
    branch = HRBranch((16, 8, 8, 8, 8, 256), temporal_stride=1)

    def compressed(name: str) -> Tensor:
        write_compressor(server, name, branch)
        prompt = Prompt()
        return make_latents(server, client, prompt, prompt.sampler(compressor=prompt.compressor(name)))

    assert torch.equal(compressed("fresh.safetensors"), tiny)  # its last layer is zero
    torch.nn.init.normal_(branch[-1].weight)
    torch.nn.init.normal_(branch[-1].bias)
    trained = compressed("trained.safetensors")
    assert torch.equal(trained[:, :, :FIRST_BLOCK_WITH_MID], tiny[:, :, :FIRST_BLOCK_WITH_MID])
    for block in range(FIRST_BLOCK_WITH_MID, TINY_BLOCKS):
        assert not torch.equal(trained[:, :, block], tiny[:, :, block])


# --- the other inputs of the sampler ---------------------------------------------------------------------------------


def test_an_empty_latent_sets_size_and_length(server: Server, client: Client):
    prompt = Prompt()
    size = {"width": 96, "height": 64, "length": 4 * 4 - 3, "batch_size": 1}
    empty = prompt.add("EmptyHunyuanLatentVideo", **size)[0]
    latents = bare_latents(server, client, prompt, latent=empty)
    assert latents.shape == (1, 16, 4, 8, 12)
    assert torch.equal(latents, bare_latents(server, client, width=96, height=64, seconds=1))


def test_without_mid_blocks_neither_compressor_nor_vae_is_needed(tiny: Tensor, bare: Tensor):
    assert torch.equal(bare[:, :, :FIRST_BLOCK_WITH_MID], tiny[:, :, :FIRST_BLOCK_WITH_MID])
    assert not torch.equal(bare[:, :, FIRST_BLOCK_WITH_MID], tiny[:, :, FIRST_BLOCK_WITH_MID])


def test_a_node_that_wants_the_video_is_told_that_there_is_none(server: Server, client: Client):
    prompt = Prompt()
    sampler = prompt.sampler({"top_k": 0}, compressor=None, vae=None, seconds=0.5)
    saved, video = prompt.save_latent(sampler[0]), prompt.save_video(sampler[1])
    inspector = prompt.add("PackForcingCacheInspector", record=sampler[2])
    result = client.run(prompt.nodes)
    [told] = result.of_type("execution_error")
    assert told.data["node_id"] == video.id
    assert "The sampler has no VAE and so no video: connect the Wan 2.1 VAE to it." in told.data["exception_message"]
    assert result.outputs[saved.id]["latents"]  # what can be had is there
    assert "compressor" in result.outputs[inspector.id]["text"][0]


def test_latents_alone_have_previews_in_the_videos_colours(server: Server, client: Client):
    """Nothing is decoded: the pictures are estimated, and stand beside what the VAE would have made."""
    prompt = Prompt()
    sampler = prompt.sampler({"top_k": 0}, compressor=None, vae=None, seconds=0.8, seed=5)
    saved, inspector = prompt.save_latent(sampler[0]), prompt.add("PackForcingCacheInspector", record=sampler[2])
    result = client.run(prompt.nodes).raise_for_status()
    report = result.outputs[inspector.id]["text"][0]
    assert re.search(r"^ *preview ", report, re.MULTILINE)
    assert not re.search(r"^ *decode ", report, re.MULTILINE)
    shown = []
    for preview in result.previews:
        with Image.open(io.BytesIO(preview.image)) as picture:
            for frame in range(picture.n_frames):
                picture.seek(frame)
                shown.append(np.asarray(picture.convert("RGB")))
    latents = normalise(saved_latent(server, result, saved))
    assert np.stack(shown).shape == (latents.shape[2], *latents.shape[3:], 3)
    frames = StreamingDecoder(load_vae(demo_vae(), torch.float32)).decode(latents)
    decoded = to_uint8(mean_colours(frames)[0]).numpy()
    assert np.abs(np.stack(shown)[1:].astype(float) - decoded).mean() < 25  # WEBP's own losses included


def test_other_frame_rates_and_updates(server: Server, client: Client, tiny: Tensor):
    prompt = Prompt()
    sampler = prompt.sampler(fps=24.0, seconds=0.5, update="euler", steps=3)  # 12 frames: three blocks
    saved, video = prompt.save_latent(sampler[0]), prompt.save_video(sampler[1])
    result = client.run(prompt.nodes).raise_for_status()
    assert saved_latent(server, result, saved).shape[2] == 3
    [shown] = result.outputs[video.id]["images"]
    info = probe(output_file(server, shown))
    assert (info.frames, info.fps) == (9, 24.0)
