"""The workflows for large models, run in the real server with the demo models in the place of the large files."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from comfyui import REPO, Client, Server, workflow_to_prompt
from graphs import output_file

from packforcing.files.video import VideoWriter

LARGE = sorted(
    path.stem for path in (REPO / "workflows").glob("*.json") if "PackForcingDemoModels" not in path.read_text()
)
DEMO = "1000"  # the id of the demo models' node
# What a loader is replaced by, and a size at which a run takes a moment.
LOADERS = {"PackForcingModelLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
SMALL = {
    "PackForcingSampler": {"width": 64, "height": 64, "seconds": 1.5, "steps": 1, "seed": 1},
    "ImageScale": {"width": 64, "height": 64},
    "ImageFromBatch": {"length": 9},
    "LoadVideo": {"file": "clip.mp4"},
}
CLIP_FRAMES = 12


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


def write_clip(path: Path) -> None:
    """A clip of 96x64 that brightens."""
    with VideoWriter(path, 16.0, 96, 64) as writer:
        writer.write(torch.linspace(-1, 1, CLIP_FRAMES).view(1, 1, -1, 1, 1).expand(1, 3, -1, 64, 96))


@pytest.mark.parametrize("name", LARGE)
def test_a_workflow_for_a_large_model_runs(server: Server, client: Client, name: str):
    write_clip(server.base_dir / "input" / "clip.mp4")
    workflow = json.loads((REPO / "workflows" / f"{name}.json").read_text())
    prompt = with_demo_models(workflow_to_prompt(workflow, client.object_info()))
    result = client.run(prompt).raise_for_status()
    [shown] = [output["images"][0] for output in result.outputs.values() if output.get("animated")]
    with av.open(str(output_file(server, shown))) as video:
        [stream] = video.streams.video
        assert (stream.width, stream.height, stream.frames) == (64, 64, 21)  # two blocks of three latent frames
        assert json.loads(video.metadata["prompt"]) == prompt  # by core Save Video, over the sampler's own file
    [report] = [output["text"] for output in result.outputs.values() if "text" in output]
    assert report[0].startswith("PackForcing cache: 2 blocks, 21 frames")


def test_a_video_that_goes_on_begins_with_its_clip(server: Server, client: Client):
    write_clip(server.base_dir / "input" / "clip.mp4")
    workflow = json.loads((REPO / "workflows" / "extend-a-video.json").read_text())
    prompt = with_demo_models(workflow_to_prompt(workflow, client.object_info()))
    result = client.run(prompt).raise_for_status()
    [shown] = [output["images"][0] for output in result.outputs.values() if output.get("animated")]
    with av.open(str(output_file(server, shown))) as video:
        greys = [float(frame.to_ndarray(format="gray").mean()) for frame in video.decode(video=0)]
    # The clip's first nine frames are dark to bright; the demo VAE keeps that.
    assert greys[0] < 60
    assert greys[8] > greys[0] + 60
