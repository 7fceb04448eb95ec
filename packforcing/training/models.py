"""The options that name generator, VAE and encoded prompts, and the loading of what they name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import CacheConfig, FrameSize, Layout
from ..demo.models import demo_transformer, demo_vae
from ..devices import fast_dtype
from ..errors import PackForcingError
from ..files.encoded_prompts import read_prompts
from ..files.weights import read_state_dict
from ..generate.sampling import Sampling
from ..generate.schedule import UPDATES
from ..known_models import KNOWN_MODELS, TINY
from ..model.attention import training_attention
from ..model.causal_wan import CausalWan
from ..model.compressor import PAPER_CHANNELS
from ..model.load import load_wan_modules
from ..model.vae import WanVAE, init_vae, load_vae
from ..model.wan_modules import SIZES, WanModules, build_wan_modules, random_state_dict
from .run_config import PRECISIONS

# Hidden channels of the demo's branch. The paper's are eight times as wide as the demo's model.
DEMO_CHANNELS = (32, 64, 128, 256)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which generator, VAE and prompts; the partition; how it samples."""
    parser.add_argument(
        "--model", default="demo", help="a causal Wan checkpoint's file, demo, or random:NAME to measure costs"
    )
    parser.add_argument("--vae", help="the Wan 2.1 VAE's file; the demo has its own")
    parser.add_argument(
        "--prompts", help="a file of encoded prompts [L, 4096], as `encode` writes it; the demo makes its own"
    )
    parser.add_argument("--width", type=int, help="pixels; default: 832, and 128 for the demo")
    parser.add_argument("--height", type=int, help="pixels; default: 480, and 128 for the demo")
    parser.add_argument("--block", type=int, default=4, help="latent frames a block: a property of the checkpoint")
    parser.add_argument("--sink", type=int, default=8, help="latent frames of sink")
    parser.add_argument("--recent", type=int, default=4, help="latent frames of recent")
    parser.add_argument("--top-k", type=int, default=16, help="mid blocks attended")
    parser.add_argument("--denoising-steps", type=int, default=4, help="a block, when rollouts are made")
    parser.add_argument("--shift", type=float, default=5.0, help="flow shift of the noise levels")
    parser.add_argument("--update", default="few-step", choices=UPDATES, help="euler for models not distilled")


@dataclass(frozen=True)
class TrainingModels:
    """What the options of `add_model_arguments` name."""

    wan: CausalWan  # the generator
    modules: WanModules  # the generator's weights
    vae: WanVAE
    layout: Layout  # partition and frame size
    sampling: Sampling  # how the generator makes rollouts
    name: str  # of the generator's file, without folders


REAL = "wan2.1-1.3b"  # whose frame and VAE width are the usual ones of a real model
RANDOM = "random:"  # with a name of `KNOWN_MODELS` behind it: a model to measure costs with


def wan_modules_of(model: str) -> WanModules:
    """The transformer that an option names: demo, random:NAME, or a checkpoint's file."""
    if model == "demo":
        return build_wan_modules(SIZES[TINY], demo_transformer())
    if not model.startswith(RANDOM):
        return load_wan_modules(model)
    name = model.removeprefix(RANDOM)
    if name not in SIZES:
        raise PackForcingError(f"There is no model size '{name}': choose one of {', '.join(SIZES)}.")
    return build_wan_modules(SIZES[name], random_state_dict(SIZES[name], seed=0))


def own_vae(demo: bool) -> Mapping[str, Tensor]:
    """The VAE of a model that comes without a file: the demo's, or random weights at the real one's width."""
    return demo_vae() if demo else init_vae(KNOWN_MODELS[REAL].vae_dim).state_dict()


def default_channels(model: str) -> tuple[int, ...]:
    """Hidden channels of a new HR branch for a model."""
    return DEMO_CHANNELS if model in ("demo", f"{RANDOM}{TINY}") else PAPER_CHANNELS


def load_training_models(options: argparse.Namespace, device: torch.device, trained: bool = False) -> TrainingModels:
    """Loads the models that the options name. A generator that is `trained` is in float32.

    Raises PackForcingError when files are missing or do not fit.
    """
    demo = options.model in ("demo", f"{RANDOM}{TINY}")
    if not options.model.startswith(RANDOM) and not demo and not (options.vae and options.prompts):
        raise PackForcingError(
            "A real model needs its VAE and encoded prompts: give --vae FILE and --prompts FILE, which "
            "'python -m packforcing encode' makes of a text file."
        )
    usual = KNOWN_MODELS[TINY if demo else REAL]
    size = FrameSize(options.width or usual.width, options.height or usual.height)
    config = CacheConfig(options.block, options.sink, options.recent, options.top_k)
    layout = Layout(config, size, 2 if options.block % 2 == 0 else 1)
    dtype = PRECISIONS[options.precision] or torch.float32
    modules = wan_modules_of(options.model)
    state = read_state_dict(options.vae)[0] if options.vae else own_vae(demo)
    vae_dtype = fast_dtype(device) if device.type == "cpu" else dtype
    vae = load_vae(state, vae_dtype, device).to_layout(channels_last=True)
    if trained:
        dtype = torch.float32
    wan = CausalWan(modules.to(device, dtype), training_attention(device), dtype=dtype, device=device)
    sampling = Sampling(0, options.denoising_steps, options.shift, options.update)
    return TrainingModels(wan, modules, vae, layout, sampling, Path(options.model).name)


def encoded_prompts(path: str) -> list[Tensor]:
    """The encoded prompts [L, 4096] of a file, in the order of their names. Raises what `read_prompts` raises."""
    return [prompt.context for prompt in read_prompts(path).values()]
