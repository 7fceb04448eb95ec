"""API prompts of the pack's nodes, in the smallest sizes that still use every partition.

The tiny video takes about a second: blocks of one latent frame at 64x64, the last three of which attend mid blocks.
What a test changes it gives by keyword. From any test: `from graphs import ...`.
"""

from __future__ import annotations

import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfyui import Client, Result, Server
from safetensors.torch import load_file, save_file
from torch import Tensor

from packforcing.files.video import read_video

TRAINING_FREE = "training-free (LR branch)"

# The node's defaults; a prompt must name every required input.
CACHE_DEFAULTS = {
    "block_frames": 4,
    "sink_frames": 8,
    "recent_frames": 4,
    "top_k": 16,
    "selection": "affinity",
    "query_fraction": 0.25,
    "head_fraction": 0.5,
    "position_range": 0,
    "archive_device": "auto",
    "archive_budget_gb": 1.0,
}
TINY_CACHE = {"block_frames": 1, "sink_frames": 1, "recent_frames": 1, "top_k": 2}
TINY_SAMPLER = {
    "seed": 1,
    "width": 64,
    "height": 64,
    "seconds": 1.5,  # 6 blocks of one latent frame
    "fps": 16.0,
    "steps": 2,
    "shift": 5.0,
    "update": "few-step",
}
TINY_BLOCKS = 6


@dataclass(frozen=True)
class Node:
    """A node of a prompt; `node[1]` is its second output, as other nodes' inputs name it."""

    id: str

    def __getitem__(self, slot: int) -> list:
        return [self.id, slot]


@dataclass
class Prompt:
    """An API prompt in the making."""

    nodes: dict[str, dict] = field(default_factory=dict)

    def add(self, class_type: str, **inputs: Any) -> Node:
        """A further node. Inputs that are None are left out."""
        node = Node(str(max(map(int, self.nodes), default=0) + 1))
        given = {name: value for name, value in inputs.items() if value is not None}
        self.nodes[node.id] = {"class_type": class_type, "inputs": given}
        return node

    def demo(self) -> Node:
        return self.add("PackForcingDemoModels")

    def text(self, clip: list, prompt: str = "a red circle") -> list:
        return self.add("CLIPTextEncode", clip=clip, text=prompt)[0]

    def cache(self, **changes: Any) -> list:
        return self.add("PackForcingCacheConfig", **(CACHE_DEFAULTS | TINY_CACHE | changes))[0]

    def compressor(self, name: str = TRAINING_FREE) -> list:
        return self.add("PackForcingCompressorLoader", compressor_name=name)[0]

    def model(self, name: str, weights: str = "auto", dtype: str = "default") -> list:
        return self.add("PackForcingModelLoader", model_name=name, weights=weights, dtype=dtype)[0]

    def sampler(self, cache: dict[str, Any] | None = None, **inputs: Any) -> Node:
        """The sampler with the demo models; `cache` changes the cache config, an input that is None is left open."""
        demo = self.demo()
        connected = {
            "model": demo[0],
            "positive": self.text(demo[1]),
            "cache_config": self.cache(**(cache or {})),
            "compressor": self.compressor(),
            "vae": demo[2],
        }
        return self.add("PackForcingSampler", **(connected | TINY_SAMPLER | inputs))

    def sampler_beside(self, other: Node, **changes: Any) -> Node:
        """One more sampler, over the very nodes that another one takes its models and its prompt from."""
        return self.add("PackForcingSampler", **(self.nodes[other.id]["inputs"] | changes))

    def save_latent(self, samples: list) -> Node:
        return self.add("SaveLatent", samples=samples, filename_prefix="latents/test")

    def save_video(self, video: list) -> Node:
        return self.add("SaveVideo", video=video, filename_prefix="video/test", format="auto", codec="auto")


def fetch(client: Client, path: str) -> bytes:
    """What the server answers to a GET of `path`, which may hold blanks and the like."""
    with urllib.request.urlopen(client.url + urllib.parse.quote(path), timeout=60) as answer:
        return answer.read()


def output_file(server: Server, shown: dict) -> Path:
    """Where the server put a file that an output names."""
    return server.base_dir / shown["type"] / shown["subfolder"] / shown["filename"]


def saved_latent(server: Server, result: Result, node: Node) -> Tensor:
    """The samples that a Save Latent node wrote in a run."""
    [shown] = result.raise_for_status().outputs[node.id]["latents"]
    return load_file(output_file(server, shown))["latent_tensor"]


def saved_frames(server: Server, result: Result, node: str) -> np.ndarray:
    """The frames [F, H, W, 3] of the video that a Save Video node, by its id, wrote in a run."""
    [shown] = result.outputs[node]["images"]
    return read_video(output_file(server, shown))[0]


def executed(result: Result, node: Node) -> bool:
    """Whether the node itself ran, and was not answered from the server's cache."""
    return any(event.data.get("node") == node.id for event in result.of_type("executing"))


def make_latents(server: Server, client: Client, prompt: Prompt, sampler: Node) -> Tensor:
    """Run the sampler and return its LATENT [1, 16, T, h, w]; fails when it came from the server's cache."""
    saved = prompt.save_latent(sampler[0])
    result = client.run(prompt.nodes)
    latents = saved_latent(server, result, saved)
    assert executed(result, sampler)
    return latents


def tiny_latents(server: Server, client: Client, cache: dict[str, Any] | None = None, **inputs: Any) -> Tensor:
    """The LATENT of the demo models' video."""
    prompt = Prompt()
    return make_latents(server, client, prompt, prompt.sampler(cache, **inputs))


def bare_latents(server: Server, client: Client, prompt: Prompt | None = None, **inputs: Any) -> Tensor:
    """The LATENT of a video without mid blocks and without VAE, which takes a moment; `inputs` are the sampler's."""
    prompt = prompt or Prompt()
    sampler = prompt.sampler({"top_k": 0}, **({"compressor": None, "vae": None} | inputs))
    return make_latents(server, client, prompt, sampler)


def forget(server: Server, client: Client) -> None:
    """Make the server forget all results and unload all models, so that the next prompt runs from nothing."""
    client.free()
    # Done between prompts, but a prompt that comes at once may overtake it: so one that leaves nothing to remember.
    prompt = Prompt()
    prompt.add("PreviewImage", images=prompt.add("EmptyImage", width=8, height=8, batch_size=1, color=0)[0])
    client.run(prompt.nodes).raise_for_status()


def write_model(server: Server, folder: str, name: str, tensors: dict[str, Tensor]) -> str:
    """A weights file in one of the server's model folders; returns its name as a loader lists it.

    `.pt` holds what it is given; `.safetensors` a flat state dict.
    """
    path = server.base_dir / "models" / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return name


def save_input_latent(server: Server, name: str, samples: Tensor) -> None:
    """A file for the core node Load Latent, as Save Latent writes it."""
    tensors = {"latent_tensor": samples.contiguous(), "latent_format_version_0": torch.tensor([])}
    save_file(tensors, server.base_dir / "input" / name)
