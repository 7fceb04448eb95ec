"""Files in ComfyUI's folders."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..packforcing.checks import shown
from ..packforcing.errors import PackForcingError

NOT_IN_NAMES = frozenset('<>:"|?*\\')  # of files, on some system
LONGEST_NAME = 200  # characters; systems have 255 bytes, and a counter follows
STATES = "packforcing_states"  # a folder below ComfyUI's output folder, and below its input folder


def temporary_folder() -> Path:
    """ComfyUI's temporary folder, which is made if it is missing."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def temporary_video() -> Path:
    """A new name for a video in ComfyUI's temporary folder."""
    return temporary_folder() / f"packforcing_{uuid.uuid4().hex}.mp4"


@dataclass(frozen=True)
class OutputPlace:
    """Where a file is, as ComfyUI's /view asks for it."""

    subfolder: str  # below the output folder; "" for the folder itself
    filename: str

    @property
    def label(self) -> str:
        return f"{self.subfolder}/{self.filename}".lstrip("/")

    def as_dict(self) -> dict[str, str]:
        return {"filename": self.filename, "subfolder": self.subfolder, "type": "output"}


def check_output_name(name: str) -> None:
    """Raises PackForcingError for what cannot name a file in the output folder, such as one outside of it."""
    parts = name.strip().split("/")
    bad = any(not part.strip(" .") or len(part) > LONGEST_NAME for part in parts)
    if name.strip() and (bad or any(c in NOT_IN_NAMES or not c.isprintable() for c in name)):
        raise PackForcingError(
            f"The name of a file in the output folder is like packforcing/cache, but it is {shown(name)}: "
            "use letters, digits, spaces, '-', '_' and '/'."
        )


def new_output_file(name: str, suffix: str) -> tuple[Path, OutputPlace]:
    """A new path in ComfyUI's output folder for a name such as packforcing/cache, with a counter behind it.

    Raises PackForcingError for a name that is outside of it.
    """
    check_output_name(name)
    *folders, stem = name.strip().split("/")
    output = Path(folder_paths.get_output_directory()).resolve()
    folder = output.joinpath(*folders)
    if not folder.resolve().is_relative_to(output):  # by a link in it
        raise PackForcingError(f"The name {shown(name)} leads out of the output folder: choose another one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PackForcingError(
            f"The folder of {shown(name)} cannot be made ({error.strerror}): choose another."
        ) from error
    counter = 1
    while (path := folder / f"{stem}_{counter:05}{suffix}").exists():
        counter += 1
    return path, OutputPlace("/".join(folders), path.name)


def state_folder() -> Path:
    """The folder for the states of videos in ComfyUI's output folder, which is made if it is missing."""
    folder = Path(folder_paths.get_output_directory()) / STATES
    folder.mkdir(parents=True, exist_ok=True)
    return folder
