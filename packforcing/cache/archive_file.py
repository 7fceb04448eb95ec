"""A file for what the archive holds: for videos whose archive is larger than memory.

The file has no name, so that nobody has to remove it: the system takes its room back when the run ends, in whatever
way.
It is written and read, and not mapped: a disk that is full or fails is then an error that can be told, where a mapped
file ends the process. What is read often stays in the system's cache of files, which gives way where memory is short.
"""

from __future__ import annotations

import errno
import os
import tempfile
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import PackForcingError

Folder: TypeAlias = "str | os.PathLike[str] | None"  # None: the system's folder for temporary files


class ArchiveFile:
    """Pieces of one shape, numbered from 0, in a file: [2, B, N_c, H, D] each, as `Slabs` has them in memory.

    Args:
        folder: where the file lies.
        pinned: whether what is read goes on to a CUDA device.

    Raises PackForcingError, here and later, when the file cannot be made, written or read.
    """

    def __init__(self, folder: Folder, pinned: bool = False) -> None:
        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        self._pinned = pinned
        self._count = 0
        self._like: Tensor  # a piece without data
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix="packforcing-archive-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._unusable("made", error) from error

    def append(self, pieces: Tensor) -> int:
        """Stores a copy of [n, ...], and returns the first one's number. What fails has stored nothing."""
        first = self._count
        self._like = pieces[0].to("meta")
        for number, piece in enumerate(pieces, first):
            self._write(number * self._bytes, _bytes_of(piece.to("cpu").contiguous()))
        self._count += len(pieces)
        return first

    def __getitem__(self, number: int) -> Tensor:
        piece = torch.empty_like(self._like, device="cpu", pin_memory=self._pinned)
        room, offset = _bytes_of(piece), number * self._bytes
        try:
            self._file.seek(offset)
            while room:
                read = self._file.readinto(room)
                if not read:
                    raise OSError(errno.EIO, "it has become shorter")
                room = room[read:]
        except OSError as error:
            raise self._unusable("read", error) from error
        return piece

    @property
    def _bytes(self) -> int:
        """Of a piece."""
        return self._like.nbytes

    def _write(self, offset: int, content: memoryview) -> None:
        try:
            self._file.seek(offset)
            while content:
                written = self._file.write(content)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                content = content[written:]
        except OSError as error:
            raise self._unusable("written", error) from error

    def _unusable(self, what: str, error: OSError) -> PackForcingError:
        return PackForcingError(
            f"The archive's file in {self.folder} cannot be {what} ({error.strerror}): free some space, or choose "
            "another folder or archive_device."
        )


def _bytes_of(piece: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, which share its memory."""
    return piece.view(-1).view(torch.uint8).numpy().data
