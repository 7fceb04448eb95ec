"""`train vae`: the demo's VAE, of the Wan 2.1 architecture, on clips of the synthetic world.

What a diffusion model wants of it besides sharp pictures is a latent space of a known scale. The Wan convention is
fixed: `vae.normalise` takes 16 constants off. So after training, an affine map a channel is absorbed into the 1x1x1
convolutions on both sides of the latents (`absorb_scale`): exactly the same pictures, and normalised latents of mean 0,
with a standard deviation of 1 where a channel shows in the pictures, and less where it hardly does
(`LatentStatistics.loudness`). A channel that the KL term has emptied is not blown up but made constant: it is 0 after
`normalise`, and the decoder does not read it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import PackForcingError
from ..files.weights import read_state_dict
from ..model.vae import (
    LATENT_CHANNELS,
    LATENT_MEAN,
    LATENT_STD,
    SPACE_STRIDE,
    Downsample,
    Upsample,
    WanVAE,
    init_vae,
    load_vae,
    normalise,
)
from ..plots import contact_sheet
from ..world.scenes import FRAME, LONGEST_START, render, sample_scene
from . import options as common
from .learner import Learner
from .loop import Outcome, train
from .processes import is_main
from .run_config import MicroBatch

QUIETEST = 0.15  # standard deviation of a normalised latent channel that hardly shows
HELD_OUT_SEED = 7_000_000_000  # scenes of the evaluation; training's seeds are hashes


@dataclass(frozen=True)
class ClipShape:
    """Windows of `crop` x `crop` pixels and `frames` frames, out of scenes rendered `size` pixels wide."""

    frames: int
    crop: int
    size: int
    clips: int  # windows a sample, each of a scene of its own
    share: float = 1.0  # of the steps

    def __post_init__(self) -> None:
        if self.frames % 4 != 1 or self.crop % SPACE_STRIDE or self.crop > self.size:
            raise PackForcingError(f"{self} is no clip: frames are 1 + 4k, and a crop is 8k pixels, at most `size`.")


# The first steps see single frames only, many and small: what a colour is takes many scenes to learn.
IMAGES = (
    ClipShape(frames=1, crop=32, size=128, clips=12, share=0.8),
    ClipShape(frames=1, crop=64, size=128, clips=3, share=0.2),
)

# Then clips, of about the same number of pixels a step. Short and wide ones teach the picture and its borders, long and
# narrow ones the steady state of the layers that look back in time, and small renderings what the compressor's LR
# branch encodes.
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
    """Weights beside the 1 of the error itself (Huber's: its gradient fades as a colour comes right)."""

    edges: float = 3.0  # mean absolute error of the differences between neighbouring pixels: keeps borders crisp
    kl: float = 3e-4  # mean a latent number, in nats


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
        # In bfloat16 for speed: narrow float32 convolutions are slow on a CPU. `export` measures in float32.
        with self.learners["vae"].averaged() as vae, torch.autocast(self.device.type, torch.bfloat16):
            scores = [psnr(reconstruct(vae, clip), clip) for clip in held_out_clips(self.held_out, 9)]
        return {"psnr": sum(scores) / len(scores)}


@torch.no_grad()
def start_from_averages(vae: WanVAE) -> None:
    """Make a random VAE one whose latents begin with the mean colour of each 8x8 patch, frame by frame.

    A deep, narrow, normalised network takes thousands of steps to learn as much as "the sky is blue" from random
    weights. So the residual branches begin quiet; the path around them carries red, green, blue and a 1 in channels
    0 to 3 (the other channels, random, carry what they may); and the two heads, whose norm and SiLU would lose size
    and sign, are given x, -x and the 1: silu(x) - silu(-x) = x, and beside the 1 a norm keeps apart dark and bright.
    """
    rgb, one = range(3), 3
    slope = torch.tensor([0.25, 0.5, 0.25])
    for name, layer in vae.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Conv3d):
            continue
        weight, identity = layer.weight, torch.eye(layer.in_channels, device=layer.weight.device)
        layer.bias.zero_()
        if name.endswith("time_conv"):  # repeats frames, or takes every second one
            weight.zero_()
            weight[:, :, -1, 0, 0] = identity.repeat(layer.out_channels // layer.in_channels, 1)
        elif layer.kernel_size == (3, 3, 3):  # sees the present frame only
            weight[:, :, :-1] = 0
            weight *= 3**0.5
        if name.endswith(("residual.6", "proj")):
            weight *= 0.1
        elif name.endswith("shortcut"):
            weight[: layer.in_channels, :, 0, 0, 0] = identity
        elif name.endswith("resample.1"):
            weight[: one + 1] = 0
            for channel in (*rgb, one):
                if "downsamples" in name:
                    weight[channel, channel, :2, :2] = 1 / 4
                else:  # from one cell to the next without a step
                    weight[channel, channel] = slope[:, None] * slope

    def carry(layer: nn.Conv3d, minus: int | None = None) -> None:
        """Let a layer's first channels be its input's, less those that start at `minus`."""
        for channel in rgb:
            layer.weight[channel] = 0
            layer.weight[channel, channel, -1, 1, 1] = 1
            if minus is not None:
                layer.weight[channel, minus + channel, -1, 1, 1] = -1

    for layer in (vae.encoder.conv1, vae.decoder.conv1):
        carry(layer)
        layer.weight[one] = 0
        layer.bias[one] = 1
    narrowest = [layer for layer in vae.encoder.downsamples if isinstance(layer, Downsample)][-1].resample[1]
    narrowest.weight[4:7] = -narrowest.weight[:3]
    carry(vae.encoder.head[2], minus=4)
    widest = [layer for layer in vae.decoder.upsamples if isinstance(layer, Upsample)][-1].resample[1]
    widest.weight[4:7] = -widest.weight[:3]
    carry(vae.decoder.head[2], minus=4)
    for layer in (vae.conv1, vae.conv2):
        layer.weight[:, :, 0, 0, 0] = torch.eye(layer.in_channels)
    vae.encoder.head[2].weight[3:LATENT_CHANNELS] *= 2
    vae.encoder.head[2].weight[LATENT_CHANNELS:] *= 0.1
    vae.conv1.bias[LATENT_CHANNELS:] = -6  # a posterior's noise much smaller than what it is added to


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


@dataclass(frozen=True)
class LatentStatistics:
    """Of the raw mean latents over a set of clips; [16] each, float64."""

    mean: Tensor
    std: Tensor
    noise: Tensor  # root mean posterior variance: how loud the encoder's own noise is
    visible: Tensor  # root mean square change of the pixels when a channel is disturbed by a share of its std

    @property
    def informative(self) -> Tensor:
        """Channels that vary by more than a tenth of their own noise; the others carry nothing."""
        return self.std > 0.1 * self.noise

    @property
    def loudness(self) -> Tensor:
        """Standard deviations that normalised latents shall have: by how much a channel shows in the pictures.

        Three channels carry the colours of 8x8 patches, and thirteen the fine detail of edges, which moves pixels ten
        times less. Were they all as loud, four fifths of a diffusion model's loss would be detail, and it would have to
        decide on detail and on what the picture shows at the same noise levels.
        """
        return (2 * self.visible / self.visible.max()).clamp(QUIETEST, 1)


@torch.no_grad()
def visibility(vae: WanVAE, mean: Tensor, std: Tensor, share: float = 0.3) -> Tensor:
    """Mean square change of the decoded pixels for each channel of latents [1, 16, T, h, w] that is disturbed by noise
    of `share` of its std [16]."""
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
    pixels = vae.decode(mean)
    changes = []
    for channel in range(LATENT_CHANNELS):
        disturbed = mean.clone()
        disturbed[:, channel] += share * float(std[channel]) * noise[:, channel]
        changes.append((vae.decode(disturbed) - pixels).double().square().mean().cpu())
    return torch.stack(changes)


@torch.no_grad()
def latent_statistics(vae: WanVAE, clips: Iterable[Tensor], disturbed: int = 2) -> LatentStatistics:
    """What latents are like over clips [1, 3, F, H, W]; visibility is measured on the first `disturbed` of them."""
    sums = torch.zeros(3, LATENT_CHANNELS, dtype=torch.float64)
    count = 0
    kept = []
    for number, clip in enumerate(clips):
        encoded = vae.encode(clip.to(vae.device, vae.dtype))
        if number < disturbed:
            kept.append(encoded[0])
        mean, log_variance = (m.double().cpu() for m in encoded)
        axes = (0, 2, 3, 4)
        sums += torch.stack([mean.sum(axes), mean.square().sum(axes), log_variance.exp().sum(axes)])
        count += mean[:, 0].numel()
    mean, square, variance = sums / count
    std = (square - mean.square()).clamp_min(0).sqrt()
    visible = torch.stack([visibility(vae, latents, std) for latents in kept]).mean(dim=0).sqrt()
    return LatentStatistics(mean, std, variance.sqrt(), visible)


@torch.no_grad()
def absorb_scale(vae: WanVAE, statistics: LatentStatistics) -> None:
    """Give the latents Wan's mean and, in parts of Wan's std, their loudness; leave the pictures as they are.

    Both sides of the latents are 1x1x1 convolutions without anything between, so the map m -> a m + b goes into the
    encoder's and its inverse into the decoder's. An uninformative channel becomes the constant Wan mean, and the
    decoder's bias takes over what its mean gave.
    """
    wan_mean = torch.tensor(LATENT_MEAN, dtype=torch.float64)
    wan_std = torch.tensor(LATENT_STD, dtype=torch.float64)
    alive = statistics.informative
    scale = torch.where(
        alive, wan_std * statistics.loudness / statistics.std.clamp_min(1e-12), torch.zeros_like(wan_std)
    )
    # What the decoder must multiply a channel by, and what it must take for the channel's mean.
    inverse = torch.where(alive, 1 / scale.clamp_min(1e-12), torch.zeros_like(scale))

    outer, inner = vae.conv1, vae.conv2
    weight, bias = outer.weight.double().cpu(), outer.bias.double().cpu()
    weight[:LATENT_CHANNELS] *= scale.view(-1, 1, 1, 1, 1)
    bias[:LATENT_CHANNELS] = wan_mean + scale * (bias[:LATENT_CHANNELS] - statistics.mean)
    # Log variances follow the scale; an emptied channel's own say nothing, and stay.
    bias[LATENT_CHANNELS:] += torch.where(alive, 2 * scale.clamp_min(1e-12).log(), torch.zeros_like(scale))
    outer.weight.copy_(weight)
    outer.bias.copy_(bias)

    weight, bias = inner.weight.double().cpu(), inner.bias.double().cpu()
    columns = weight[:, :, 0, 0, 0]
    # conv2(m) with m = mean + inverse * (m' - wan_mean)
    bias += columns @ (statistics.mean - inverse * wan_mean)
    weight *= inverse.view(1, -1, 1, 1, 1)
    inner.weight.copy_(weight)
    inner.bias.copy_(bias)


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
    weights = VAELosses(edges=options.edges, kl=options.kl)
    trainer = VAETrainer(options.dim, options.seed, options.rate, options.ema, weights, options.image_steps, device)
    outcome = train(trainer, common.run_config(options, final_rate=0.01))
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
