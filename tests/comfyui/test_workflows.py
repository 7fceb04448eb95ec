"""The workflows for large models, run in the real server with the demo models in the place of the large files."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from comfyui import REPO, Client, Result, Server, workflow_to_prompt
from graphs import output_file
from PIL import Image

from packforcing.files.video import VideoWriter, read_video

LARGE = sorted(
    path.stem for path in (REPO / "workflows").glob("*.json") if "PackForcingDemoModels" not in path.read_text()
)
DEMO = "1000"  # the id of the demo models' node
# What a loader is replaced by, and a size at which a run takes a moment.
LOADERS = {"PackForcingModelLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
SMALL = {
    "PackForcingSampler": {"width": 64, "height": 64, "seconds": 1.5, "steps": 1, "seed": 1},
    "LoadVideo": {"file": "clip.mp4"},
    "LoadImage": {"image": "picture.png"},
}
CLIP_FRAMES = 9  # three latent frames: a block


def with_demo_models(prompt: dict[str, dict]) -> dict[str, dict]:
    """The prompt with the demo models in the place of its loaders, and small."""
    outputs = {id: LOADERS[node["class_type"]] for id, node in prompt.items() if node["class_type"] in LOADERS}
    kept = {id: node for id, node in prompt.items() if id not in outputs}
    for node in kept.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in outputs:
                node["inputs"][name] = [DEMO, outputs[value[0]]]
    return {DEMO: {"class_type": "PackForcingDemoModels", "inputs": {}}, **kept}


@pytest.fixture(scope="module", autouse=True)
def given_files(server: Server) -> None:
    """What the workflows load, at 96x64: a clip that brightens, and a bright picture."""
    with VideoWriter(server.base_dir / "input" / "clip.mp4", 16.0, 96, 64) as writer:
        writer.write(torch.linspace(-1, 1, CLIP_FRAMES).view(1, 1, -1, 1, 1).expand(1, 3, -1, 64, 96))
    Image.new("RGB", (96, 64), "white").save(server.base_dir / "input" / "picture.png")


def run_small(server: Server, client: Client, name: str) -> tuple[dict, Result, Path]:
    """A workflow's prompt with the demo models, its run, and the video that Save Video wrote."""
    workflow = json.loads((REPO / "workflows" / f"{name}.json").read_text())
    prompt = with_demo_models(workflow_to_prompt(workflow, client.object_info()))
    result = client.run(prompt).raise_for_status()
    [saved] = [id for id, node in prompt.items() if node["class_type"] == "SaveVideo"]
    [shown] = result.outputs[saved]["images"]
    return prompt, result, output_file(server, shown)


@pytest.mark.parametrize("name", LARGE)
def test_a_workflow_for_a_large_model_runs(server: Server, client: Client, name: str):
    prompt, result, file = run_small(server, client, name)
    with av.open(str(file)) as video:
        [stream] = video.streams.video
        assert (stream.width, stream.height, stream.frames) == (64, 64, 21)  # two blocks of three latent frames
        written = json.loads(video.metadata["prompt"])  # by core Save Video, over the sampler's own file
    for node in written.values():
        node.pop("is_changed", None)  # what ComfyUI notes on nodes that load files
    assert written == prompt
    [report] = [output["text"] for output in result.outputs.values() if "text" in output]
    assert report[0].startswith("PackForcing cache: 2 blocks, 21 frames")


def greys(file: Path) -> list[float]:
    """The mean brightness of each frame of a video."""
    return [float(frame.mean()) for frame in read_video(file)[0]]


def test_a_video_that_goes_on_begins_with_its_clip(server: Server, client: Client):
    made = greys(run_small(server, client, "extend-a-video")[2])
    # The clip is dark to bright; the demo VAE keeps that.
    assert made[0] < 60
    assert made[CLIP_FRAMES - 1] > made[0] + 60


def test_a_video_from_a_picture_begins_with_it(server: Server, client: Client):
    assert greys(run_small(server, client, "picture-to-video")[2])[0] > 200
