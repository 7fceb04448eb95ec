"""Checkpoints: files that hold all that the next step reads, and are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import PackForcingError
from ..files.weights import reason_of

FORMAT = 1  # of the checkpoints


class Checkpoints:
    """A folder of `step-00000100.pt`, the newest `keep` of them."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        part = self.folder / "writing.part"
        with part.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        # From here on the new one is whole, under its name; only then may an old one go.
        os.replace(part, path)
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint, on the CPU; None if there is none. Raises `PackForcingError` if it is not one."""
        paths = self.paths()
        if not paths:
            return None
        try:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle raises
            raise PackForcingError(
                f"{paths[-1]} cannot be read as a checkpoint ({reason_of(error)}); delete it to go on from the one "
                "before."
            ) from error
        if not isinstance(state, dict) or not isinstance(state.get("format"), int) or state.get("format") != FORMAT:
            raise PackForcingError(f"{paths[-1]} is not a checkpoint of this version's trainers; use another folder.")
        return state
