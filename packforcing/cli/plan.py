"""The command `plan`: what a run will hold."""

from __future__ import annotations

import argparse
import json

from ..command_options import add_cache_options, add_video_options, cache_config
from ..config import FrameSize
from ..generate.fit import Wish, card_table, fit_json, fit_text
from ..generate.plan import plan, plan_text
from ..known_models import KNOWN_MODELS, MODELS
from .options import Commands

DEFAULT_MODEL = "wan2.1-1.3b"


def add_command(commands: Commands) -> None:
    """Adds `plan` and its options."""
    command = commands.add_parser("plan", help="what a run will hold, in tokens and bytes")
    command.add_argument("--model", default=DEFAULT_MODEL, choices=MODELS)
    usual = KNOWN_MODELS[DEFAULT_MODEL]
    add_video_options(command, usual.width, usual.height, seconds=120.0)
    add_cache_options(command)
    command.add_argument("--fit", metavar="CARD", help="the settings that fit a card, such as 8GB")
    command.add_argument("--cards", action="store_true", help="a table of cards, models, frames and settings")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the plan, or what fits."""
    config = cache_config(options)
    if options.cards:
        print(card_table(config, options.seconds))
        return
    model, size = KNOWN_MODELS[options.model], FrameSize(options.width, options.height)
    if options.fit:
        wish = Wish(options.model, config, size, options.seconds, options.fps)
        print(json.dumps(fit_json(wish, options.fit)) if options.json else fit_text(wish, options.fit))
        return
    result = plan(model.sizes.shape, config, size, options.seconds, options.fps, vae_dim=model.vae_dim)
    print(json.dumps(result.as_dict()) if options.json else plan_text(result, options.model))
