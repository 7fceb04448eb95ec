"""Digests of files: whether a file is the one that a video was made of."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from ..errors import PackForcingError

PIECE = 1 << 20  # bytes that are read at a time


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in _files(path))


def digest_of(path: Path) -> str:
    """The SHA-256 of a file; of a folder, that of its files' names and digests. Raises PackForcingError for none."""
    try:
        if not path.is_dir():
            return _digest(path)
        rows = (f"{file.relative_to(path).as_posix()} {_digest(file)}\n" for file in _files(path))
        return hashlib.sha256("".join(rows).encode()).hexdigest()
    except OSError as error:
        raise PackForcingError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _digest(path: Path) -> str:
    """Of a file that did not change since it was asked for last, what was found then: weights take seconds to read."""
    stat = path.stat()
    return _digest_as_it_is(path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=256)
def _digest_as_it_is(path: Path, *stat: int) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(piece):
            digest.update(piece[:read])
    return digest.hexdigest()


def found_below(name: str, folders: list[Path]) -> list[Path]:
    """The files and folders of a name in these folders and below them."""
    found: list[Path] = []
    for root in folders:
        for folder, folders_inside, files in os.walk(root):
            found += [Path(folder, each) for each in (*files, *folders_inside) if each == name]
    return found
