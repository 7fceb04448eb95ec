"""The options of `generate` that say how a block is denoised, and the flavour that says the rest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..config import CacheConfig
from ..errors import PackForcingError
from ..flavours import FLAVOUR_NAMES, NO_FLAVOUR, Flavour, flavour_named, flavour_of
from ..generate.sampling import Sampling, departures
from ..generate.schedule import TIMESTEPS, UPDATES, Schedule, parse_timesteps, schedule_of_timesteps, sigmas
from ..telling import tell


def add_sampling_options(command: argparse.ArgumentParser) -> None:
    """Flavour, seed, noise levels and update. What is not given, the flavour says."""
    command.add_argument(
        "--flavour",
        choices=(*FLAVOUR_NAMES, NO_FLAVOUR),
        help="how the checkpoint was trained: its schedule, and a cache preset; default: by the file's name, if sure",
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="even denoising steps a block; default: the flavour's, else 4")
    command.add_argument("--timesteps", metavar="LIST", help="in place of --steps: falling, such as 1000,757,522")
    command.add_argument("--first-timesteps", metavar="LIST", help="of the video's first block, if it has its own")
    command.add_argument("--shift", type=float, help="flow shift; default: the flavour's, else 5")
    command.add_argument(
        "--warp",
        action=argparse.BooleanOptionalAction,
        help="whether the shift warps the timesteps; default: as the flavour has it, else yes",
    )
    command.add_argument("--update", choices=UPDATES, help="default: the flavour's, else few-step")


def chosen_flavour(options: argparse.Namespace) -> Flavour | None:
    """The flavour that is named, or that the model's name tells."""
    if options.flavour is None:
        return flavour_of(options.model)
    return None if options.flavour == NO_FLAVOUR else flavour_named(options.flavour)


def requested_sampling(options: argparse.Namespace, flavour: Flavour | None) -> Sampling:
    """The sampling that is asked for. Raises PackForcingError for values that are out of range."""
    if options.timesteps is not None and options.steps is not None:
        raise PackForcingError("Both --timesteps and --steps say how many steps there are: leave one of them out.")
    steps = options.steps if options.steps is not None else flavour.steps if flavour else 4
    shift = options.shift if options.shift is not None else flavour.shift if flavour else 5.0
    update = options.update or (flavour.update if flavour else UPDATES[0])
    sampling = Sampling(options.seed, steps, shift, update)  # checks them before a list is made
    return Sampling(options.seed, steps, shift, update, _schedule(options, sampling, flavour))


def _schedule(options: argparse.Namespace, sampling: Sampling, flavour: Flavour | None) -> Schedule | None:
    """None where it is that of steps and shift."""
    timesteps, first, warp = _timesteps(options, flavour)
    if not timesteps and not first and warp:
        return None
    even = [TIMESTEPS * level for level in sigmas(sampling.steps, shift=1.0)]
    return schedule_of_timesteps(timesteps or even, first, sampling.shift, warp)


def _timesteps(options: argparse.Namespace, flavour: Flavour | None) -> tuple[Sequence[float], Sequence[float], bool]:
    """Those of each block, those of the first one, () where there are none of its own; and whether they are warped."""
    timesteps: Sequence[float] = ()
    first: Sequence[float] = ()
    if flavour and options.timesteps is None and options.steps is None:
        timesteps, first = flavour.timesteps, flavour.first_timesteps
    if options.timesteps is not None:
        timesteps = parse_timesteps(options.timesteps)
    if options.first_timesteps is not None:
        first = parse_timesteps(options.first_timesteps)
    return timesteps, first, options.warp if options.warp is not None else flavour.warp if flavour else True


def written_out(options: argparse.Namespace, flavour: Flavour | None, sampling: Sampling) -> dict[str, object]:
    """The options that ask for this sampling, whatever a flavour will mean by then."""
    timesteps, first, warp = _timesteps(options, flavour)
    return {
        "flavour": flavour.name if flavour else NO_FLAVOUR,
        "seed": sampling.seed,
        "steps": None if timesteps else sampling.steps,
        "timesteps": ",".join(map(repr, timesteps)) or None,
        "first_timesteps": ",".join(map(repr, first)) or None,
        "shift": sampling.shift,
        "warp": warp,
        "update": sampling.update,
    }


def tell_flavour(flavour: Flavour | None, sampling: Sampling, config: CacheConfig) -> None:
    """Says on standard error which flavour holds, and what of the run departs from it."""
    if flavour is None:
        return
    tell(f"flavour: {flavour.name} ({flavour.source})")
    if flavour.note:
        tell(f"  {flavour.note}")
    for phrase in departures(flavour, sampling, config):
        tell(f"warning: {phrase}")
