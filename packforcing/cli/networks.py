"""The networks of a run on the command line: the options that name them, and reading them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..cache.head_share import WHOLE, HeadShare
from ..config import CacheConfig
from ..demo.models import demo_compressor, demo_transformer, demo_vae
from ..files.compressor_file import load_compressor
from ..files.lora import given_lora, with_loras
from ..files.weights import read_state_dict
from ..known_models import SIZES, TINY
from ..model.causal_wan import CausalWan
from ..model.compressor import TRAINING_FREE, CompressorChoice
from ..model.load import load_wan_modules, make_causal_wan
from ..model.tensor_parallel import shared_wan
from ..model.vae import WanVAE, load_vae
from ..model.wan_modules import WanModules, build_wan_modules
from ..processes import in_all

NO_COMPRESSOR_FILE = "training-free"  # the value of --compressor


def add_model_options(command: argparse.ArgumentParser) -> None:
    """The networks' files."""
    command.add_argument("--model", default=TINY, help="'tiny' (the demo models), or a causal Wan checkpoint")
    command.add_argument("--weights", default="auto", choices=("auto", "ema", "raw"), help="of a training checkpoint")
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA that belongs to the model, such as LongLive's lora.pt; may be given several times",
    )
    command.add_argument("--vae", help="the Wan 2.1 VAE's file; not for --model tiny")
    command.add_argument(
        "--compressor",
        help=f"a dual-branch compressor's file, or {NO_COMPRESSOR_FILE}; default: the model's own, if any",
    )


def compressor_choice(options: argparse.Namespace, config: CacheConfig) -> CompressorChoice:
    """The compressor of a file; else the demo's own, where it fits the block size; else the training-free one."""
    if options.compressor is None and options.model == TINY:
        own = demo_compressor()
        if own.metadata is not None and own.metadata.block_frames == config.block_frames:
            return own
    if options.compressor in (None, NO_COMPRESSOR_FILE):
        return TRAINING_FREE
    return CompressorChoice(Path(options.compressor).name, *load_compressor(options.compressor))


def read_models(options: argparse.Namespace, dtype: torch.dtype, decodes: bool) -> tuple[WanModules, WanVAE | None]:
    """The transformer's module tree, and the VAE where this process decodes, as the options name them."""
    loras = [given_lora(text) for text in options.lora]
    if options.model == TINY:
        modules = build_wan_modules(SIZES[TINY], with_loras(demo_transformer(), loras, dtype))
        return modules, load_vae(demo_vae(options.device), device=options.device) if decodes else None
    modules = load_wan_modules(options.model, options.weights, dtype, loras)
    return modules, load_vae(read_state_dict(options.vae)[0], dtype, options.device) if decodes else None


def load_models(
    options: argparse.Namespace, dtype: torch.dtype, share: HeadShare = WHOLE
) -> tuple[CausalWan, WanVAE | None]:
    """The transformer, or this process's share of it, and the VAE, which only the main process has."""
    modules, vae = in_all(lambda: read_models(options, dtype, decodes=share.rank == 0))
    if share.count > 1:
        return shared_wan(modules, options.device, dtype, share), vae
    speed = options.linear_dtype, options.compile, options.weights_device
    return make_causal_wan(modules, options.device, dtype, *speed), vae
