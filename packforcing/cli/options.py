"""What several commands share here: the options of `generate` and `bench` that make a model fast."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from ..generate.side_stream import CHOICES
from ..model.fp8_linear import LINEAR_DTYPES
from ..model.load import WEIGHTS_DEVICES

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # what commands are added to


def add_speed_options(command: argparse.ArgumentParser) -> None:
    """--compile, --overlap, --linear-dtype and --weights-device."""
    command.add_argument(
        "--compile", action="store_true", help="compile the transformer's layers first, which takes a minute"
    )
    command.add_argument(
        "--overlap",
        default="auto",
        choices=CHOICES,
        help="decode each block beside the denoising of the next, where memory allows; auto: on a GPU",
    )
    command.add_argument(
        "--linear-dtype", default="model", choices=LINEAR_DTYPES, help="what the transformer's layers multiply in"
    )
    command.add_argument(
        "--weights-device",
        default="device",
        choices=WEIGHTS_DEVICES,
        help="where the transformer's layers lie; from host memory each is read ahead of its turn: slower, the same "
        "video",
    )
