"""`train compressor`: the HR branch, for a generator that is frozen. One GPU and prompts are enough.

The data are rollouts: videos that the model makes itself (`rollouts`). Each goes through the model twice, block by
block, over the cache of inference. In one pass the whole history is at full resolution; in the other it is partitioned,
and mid blocks are compressed. At some blocks that have mid blocks, both passes denoise the same noise, and the loss is
the difference of their velocities. So HR learns to put into a few tokens what the model reads out of a block at full
resolution.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..cache.gradients import GradientCache
from ..checks import check_between, check_count
from ..config import LATENT_CHANNELS, CacheConfig, Layout
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..files.compressor_file import CompressorMetadata, save_compressor
from ..generate.schedule import check_shift
from ..model.causal_wan import CausalWan
from ..model.compressor import HRBranch
from ..processes import is_main, wait_for_all
from ..world.scenes import evaluation_prompts, sample_scene
from . import options as common
from .blocks import levels_like, noise_levels, walk_blocks
from .learner import Learner
from .loop import Outcome, train
from .models import add_model_arguments, default_channels, encoded_prompts, load_training_models
from .processes import whole
from .rollouts import Rollout, Rollouts, RolloutShape, prepare
from .run_config import MicroBatch, check_ema

PROMPT_SEED = 5_000_000_000  # scenes whose captions are the rollouts' prompts; clips have other seeds


@dataclass(frozen=True)
class CompressorOptions:
    """The trainer's hyperparameters."""

    rate: float = 1e-3  # learning rate
    ema: float = 0.99
    shift: float = 5.0  # flow shift of the noise levels
    held_out: int = 8  # rollouts that only measure, the last ones
    targets: int = 2  # blocks denoised in a step; each keeps its activations for the backward pass

    def __post_init__(self) -> None:
        check_between("rate", self.rate, 0)
        check_ema(self.ema)
        check_shift(self.shift)
        for name, least in (("held_out", 0), ("targets", 1)):
            check_count(name, getattr(self, name), least)


@dataclass(frozen=True)
class Batch:
    """B rollouts, their noise, and the blocks to denoise."""

    latents: Tensor  # [B, 16, T, h, w]
    compressed: Tensor  # [B, blocks, 16, T', h', w'], latents of the compressor's LR branch
    context: Tensor  # [B, L, 4096], encoded prompts
    noise: Tensor  # [B, 16, T, h, w]
    sigma: Tensor  # [B, blocks], noise levels
    targets: tuple[int, ...]  # numbers of the blocks that are denoised


def whole_history(blocks: int, block_frames: int) -> CacheConfig:
    """All blocks of a video at full resolution."""
    return CacheConfig(block_frames, sink_frames=(blocks - 1) * block_frames, recent_frames=0, top_k=0)


class CompressorTrainer:
    """A `Trainer` with one learner, "hr".

    Args:
        wan: the frozen generator.
        hr: the branch to train, in float32.
        rollouts: the data.
        layout: the partition that the compressor is trained for.
        options: the hyperparameters.
    """

    def __init__(
        self, wan: CausalWan, hr: HRBranch, rollouts: Rollouts, layout: Layout, options: CompressorOptions
    ) -> None:
        held_out = options.held_out
        if not 0 < held_out < len(rollouts):
            raise PackForcingError(
                f"Of {len(rollouts)} rollouts {held_out} are to be held out: keep 1 at least for each purpose."
            )
        self.device = wan.device
        self.wan = wan
        self.hr = hr.requires_grad_(True).to(self.device)
        self.rollouts = rollouts
        self.options = options
        self.layout = layout
        self.blocks = blocks = len(rollouts[0].compressed)
        self.first = layout.config.sink_blocks + layout.config.recent_blocks + 1  # the first block with a mid block
        if self.first >= blocks:
            raise PackForcingError(
                f"Rollouts of {blocks} blocks have no compressed block to learn from, since sink and recent hold "
                f"{self.first - 1}: give --blocks {self.first + 1} or more."
            )
        self.whole = Layout(whole_history(blocks, layout.config.block_frames), layout.size, layout.temporal_stride)
        optimizer = torch.optim.AdamW(hr.parameters(), lr=options.rate, weight_decay=0.01)
        self.learners = {"hr": Learner(self.hr, optimizer, options.ema)}

    def describe(self) -> Mapping[str, Any]:
        channels = out_channels(self.hr)
        config = {k: v for k, v in asdict(self.layout.config).items() if not k.startswith("archive")}
        layout = {"config": config, "size": asdict(self.layout.size)}
        return {**asdict(self.options), "channels": channels, **layout, "rollouts": len(self.rollouts)}

    def turns(self, step: int) -> Sequence[str]:
        return ("hr",)

    def batch(self, micro: MicroBatch) -> Batch:
        count = len(self.rollouts) - self.options.held_out
        drawn = [(seed, int(np.random.default_rng(seed).integers(count))) for seed in micro.seeds()]
        order = np.random.default_rng(micro.step_seed()).permutation(range(self.first, self.blocks))
        return self._batch(drawn, tuple(order[: self.options.targets].tolist()))

    def _batch(self, drawn: Sequence[tuple[int, int]], targets: tuple[int, ...]) -> Batch:
        """Rollouts by (seed of the noise, number)."""
        samples: list[Rollout] = [self.rollouts[number] for _, number in drawn]
        blocks = len(samples[0].compressed)
        noise, sigma = [], []
        for (seed, _), sample in zip(drawn, samples, strict=True):
            noise.append(torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(seed)))
            sigma.append(
                torch.from_numpy(noise_levels(np.random.default_rng(seed + 1), blocks, self.options.shift)).float()
            )
        context = nn.utils.rnn.pad_sequence([sample.context for sample in samples], batch_first=True)
        return Batch(
            latents=torch.stack([sample.latents for sample in samples]).to(self.device),
            compressed=torch.stack([sample.compressed for sample in samples]).to(self.device),
            context=context.to(self.device),
            noise=torch.stack(noise).to(self.device),
            sigma=torch.stack(sigma),
            targets=targets,
        )

    def losses(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted = self.velocities(batch, self.whole, self.lr_tokens)
        found = self.velocities(batch, self.layout, self.dual_tokens)
        return {"loss": error(found, wanted)}

    def velocities(self, batch: Batch, layout: Layout, tokens: Callable[[Batch, int], Tensor]) -> list[Tensor]:
        """What the model predicts for each target block, given a partition and a compressor."""
        wan = self.wan
        cache = GradientCache(layout, wan.shape, self.device, wan.dtype, batch=len(batch.latents))
        text = wan.embed_text(batch.context)
        frames = layout.config.block_frames
        blocks, noise = batch.latents.split(frames, dim=2), batch.noise.split(frames, dim=2)
        found = []

        def visit(i: int) -> None:
            if i in batch.targets:
                sigma = batch.sigma[:, i]
                x = torch.lerp(blocks[i], noise[i], levels_like(sigma, noise[i]))
                found.append(wan.denoise(x, sigma, text, cache))

        walked = blocks[: max(batch.targets) + 1]
        walk_blocks(wan, cache, len(walked) * [text], walked, lambda i: tokens(batch, i), visit)
        return found

    def lr_tokens(self, batch: Batch, block: int) -> Tensor:
        """The training-free form's tokens [B, N_c, d] of a block."""
        size = self.layout.size
        small = batch.compressed[:, block, ..., : 2 * size.compressed_rows, : 2 * size.compressed_columns]
        return self.wan.patch_tokens(small)

    def dual_tokens(self, batch: Batch, block: int) -> Tensor:
        """Both branches' tokens [B, N_c, d] of a block."""
        frames = self.layout.config.block_frames
        latents = batch.latents[:, :, block * frames : (block + 1) * frames]
        return self.lr_tokens(batch, block) + rearrange(self.hr(latents), "b d t h w -> b (t h w) d")

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """On held-out rollouts, the distance to the full-resolution history: with both branches, LR, and no mids."""
        config = self.layout.config
        forms = {"held_out": (self.layout, self.dual_tokens), "held_out_lr": (self.layout, self.lr_tokens)}
        no_mids = CacheConfig(config.block_frames, config.sink_frames, config.recent_frames, top_k=0)
        forms["held_out_none"] = (Layout(no_mids, self.layout.size, self.layout.temporal_stride), self.lr_tokens)
        sums = dict.fromkeys(forms, 0.0)
        with self.learners["hr"].averaged():
            for number in range(len(self.rollouts) - self.options.held_out, len(self.rollouts)):
                batch = self._batch([(number, number)], tuple(range(self.first, self.blocks)))
                wanted = self.velocities(batch, self.whole, self.lr_tokens)
                for name, (layout, tokens) in forms.items():
                    sums[name] += error(self.velocities(batch, layout, tokens), wanted).item() / self.options.held_out
        return sums


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of velocities."""
    return torch.stack([(f - w).square().mean() for f, w in zip(found, wanted, strict=True)]).mean()


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train compressor`."""
    common.add_run_arguments(parser, "compressor", steps=600, batch=1, rate=1e-3, warmup=20)
    add_model_arguments(parser)
    parser.add_argument("--rollout-folder", help="where rollouts are kept; default: FOLDER/rollouts")
    parser.add_argument("--rollouts", type=int, default=64, help="rollouts to train with; one a prompt")
    parser.add_argument("--held-out", type=int, default=8, help="rollouts that only measure")
    parser.add_argument("--blocks", type=int, default=10, help="blocks a rollout")
    parser.add_argument("--targets", type=int, default=2, help="blocks of a rollout that are denoised in a step")
    parser.add_argument("--prepare", metavar="I/N", help="only make part I (from 0) of N of the rollouts, and stop")
    parser.add_argument("--channels", help="hidden channels, four numbers; default: 32,128,512,2048, less for the demo")
    parser.add_argument("--ema", type=float, default=0.99, help="of the exported weights; 0 is off")
    parser.set_defaults(run=run)


def prompt_contexts(options: argparse.Namespace, count: int, held_out: int) -> list[Tensor]:
    """Encoded prompts [L, 4096]: `count` to train with, then `held_out` others."""
    if options.prompts is None:  # the synthetic world's
        captions = [sample_scene(PROMPT_SEED + i).caption for i in range(count)] + evaluation_prompts(held_out)
        return [encode_prompt(caption)[0] for caption in captions]
    contexts = encoded_prompts(options.prompts)
    if len(contexts) < 2:
        raise PackForcingError(f"{options.prompts} holds one prompt; two at least are needed, one of them to measure.")
    kept = contexts[-held_out:] if len(contexts) > held_out else contexts[-1:]
    rest = contexts[: -len(kept)]
    return [rest[i % len(rest)] for i in range(count)] + [kept[i % len(kept)] for i in range(held_out)]


def run(options: argparse.Namespace) -> Outcome | None:
    """Make the rollouts that are missing; train, or go on training; export what there is."""
    device = common.start(options)
    folder = Path(options.folder)
    config = common.run_config(options)
    settings = CompressorOptions(options.rate, options.ema, options.shift, options.held_out, options.targets)
    models = load_training_models(options, device)
    layout = models.layout
    shape = RolloutShape(options.blocks, layout.size, layout.config, models.sampling, layout.temporal_stride)
    contexts = prompt_contexts(options, options.rollouts, options.held_out)
    rollout_folder = Path(options.rollout_folder or folder / "rollouts")
    part, parts = common.part_of(options.prepare)
    prepare(rollout_folder, contexts, models.wan, models.vae, shape, part, parts)
    if options.prepare:
        return None
    wait_for_all()

    channels = common.numbers(options.channels) or default_channels(options.model)
    torch.manual_seed(options.seed)
    hr = HRBranch((LATENT_CHANNELS, *channels, models.wan.shape.dim), layout.temporal_stride)
    rollouts = Rollouts(rollout_folder, len(contexts), shape)
    trainer = CompressorTrainer(models.wan, hr, rollouts, layout, settings)
    outcome = train(trainer, config)
    output = Path(options.output or folder / "compressor.safetensors")
    with trainer.learners["hr"].averaged():
        export(hr, output, layout, models.name)
    measures = trainer.evaluate(outcome.step)
    if is_main():
        provenance = common.provenance(options, outcome)
        print(json.dumps({"output": str(output), "bytes": output.stat().st_size, **provenance, **measures}, indent=1))
    return outcome


def out_channels(hr: HRBranch) -> list[int]:
    """The channels that each of the branch's convolutions gives."""
    return [layer.out_channels for layer in hr if isinstance(layer, nn.Conv3d)]


def export(hr: HRBranch, path: Path, layout: Layout, base_model: str) -> None:
    """Writes a compressor file, bfloat16."""
    channels = out_channels(hr)
    metadata = CompressorMetadata(
        model_dim=channels[-1],
        temporal_stride=layout.temporal_stride,
        hidden_channels=tuple(channels[:-1]),
        block_frames=layout.config.block_frames,
        base_model=base_model,
    )
    state = {f"hr.{name}": whole(t.detach()).to(torch.bfloat16) for name, t in hr.state_dict().items()}
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_compressor(path, state, metadata)
