"""`train vae`: the demo's VAE, of the Wan 2.1 architecture, on clips of the synthetic world.

The VAE starts from weights that already encode colours (`vae_start`). After training, the export gives its latents the
scale that a diffusion model wants (`latent_scale`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..checks import check_between, check_count
from ..devices import fast_dtype
from ..errors import PackForcingError
from ..files.weights import read_state_dict
from ..model.vae import LATENT_CHANNELS, SPACE_STRIDE, WanVAE, init_vae, load_vae, normalise
from ..plots import contact_sheet
from ..processes import is_main
from ..world.drawing import render
from ..world.scenes import FRAME, LONGEST_START, sample_scene
from . import options as common
from .latent_scale import absorb_scale, latent_statistics
from .learner import Learner
from .loop import Outcome, train
from .run_config import MicroBatch, check_ema
from .vae_start import start_from_averages

HELD_OUT_SEED = 7_000_000_000  # of the evaluation's scenes; seeds in training are hashes


@dataclass(frozen=True)
class ClipShape:
    """The windows that a training sample holds; each is cut out of a scene of its own."""

    frames: int
    crop: int  # width and height of a window, pixels
    size: int  # width and height of the rendered scene, pixels
    clips: int  # windows in a sample
    share: float = 1.0  # of the steps

    def __post_init__(self) -> None:
        for name in ("frames", "crop", "size", "clips"):
            check_count(f"A clip's {name}", getattr(self, name), 1)
        check_between("A clip's share", self.share, 0)
        if self.frames % 4 != 1 or self.crop % SPACE_STRIDE or self.crop > self.size:
            raise PackForcingError(f"{self} is no clip: frames are 1 + 4k, and a crop is 8k pixels, at most `size`.")


# The first steps see single frames only, many and small ones: it takes many scenes to learn what a colour is.
IMAGES = (
    ClipShape(frames=1, crop=32, size=128, clips=12, share=0.8),
    ClipShape(frames=1, crop=64, size=128, clips=3, share=0.2),
)

# Then come clips, all of about the same number of pixels. Short and wide ones teach the picture and its borders. Long
# and narrow ones teach the layers that look back in time. Small renderings teach what the LR branch encodes.
CLIPS = (
    ClipShape(frames=5, crop=32, size=128, clips=5, share=0.3),
    ClipShape(frames=9, crop=32, size=128, clips=3, share=0.3),
    ClipShape(frames=17, crop=40, size=128, clips=1, share=0.15),
    ClipShape(frames=1, crop=128, size=128, clips=2, share=0.1),
    ClipShape(frames=9, crop=32, size=64, clips=3, share=0.05),
    ClipShape(frames=33, crop=32, size=32, clips=1, share=0.05),
    ClipShape(frames=5, crop=88, size=128, clips=1, share=0.05),
)


# --- the trainer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class VAELosses:
    """Weights of the losses. The pixels' own error has weight 1 (Huber's: its gradient fades as colours come right)."""

    edges: float = 3.0  # of the mean absolute error of differences between neighbouring pixels: keeps borders crisp
    kl: float = 3e-4  # of the KL term, in nats, mean over all latent numbers

    def __post_init__(self) -> None:
        for name in ("edges", "kl"):
            check_between(name, getattr(self, name), 0)


class VAETrainer:
    """A `Trainer` for the VAE: one learner, "vae"."""

    def __init__(
        self,
        dim: int = 8,
        seed: int = 0,
        rate: float = 3e-3,
        ema: float = 0.995,
        weights: VAELosses | None = None,
        image_steps: int = 1000,
        device: torch.device | str = "cpu",
        held_out: int = 6,
    ) -> None:
        check_ema(ema)
        check_between("rate", rate, 0)
        check_count("The VAE's width", dim, 1)
        check_count("image_steps", image_steps)
        self.device = torch.device(device)
        self.vae = init_vae(dim, seed)
        start_from_averages(self.vae)
        # 1.6 times as fast for narrow bfloat16 layers on a CPU, forward and backward together.
        self.vae.to(self.device).to_layout(channels_last=True)
        optimizer = torch.optim.AdamW(self.vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.learners = {"vae": Learner(self.vae, optimizer, ema)}
        self.weights = weights or VAELosses()
        self.image_steps = image_steps
        self.held_out = held_out
        self._options = {"dim": dim, "rate": rate, "ema": ema, "image_steps": image_steps}

    def describe(self) -> Mapping[str, Any]:
        return {**self._options, **asdict(self.weights), "shapes": [astuple(shape) for shape in IMAGES + CLIPS]}

    def turns(self, step: int) -> Sequence[str]:
        return ("vae",)

    def batch(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Clips [B, 3, F, H, W] and the noise of the posterior's sample [B, 16, T, H/8, W/8]."""
        shapes = IMAGES if micro.step < self.image_steps else CLIPS
        odds = np.array([shape.share for shape in shapes])
        # One shape for all samples of a step, or they would not stack.
        shape = shapes[np.random.default_rng(micro.step_seed()).choice(len(odds), p=odds / odds.sum())]
        samples = [sample_clips(shape, seed) for seed in micro.seeds()]
        pixels, noise = (torch.cat(parts).to(self.device) for parts in zip(*samples, strict=True))
        return pixels.contiguous(memory_format=torch.channels_last_3d), noise

    def losses(self, turn: str, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        pixels, noise = batch
        mean, log_variance = (moment.float() for moment in self.vae.encode(pixels))
        log_variance = log_variance.clamp(-20, 10)
        frames = self.vae.decode(mean + noise * torch.exp(0.5 * log_variance)).float()
        error = frames - pixels
        colour, edges = F.smooth_l1_loss(frames, pixels, beta=0.1), edge_loss(error)
        kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).mean()
        loss = colour + self.weights.edges * edges + self.weights.kl * kl
        return {"loss": loss, "absolute": error.abs().mean(), "edges": edges, "kl": kl}

    def evaluate(self, step: int) -> dict[str, float]:
        # In bfloat16 where that is faster. `export` measures in float32.
        low = fast_dtype(self.device) == torch.bfloat16
        with self.learners["vae"].averaged() as vae, torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            scores = [psnr(reconstruct(vae, clip), clip) for clip in held_out_clips(self.held_out, 9)]
        return {"psnr": sum(scores) / len(scores)}


def sample_clips(shape: ClipShape, seed: int) -> tuple[Tensor, Tensor]:
    """Random windows [clips, 3, frames, crop, crop] of random scenes, and noise of their latents' shape."""
    rng = np.random.default_rng(seed)
    windows = []
    for _ in range(shape.clips):
        scene = sample_scene(rng)
        clip = render(scene, shape.frames, size=shape.size, start=int(rng.integers(LONGEST_START)))
        top, left = rng.integers(shape.size - shape.crop + 1, size=2)
        windows.append(clip[:, :, top : top + shape.crop, left : left + shape.crop])
    cells = shape.crop // SPACE_STRIDE
    noise = rng.standard_normal((shape.clips, LATENT_CHANNELS, 1 + shape.frames // 4, cells, cells), np.float32)
    return torch.stack(windows), torch.from_numpy(noise)


def edge_loss(error: Tensor) -> Tensor:
    """Mean absolute difference between neighbours of an error [B, 3, F, H, W]: down, across, and in time."""
    steps = [error.diff(dim=axis).abs().mean() for axis in (2, 3, 4) if error.shape[axis] > 1]
    return torch.stack(steps).mean()


# --- measures -------------------------------------------------------------------------------------


def held_out_clips(count: int, frames: int, size: int = FRAME) -> list[Tensor]:
    """The evaluation's clips [1, 3, frames, size, size]: whole frames, of combinations that training never draws."""
    return [
        render(sample_scene(HELD_OUT_SEED + i, held_out=True), frames, size=size, start=37 * i).unsqueeze(0)
        for i in range(count)
    ]


@torch.no_grad()
def reconstruct(vae: WanVAE, pixels: Tensor) -> Tensor:
    """Encode (means) and decode clips [B, 3, F, H, W]."""
    pixels = pixels.to(vae.device, vae.dtype)
    return vae.decode(vae.encode(pixels)[0]).float().clamp(-1, 1).cpu()


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of numbers in [-1, 1]."""
    return -10 * math.log10(max(1e-12, (found.float() - wanted.float()).square().mean().item() / 4))


# --- export ---------------------------------------------------------------------------------------


def export(vae: WanVAE, path: str | Path, metadata: Mapping[str, str], clips: int = 64) -> dict[str, Any]:
    """Absorb the scale, write a float16 safetensors file, and measure what was written; returns the measures.

    `clips`: of the training scenes, whole frames, to take the latents' statistics from.
    """
    vae = load_vae({name: t.detach().clone().contiguous() for name, t in vae.state_dict().items()}, torch.float32)
    vae.to_layout(channels_last=True)
    shape = ClipShape(frames=17, crop=FRAME, size=FRAME, clips=1)
    absorb_scale(vae, latent_statistics(vae, (sample_clips(shape, seed)[0] for seed in range(clips))))
    # float16 and not bfloat16: three more bits, and no weight is anywhere near its limits.
    state = {name: tensor.detach().half().contiguous().cpu() for name, tensor in vae.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    measures = measure(load_vae(state, torch.float32))
    texts = {**metadata, **{name: json.dumps(value) for name, value in measures.items()}}
    save_file(state, path, metadata={"format": "pt", **texts})
    return measures


@torch.no_grad()
def measure(vae: WanVAE, clips: int = 12) -> dict[str, Any]:
    """PSNR on held-out clips, mean and worst, and the mean and std of the normalised latents, channel by channel."""
    held_out = held_out_clips(clips, 33)
    means = [vae.encode(clip)[0] for clip in held_out]
    scores = [psnr(vae.decode(mean).clamp(-1, 1), clip) for mean, clip in zip(means, held_out, strict=True)]
    latents = normalise(torch.cat(means)).transpose(0, 1).flatten(1).double()
    return {
        "psnr": round(sum(scores) / len(scores), 2),
        "psnr_worst": round(min(scores), 2),
        "latent_mean": [round(x, 3) for x in latents.mean(1).tolist()],
        "latent_std": [round(x, 3) for x in latents.std(1).tolist()],
    }


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train vae`."""
    common.add_run_arguments(parser, "vae", steps=4000, batch=2, rate=3e-3, warmup=50)
    parser.add_argument("--image-steps", type=int, default=1000, help="of the steps, the first, on single frames")
    parser.add_argument("--dim", type=int, default=8, help="width; 96 in the released Wan 2.1 VAE")
    parser.add_argument("--ema", type=float, default=0.995, help="of the exported weights; 0 is off")
    parser.add_argument("--kl", type=float, default=VAELosses.kl, help="weight of the KL term")
    parser.add_argument("--edges", type=float, default=VAELosses.edges, help="weight of the edge term")
    parser.add_argument("--calibration-clips", type=int, default=64, help="that the latents' scale is taken from")
    parser.set_defaults(run=run, log_every=10)


def run(options: argparse.Namespace) -> Outcome:
    """Train, or go on training; export what there is."""
    device = common.start(options)
    folder = Path(options.folder)
    config = common.run_config(options, final_rate=0.01)
    weights = VAELosses(edges=options.edges, kl=options.kl)
    trainer = VAETrainer(options.dim, options.seed, options.rate, options.ema, weights, options.image_steps, device)
    outcome = train(trainer, config)
    if not is_main():
        return outcome

    output = Path(options.output or folder / "vae.safetensors")
    metadata = common.provenance(options, outcome)
    with trainer.learners["vae"].averaged() as vae:
        measures = export(vae, output, metadata, options.calibration_clips)
    show(output, folder / "reconstructions.png")
    print(json.dumps({"output": str(output), "bytes": output.stat().st_size, **metadata, **measures}, indent=1))
    return outcome


def show(weights: str | Path, picture: str | Path, clips: int = 6) -> None:
    """Held-out clips and, below each, their reconstructions, as a PNG."""
    vae = load_vae(read_state_dict(weights)[0], torch.float32)
    rows = []
    for clip in held_out_clips(clips, 33):
        rows += [video[0, :, ::8] for video in (clip, reconstruct(vae, clip))]
    contact_sheet(rows, picture)
