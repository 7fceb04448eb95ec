"""Signals that end a run: Ctrl-C, and those of a terminal that closes or of a machine that shuts down."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopping:
    """Turns signals into KeyboardInterrupt.

    While blocks are made, the first signal waits for the next model pass: there a run ends without losing a block. If
    there is none any more, since the last files are being written, they are written. The second one does not wait.

    Args:
        anywhere: whether several processes have heard one, given whether this one has: they stop at the same pass.

    Attributes:
        making: whether a block has been begun.
    """

    def __init__(self, anywhere: Callable[[bool], bool] = bool) -> None:
        self.making = False
        self._anywhere = anywhere
        self._asked = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        if self._asked or not self.making:
            raise KeyboardInterrupt
        self._asked = True

    def on_step(self, block: int, step: int) -> None:
        """The `on_step` of a `LongVideo`. Raises KeyboardInterrupt after a signal."""
        if self._anywhere(self._asked):
            raise KeyboardInterrupt


@contextmanager
def stopping(anywhere: Callable[[bool], bool] = bool) -> Iterator[Stopping]:
    """Hears the signals until the context ends; only a program's main thread can. The argument is `Stopping`'s."""
    heard = Stopping(anywhere)
    before: dict[Any, Any] = {}
    if current_thread() is main_thread():
        before = {number: signal.signal(number, heard.hear) for number in SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
