"""The command `inspect`: a record that `generate --report` or the Cache Inspector wrote, as report and picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import PackForcingError
from ..files.weights import read_json
from ..files.writing import check_output_file
from ..generate.record import CacheRecord
from ..inspector import overview, picture, report
from .options import Commands


def add_command(commands: Commands) -> None:
    """Adds `inspect` and its options."""
    command = commands.add_parser("inspect", help="show a cache record again")
    command.add_argument("record", help="a JSON file of `generate --report` or the node Cache Inspector")
    command.add_argument("--picture", help="a PNG file for the inspector's picture")
    command.add_argument("--overview", help="a PNG file for the small picture, as the node shows it")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the report, and writes the pictures that are asked for."""
    check_output_file(options.picture, "picture")
    check_output_file(options.overview, "overview")
    record = read_record(options.record)
    for path, draw in ((options.picture, picture), (options.overview, overview)):
        if path:
            draw(record).save(path, format="PNG")
    print(report(record))


def read_record(path: str) -> CacheRecord:
    """Reads a record of this version or an earlier one. Raises PackForcingError for what is none."""
    try:
        document = read_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackForcingError(
            f"{path} cannot be read as JSON ({error}): choose a file that `generate --report` wrote."
        ) from error
    return CacheRecord.from_dict(document)
