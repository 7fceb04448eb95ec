"""The command `train`, with a part of its own for each trainer. What they do lies in the room `training`."""

from __future__ import annotations

from ..training import base_command, compressor, forcing, preview, vae
from .options import Commands


def add_command(commands: Commands) -> None:
    """Adds `train` and its options."""
    parts = commands.add_parser("train", help="train a part of the demo model").add_subparsers(
        dest="part", required=True
    )
    vae.add_arguments(parts.add_parser("vae", help="the demo's VAE, on a synthetic video world"))
    base_command.add_arguments(parts.add_parser("base", help="the demo's generator, by causal flow matching"))
    compressor.add_arguments(parts.add_parser("compressor", help="the HR branch, for a frozen generator"))
    forcing.add_arguments(parts.add_parser("forcing", help="generator and HR branch together, by DMD"))
    preview.add_arguments(parts.add_parser("preview", help="the map from latents to a preview's colours"))
