"""The commands `bench`, `check` and `evaluate`. What they do lies in the rooms of these names."""

from __future__ import annotations

import argparse

from ..bench import exactness
from ..bench import run as bench
from ..command_options import add_cache_options, cache_config
from ..devices import usable_device
from ..evaluation import run as evaluation
from ..files.writing import check_output_file
from .options import Commands, add_speed_options


def add_commands(commands: Commands) -> None:
    """Adds `bench`, `check` and `evaluate` with their options."""
    command = commands.add_parser("bench", help="measure time and memory, against floors and other caches")
    bench.add_arguments(command)
    add_speed_options(command)
    add_cache_options(command)
    command.set_defaults(run=run_bench)

    command = commands.add_parser("check", help="whether a device computes what the CPU does")
    exactness.add_arguments(command)
    command.set_defaults(run=exactness.run)

    evaluation.add_arguments(commands.add_parser("evaluate", help="compare cache policies, measured from pixels"))


def run_bench(options: argparse.Namespace) -> None:
    """Runs the benchmark, after it has been seen that its results can be written."""
    check_output_file(options.plot, "plot")
    check_output_file(options.json if options.json != "-" else None, "result")
    bench.run(options, cache_config(options), usable_device(options.device))
