"""What a command says while it works: on stderr, if anybody is there to read it."""

from __future__ import annotations

import contextlib
import sys


def tell(text: str, end: str = "\n") -> None:
    """Prints a text. That the reader has gone, with its terminal or its pipe, ends no work."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)
