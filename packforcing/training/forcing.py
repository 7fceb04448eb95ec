"""`train forcing`: the paper's joint training of generator and compressor (method 2; paper section 3.6).

The generator makes a video of 5 s by itself, block after block over the three-partition cache that inference uses
(self-forcing). Distribution matching distillation (DMD) then moves it towards what a frozen bidirectional teacher
holds for likely, and away from what a critic, trained on the generator's own videos all along, holds for likely.

- Each block is denoised up to an exit step, drawn anew for each batch; only the last of these passes has a gradient.
- The history is a constant: no gradient reaches the generator through clean passes. The compressor's HR branch gets its
  gradient through them, from the blocks that attend to its tokens.
- Teacher and critic see the whole video as one block, so the same forward pass and the same cache serve for both.

Generator, critic and teacher are each a Wan tree; one process trains on one device, several (`torchrun`) share the
samples of a step, and with `--fsdp` the weights, gradients and optimizer states of generator and critic too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..cache.gradients import GradientCache
from ..config import LATENT_CHANNELS, CacheConfig, Layout
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..files.compressor_file import load_compressor
from ..generate.schedule import denoising_step, predicted_x0, sigmas
from ..model.attention import training_attention
from ..model.causal_wan import CausalWan, TextKV
from ..model.compressor import Compressor, HRBranch, hr_branch
from ..model.vae import StreamingDecoder, WanVAE
from ..world.scenes import sample_scene
from . import base, compressor, models
from . import options as common
from .blocks import spread
from .loop import Learner, Micro, Outcome, RunConfig, train

T = TypeVar("T")


@dataclass(frozen=True)
class ForcingOptions:
    """The paper's hyperparameters (method 2), and those of Self-Forcing where it is silent."""

    generator_rate: float = 2e-6
    critic_rate: float = 1e-6
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    critic_turns: int = 5  # critic updates a generator update
    blocks: int = 5  # a video: 20 latent frames
    gradient_blocks: int = 5  # of these, how many have a gradient; fewer take less memory
    guidance: float = 3.0  # classifier-free, of the teacher
    shift: float = 5.0
    steps: int = 4  # denoising steps of the generator
    lowest: float = 0.02  # noise levels at which the scores are compared, before the shift
    highest: float = 0.98
    ema: float = 0.99  # of the generator


@dataclass(frozen=True)
class Batch:
    """Prompts [B, L, 4096]; the seeds of the videos' noise; the step at which each block is left; the blocks that have
    a gradient; the noise levels [B] of the scores."""

    context: Tensor
    seeds: tuple[int, ...]
    exit_step: int
    gradient: tuple[int, ...]
    sigma: Tensor


class ForcingTrainer:
    """A `loop.Trainer` with the learners "generator" and "critic".

    Args:
        tree, critic, teacher: Wan trees; the teacher is frozen, and was trained bidirectionally. The critic usually
            begins as a copy of the teacher.
        hr: the compressor's HR branch.
        vae: frozen, for the compressor's LR branch.
        layout: the partition.
        contexts: encoded prompts [L, 4096], of which each sample draws one; or a function of a seed.
        empty: the encoded empty prompt [L, 4096], for the teacher's guidance.
        fsdp: shard generator and critic over the processes.
        recompute: keep only layers' inputs of the critic's pass for its backward pass, and compute the rest again.
    """

    def __init__(
        self,
        modules: nn.Module,
        hr: HRBranch,
        critic: nn.Module,
        teacher: nn.Module,
        vae: WanVAE,
        layout: Layout,
        contexts: Callable[[int], Tensor],
        empty: Tensor,
        options: ForcingOptions | None = None,
        device: torch.device | str = "cpu",
        cache_dtype: torch.dtype = torch.float32,
        fsdp: bool = False,
        recompute: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.options = options or ForcingOptions()
        self.layout = layout
        self.contexts = contexts
        self.empty = empty
        self.vae = vae
        self.cache_dtype = cache_dtype
        self.hr = hr.requires_grad_(True).to(self.device)
        self.trees = {
            "generator": modules.requires_grad_(True).to(self.device),
            "critic": critic.requires_grad_(True).to(self.device),
            "teacher": teacher.requires_grad_(False).to(self.device),
        }
        attention = training_attention(self.device)
        # The teacher's type may be smaller, and so are then its hidden states: not every device mixes the two.
        self.wans = {
            name: CausalWan(each, attention, dtype=next(each.parameters()).dtype, device=self.device)
            for name, each in self.trees.items()
        }
        self.wans["critic"].recompute = recompute
        # Of what FSDP replaces, so before it does.
        self.frames = self.options.blocks * layout.config.block_frames
        self.shape = self.wans["teacher"].shape
        if fsdp:
            for name in ("generator", "critic"):
                shard(self.trees[name])
        generator = self._optimizer([modules, hr], self.options.generator_rate)
        self.learners = {
            "generator": Learner(nn.ModuleDict({"tree": modules, "hr": hr}), generator, self.options.ema),
            "critic": Learner(critic, self._optimizer([critic], self.options.critic_rate)),
        }

    def _optimizer(self, modules: Sequence[nn.Module], rate: float) -> torch.optim.Optimizer:
        options = self.options
        # A group each: FSDP shares the trees and not the small branch, and a group must be all of one kind.
        groups = [{"params": list(module.parameters())} for module in modules]
        return torch.optim.AdamW(groups, lr=rate, betas=options.betas, weight_decay=options.weight_decay)

    def describe(self) -> Mapping[str, Any]:
        config = {k: v for k, v in asdict(self.layout.config).items() if not k.startswith("archive")}
        return {**asdict(self.options), "config": config, "size": asdict(self.layout.size)}

    def rotary(self, step: int) -> Sequence[str]:
        """The critic's in each step, and the generator's after every `critic_turns`."""
        last = step % self.options.critic_turns == self.options.critic_turns - 1
        return ("critic", "generator") if last else ("critic",)

    def batch(self, micro: Micro) -> Batch:
        options = self.options
        seeds = micro.seeds()
        rngs = [np.random.default_rng(seed) for seed in seeds]
        context = nn.utils.rnn.pad_sequence([self.contexts(seed) for seed in seeds], batch_first=True)
        even = np.array([rng.uniform(options.lowest, options.highest) for rng in rngs])
        sigma = options.shift * even / (1 + (options.shift - 1) * even)
        # Of all processes, or the slowest decides how long a step takes.
        shared = np.random.default_rng(micro.step_seed())
        exit_step = int(shared.integers(options.steps))
        gradient = tuple(shared.permutation(options.blocks)[: options.gradient_blocks].tolist())
        return Batch(context.to(self.device), tuple(seeds), exit_step, gradient, torch.from_numpy(sigma).float())

    def losses(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        if turn == "critic":
            with self._constant("generator"):
                video = self.rollout(batch)
            return {"loss": self.critic_loss(video, batch)}
        return self.generator_losses(self.rollout(batch), batch)

    # ------------------------------------------------------------------ the generator's own video

    def rollout(self, batch: Batch) -> Tensor:
        """The generator's videos [B, 16, T, h, w]: their blocks have a gradient if gradients are on."""
        wan = self.wans["generator"]
        with_gradient = torch.is_grad_enabled()
        config = self.layout.config
        noise = NoiseSource(batch.seeds, self.layout, self.device)
        cache = GradientCache(self.layout, self.shape, self.device, self.cache_dtype, batch=len(batch.seeds))
        decoder = StreamingDecoder(self.vae)
        levels = sigmas(self.options.steps, self.options.shift)
        text = self._call("generator", lambda: wan.embed_text(batch.context))
        constant_text = TextKV(tuple((keys.detach(), values.detach()) for keys, values in text.layers))
        blocks = []
        for i in range(self.options.blocks):
            cache.begin(i)
            x = noise.next()
            with torch.no_grad():
                for sigma, next_sigma in pairwise(levels[: batch.exit_step + 1]):
                    velocity = self._denoise("generator", x, sigma, constant_text, cache)
                    x = denoising_step(x, velocity, sigma, next_sigma, "few-step", noise.next)
            sigma = levels[batch.exit_step]
            with torch.set_grad_enabled(with_gradient and i in batch.gradient):
                x0 = predicted_x0(x, self._denoise("generator", x, sigma, text, cache), sigma)
            blocks.append(x0)
            if i + 1 == self.options.blocks:
                break
            history = x0.detach()
            with torch.no_grad():
                frames = decoder.decode(history)
            compressed = self._compressed(history, frames) if config.becomes_mid(i) else None
            with frozen(self.trees["generator"], with_gradient):
                self._call("generator", partial(wan.clean_pass, history, constant_text, cache, compressed))
            cache.end()
        return torch.cat(blocks, dim=2)

    def _compressed(self, latents: Tensor, frames: Tensor) -> Tensor:
        """The compressor's tokens [B, N_c, d] of a finished block, with a gradient for HR only."""
        wan = self.wans["generator"]
        with torch.no_grad():
            lr = self._call(
                "generator",
                lambda: Compressor(self.layout.temporal_stride)(
                    latents, frames, self.layout, self.vae, wan.patch_tokens
                ),
            )
        return lr + rearrange(self.hr(latents), "b d t h w -> b (t h w) d")

    # ------------------------------------------------------------------ scores

    def score_noise(self, batch: Batch, video: Tensor) -> Tensor:
        noises = [
            torch.randn(video.shape[1:], generator=torch.Generator().manual_seed((seed + 1) % 2**63))
            for seed in batch.seeds
        ]
        return torch.stack(noises).to(video)

    def whole_velocity(self, name: str, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """Velocity of a whole noisy video [B, 16, T, h, w], whose frames all see each other."""
        wan = self.wans[name]
        one_block = CacheConfig(block_frames=self.frames, sink_frames=0, recent_frames=0, top_k=0)
        layout = Layout(one_block, self.layout.size, self.layout.temporal_stride)
        cache = GradientCache(layout, self.shape, self.device, self.cache_dtype, batch=len(x))
        cache.begin(0)
        return self._call(name, lambda: wan.denoise(x, sigma, wan.embed_text(context), cache))

    def critic_loss(self, video: Tensor, batch: Batch) -> Tensor:
        """Flow matching on the generator's videos, which are constants here."""
        noise = self.score_noise(batch, video)
        x = torch.lerp(video, noise, spread(batch.sigma, video))
        return F.mse_loss(self.whole_velocity("critic", x, batch.sigma, batch.context), noise - video)

    def generator_losses(self, video: Tensor, batch: Batch) -> dict[str, Tensor]:
        """DMD: a loss whose gradient at the video is the normalised difference of the critic's and teacher's x0."""
        with self._constant("critic"):
            noise = self.score_noise(batch, video)
            levels = spread(batch.sigma, video)
            x = torch.lerp(video, noise, levels)
            fake = x - levels * self.whole_velocity("critic", x, batch.sigma, batch.context)
            wanted = self.whole_velocity("teacher", x, batch.sigma, batch.context)
            if self.options.guidance != 1:
                empty = self.empty.to(self.device).expand(len(video), -1, -1)
                without = self.whole_velocity("teacher", x, batch.sigma, empty)
                wanted = without + self.options.guidance * (wanted - without)
            real = x - levels * wanted
            size = (video - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
            gradient = torch.nan_to_num((fake - real) / size.clamp_min(1e-6))
            target = video - gradient
        return {"loss": 0.5 * F.mse_loss(video, target), "gap": (fake - real).abs().mean(), "std": video.detach().std()}

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean and spread of the averaged generator's videos on fixed prompts: what a collapse shows in first."""
        batch = Batch(
            nn.utils.rnn.pad_sequence([self.contexts(seed) for seed in (1, 2)], batch_first=True).to(self.device),
            (1, 2),
            self.options.steps - 1,
            (),
            torch.ones(2),
        )
        with self.learners["generator"].averaged(), self._constant("generator"):
            video = self.rollout(batch)
        return {"video_mean": video.mean().item(), "video_std": video.std().item()}

    # ------------------------------------------------------------------ several processes

    @contextmanager
    def _constant(self, name: str) -> Iterator[None]:
        """No gradients; and afterwards, under FSDP, the tree is in parts again, or its next update would be missed."""
        with torch.no_grad():
            yield
        if isinstance(self.trees[name], _fsdp_module()):
            self.trees[name].reshard()

    def _denoise(self, name: str, x: Tensor, sigma: float, text: TextKV, cache: GradientCache) -> Tensor:
        return self._call(name, lambda: self.wans[name].denoise(x, sigma, text, cache))

    def _call(self, name: str, function: Callable[[], T]) -> T:
        """Runs what reads a tree's weights, which are whole meanwhile under FSDP.

        Nothing is passed to the function that FSDP could see a gradient in: it would take the end of the first of a
        step's passes for the end of all.
        """
        return self.trees[name].call(function)


def _fsdp_module() -> tuple[type, ...]:
    """FSDP's class, where several processes train; it takes a second to import."""
    if not dist.is_initialized():
        return ()
    from torch.distributed.fsdp import FSDPModule

    return (FSDPModule,)


@contextmanager
def frozen(modules: nn.Module, needed: bool) -> Iterator[None]:
    """Keeps gradients of what runs inside from a tree's weights; gradients through it still flow."""
    if not needed:
        yield
        return
    modules.requires_grad_(False)
    try:
        yield
    finally:
        modules.requires_grad_(True)


def shard(modules: nn.Module) -> None:
    """FSDP over all processes: each keeps a part of the weights, of their gradients and of the optimizer's state."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not dist.is_initialized():
        raise PackForcingError("--fsdp shares a model among processes: start it with torchrun --nproc-per-node N.")
    fully_shard(modules, reshard_after_forward=False)
    register_fsdp_forward_method(modules, "call")


class NoiseSource:
    """Noise of the videos of a batch, block after block: [B, 16, T, h, w], each sample's from its own seed."""

    def __init__(self, seeds: Sequence[int], layout: Layout, device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        size = layout.size
        self._shape = (LATENT_CHANNELS, layout.config.block_frames, size.latent_height, size.latent_width)
        self._device = device

    def next(self) -> Tensor:
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)


# --- command line ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train forcing`."""
    common.add_run_arguments(
        parser, "forcing", steps=15_000, batch=1, rate=ForcingOptions.generator_rate, warmup=0, decay="constant"
    )
    models.add_model_arguments(parser)
    parser.add_argument(
        "--teacher",
        help="a bidirectional Wan checkpoint's file (Wan2.1-T2V-1.3B); needed, but for a model named random:...",
    )
    parser.add_argument("--compressor", help="a compressor's file to begin with; default: HR begins at zero")
    parser.add_argument("--channels", help="hidden channels of a new HR branch; default: 32,128,512,2048")
    parser.add_argument("--empty-prompt", help="safetensors file with the encoded negative prompt; the demo makes it")
    parser.add_argument("--critic-rate", type=float, default=ForcingOptions.critic_rate, help="learning rate")
    parser.add_argument("--critic-turns", type=int, default=ForcingOptions.critic_turns, help="a generator's turn")
    parser.add_argument("--guidance", type=float, default=ForcingOptions.guidance, help="of the teacher; 1 is off")
    parser.add_argument("--blocks", type=int, default=ForcingOptions.blocks, help="a video")
    parser.add_argument("--gradient-blocks", type=int, default=5, help="of a video; fewer take less memory")
    parser.add_argument("--ema", type=float, default=ForcingOptions.ema, help="of the generator's exported weights")
    parser.add_argument("--fsdp", action="store_true", help="share generator and critic among torchrun's processes")
    parser.add_argument("--recompute", action="store_true", help="less memory for the critic, more time")
    parser.add_argument("--dry-run", action="store_true", help="one turn of each kind, what it takes, and stop")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> Outcome | None:
    """Train, or go on training; export generator and compressor. With --dry-run, measure one turn of each kind."""
    device = common.start(options)
    used = models.setting(options, device, trained=True)
    trainer = build(options, used, device)
    config = common.run_config(options)
    if options.dry_run:
        if common.is_main():
            print(json.dumps(cost(trainer, config), indent=1))
        else:
            cost(trainer, config)
        return None
    outcome = train(trainer, config)
    folder = Path(options.folder)
    output = Path(options.output or folder / "generator.safetensors")
    with trainer.learners["generator"].averaged():
        metadata = common.provenance(options, outcome)
        base.export(trainer.trees["generator"], output, metadata)
        hr_output = output.with_name(f"{output.stem}-compressor.safetensors")
        compressor.export(trainer.hr, hr_output, trainer.layout, used.name)
    if common.is_main():
        print(json.dumps({"generator": str(output), "compressor": str(hr_output), **metadata}, indent=1))
    return outcome


def build(options: argparse.Namespace, used: models.TrainingModels, device: torch.device) -> ForcingTrainer:
    """The trainer that the command's options ask for."""
    if options.teacher is None and not options.model.startswith("random:"):
        raise PackForcingError(
            "DMD needs a bidirectional teacher: give --teacher FILE (for Wan, Wan2.1-T2V-1.3B; for the demo, what "
            "`train base --bidirectional` makes)."
        )
    teacher, critic = (models.wan_modules_of(options.teacher or options.model) for _ in range(2))
    dim = used.wan.shape.dim
    if options.compressor:
        state, metadata = load_compressor(options.compressor)
        if metadata.model_dim != dim or metadata.temporal_stride != used.layout.temporal_stride:
            raise PackForcingError(
                f"{options.compressor} was made for a model {metadata.model_dim} wide at temporal stride "
                f"{metadata.temporal_stride}, but here they are {dim} and {used.layout.temporal_stride}."
            )
        hr = hr_branch({name: tensor.float() for name, tensor in state.items()}, metadata.temporal_stride)
    else:
        torch.manual_seed(options.seed)
        channels = common.numbers(options.channels) or models.default_channels(options.model)
        hr = HRBranch((LATENT_CHANNELS, *channels, dim), used.layout.temporal_stride)
    settings = ForcingOptions(
        generator_rate=options.rate,
        critic_rate=options.critic_rate,
        critic_turns=options.critic_turns,
        blocks=options.blocks,
        gradient_blocks=options.gradient_blocks,
        guidance=options.guidance,
        shift=options.shift,
        steps=options.denoising_steps,
        ema=options.ema,
    )
    low = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    return ForcingTrainer(
        used.wan.modules,
        hr,
        critic.float(),
        teacher.to(low),
        used.vae,
        used.layout,
        prompt_source(options),
        empty_prompt(options),
        settings,
        device,
        cache_dtype=low,
        fsdp=options.fsdp,
        recompute=options.recompute,
    )


def prompt_source(options: argparse.Namespace) -> Callable[[int], Tensor]:
    """Encoded prompts [L, 4096] by seed: of the file's, or of the synthetic world."""
    if options.prompts is None:
        return lambda seed: encode_prompt(sample_scene(seed).caption)[0]
    contexts = models.encoded_prompts(options.prompts)
    return lambda seed: contexts[int(np.random.default_rng(seed).integers(len(contexts)))].float()


def empty_prompt(options: argparse.Namespace) -> Tensor:
    """The encoded prompt [L, 4096] that guidance leads away from."""
    if options.empty_prompt:
        return models.encoded_prompts(options.empty_prompt)[0].float()
    if options.prompts and options.guidance != 1:
        raise PackForcingError(
            "Guidance leads away from a negative prompt: give --empty-prompt FILE (safetensors, encoded like "
            "--prompts), or --guidance 1."
        )
    return encode_prompt("")[0]


def cost(trainer: ForcingTrainer, config: RunConfig) -> dict[str, Any]:
    """Seconds and peak memory of one turn of each kind, measured here, and what the paper's 3,000 iterations take."""
    seconds = {}
    for turn in ("critic", "generator"):
        start = time.perf_counter()
        batch = trainer.batch(Micro(0, turn, range(config.micro_batch), config.seed))
        dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        with torch.autocast(trainer.device.type, dtype, enabled=dtype is not None):
            losses = trainer.losses(turn, batch)
        losses["loss"].backward()
        trainer.learners[turn].update(1.0, config.clip)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        seconds[turn] = time.perf_counter() - start
    iteration = seconds["generator"] + trainer.options.critic_turns * seconds["critic"]
    return {
        "device": str(trainer.device),
        "seconds": seconds,
        "peak_memory_bytes": common.peak_memory(trainer.device),
        "samples": config.micro_batch,
        "hours_for_3000_iterations": 3000 * iteration / 3600,
    }
