"""`train forcing`: the paper's joint training of generator and compressor (docs/method.md, section 2; paper 3.6).

The generator makes a video of 5 s by itself, block after block, over the three-partition cache of inference
(self-forcing). Then distribution matching distillation (DMD) moves it: towards what a teacher finds likely, and away
from what a critic finds likely. The teacher is frozen and bidirectional. The critic is trained all along, on the
generator's own videos.

- Each block is denoised up to an exit step, drawn anew for each batch. Only its last denoising pass has a gradient.
- The history is a constant for the generator: no gradient reaches it through clean passes. The compressor's HR branch
  does get its gradient through them, from the blocks that attend to its tokens.
- Teacher and critic see the whole video as one block. So the same forward pass and the same cache serve for both.

One process trains on one device. Several processes (`torchrun`) share the samples of a step; with `--fsdp` they also
share the weights, gradients and optimizer states of generator and critic.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import LATENT_CHANNELS, Layout
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..files.compressor_file import load_compressor
from ..files.encoded_prompts import read_prompt
from ..model.compressor import HRBranch, hr_branch
from ..processes import is_main
from ..world.scenes import sample_scene
from . import base_command, compressor, models
from . import options as common
from .dmd import DMDLosses, one_block
from .forcing_batch import Batch, ForcingOptions, Prompts, draw_batch
from .learner import Learner
from .loop import Outcome, train
from .networks import ForcingModels, Networks, Placement
from .run_config import MicroBatch, RunConfig
from .self_rollout import SelfRollout


class ForcingTrainer:
    """A `Trainer` with the learners "generator" (with the HR branch) and "critic".

    Args:
        models: generator, HR branch, critic, teacher and VAE.
        layout: the partition.
        prompts: of the videos.
        options: the hyperparameters.
        placement: device and memory.
    """

    def __init__(
        self, models: ForcingModels, layout: Layout, prompts: Prompts, options: ForcingOptions, placement: Placement
    ) -> None:
        self.device = placement.device
        self.options = options
        self.layout = layout
        self.prompts = prompts
        self.hr = models.hr.requires_grad_(True).to(self.device)
        self.generator = models.generator
        self.networks = Networks(models, placement)
        self.rollout = SelfRollout(self.networks, self.hr, models.vae, layout, options)
        self.dmd = DMDLosses(self.networks, one_block(layout, options.blocks), prompts.empty, options.guidance)
        # "tree" is what checkpoints call the generator.
        both = nn.ModuleDict({"tree": models.generator, "hr": models.hr})
        optimizer = self._optimizer([models.generator, models.hr], options.generator_rate)
        self.learners: dict[str, Learner[Any]] = {
            "generator": Learner(both, optimizer, options.ema),
            "critic": Learner(models.critic, self._optimizer([models.critic], options.critic_rate)),
        }

    def _optimizer(self, modules: Sequence[nn.Module], rate: float) -> torch.optim.Optimizer:
        options = self.options
        # One group for each module: FSDP shares the generator and not the small branch, and does not mix them.
        groups = [{"params": list(module.parameters())} for module in modules]
        return torch.optim.AdamW(groups, lr=rate, betas=options.betas, weight_decay=options.weight_decay)

    def describe(self) -> Mapping[str, Any]:
        config = {k: v for k, v in asdict(self.layout.config).items() if not k.startswith("archive")}
        return {**asdict(self.options), "config": config, "size": asdict(self.layout.size)}

    def turns(self, step: int) -> Sequence[str]:
        """The critic's in each step, and the generator's after every `critic_turns`."""
        last = step % self.options.critic_turns == self.options.critic_turns - 1
        return ("critic", "generator") if last else ("critic",)

    def batch(self, micro: MicroBatch) -> Batch:
        return draw_batch(micro, self.options, self.prompts, self.device)

    def losses(self, turn: str, batch: Batch) -> dict[str, Tensor]:
        if turn == "critic":
            with self.networks.constant("generator"):
                video = self.rollout.video(batch)
            return {"loss": self.dmd.critic_loss(video, batch)}
        return self.dmd.generator_losses(self.rollout.video(batch), batch)

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean and standard deviation of the averaged generator's videos on fixed prompts: a collapse shows here."""
        contexts = [self.prompts.of_seed(seed) for seed in (1, 2)]
        batch = Batch(
            context=nn.utils.rnn.pad_sequence(contexts, batch_first=True).to(self.device),
            seeds=(1, 2),
            exit_step=self.options.steps - 1,
            gradient=(),
            sigma=torch.ones(2),
        )
        with self.learners["generator"].averaged(), self.networks.constant("generator"):
            video = self.rollout.video(batch)
        return {"video_mean": video.mean().item(), "video_std": video.std().item()}


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
    parser.add_argument("--empty-prompt", help="the encoded negative prompt, FILE or FILE:NAME; the demo makes it")
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
    config, settings = common.run_config(options), hyperparameters(options)  # before anything is loaded
    loaded = models.load_training_models(options, device, trained=True)
    trainer = build(options, loaded, settings, device)
    if options.dry_run:
        if is_main():
            print(json.dumps(cost(trainer, config), indent=1))
        else:
            cost(trainer, config)
        return None
    outcome = train(trainer, config)
    folder = Path(options.folder)
    output = Path(options.output or folder / "generator.safetensors")
    with trainer.learners["generator"].averaged():
        metadata = common.provenance(options, outcome)
        base_command.export(trainer.generator, output, metadata)
        hr_output = output.with_name(f"{output.stem}-compressor.safetensors")
        compressor.export(trainer.hr, hr_output, trainer.layout, loaded.name)
    if is_main():
        print(json.dumps({"generator": str(output), "compressor": str(hr_output), **metadata}, indent=1))
    return outcome


def build(
    options: argparse.Namespace, loaded: models.TrainingModels, settings: ForcingOptions, device: torch.device
) -> ForcingTrainer:
    """The trainer that the command's options ask for."""
    if options.teacher is None and not options.model.startswith("random:"):
        raise PackForcingError(
            "DMD needs a bidirectional teacher: give --teacher FILE (for Wan, Wan2.1-T2V-1.3B; for the demo, what "
            "`train base --bidirectional` makes)."
        )
    teacher, critic = (models.wan_modules_of(options.teacher or options.model) for _ in range(2))
    low = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    hr = first_hr_branch(options, loaded)
    forcing_models = ForcingModels(loaded.modules, hr, critic.float(), teacher.to(low), loaded.vae)
    prompts = Prompts(prompt_source(options), empty_prompt(options))
    placement = Placement(device, cache_dtype=low, fsdp=options.fsdp, recompute=options.recompute)
    return ForcingTrainer(forcing_models, loaded.layout, prompts, settings, placement)


def first_hr_branch(options: argparse.Namespace, loaded: models.TrainingModels) -> HRBranch:
    """The HR branch that training begins with: a file's, or a new one."""
    dim, stride = loaded.wan.shape.dim, loaded.layout.temporal_stride
    if options.compressor:
        state, metadata = load_compressor(options.compressor)
        if metadata.model_dim != dim or metadata.temporal_stride != stride:
            raise PackForcingError(
                f"{options.compressor} was made for a model {metadata.model_dim} wide at temporal stride "
                f"{metadata.temporal_stride}, but here they are {dim} and {stride}."
            )
        return hr_branch({name: tensor.float() for name, tensor in state.items()}, metadata.temporal_stride)
    torch.manual_seed(options.seed)
    channels = common.numbers(options.channels) or models.default_channels(options.model)
    return HRBranch((LATENT_CHANNELS, *channels, dim), stride)


def hyperparameters(options: argparse.Namespace) -> ForcingOptions:
    """The hyperparameters that the command's options name."""
    return ForcingOptions(
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


def prompt_source(options: argparse.Namespace) -> Callable[[int], Tensor]:
    """Gives an encoded prompt [L, 4096] for a seed: one of the file's, or a caption of the synthetic world."""
    if options.prompts is None:
        return lambda seed: encode_prompt(sample_scene(seed).caption)[0]
    contexts = models.encoded_prompts(options.prompts)
    return lambda seed: contexts[int(np.random.default_rng(seed).integers(len(contexts)))].float()


def empty_prompt(options: argparse.Namespace) -> Tensor:
    """The encoded prompt [L, 4096] that guidance leads away from."""
    if options.empty_prompt:
        return read_prompt(options.empty_prompt).context.float()
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
        batch = trainer.batch(MicroBatch(0, turn, range(config.micro_batch), config.seed))
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
