"""The command `train base`: its clips, the weights that it begins with, and the files that it writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import check_between
from ..config import LATENT_CHANNELS, default_temporal_stride
from ..demo.models import demo_vae
from ..devices import fast_dtype
from ..errors import PackForcingError
from ..files.compressor_file import load_compressor
from ..files.weights import read_state_dict
from ..model.compressor import HRBranch, hr_branch
from ..model.load import load_wan_modules
from ..model.vae import load_vae
from ..model.wan_modules import SIZES, WanModules, WanSizes, build_wan_modules, random_state_dict
from ..processes import is_main, wait_for_all
from ..world.scenes import FRAME
from . import options as common
from .base import BaseTrainer
from .base_samples import BaseOptions, TrainingClips
from .clips import ClipSet, LatentClips, prepare
from .compressor import export as export_compressor
from .histories import BLOCK_FRAMES, HISTORIES, PLACE_HISTORIES, History, bidirectional
from .loop import Outcome, train
from .models import DEMO_CHANNELS
from .processes import whole

Module = TypeVar("Module", bound=nn.Module)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train base`."""
    common.add_run_arguments(parser, "base", steps=6000, batch=4, rate=BaseOptions.rate, warmup=200)
    add_clip_arguments(parser)
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
    parser.add_argument(
        "--first-again", type=int, default=BaseOptions.first_again, help="more noise levels of the first block"
    )
    parser.add_argument("--focus", type=float, default=0.0, help="part of the loss's weight on what is small, 0 to 1")
    parser.add_argument("--ema", type=float, default=BaseOptions.ema, help="of the exported weights; 0 is off")
    parser.add_argument("--init", help="a transformer's file to begin with; default: random weights")
    parser.add_argument(
        "--start-share",
        type=float,
        default=0.0,
        help="share of the weights of --init in the exported ones, 0 to 1: what a short run forgets, some of it keeps",
    )
    parser.add_argument(
        "--compressor-output", help="train an HR branch with the transformer, and export the compressor to this file"
    )
    parser.add_argument("--compressor-init", help="a compressor's file to begin with; default: an HR branch of zeros")
    parser.add_argument(
        "--frozen", action="store_true", help="train the HR branch alone, always with it, and leave the transformer"
    )
    parser.add_argument("--bidirectional", action="store_true", help="train a teacher for DMD: a clip is one block")
    parser.set_defaults(run=run)


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """Which clips, and how often each kind is drawn."""
    parser.add_argument("--clips", type=int, default=2048, help="of the training set")
    parser.add_argument(
        "--away-clips", type=int, default=0, help="more clips, in which things leave the view and come back"
    )
    parser.add_argument("--away-share", type=float, default=BaseOptions.away_share, help="of them among the samples")
    parser.add_argument("--place-clips", type=int, default=0, help="more clips: tours through places under names")
    parser.add_argument("--place-share", type=float, default=BaseOptions.place_share, help="of them among the samples")
    parser.add_argument(
        "--twin-clips", type=int, default=0, help="more clips: the first of --clips with one colour changed each"
    )
    parser.add_argument(
        "--switch-share",
        type=float,
        default=BaseOptions.switch_share,
        help="of the samples: their prompt changes on the way, from a clip to its twin or back",
    )
    parser.add_argument(
        "--described", type=float, default=BaseOptions.described, help="share of places described at first, 0 to 1"
    )
    parser.add_argument(
        "--composed", type=float, default=0.0, help="share of the tours that are put together from blocks of --clips"
    )
    parser.add_argument(
        "--telling-names", type=float, default=0.0, help="share of these whose names tell the places' colours"
    )
    parser.add_argument(
        "--pure-noise", type=float, default=0.0, help="share of the tours' blocks that are denoised from pure noise"
    )
    parser.add_argument(
        "--least-returns", type=int, default=1, help="leave out tours with fewer blocks that show a place again"
    )
    parser.add_argument(
        "--whole-steps", type=int, default=0, help="first steps that see the whole history, where there are places"
    )


def run(options: argparse.Namespace) -> Outcome:
    """Encode the clips that are missing; train, or go on training; export what there is."""
    device = common.start(options)
    check_start_share(options)
    check_frozen(options)
    config, settings, histories = common.run_config(options), hyperparameters(options), histories_of(options)
    data = prepare_clips(options, device)
    trainer = BaseTrainer(
        first_modules(options),
        data,
        settings,
        histories=histories,
        start=options.init or options.seed,
        device=device,
        cache_dtype=torch.bfloat16 if options.precision == "bfloat16" else torch.float32,
        hr=first_hr(options),
        frozen=options.frozen,
    )
    outcome = train(trainer, config)
    provenance = common.provenance(options, outcome)
    with trainer.learners["base"].averaged():
        output = export_trained(trainer, options, provenance)
    if is_main():
        print(json.dumps({"output": str(output), "bytes": output.stat().st_size, "minutes": outcome.minutes}))
    return outcome


def export_trained(trainer: BaseTrainer, options: argparse.Namespace, provenance: Mapping[str, str]) -> Path:
    """Writes what was trained: the transformer, and the compressor. Returns the first file of them."""
    share, output = options.start_share, Path(options.output or Path(options.folder) / "base.safetensors")
    if trainer.frozen:
        output = Path(options.init)
    else:
        modules = mixed(first_modules(options), trainer.modules, share) if share else trainer.modules
        export(modules, output, provenance)
    if trainer.hr is None:
        return output
    start = first_hr(options) if share and options.compressor_init else None
    hr = trainer.hr if start is None else mixed(start, trainer.hr, share)
    compressor = Path(options.compressor_output)
    export_compressor(hr, compressor, trainer.compressor_layout, output.stem)
    return compressor if trainer.frozen else output


def check_start_share(options: argparse.Namespace) -> None:
    """Raises PackForcingError for a --start-share that cannot be."""
    check_between("--start-share", options.start_share, 0, 1)
    if options.start_share and not options.init:
        raise PackForcingError(
            f"--start-share is {options.start_share:g}, a share of the weights of --init, but there is no --init: give "
            "the transformer to begin with, or leave the share out."
        )


def check_frozen(options: argparse.Namespace) -> None:
    """Raises PackForcingError for --frozen without what it trains, or for; and for a teacher, which has no history."""
    if options.frozen and options.bidirectional:
        raise PackForcingError(
            "--frozen trains the HR branch, which is in a history's mid blocks, but a bidirectional teacher has no "
            "history: leave out --frozen, or --bidirectional."
        )
    if options.frozen and not (options.init and options.compressor_output):
        raise PackForcingError(
            "--frozen trains the HR branch for a transformer that stays as it is: give that by --init, and a file for "
            "the compressor by --compressor-output."
        )


def mixed(start: Module, trained: Module, share: float) -> Module:
    """`start`, with `share` of its own weights and the rest of those that were trained from it, a line between the two.

    What lies between is often better at the old task than the one and at the new task than the other (Wortsman et al.,
    2022, "Robust fine-tuning of zero-shot models").
    """
    with torch.no_grad():
        for own, other in zip(start.parameters(), trained.parameters(), strict=True):
            own.lerp_(other.to(own), 1 - share)
    return start


def prepare_clips(options: argparse.Namespace, device: torch.device) -> TrainingClips:
    """Encodes the clips that are missing, and loads all."""
    clips = ClipSet(options.clips, latent_frames=options.latent_frames, size=options.size)
    away = replace(clips, count=options.away_clips, away=True) if options.away_clips else None
    places = replace(clips, count=options.place_clips, places=True) if options.place_clips else None
    twins = replace(clips, count=options.twin_clips, twins=True) if options.twin_clips else None
    if options.bidirectional and (places or twins):
        raise PackForcingError(
            "A tour or a change of the prompt has a caption for each block, but a bidirectional teacher takes a clip "
            "as one block: leave out --place-clips and --twin-clips, or --bidirectional."
        )
    if twins is not None and twins.count > clips.count:
        raise PackForcingError(
            f"Each twin belongs to one of --clips, but --twin-clips is {twins.count} and --clips is {clips.count}: ask "
            "for no more twins than clips."
        )
    for name, each in (("--clips", clips), ("--away-clips", away), ("--place-clips", places), ("--twin-clips", twins)):
        if each is not None and not 0 < options.held_out < each.count:
            raise PackForcingError(
                f"Some clips train and at least one measures, but {name} is {each.count} and --held-out is "
                f"{options.held_out}: ask for more clips, or keep fewer (but 1) out."
            )
    folder = Path(options.clip_folder or Path(options.folder) / "clips")
    weights = read_state_dict(options.vae)[0] if options.vae else demo_vae()
    vae = load_vae(weights, fast_dtype(device), device).to_layout(channels_last=True)
    for each in filter(None, (clips, away, places, twins)):
        written = prepare(folder, each, vae, *common.part_of(None))
        print(f"{written} of {each.shards} files of clips encoded", flush=True)
    wait_for_all()
    return TrainingClips(
        LatentClips(folder, clips),
        LatentClips(folder, away) if away else None,
        options.held_out,
        LatentClips(folder, places) if places else None,
        LatentClips(folder, twins) if twins else None,
    )


def histories_of(options: argparse.Namespace) -> tuple[History, ...]:
    """The partitions of the history that the options ask for."""
    if options.bidirectional:
        return bidirectional(options.latent_frames)
    histories = PLACE_HISTORIES if options.place_clips else HISTORIES
    if not options.frozen:
        return histories
    last = options.latent_frames // BLOCK_FRAMES - 1
    chosen = tuple(each if each.config().attended_mids(last) else replace(each, share=0.0) for each in histories)
    if not any(each.share for each in chosen):
        raise PackForcingError(
            f"The HR branch is in mid blocks, but a clip of {options.latent_frames} latent frames has no block in the "
            "middle: ask for longer ones."
        )
    return chosen


def first_modules(options: argparse.Namespace) -> WanModules:
    """The transformer that training begins with: a file's, or a random one."""
    if options.init:
        return load_wan_modules(options.init).float()
    sizes = SIZES["tiny"]
    return build_wan_modules(sizes, initial_state_dict(sizes, options.seed))


def first_hr(options: argparse.Namespace) -> HRBranch | None:
    """The HR branch that training begins with: a file's, or a new one; None when none is trained."""
    if options.compressor_output is None:
        return None
    if options.compressor_init:
        state, metadata = load_compressor(options.compressor_init)
        return hr_branch(state, metadata.temporal_stride).float()
    torch.manual_seed(options.seed)
    stride = default_temporal_stride(BLOCK_FRAMES)
    return HRBranch((LATENT_CHANNELS, *DEMO_CHANNELS, SIZES["tiny"].dim), stride)


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
        place_share=options.place_share,
        switch_share=options.switch_share,
        described=options.described,
        composed=options.composed,
        telling_names=options.telling_names,
        pure_noise=options.pure_noise,
        least_returns=options.least_returns,
        whole_steps=options.whole_steps,
        dual_share=1.0 if options.frozen else BaseOptions.dual_share,
        first_again=0 if options.bidirectional else options.first_again,
    )


def export(modules: WanModules, path: str | Path, metadata: Mapping[str, str]) -> Path:
    """Writes a transformer as bfloat16 safetensors under Wan 2.1's names. All processes call it, and one writes."""
    state = {name: whole(t.detach()).to("cpu", torch.bfloat16) for name, t in modules.state_dict().items()}
    path = Path(path)
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in state.items()}, path, metadata={"format": "pt", **metadata})
    return path
