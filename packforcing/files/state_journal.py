"""The state of a video that is still being made, as a file that only grows: what is left of a run that was killed.

It is a row of entries. Each begins with 16 bytes (a mark, the checksum of what follows and its length), and holds one
safetensors file: the first a whole state of one block (`state_bytes`), each later one the latents of the next block and
the mid blocks that it attended to, and all prompts anew where they were changed since. A reader takes the entries up to
the first that is not whole, so the file is good at every moment.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import PackForcingError
from .state_file import (
    LATENTS,
    SELECTED,
    StatePrompt,
    VideoState,
    load_state,
    prompts_from,
    state_bytes,
    state_from,
    stored_prompts,
)
from .weights import read_json
from .writing import part_of, target_of

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"  # behind the name of the state's file
PROMPTS = "prompts"
MARK = b"PFJ1"
ENTRY = struct.Struct("<4sIQ")  # mark, CRC-32, bytes


def journal_of(state_path: str | os.PathLike[str]) -> Path:
    """The journal of the run that will write that state."""
    path = target_of(state_path)
    return path.with_name(path.name + UNFINISHED)


class StateJournal:
    """Writes a journal. An older file of the name stays until this one has as many blocks as `at_least`.

    A run goes on without it when the disk is full: that is told in the log once.
    """

    def __init__(self, path: Path, at_least: int = 1) -> None:
        self.path = path
        self._prompts: Sequence[StatePrompt] = ()
        self._at_least = at_least
        self._blocks = 0
        self._file: BinaryIO | None = None
        self._failed = False

    def begin(self, state: VideoState) -> None:
        """The first block, with all that the run is made with."""
        self._prompts = state.prompts
        self._write(state_bytes(state))

    def add(self, latents: Tensor, selected: Tensor, prompts: Sequence[StatePrompt]) -> None:
        """The next block: [B, 16, T, h, w], normalised, and [1, layers, top_k]; with the prompts of the whole video."""
        tensors, metadata = {LATENTS: latents.contiguous(), SELECTED: selected.contiguous()}, {}
        if _names(prompts) != _names(self._prompts):
            told, contexts = stored_prompts(prompts)
            tensors, metadata = tensors | contexts, {PROMPTS: json.dumps(told)}
            self._prompts = prompts
        self._write(save(tensors, metadata))

    def close(self) -> None:
        """Ends the writing; the file stays."""
        if self._file is not None:
            self._file.close()
            self._file = None
            part_of(self.path).unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the file, since the state is kept elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, entry: bytes) -> None:
        if self._failed:
            return
        try:
            if self._file is None:
                self._file = part_of(self.path).open("wb", buffering=0)
            framed = ENTRY.pack(MARK, zlib.crc32(entry), len(entry)) + entry
            if self._file.write(framed) < len(framed):  # what did not fit on the disk is no error by itself
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
            self._blocks += 1
            if self._blocks == self._at_least:
                self._file.close()  # not every system renames a file that is open
                part_of(self.path).replace(self.path)
                self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            self._failed = True
            log.warning(
                "The state so far cannot be written to %s (%s): should this run be killed, its last blocks are lost.",
                self.path,
                error.strerror,
            )


def _names(prompts: Sequence[StatePrompt]) -> list[tuple[int, str]]:
    return [(prompt.start, prompt.prompt) for prompt in prompts]


def read_state(path: str | os.PathLike[str]) -> VideoState:
    """The state of a finished or an unfinished run. Raises what `load_state` and `load_journal` raise."""
    return load_journal(path) if os.fspath(path).endswith(UNFINISHED) else load_state(path)


def load_journal(path: str | os.PathLike[str]) -> VideoState:
    """The state that a journal holds. Raises PackForcingError for any other file, and when no whole block is in it."""
    state: VideoState | None = None
    latents, selected = [], []
    try:
        for entry in _entries(Path(path)):
            tensors, metadata = load(entry), _metadata(entry)
            latents.append(tensors[LATENTS])
            selected.append(tensors[SELECTED])
            if state is None:
                state = state_from(tensors, metadata, os.fspath(path))
            elif PROMPTS in metadata:
                state = replace(state, prompts=prompts_from(read_json(metadata[PROMPTS]), tensors))
        if state is None:
            raise PackForcingError(f"{path} holds no finished block of a video: delete it, or choose another file.")
        return replace(state, latents=torch.cat(latents, dim=2), selected=torch.cat(selected))
    except PackForcingError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PackForcingError(
            f"{path} is no state of an unfinished video ({str(error)[:80]}): delete it, or choose another file."
        ) from error


def _metadata(entry: bytes) -> dict[str, str]:
    """The metadata in a safetensors file's header."""
    end = 8 + int.from_bytes(entry[:8], "little")
    return read_json(entry[8:end].decode()).get("__metadata__", {})


def _entries(path: Path) -> Iterator[bytes]:
    """The whole entries, up to the first that is not."""
    with path.open("rb") as file:
        while len(head := file.read(ENTRY.size)) == ENTRY.size:
            mark, checksum, length = ENTRY.unpack(head)
            if mark != MARK or length > os.fstat(file.fileno()).st_size - file.tell():
                return
            entry = file.read(length)
            if zlib.crc32(entry) != checksum:
                return
            yield entry
