"""An MP4 that is written bit by bit, and has its name only when something can be seen in it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import PackForcingError
from .writing import part_of, target_of


class GrowingFile:
    """A file that has `.part` behind its name until something of the video is in it.

    Raises PackForcingError when what an earlier run left under that name cannot be taken away.
    """

    def __init__(self, path: Path) -> None:
        self._target = target_of(path)
        special = self._target.exists() and not self._target.is_file()  # a device, say, has no file beside it
        self._shown = special
        self.path = self._target if special else part_of(self._target)
        if special:
            return
        try:  # or what a killed run left would be taken for this one's, until its first frame is written
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise PackForcingError(
                f"{self.path} is there from an earlier run, and cannot be removed ({error.strerror}): close what has "
                "it open, or choose another name for the video."
            ) from error

    def show(self) -> None:
        """Gives the file its name, once it holds frames. Where open files cannot be renamed, that waits for the end."""
        if self._shown or not _holds_frames(self.path):
            return
        with contextlib.suppress(PermissionError):
            self._rename()

    def end(self) -> None:
        """Gives the closed file its name, if it has not got it; one without frames is removed."""
        if not self._shown and _holds_frames(self.path):
            self._rename()
        if not self._shown:
            self.path.unlink(missing_ok=True)

    def _rename(self) -> None:
        os.replace(self.path, self._target)
        self.path, self._shown = self._target, True


def _holds_frames(path: Path) -> bool:
    """Whether an MP4 has a whole box of frames already: each box begins with its size and its name."""
    if not path.is_file():
        return False
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start + 8 <= size:
            file.seek(start)
            length, name = int.from_bytes(file.read(4), "big"), file.read(4)
            if name == b"mdat" or length < 8:  # a size of 0 or 1 is that of a long box, which only frames fill
                return name == b"mdat" and start + length <= size
            start += length
    return False
