"""Writing files so that they are whole or absent; and asking before the work starts whether they can be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import PackForcingError

PART = ".part"  # behind the name of a file that is being written


def target_of(path: str | os.PathLike[str]) -> Path:
    """Where writing to a path ends up: an absolute path, with links followed, so that a link stays a link."""
    return Path(os.path.realpath(path))


def part_of(path: Path) -> Path:
    """The file beside `path` that becomes `path` once it is whole."""
    return path.with_name(path.name + PART)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the name of a file to write, which becomes `path` when the body ends, and is removed when it raises.

    It is on the disk before it gets its name: after a power cut `path` is the old file or the new one.
    """
    target = target_of(path)
    part = part_of(target)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file that is whole or absent. Raises OSError when it cannot be written."""
    with whole_file(path) as part:
        part.write_bytes(content)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, what: str
) -> None:
    """Writes a safetensors file that is whole or absent. Raises PackForcingError, about `what`, when it cannot."""
    try:
        with whole_file(path) as part, _folder_for(part) as folder:
            # safetensors writes a file of its own beside this one. A process that is killed leaves it.
            save_file(dict(tensors), folder / part.name, None if metadata is None else dict(metadata))
            (folder / part.name).replace(part)
    except (OSError, SafetensorError) as error:
        raise PackForcingError(
            f"The {what} cannot be written to {path} ({error}): free some space, or choose another folder."
        ) from error


@contextmanager
def _folder_for(part: Path) -> Iterator[Path]:
    """A folder beside a file that is being written. It goes at the end, and one that a killed process left as well."""
    folder = part.with_suffix(".temp")  # a name of the same length
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output_file(path: str | os.PathLike[str] | None, what: str) -> None:
    """Raises PackForcingError when a file cannot be written; leaves an existing one as it is.

    Args:
        path: None where no file is asked for.
        what: the file in a sentence's middle, such as "report".
    """
    if path is None:
        return
    target, folder = target_of(path), Path(path).parent
    if os.path.isdir(target):  # not Path.is_dir, which raises for a name that is too long
        raise PackForcingError(f"The {what} cannot be written to {path}, which is a folder: add a file name to it.")
    if not os.path.isdir(target.parent):
        raise PackForcingError(
            f"The {what} cannot be written to {path}: the folder {folder} does not exist, create it first."
        )
    try:
        if target.exists():
            target.open("ab").close()  # opens for writing without emptying the file
        if not _is_special(target):
            part = part_of(target)  # and not the file itself, which a process that is killed here would leave empty
            is_new = not part.exists()
            part.open("ab").close()
            if is_new:
                part.unlink()
    except OSError as error:
        advice = "shorten it" if len(os.fsencode(target.name)) > 240 else "choose a folder that you may write to"
        raise PackForcingError(f"The {what} cannot be written to {path} ({error.strerror}): {advice}.") from error


def _is_special(path: Path) -> bool:
    """Whether a path is a device, a pipe or the like, beside which nothing can be written."""
    return path.exists() and not path.is_file()


def free_space(folder: str | os.PathLike[str]) -> int | None:
    """Bytes that are free in a folder; None if that is not known, since it is missing, say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def check_distinct(files: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Raises PackForcingError when two of the files to write are one; by the options that name them."""
    given = [(name, target_of(path)) for name, path in files.items() if path is not None]
    for (one, first), (other, second) in combinations(given, 2):
        if first == second:
            raise PackForcingError(f"{one} and {other} name one file, {first}: give them different names.")
