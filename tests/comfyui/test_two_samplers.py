"""Two samplers in one graph, over the same models: nothing of the one gets into the other."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui import Client, Event, Preview, Result, Server
from graphs import Node, Prompt, executed, forget, saved_frames, saved_latent
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from packforcing.files.state_file import load_state

FIRST = {"seed": 41, "width": 64, "height": 64, "seconds": 1.5}  # 6 blocks
SECOND = {"seed": 42, "width": 96, "height": 64, "seconds": 2.0}  # 8 blocks
BLOCKS = (6, 8)


class Pair:
    """A graph of both samplers; each has its latents saved, and its video."""

    def __init__(self) -> None:
        self.prompt = Prompt()
        first = self.prompt.sampler(**FIRST)
        self.samplers = (first, self.prompt.sampler_beside(first, **self.second(first)))
        self.latents = [self.prompt.save_latent(sampler[0]) for sampler in self.samplers]
        self.videos = [self.prompt.save_video(sampler[1]) for sampler in self.samplers]

    def second(self, first: Node) -> dict[str, Any]:
        """The inputs in which the second sampler differs."""
        return SECOND


class Row(Pair):
    """The second takes its size from the first's pictures: of samplers that do not wait, ComfyUI runs either first."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__()

    def second(self, first: Node) -> dict[str, Any]:
        size = self.prompt.add("GetImageSize", image=first[4])
        return {"seed": SECOND["seed"], "width": size[0], "height": size[1], "seconds": self.seconds}


@dataclass(frozen=True)
class Made:
    """What a sampler made."""

    latent: Tensor
    frames: np.ndarray


def made(server: Server, result: Result, latent: Node, video: Node) -> Made:
    return Made(saved_latent(server, result, latent), saved_frames(server, result, video.id))


def alone(server: Server, client: Client, **inputs: float) -> Made:
    """By a sampler that has its graph for itself, after everything was unloaded."""
    forget(server, client)
    prompt = Prompt()
    sampler = prompt.sampler(**inputs)
    latent, video = prompt.save_latent(sampler[0]), prompt.save_video(sampler[1])
    result = client.run(prompt.nodes).raise_for_status()
    assert executed(result, sampler)
    return made(server, result, latent, video)


def files_of_runs(server: Server) -> set[Path]:
    """What lies in the folders in which a run keeps its video and its state while it goes on."""
    return {file for name in ("interrupted", "states") for file in (server.base_dir / "output").glob(f"*_{name}/*")}


@pytest.fixture(scope="module")
def both(server: Server) -> tuple[Made, Made]:
    """What each makes alone."""
    with server.client() as client:
        return alone(server, client, **FIRST), alone(server, client, **SECOND)


def same(one: Made, other: Made) -> bool:
    return torch.equal(one.latent, other.latent) and np.array_equal(one.frames, other.frames)


def test_each_makes_the_video_that_it_makes_alone(server: Server, client: Client, both: tuple[Made, Made]):
    """And tells of itself alone: progress, previews, its line of text. Files of only one run are there at a time."""
    forget(server, client)
    before, pair, most = files_of_runs(server), Pair(), 0
    run = re.compile(r"\d{8}-\d{6}-\w{4}")  # in the names of its files

    def count(_: Event | Preview) -> None:
        nonlocal most
        runs = {run.search(file.name)[0] for file in files_of_runs(server) - before}
        most = max(most, len(runs))

    result = client.run(pair.prompt.nodes, on_event=count).raise_for_status()
    for index, sampler in enumerate(pair.samplers):
        assert executed(result, sampler)
        assert same(made(server, result, pair.latents[index], pair.videos[index]), both[index])
        check_told(result, sampler, BLOCKS[index], both[index].latent)
    assert most == 1
    assert files_of_runs(server) == before


def check_told(result: Result, sampler: Node, blocks: int, latent: Tensor) -> None:
    """A sampler's progress, previews and text are of its own video."""
    progress = [event.data for event in result.of_type("progress") if event.data["node"] == sampler.id]
    passes = blocks * 3 - 1  # two steps and a clean pass, which the last block does without
    values = [event["value"] for event in progress]
    assert {event["max"] for event in progress} == {passes}
    assert values == sorted(values)
    assert set(values) == set(range(passes + 1))
    previews = [preview.image for preview in result.previews if preview.metadata["node_id"] == sampler.id]
    sizes = [Image.open(io.BytesIO(image)).size for image in previews]
    assert sizes == blocks * [(latent.shape[-1] * 8, latent.shape[-2] * 8)]
    told = [event.data["text"] for event in result.of_type("progress_text") if event.data["node"] == sampler.id]
    lines = [text.partition(",")[0] for text in told if text]  # an empty one takes away what an earlier run said
    assert lines == [f"block {n + 1} of {blocks}" for n in range(blocks)]


def test_cancel_in_the_second_leaves_the_first_whole(server: Server, client: Client, both: tuple[Made, Made]):
    """What is kept is of the second alone. The graph again, shorter: the first is not made anew."""
    wanted = alone(server, client, seed=SECOND["seed"], seconds=SECOND["seconds"])
    forget(server, client)
    before, row = files_of_runs(server), Row(seconds=600)

    def cancel(event: Event | Preview) -> None:
        told = event.data if isinstance(event, Event) and event.type == "progress" else {}
        if told.get("node") == row.samplers[1].id and told["value"] >= 5 * 3:
            client.interrupt()

    result = client.run(row.prompt.nodes, on_event=cancel)
    assert result.status == "interrupted"
    assert np.array_equal(saved_frames(server, result, row.videos[0].id), both[0].frames)
    assert row.videos[1].id not in result.outputs
    latent, video, state = sorted(files_of_runs(server) - before)
    assert (latent.name, video.name) == (f"{latent.stem}.latent", f"{latent.stem}.mp4")
    assert state.name == f"interrupted {latent.stem}.safetensors"
    kept = load_file(latent)["latent_tensor"]
    assert load_state(state).blocks == kept.shape[2] >= 5
    shared = min(kept.shape[2], wanted.latent.shape[2])
    assert torch.equal(kept[:, :, :shared], wanted.latent[:, :, :shared])

    row = Row(seconds=SECOND["seconds"])
    again = client.run(row.prompt.nodes).raise_for_status()
    assert not executed(again, row.samplers[0])
    assert same(made(server, again, row.latents[1], row.videos[1]), wanted)
