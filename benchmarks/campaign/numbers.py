"""Absurd values for every setting: each dataclass of settings, and each option of the command line that is a number."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from packforcing.cli.main import parser
from packforcing.cli.plan import run as run_plan
from packforcing.cli.sampling import requested_sampling
from packforcing.command_options import cache_config
from packforcing.config import CacheConfig, FrameSize, Layout, Length
from packforcing.errors import PackForcingError
from packforcing.evaluation.policies import POLICIES
from packforcing.evaluation.recall_runs import RecallSettings
from packforcing.evaluation.runs import Settings
from packforcing.evaluation.switches import SwitchSettings
from packforcing.files.compressor_file import CompressorMetadata
from packforcing.generate.plan import plan
from packforcing.generate.sampling import Sampling
from packforcing.generate.schedule import Level, Schedule
from packforcing.generate.story import Story, Stretch, TimedPrompt, check_story_times
from packforcing.known_models import MODELS, ModelShape
from packforcing.training.base_command import hyperparameters as base_hyperparameters
from packforcing.training.base_samples import BaseOptions
from packforcing.training.clips import ClipSet
from packforcing.training.compressor import CompressorOptions
from packforcing.training.forcing import hyperparameters as forcing_hyperparameters
from packforcing.training.forcing_batch import ForcingOptions
from packforcing.training.options import run_config
from packforcing.training.run_config import RunConfig
from packforcing.training.vae import ClipShape, VAELosses

LONGEST = 0.1  # seconds of the processor
INTEGERS = (-1, 0, 1, 2, 3, 5, 16, 17, 64, 1000, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**400)
FLOATS = (0.5, 1.0, 2.0, -1.5, 1e-300, 1e308, math.inf, -math.inf, math.nan)
OTHERS = (
    None,
    True,
    False,
    "",
    "x",
    "5",
    "nan",
    "\ud800",
    "a" * 10_000,
    b"5",
    [],
    [1],
    (),
    (1,),
    (1, 2),
    {},
    {"a": 1},
    1j,
    object(),
)
VALUES = (*INTEGERS, *FLOATS, *OTHERS)


@dataclass(frozen=True)
class Setting:
    """A dataclass of settings, with values that work, and what a run asks of it first."""

    make: Callable[..., Any]
    values: dict[str, Any]
    use: Callable[[Any], object] = repr


def _fields_of(kind: type) -> dict[str, Any]:
    """The defaults of a dataclass; a field without one must be given."""
    made = kind()
    return {each.name: getattr(made, each.name) for each in fields(kind)}


def _layout_numbers(layout: Layout) -> object:
    return layout.context_tokens, layout.aside_tokens, plan(MODELS["tiny"], layout.config, layout.size, 60)


TEXT: Any = None  # stories are not made
SIZE = FrameSize(64, 64)
POLICY = tuple(POLICIES.values())[:1]
SETTINGS: dict[str, Setting] = {
    "CacheConfig": Setting(
        CacheConfig, _fields_of(CacheConfig), lambda found: (found.partition(1000), found.archived_blocks(1000))
    ),
    "FrameSize": Setting(FrameSize, {"width": 832, "height": 480}, lambda found: found.tokens_per_frame),
    "Layout": Setting(
        Layout, {"config": CacheConfig(), "size": SIZE, "temporal_stride": 2, "direct": False}, _layout_numbers
    ),
    "Length": Setting(Length, {"seconds": 60, "fps": 16, "block_frames": 4}, lambda found: found.video_frames),
    "ModelShape": Setting(ModelShape, {"layers": 2, "dim": 256, "heads": 2}, lambda found: found.kv_bytes(10)),
    "Sampling": Setting(Sampling, _fields_of(Sampling), lambda found: found.timesteps_of(0)),
    "Schedule": Setting(Schedule, {"levels": (Level(1.0, 1.0), Level(0.5, 0.5)), "first": ()}, lambda f: f.steps(0)),
    "Story": Setting(
        lambda start, switch, blend_blocks: Story((Stretch(0, TEXT), Stretch(start, TEXT)), switch, blend_blocks),
        {"start": 3, "switch": "blend", "blend_blocks": 2},
        lambda found: (found.text(5), found.refreshes(5)),
    ),
    "TimedPrompt": Setting(
        lambda seconds, prompt: [TimedPrompt(0, "a"), TimedPrompt(seconds, prompt)],
        {"seconds": 3, "prompt": "a cat"},
        lambda found: check_story_times(found, 16, 4, 100),
    ),
    "CompressorMetadata": Setting(
        CompressorMetadata,
        {"model_dim": 8, "latent_channels": 16, "temporal_stride": 2, "hidden_channels": (8,), "block_frames": 4},
        lambda found: found.channels,
    ),
    "RunConfig": Setting(
        RunConfig,
        {each.name: each.default for each in fields(RunConfig)} | {"folder": "x", "steps": 10},
        lambda found: [found.rate(step) for step in range(10)],
    ),
    "ClipSet": Setting(
        ClipSet,
        {each.name: each.default for each in fields(ClipSet)} | {"count": 8},
        lambda found: (found.shards, found.kind, found.as_dict()),
    ),
    "ClipShape": Setting(ClipShape, {"frames": 5, "crop": 32, "size": 128, "clips": 5, "share": 0.3}),
    "VAELosses": Setting(VAELosses, _fields_of(VAELosses)),
    "BaseOptions": Setting(BaseOptions, _fields_of(BaseOptions)),
    "ForcingOptions": Setting(ForcingOptions, _fields_of(ForcingOptions)),
    "CompressorOptions": Setting(CompressorOptions, _fields_of(CompressorOptions)),
    "evaluation Settings": Setting(
        lambda seconds, prompts, seeds: Settings(POLICY, (seconds,), prompts, seeds=seeds),
        {"seconds": 5, "prompts": 4, "seeds": 1},
    ),
    "RecallSettings": Setting(lambda gap, videos: RecallSettings(POLICY, (gap,), videos), {"gap": 2, "videos": 2}),
    "SwitchSettings": Setting(lambda videos: SwitchSettings(POLICY, videos), {"videos": 2}),
}


@dataclass
class Outcomes:
    """All values given to one setting or command."""

    given: int = 0
    worked: int = 0
    refused: int = 0
    longest_seconds: float = 0.0
    problems: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, call: Callable[[], object]) -> None:
        """Calls, and keeps what came of it."""
        self.given += 1
        start = time.process_time()
        try:
            call()
            self.worked += 1
        except PackForcingError as error:
            self.refused += 1
            if "\n" in str(error) or len(str(error)) > 1000 or not str(error).endswith("."):
                self._problem(f"{what}: no sentence: {str(error)[:80]!r}")
        except BaseException as error:
            self._problem(f"{what}: {type(error).__name__}: {str(error)[:80]}")
        seconds = time.process_time() - start
        self.longest_seconds = max(self.longest_seconds, seconds)
        if seconds > LONGEST:
            self._problem(f"{what}: {seconds:.2f} s")

    def _problem(self, told: str) -> None:
        self.problems[told] = self.problems.get(told, 0) + 1


def campaign(pairs: int, seed: int) -> dict[str, Outcomes]:
    """Every value for every field, and so many drawn pairs of fields; then the options of the command line."""
    found = {name: _setting(setting, pairs, random.Random(f"{seed} {name}")) for name, setting in SETTINGS.items()}
    found["options"] = _options()
    for name, outcomes in found.items():
        print(f"numbers, {name}: {outcomes.given}, problems {dict(outcomes.problems)}", file=sys.stderr, flush=True)
    return found


def _setting(setting: Setting, pairs: int, rng: random.Random) -> Outcomes:
    outcomes = Outcomes()
    for changes in _changes(tuple(setting.values), pairs, rng):
        values = setting.values | changes
        told = ", ".join(f"{name}={repr(value)[:30]}" for name, value in changes.items())
        outcomes.add(told, lambda values=values: setting.use(setting.make(**values)))
    return outcomes


def _changes(names: tuple[str, ...], pairs: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    for name in names:
        for value in VALUES:
            yield {name: value}
    for _ in range(pairs if len(names) > 1 else 0):
        yield {name: rng.choice(VALUES) for name in rng.sample(names, 2)}


# --- the command line -----------------------------------------------------------------------------------------------


def _generate_settings(options: argparse.Namespace) -> object:
    """What `generate` checks before it looks at a file."""
    config = cache_config(options, None)
    return (
        FrameSize(options.width or 64, options.height or 64),
        Length(options.seconds, options.fps, config.block_frames),
        requested_sampling(options, None),
    )


def _train(hyperparameters: Callable[[argparse.Namespace], object]) -> Callable[[argparse.Namespace], object]:
    def settings(options: argparse.Namespace) -> object:
        options.precision = options.precision or "float32"
        return run_config(options), hyperparameters(options)

    return settings


def _quiet_plan(options: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run_plan(options)


COMMANDS: dict[str, Callable[[argparse.Namespace], object]] = {
    "plan": _quiet_plan,
    "generate --prompt x": _generate_settings,
    "train base": _train(base_hyperparameters),
    "train forcing": _train(forcing_hyperparameters),
    "train compressor": _train(
        lambda o: (
            CompressorOptions(o.rate, o.ema, o.shift, o.held_out, o.targets),
            Sampling(o.seed, o.denoising_steps),
        )
    ),
    "train vae": _train(lambda o: VAELosses(o.edges, o.kl)),
}


def _options() -> Outcomes:
    """Every numeric option of the commands, with each number that its type takes."""
    outcomes = Outcomes()
    root = parser()
    for command, check in COMMANDS.items():
        words = command.split()
        usual = root.parse_args(words)
        for action in _parser_of(root, words)._actions:
            if action.type not in (int, float):
                continue
            for value in INTEGERS if action.type is int else (*INTEGERS[:-1], *FLOATS):
                options = argparse.Namespace(**vars(usual) | {action.dest: value})
                told = f"{command} {action.option_strings[0]} {repr(value)[:30]}"
                outcomes.add(told, lambda options=options, check=check: check(options))
    return outcomes


def _parser_of(root: argparse.ArgumentParser, words: list[str]) -> argparse.ArgumentParser:
    """The parser of a command such as ["train", "base"]."""
    found = root
    for word in words:
        for action in found._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                found = action.choices[word]
    return found
