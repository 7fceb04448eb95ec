"""The command line: videos of any length in fixed memory, and all that belongs to making them."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from ..devices import is_out_of_memory
from ..errors import PackForcingError
from ..telling import tell
from . import again, encode, inspect, many, measure, plan, train


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it parses has a function `run`, which takes the options."""
    root = argparse.ArgumentParser(prog="python -m packforcing", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)
    plan.add_command(commands)
    many.add_command(commands)
    again.add_command(commands)
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
        print(end="", flush=True)
    except PackForcingError as error:
        tell(f"error: {error}")
        return 1
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        tell(
            f"error: The device ran out of memory ({reason}), and what was finished is kept: choose a smaller frame or "
            "batch, or close other programs that use the device."
        )
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tell(
            "error: Memory ran out, and what was finished is kept: choose a smaller frame, a "
            "shorter video, or close other programs."
        )
        return 1
    except BrokenPipeError:  # nobody reads what was printed; the files are written by now
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python writes to it once more as it ends)
        return 0
    except KeyboardInterrupt:
        tell("\nstopped; what was finished is in the file")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
