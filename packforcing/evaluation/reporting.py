"""What both kinds of evaluation read from the command line and tell: names, folders, versions, progress."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..errors import PackForcingError

Tell = Callable[[str], None]


def unique(text: str) -> list[str]:
    """Names with commas between, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def readable_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def output_folder(path: str, results: str) -> Path:
    """The folder with its file of `results`, made if missing. Raises PackForcingError when it cannot be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / results).touch()
    except OSError as error:
        raise PackForcingError(
            f"Results cannot be written to {folder} ({error.strerror}): choose another --output."
        ) from None
    return folder


def tell_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
