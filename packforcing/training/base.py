"""`train base`: a causal generator from scratch, by flow matching with clean history (teacher forcing).

A clip goes through the model as inference makes it, block by block over the same `Cache`: a noisy block is denoised
given the clean passes of the blocks before it, then has its own clean pass. Gradients reach the clean passes too.

Three things prepare the model for the long runs that it will never see in training:

- The history is often partitioned (`HISTORIES`): blocks are dropped, or compressed by the compressor's LR branch, so
  that sinks, compressed mid blocks and gaps in time are nothing new. A clip of five blocks has few mid blocks. So in
  some steps all mid slots are filled with those there are: as many tokens, and sinks as far away, as late in a video.
- Clean passes see latents with a little noise (`history_noise`), as a model's own output is a little wrong; without it,
  small errors of one block become the next one's truth, and grow.
- Blocks are cut out of the clip at every noise level, independently of each other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..cache.cache import Cache
from ..config import CacheConfig, FrameSize, Layout
from ..demo.models import demo_vae
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..files.weights import read_state_dict
from ..model.attention import training_attention
from ..model.causal_wan import CausalWan
from ..model.load import load_wan_modules
from ..model.vae import load_vae
from ..model.wan_modules import SIZES, WanModules, WanSizes, build_wan_modules, random_state_dict
from ..world.scenes import FRAME, opened, parse
from . import options as common
from .blocks import levels_like, noise_levels, walk_blocks
from .clips import ClipSet, LatentClips, prepare
from .learner import Learner
from .loop import Outcome, train
from .optimizers import muon_and_adamw
from .processes import is_main, wait_for_all, whole
from .run_config import MicroBatch

BLOCK_FRAMES = 4


@dataclass(frozen=True)
class History:
    """A partition of the history of a training clip, and the share of the micro-batches that see it."""

    sink_frames: int
    recent_frames: int
    top_k: int
    share: float
    repeat_mids: bool = False
    block_frames: int = BLOCK_FRAMES

    def config(self) -> CacheConfig:
        sizes = self.block_frames, self.sink_frames, self.recent_frames, self.top_k
        return CacheConfig(*sizes, repeat_mids=self.repeat_mids)


HISTORIES = (
    History(sink_frames=16, recent_frames=4, top_k=0, share=0.35),  # everything
    History(sink_frames=8, recent_frames=4, top_k=0, share=0.15),  # gaps
    History(sink_frames=4, recent_frames=4, top_k=16, share=0.10),  # compressed blocks between
    History(sink_frames=0, recent_frames=4, top_k=16, share=0.05),
    History(sink_frames=8, recent_frames=4, top_k=16, share=0.10, repeat_mids=True),
    History(sink_frames=4, recent_frames=4, top_k=16, share=0.10, repeat_mids=True),
    History(sink_frames=4, recent_frames=4, top_k=6, share=0.10, repeat_mids=True),
    History(sink_frames=0, recent_frames=4, top_k=16, share=0.05, repeat_mids=True),
)


BLOCK_BEFORE = History(sink_frames=0, recent_frames=BLOCK_FRAMES, top_k=0, share=0.0)
MEMORY_LEVEL = 0.85  # a noise level at which colours are decided


def bidirectional(latent_frames: int) -> tuple[History, ...]:
    """The whole clip as one block, all of whose frames see each other: what a teacher for DMD is trained with."""
    return (History(sink_frames=0, recent_frames=0, top_k=0, share=1.0, block_frames=latent_frames),)


@dataclass(frozen=True)
class BaseOptions:
    """What a run is beside its loop."""

    rate: float = 1e-3  # learning rate
    ema: float = 0.999
    shift: float = 3.0  # of the noise levels: more of them are high
    history_noise: float = 0.2  # the largest noise level of a clean pass's latents
    clean_history: float = 0.3  # share of the clean passes without any
    first_again: int = 2  # more noise levels of the first block, which alone has only the prompt to go by
    open_captions: float = 0.0  # share of the captions that leave colours out, so that only the history knows them
    away_share: float = 0.5  # of the samples, where there are clips in which things leave the view and come back
    focus: float = 0.0  # part of the loss's weight that lies where a clip differs from its rows' mean colours
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Batch:
    """Clips [B, 16, T, h, w], LR latents [B, blocks, 16, T', h', w'], padded prompts [B, L, 4096]; of each denoised
    block, of which the first comes several times, the noise [B, 16, n * 4, h, w] and its level [B, n]; the noise of the
    clean passes, like the clips, and its levels [B, blocks]; the partition."""

    latents: Tensor
    compressed: Tensor
    context: Tensor
    noise: Tensor
    history_noise: Tensor
    sigma: Tensor
    history_sigma: Tensor
    history: History


def encode_prompts(prompts: Sequence[str]) -> Tensor:
    """Embeddings [B, L, 4096]; shorter prompts end in zeros, as Wan's do."""
    encoded = [encode_prompt(prompt)[0] for prompt in prompts]
    return torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)


def initial_state_dict(sizes: WanSizes, seed: int) -> dict[str, Tensor]:
    """Where training starts: residual branches that begin quiet, and a head that predicts zero."""
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
    """A `Trainer` with one learner, "base"."""

    def __init__(
        self,
        modules: WanModules,
        clips: LatentClips,
        options: BaseOptions,
        held_out: int = 32,
        device: torch.device | str = "cpu",
        cache_dtype: torch.dtype = torch.float32,
        start: str | int = 0,
        histories: Sequence[History] = HISTORIES,
        away: LatentClips | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.options = options
        self.clips = clips
        self.away = away
        self.histories = histories
        self.block_frames = histories[0].block_frames
        self.held_out = held_out  # of each set's clips, the last, for the log
        self.cache_dtype = cache_dtype
        self.modules = modules.requires_grad_(True).to(self.device)
        self.wan = CausalWan(self.modules, training_attention(self.device), device=self.device)
        optimizer = muon_and_adamw(
            modules, modules.blocks.parameters(), options.rate, options.betas, options.weight_decay
        )
        self.learners = {"base": Learner(self.modules, optimizer, options.ema)}
        self.size = FrameSize(clips.clips.size, clips.clips.size)
        self._start = start
        # Errors count by channel as the channel does in the latents, which the VAE makes by what shows.
        stds = clips.latents[:256].float().std(dim=(0, 2, 3, 4), keepdim=True)
        self.loudness = (stds / stds.mean()).to(self.device)

    def describe(self) -> Mapping[str, Any]:
        clips = self.clips.clips
        away = vars(self.away.clips) if self.away is not None else None
        histories = [list(vars(history).values()) for history in self.histories]
        return {
            **vars(self.options),
            "clips": vars(clips),
            "away": away,
            "histories": histories,
            "weights": self._start,
        }

    def turns(self, step: int) -> Sequence[str]:
        return ("base",)

    def batch(self, micro: MicroBatch) -> Batch:
        odds = np.array([history.share for history in self.histories])
        history = self.histories[np.random.default_rng(micro.step_seed()).choice(len(odds), p=odds / odds.sum())]
        return self._batch([self._sample(seed) for seed in micro.seeds()], history)

    def _sample(self, seed: int, number: int | None = None) -> tuple[Any, ...]:
        """A clip, its noise and its noise levels; of a random clip unless its number is given."""
        rng = np.random.default_rng(seed)
        away = number is None and self.away is not None and rng.random() < self.options.away_share
        if away:
            latents, compressed, caption = self.away[int(rng.integers(len(self.away) - self.held_out))]
        else:
            drawn = int(rng.integers(len(self.clips) - self.held_out))
            latents, compressed, caption = self.clips[drawn if number is None else number]
        if number is None and rng.random() < self.options.open_captions:
            caption = opened(parse(caption), rng, share=1 if away else 0.5).caption(int(rng.random() < 0.25))
        return self._noised(latents, compressed, caption, seed, rng)

    def _noised(
        self, latents: Tensor, compressed: Tensor, caption: str, seed: int, rng: np.random.Generator
    ) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        blocks = latents.shape[1] // self.block_frames
        denoised = blocks + self.options.first_again
        frames, *rest = latents.transpose(0, 1).shape
        noise = torch.randn((self.block_frames * denoised + frames, *rest), generator=generator).transpose(0, 1)
        noise = noise.split((self.block_frames * denoised, frames), dim=1)
        levels = torch.from_numpy(noise_levels(rng, denoised, self.options.shift)).float()
        history = self.options.history_noise * rng.random(blocks) * (rng.random(blocks) >= self.options.clean_history)
        return latents, compressed, caption, *noise, levels, torch.from_numpy(history).float()

    def _batch(self, samples: Sequence[tuple[Any, ...]], history: History) -> Batch:
        latents, compressed, captions, noise, history_noise, sigma, history_sigma = zip(*samples, strict=True)
        on_device = [torch.stack(x).to(self.device) for x in (latents, compressed, noise, history_noise)]
        return Batch(
            *on_device[:2],
            encode_prompts(captions).to(self.device),
            *on_device[2:],
            torch.stack(sigma),
            torch.stack(history_sigma),
            history,
        )

    def losses(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        errors = self.errors(batch, self.loudness * focus_weights(batch.latents, self.options.focus))
        return {"loss": errors.mean(), "first": errors[0].mean(), "last": errors[-1].mean()}

    def errors(self, batch: Batch, weights: Tensor) -> Tensor:
        """Weighted mean squared errors of the velocities [n, B], of the first block n - blocks + 1 times."""
        config = batch.history.config()
        layout = Layout(config, self.size, self.clips.clips.temporal_stride)
        cache = Cache(layout, self.wan.shape, self.device, self.cache_dtype, batch=len(batch.latents))
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
        """Losses on clips that are kept out of training, the same noise each time, with the whole history.

        Where there are clips with things away, also those of their last blocks, of which open captions say no colour:
        with the whole history ("away") and with the block before alone ("away_block_before"). A model that remembers
        does better with the whole.
        """
        with self.learners["base"].averaged():
            samples = [self._sample(number, number) for number in held_out(self.clips, self.held_out)]
            found = {"held_out": self._held_out_errors(samples, self.histories[0]).mean().item()}
            if self.away is not None and self.block_frames == BLOCK_FRAMES:
                samples = [self._away_sample(number) for number in held_out(self.away, self.held_out)]
                for name, history in (("away", self.histories[0]), ("away_block_before", BLOCK_BEFORE)):
                    found[name] = self._held_out_errors(samples, history)[-2:].mean().item()
        return found

    def _away_sample(self, number: int) -> tuple[Any, ...]:
        """A clip with things away under its open caption, with a clean history, at one noise level."""
        rng = np.random.default_rng(number)
        latents, compressed, caption = self.away[number]
        *rest, levels, history = self._noised(
            latents, compressed, opened(parse(caption), rng, share=1).caption(), number, rng
        )
        return *rest, torch.full_like(levels, MEMORY_LEVEL), torch.zeros_like(history)

    def _held_out_errors(self, samples: Sequence[tuple[Any, ...]], history: History) -> Tensor:
        """Errors [n, clips] of the denoised blocks, without `focus`."""
        errors = []
        for first in range(0, len(samples), 8):
            batch = self._batch(samples[first : first + 8], history)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cache_dtype == torch.bfloat16):
                errors.append(self.errors(batch, self.loudness * focus_weights(batch.latents, 0)))
        return torch.cat(errors, dim=1)


def held_out(clips: LatentClips, count: int) -> range:
    """The clips of a set that are kept out of training: its last ones."""
    return range(len(clips) - count, len(clips))


def focus_weights(latents: Tensor, focus: float) -> Tensor:
    """Weights [B, 1, T, h, w] of mean 1 for the errors of clips [B, 16, T, h, w].

    What moves is small, and a plain background is soon learnt: without weights, most of what is left to learn is the
    last per cent of the loss. `focus` is the part of the weight that follows the distance to the row's mean.
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
    clips = ClipSet(options.clips, latent_frames=options.latent_frames, size=options.size)
    away = replace(clips, count=options.away_clips, away=True) if options.away_clips else None
    for name, each in (("--clips", clips), ("--away-clips", away)):
        if each is not None and not 0 < options.held_out < each.count:
            raise PackForcingError(
                f"Some clips train and at least one measures, but {name} is {each.count} and --held-out is "
                f"{options.held_out}: ask for more clips, or keep fewer (but 1) out."
            )
    clip_folder = Path(options.clip_folder or folder / "clips")
    weights = read_state_dict(options.vae)[0] if options.vae else demo_vae()
    vae = load_vae(weights, torch.bfloat16, device).to_layout(channels_last=True)
    for each in filter(None, (clips, away)):
        written = prepare(clip_folder, each, vae, *common.part_of(None))
        print(f"{written} of {each.shards} files of clips encoded", flush=True)
    wait_for_all()

    sizes = SIZES["tiny"]
    trainer = BaseTrainer(
        load_wan_modules(options.init).float()
        if options.init
        else build_wan_modules(sizes, initial_state_dict(sizes, options.seed)),
        LatentClips(clip_folder, clips),
        BaseOptions(
            rate=options.rate,
            ema=options.ema,
            shift=options.shift,
            history_noise=options.history_noise,
            open_captions=options.open_captions,
            away_share=options.away_share,
            focus=options.focus,
            first_again=0 if options.bidirectional else BaseOptions.first_again,
        ),
        held_out=options.held_out,
        device=device,
        cache_dtype=torch.bfloat16 if options.precision == "bfloat16" else torch.float32,
        start=options.init or options.seed,
        histories=bidirectional(clips.latent_frames) if options.bidirectional else HISTORIES,
        away=LatentClips(clip_folder, away) if away else None,
    )
    outcome = train(trainer, common.run_config(options))
    with trainer.learners["base"].averaged() as modules:
        output = export(modules, options.output or folder / "base.safetensors", common.provenance(options, outcome))
    if is_main():
        print(json.dumps({"output": str(output), "bytes": output.stat().st_size, "minutes": outcome.minutes}))
    return outcome


def export(modules: WanModules, path: str | Path, metadata: Mapping[str, str]) -> Path:
    """Writes a transformer as bfloat16 safetensors under Wan 2.1's names. All processes call it, and one writes."""
    state = {name: whole(t.detach()).to("cpu", torch.bfloat16) for name, t in modules.state_dict().items()}
    path = Path(path)
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in state.items()}, path, metadata={"format": "pt", **metadata})
    return path
