"""`train base`: a causal generator from scratch, by flow matching with clean history (teacher forcing).

A clip goes through the model as at inference, block by block over the same cache: a noisy block is denoised given the
clean passes of the blocks before it, then has its own clean pass. Gradients reach the clean passes too.

Videos at inference are much longer than training clips. Three things prepare the model for that:

- The history is often partitioned (`histories`): blocks are dropped, or compressed by the compressor's LR branch. So
  sinks, compressed mid blocks and gaps in time are nothing new. A clip of five blocks has few mid blocks; so in some
  steps these few fill all mid slots. Then the context has as many tokens as late in a video, and the sinks are as far
  away.
- Clean passes see latents with a little noise (`history_noise`), since a model's own output is a little wrong. Without
  it, small errors of one block count as truth for the next one, and grow.
- Each block of a clip has its own noise level, independent of the others'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..cache.gradients import GradientCache
from ..config import FrameSize, Layout
from ..demo.models import demo_vae
from ..errors import PackForcingError
from ..files.weights import read_state_dict
from ..model.attention import training_attention
from ..model.causal_wan import CausalWan
from ..model.load import load_wan_modules
from ..model.vae import load_vae
from ..model.wan_modules import SIZES, WanModules, WanSizes, build_wan_modules, random_state_dict
from ..world.scenes import FRAME
from . import options as common
from .base_samples import BaseOptions, Batch, Sample, Samples, TrainingClips, held_out, stacked
from .blocks import levels_like, walk_blocks
from .clips import ClipSet, LatentClips, prepare
from .histories import BLOCK_BEFORE, BLOCK_FRAMES, HISTORIES, History, bidirectional
from .learner import Learner
from .loop import Outcome, train
from .optimizers import muon_and_adamw
from .processes import is_main, wait_for_all, whole
from .run_config import MicroBatch


def initial_state_dict(sizes: WanSizes, seed: int) -> dict[str, Tensor]:
    """Random weights to start from: residual branches that begin small, and a head that predicts zero."""
    state = random_state_dict(sizes, seed)
    for name, tensor in state.items():
        if name.startswith("head.head"):
            tensor.zero_()
        elif name.startswith("time_projection") or name.endswith((".o.weight", "ffn.2.weight")):
            tensor *= 0.2
        elif name.startswith("blocks") and name.endswith("modulation"):
            tensor[:, [2, 5]] = 0.5  # gates
    return state


class BaseTrainer:
    """A `Trainer` with one learner, "base".

    Args:
        modules: the transformer's weights, float32; they are trained.
        data: the clips.
        options: the hyperparameters.
        histories: the partitions of the history; the first is the one that `evaluate` measures under.
        start: where the weights come from, a file or a seed. A run is continued only from the same start.
        device: where to train.
        cache_dtype: of the cached keys and values.
    """

    def __init__(
        self,
        modules: WanModules,
        data: TrainingClips,
        options: BaseOptions,
        histories: Sequence[History] = HISTORIES,
        start: str | int = 0,
        device: torch.device | str = "cpu",
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = torch.device(device)
        self.options = options
        self.data = data
        self.histories = histories
        self.block_frames = histories[0].block_frames
        self.samples = Samples(data, options, self.block_frames)
        self.cache_dtype = cache_dtype
        self.modules = modules.requires_grad_(True).to(self.device)
        self.wan = CausalWan(self.modules, training_attention(self.device), device=self.device)
        optimizer = muon_and_adamw(
            modules, modules.blocks.parameters(), options.rate, options.betas, options.weight_decay
        )
        self.learners = {"base": Learner(self.modules, optimizer, options.ema)}
        clips = data.clips
        self.size = FrameSize(clips.clips.size, clips.clips.size)
        self._start = start
        # The errors of a channel weigh as much as the channel varies: the VAE scales channels by how much they show.
        stds = clips.latents[:256].float().std(dim=(0, 2, 3, 4), keepdim=True)
        self.loudness = (stds / stds.mean()).to(self.device)  # [1, 16, 1, 1, 1]

    def describe(self) -> Mapping[str, Any]:
        away = vars(self.data.away.clips) if self.data.away is not None else None
        return {
            **vars(self.options),
            "clips": vars(self.data.clips.clips),
            "away": away,
            "histories": [list(vars(history).values()) for history in self.histories],
            "weights": self._start,
        }

    def turns(self, step: int) -> Sequence[str]:
        return ("base",)

    def batch(self, micro: MicroBatch) -> Batch:
        odds = np.array([history.share for history in self.histories])
        history = self.histories[np.random.default_rng(micro.step_seed()).choice(len(odds), p=odds / odds.sum())]
        return stacked([self.samples.drawn(seed) for seed in micro.seeds()], history, self.device)

    def losses(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        errors = self.errors(batch, self.loudness * focus_weights(batch.latents, self.options.focus))
        return {"loss": errors.mean(), "first": errors[0].mean(), "last": errors[-1].mean()}

    def errors(self, batch: Batch, weights: Tensor) -> Tensor:
        """Weighted mean squared errors [n, B] of the velocities of the n denoised blocks.

        `weights`: of the errors of a clip, like [B, 16, T, h, w].
        """
        layout = Layout(batch.history.config(), self.size, self.data.clips.clips.temporal_stride)
        cache = GradientCache(layout, self.wan.shape, self.device, self.cache_dtype, batch=len(batch.latents))
        text = self.wan.embed_text(batch.context)
        frames = self.block_frames
        denoised = zip(batch.noise.split(frames, dim=2), batch.sigma.unbind(dim=1), strict=True)
        blocks, block_weights = batch.latents.split(frames, dim=2), weights.split(frames, dim=2)
        noises = zip(blocks, batch.history_noise.split(frames, dim=2), batch.history_sigma.unbind(dim=1), strict=True)
        seen = [torch.lerp(x0, noise, levels_like(sigma, x0)) for x0, noise, sigma in noises]
        errors = []

        def denoise(i: int) -> None:
            for noise, sigma in islice(denoised, 1 if i else 1 + self.options.first_again):
                x0 = blocks[i]
                velocity = self.wan.denoise(torch.lerp(x0, noise, levels_like(sigma, x0)), sigma, text, cache)
                error = F.mse_loss(velocity, noise - x0, reduction="none") * block_weights[i]
                errors.append(error.mean(dim=(1, 2, 3, 4)))

        walk_blocks(self.wan, cache, text, seen, lambda i: self.wan.patch_tokens(batch.compressed[:, i]), denoise)
        return torch.stack(errors)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Losses on held-out clips, with the whole history and the same noise each time.

        If there are clips with things away, also the errors of their last blocks, under captions that say no colour of
        what was away: with the whole history ("away") and with the block before alone ("away_block_before"). A model
        that remembers does better with the whole.
        """
        data = self.data
        with self.learners["base"].averaged():
            samples = [self.samples.measured(number) for number in held_out(data.clips, data.held_out)]
            found = {"held_out": self._held_out_errors(samples, self.histories[0]).mean().item()}
            if data.away is not None and self.block_frames == BLOCK_FRAMES:
                numbers = held_out(data.away, data.held_out)
                samples = [self.samples.measured_away(data.away, number) for number in numbers]
                for name, history in (("away", self.histories[0]), ("away_block_before", BLOCK_BEFORE)):
                    found[name] = self._held_out_errors(samples, history)[-2:].mean().item()
        return found

    def _held_out_errors(self, samples: Sequence[Sample], history: History) -> Tensor:
        """Errors [n, clips] of the denoised blocks, without `focus`."""
        errors = []
        for first in range(0, len(samples), 8):
            batch = stacked(samples[first : first + 8], history, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cache_dtype == torch.bfloat16):
                errors.append(self.errors(batch, self.loudness * focus_weights(batch.latents, 0)))
        return torch.cat(errors, dim=1)


def focus_weights(latents: Tensor, focus: float) -> Tensor:
    """Weights [B, 1, T, h, w] of mean 1 for the errors of clips [B, 16, T, h, w].

    What moves is small, and a plain background is soon learnt. Then most of what is left to learn is in the last per
    cent of the loss. So a part `focus` of the weight follows the distance of a latent pixel to the mean of its row.
    """
    distance = (latents - latents.mean(dim=(2, 4), keepdim=True)).abs().mean(dim=1, keepdim=True)
    return 1 - focus + focus * distance / distance.mean(dim=(2, 3, 4), keepdim=True)


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train base`."""
    common.add_run_arguments(parser, "base", steps=6000, batch=4, rate=BaseOptions.rate, warmup=200)
    parser.add_argument("--clips", type=int, default=2048, help="of the training set")
    parser.add_argument(
        "--away-clips", type=int, default=0, help="more clips, in which things leave the view and come back"
    )
    parser.add_argument("--away-share", type=float, default=BaseOptions.away_share, help="of them among the samples")
    parser.add_argument("--latent-frames", type=int, default=20, help="a clip; 20 are 5 s")
    parser.add_argument("--size", type=int, default=FRAME, help="pixels, width and height")
    parser.add_argument("--clip-folder", help="where encoded clips are kept; default: FOLDER/clips")
    parser.add_argument("--vae", help="the VAE that encodes them, a safetensors file; default: the demo's")
    parser.add_argument("--held-out", type=int, default=32, help="clips of each kind that only measure")
    parser.add_argument("--shift", type=float, default=BaseOptions.shift, help="flow shift of the noise levels")
    parser.add_argument(
        "--history-noise", type=float, default=BaseOptions.history_noise, help="largest, of the history"
    )
    parser.add_argument(
        "--open-captions",
        type=float,
        default=BaseOptions.open_captions,
        help="share of the captions that leave colours out, 0 to 1",
    )
    parser.add_argument("--focus", type=float, default=0.0, help="part of the loss's weight on what is small, 0 to 1")
    parser.add_argument("--ema", type=float, default=BaseOptions.ema, help="of the exported weights; 0 is off")
    parser.add_argument("--init", help="a transformer's file to begin with; default: random weights")
    parser.add_argument("--bidirectional", action="store_true", help="train a teacher for DMD: a clip is one block")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> Outcome:
    """Encode the clips that are missing; train, or go on training; export what there is."""
    device = common.start(options)
    folder = Path(options.folder)
    data = prepare_clips(options, device)
    trainer = BaseTrainer(
        first_modules(options),
        data,
        hyperparameters(options),
        histories=bidirectional(data.clips.clips.latent_frames) if options.bidirectional else HISTORIES,
        start=options.init or options.seed,
        device=device,
        cache_dtype=torch.bfloat16 if options.precision == "bfloat16" else torch.float32,
    )
    outcome = train(trainer, common.run_config(options))
    with trainer.learners["base"].averaged() as modules:
        output = export(modules, options.output or folder / "base.safetensors", common.provenance(options, outcome))
    if is_main():
        print(json.dumps({"output": str(output), "bytes": output.stat().st_size, "minutes": outcome.minutes}))
    return outcome


def prepare_clips(options: argparse.Namespace, device: torch.device) -> TrainingClips:
    """Encodes the clips that are missing, and loads all."""
    clips = ClipSet(options.clips, latent_frames=options.latent_frames, size=options.size)
    away = replace(clips, count=options.away_clips, away=True) if options.away_clips else None
    for name, each in (("--clips", clips), ("--away-clips", away)):
        if each is not None and not 0 < options.held_out < each.count:
            raise PackForcingError(
                f"Some clips train and at least one measures, but {name} is {each.count} and --held-out is "
                f"{options.held_out}: ask for more clips, or keep fewer (but 1) out."
            )
    folder = Path(options.clip_folder or Path(options.folder) / "clips")
    weights = read_state_dict(options.vae)[0] if options.vae else demo_vae()
    vae = load_vae(weights, torch.bfloat16, device).to_layout(channels_last=True)
    for each in filter(None, (clips, away)):
        written = prepare(folder, each, vae, *common.part_of(None))
        print(f"{written} of {each.shards} files of clips encoded", flush=True)
    wait_for_all()
    return TrainingClips(LatentClips(folder, clips), LatentClips(folder, away) if away else None, options.held_out)


def first_modules(options: argparse.Namespace) -> WanModules:
    """The transformer that training begins with: a file's, or a random one."""
    if options.init:
        return load_wan_modules(options.init).float()
    sizes = SIZES["tiny"]
    return build_wan_modules(sizes, initial_state_dict(sizes, options.seed))


def hyperparameters(options: argparse.Namespace) -> BaseOptions:
    """The hyperparameters that the command's options name."""
    return BaseOptions(
        rate=options.rate,
        ema=options.ema,
        shift=options.shift,
        history_noise=options.history_noise,
        open_captions=options.open_captions,
        away_share=options.away_share,
        focus=options.focus,
        first_again=0 if options.bidirectional else BaseOptions.first_again,
    )


def export(modules: WanModules, path: str | Path, metadata: Mapping[str, str]) -> Path:
    """Writes a transformer as bfloat16 safetensors under Wan 2.1's names. All processes call it, and one writes."""
    state = {name: whole(t.detach()).to("cpu", torch.bfloat16) for name, t in modules.state_dict().items()}
    path = Path(path)
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in state.items()}, path, metadata={"format": "pt", **metadata})
    return path
