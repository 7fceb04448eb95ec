"""What a video starts from, in a real ComfyUI server: a state's file, a picture, a video."""

from __future__ import annotations

import shutil
from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui import Client, PromptRejected, Server
from graphs import Node, Prompt, forget, output_file, saved_frames, saved_latent, tiny_latents
from PIL import Image
from torch import Tensor

from packforcing.config import FrameSize
from packforcing.demo.models import demo_vae
from packforcing.files.video import VideoWriter, read_video
from packforcing.generate.start import fitted
from packforcing.model.vae import encode_clip, load_vae, normalise

FOUR = {"block_frames": 4, "sink_frames": 4, "recent_frames": 4}


def run_and_save(server: Server, client: Client, prompt: Prompt, sampler: Node) -> Tensor:
    """The LATENT of a sampler whose prompt has other outputs as well."""
    saved = prompt.save_latent(sampler[0])
    return saved_latent(server, client.run(prompt.nodes), saved)


@pytest.fixture(scope="module")
def state_file(server: Server) -> str:
    """The state of five blocks, as Load State lists it; the first of the name."""
    with server.client() as client:
        prompt = Prompt()
        sampler = prompt.sampler(seconds=1.25)
        node = prompt.add("PackForcingSaveState", state=sampler[3], name="my state")
        result = client.run(prompt.nodes).raise_for_status()
    [told] = result.outputs[node.id]["text"]
    assert told.startswith("my state_00001.safetensors [output]: 5 blocks, ")
    return told.partition(":")[0]


def test_a_video_goes_on_from_a_states_file_to_the_bit(server: Server, client: Client, state_file: str):
    """After everything was forgotten, as after a restart; from the output folder and from the input folder."""
    whole = tiny_latents(server, client)
    path = server.base_dir / "output" / "packforcing_states" / state_file.removesuffix(" [output]")
    there = server.base_dir / "input" / "packforcing_states"
    there.mkdir(parents=True, exist_ok=True)
    brought = shutil.copy(path, there / "brought.safetensors").name
    forget(server, client)
    for name in (state_file, brought):
        prompt = Prompt()
        state = prompt.add("PackForcingLoadState", file=name)
        sampler = prompt.sampler(state=state[0])
        assert torch.equal(run_and_save(server, client, prompt, sampler), whole)


def test_a_state_goes_on_in_the_same_graph(server: Server, client: Client):
    prompt = Prompt()
    first = prompt.sampler(seconds=1.0)
    connected = prompt.nodes[first.id]["inputs"]
    second = prompt.add("PackForcingSampler", **(connected | {"seconds": 1.5, "state": first[3]}))
    assert torch.equal(run_and_save(server, client, prompt, second), tiny_latents(server, client))


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "gone.safetensors", "gone.safetensors [output]"]
)
def test_only_listed_states_are_opened(client: Client, name: str):
    prompt = Prompt()
    prompt.save_latent(prompt.sampler(state=prompt.add("PackForcingLoadState", file=name)[0])[0])
    with pytest.raises(PromptRejected) as caught:
        client.run(prompt.nodes)
    assert f"There is no state '{name}': choose one of the list" in str(caught.value.details)


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "a\\b"])
def test_a_states_name_is_a_plain_name(client: Client, name: str):
    prompt = Prompt()
    prompt.add("PackForcingSaveState", state=prompt.sampler()[3], name=name)
    with pytest.raises(PromptRejected) as caught:
        client.run(prompt.nodes)
    assert "The state's name must be a plain name" in str(caught.value.details)


def told(client: Client, prompt: Prompt, sampler: Node) -> str:
    """The sentence with which a run is refused, before it makes a block."""
    prompt.save_latent(sampler[0])
    result = client.run(prompt.nodes)
    assert result.status == "error"
    assert not [event for event in result.of_type("progress") if event.data["max"] > 1]
    message = result.error["exception_message"].strip()
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_state_that_does_not_fit_is_told(server: Server, client: Client, state_file: str):
    for changes, cache, words in (
        ({"width": 80}, {}, "the size 64x64, but this run has 80x64"),
        ({}, {"top_k": 1}, "top_k 2, but this run has 1"),
        ({"seconds": 1.0}, {}, "The state has 5 blocks already, but the video is to have 4 in all"),
    ):
        prompt = Prompt()
        state = prompt.add("PackForcingLoadState", file=state_file)[0]
        assert words in told(client, prompt, prompt.sampler(cache, state=state, **changes))
    bad = server.base_dir / "input" / "packforcing_states" / "bad.safetensors"
    bad.parent.mkdir(parents=True, exist_ok=True)
    bad.write_bytes(b"x" * 100)
    prompt = Prompt()
    state = prompt.add("PackForcingLoadState", file="bad.safetensors")[0]
    assert "bad.safetensors is damaged" in told(client, prompt, prompt.sampler(state=state))


def test_several_starts_and_a_picture_without_a_vae_are_told(client: Client, server: Server, state_file: str):
    Image.new("RGB", (64, 64)).save(server.base_dir / "input" / "black.png")
    prompt = Prompt()
    image, state = prompt.add("LoadImage", image="black.png")[0], prompt.add("PackForcingLoadState", file=state_file)[0]
    message = told(client, prompt, prompt.sampler(state=state, start_image=image))
    assert "starts from one thing, but state and start_image are connected: leave one of them out" in message
    prompt = Prompt()
    image = prompt.add("LoadImage", image="black.png")[0]
    sampler = prompt.sampler({"top_k": 0}, start_image=image, vae=None, compressor=None)
    assert "The start_image must be encoded, but there is no VAE: connect the Wan 2.1 VAE" in told(
        client, prompt, sampler
    )


def as_normalised(latents: Tensor) -> Tensor:
    """ComfyUI's latents -> the model's."""
    return normalise(latents)


def test_a_video_begins_with_a_picture_and_gives_its_last_frames(server: Server, client: Client):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 120, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(server.base_dir / "input" / "wide.png")
    prompt = Prompt()
    image = prompt.add("LoadImage", image="wide.png")[0]
    sampler = prompt.sampler(FOUR, start_image=image, seconds=1.5)
    saved, video = prompt.save_latent(sampler[0]), prompt.save_video(sampler[1])
    frames = prompt.add("SaveImage", images=sampler[4], filename_prefix="last")
    result = client.run(prompt.nodes).raise_for_status()
    latents = saved_latent(server, result, saved)
    assert latents.shape[2] == 8
    expected = fitted(torch.from_numpy(pixels).float() / 255, FrameSize(64, 64))
    encoded = encode_clip(load_vae(demo_vae()), expected[None, :, None])
    torch.testing.assert_close(as_normalised(latents)[:, :, :1], encoded, rtol=1e-2, atol=1e-2)
    last = [output_file(server, shown) for shown in result.outputs[frames.id]["images"]]
    assert len(last) == 16
    film = saved_frames(server, result, video.id)
    assert film.shape == (29, 64, 64, 3)
    for made, path in zip(film[-16:].astype(float), last, strict=True):
        assert abs(made - np.asarray(Image.open(path).convert("RGB"), dtype=float)).mean() < 12  # H.264 of noise


def test_the_picture_of_cores_own_node_is_taken_from_the_model(pack: ModuleType):
    """ComfyUI's versions with ARVideoI2V keep it there."""
    start = import_module(f"{pack.__name__}.nodes.start")
    size = import_module(f"{pack.__name__}.packforcing.config").FrameSize(64, 64)
    inner = SimpleNamespace(process_latent_in=lambda samples: samples + 1)
    picture = torch.zeros(1, 16, 1, 8, 8)
    options = {"transformer_options": {"ar_config": {"initial_latent": picture}}}
    found = start.start_of(start.StartInputs(), SimpleNamespace(model=inner, model_options=options), size, 16.0, None)
    assert found.frames == 1
    assert torch.equal(found.latents(None), picture + 1)
    bare = SimpleNamespace(model=inner, model_options={})
    assert start.start_of(start.StartInputs(), bare, size, 16.0, None) is None


def test_a_video_goes_on_from_a_video(server: Server, client: Client):
    """21 frames are six latent frames, a block and a half of four; the same as images and as a VIDEO."""
    clip = torch.linspace(-1, 1, 21).view(1, 21, 1, 1).expand(3, 21, 64, 64)
    with VideoWriter(server.base_dir / "input" / "clip.mp4", 16.0, 64, 64) as writer:
        writer.write(clip)
    frames = torch.from_numpy(read_video(server.base_dir / "input" / "clip.mp4")[0])
    encoded = encode_clip(load_vae(demo_vae()), (frames.float() / 127.5 - 1).permute(3, 0, 1, 2)[None])
    found = []
    for as_images in (False, True):
        prompt = Prompt()
        video = prompt.add("LoadVideo", file="clip.mp4")[0]
        if as_images:
            video = prompt.add("GetVideoComponents", video=video)[0]
        sampler = prompt.sampler(FOUR, start_video=video, seconds=2.5)
        found.append(run_and_save(server, client, prompt, sampler))
        assert found[-1].shape[2] == 12
        torch.testing.assert_close(as_normalised(found[-1])[:, :, :6], encoded, rtol=2e-2, atol=2e-2)
    assert torch.equal(*found)
