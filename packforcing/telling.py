"""What a command says while it works: on stderr, if anybody is there to read it."""

from __future__ import annotations

import contextlib
import sys

_muted = False


def mute(muted: bool) -> None:
    """Whether `tell` says nothing from now on: of several processes that do the same, one speaks."""
    global _muted
    _muted = muted


def tell(text: str, end: str = "\n") -> None:
    """Prints a text. That the reader has gone, with its terminal or its pipe, ends no work."""
    if _muted:
        return
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)
