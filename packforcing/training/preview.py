"""`train preview`: fits the map by which previews estimate a block's colours from its latents (`model.latent_preview`).

Clips of the synthetic world, encoded by the demo's VAE, and 643 numbers: it takes seconds once the clips are encoded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..demo.models import demo_vae
from ..files.weights import read_state_dict
from ..files.writing import check_output_file
from ..model.latent_preview import as_tensors, fitted, levels_off
from ..model.vae import encode_clip, load_vae
from ..world.drawing import render
from ..world.scenes import FRAME, sample_scene
from .vae import held_out_clips

CLIP_FRAMES = 17
HELD_OUT = 6  # clips


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--vae", help="a Wan 2.1 VAE's file; default: the demo's")
    command.add_argument("--clips", type=int, default=48, help="scenes to fit to")
    command.add_argument("--hidden", type=int, default=32, help="width of the hidden layer")
    command.add_argument("--steps", type=int, default=3000)
    command.add_argument("--output", required=True, help="the safetensors file to write")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Fits, measures on held-out clips, and writes the file. Raises PackForcingError for files that cannot be."""
    check_output_file(options.output, "map")
    state = read_state_dict(options.vae)[0] if options.vae else demo_vae()
    vae = load_vae(state, torch.float32)
    clips = [render(sample_scene(seed), CLIP_FRAMES, size=FRAME).unsqueeze(0) for seed in range(options.clips)]
    preview = fitted([encode_clip(vae, clip) for clip in clips], clips, options.hidden, options.steps)
    held_out = held_out_clips(HELD_OUT, CLIP_FRAMES)
    off = sum(levels_off(preview, encode_clip(vae, clip), clip) for clip in held_out) / len(held_out)
    told = {
        "format": "pt",
        "command": " ".join(["python -m packforcing", *sys.argv[1:]]),
        "torch": torch.__version__,
        "levels_off": f"{off:.2f}",
    }
    save_file(as_tensors(preview), Path(options.output), metadata=told)
    print(f"{off:.2f} of 255 levels off on held-out clips, mean; written: {options.output}")
