"""The command line: python -m packforcing plan | generate | encode | inspect | bench | evaluate | train."""

from __future__ import annotations

import argparse
import sys

import torch

from ..errors import PackForcingError
from . import encode, generate, inspect, measure, plan, train


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it parses has a function `run`, which takes the options."""
    root = argparse.ArgumentParser(prog="python -m packforcing", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)
    plan.add_command(commands)
    generate.add_command(commands)
    encode.add_command(commands)
    inspect.add_command(commands)
    measure.add_commands(commands)
    train.add_command(commands)
    return root


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the process's exit code: 0; 1 after an error, which is told; 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except PackForcingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        print(
            f"error: The device ran out of memory ({reason}), and what was finished is kept: choose a smaller frame or "
            "batch, or close other programs that use the device.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was finished is in the file", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
