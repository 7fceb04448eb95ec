"""Files in ComfyUI's folders."""

from __future__ import annotations

import uuid
from pathlib import Path

import folder_paths

STATES = "packforcing_states"  # a folder below ComfyUI's output folder, and below its input folder


def temporary_video() -> Path:
    """A new name for a video in ComfyUI's temporary folder, which is made if it is missing."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"packforcing_{uuid.uuid4().hex}.mp4"


def state_folder() -> Path:
    """The folder for the states of videos in ComfyUI's output folder, which is made if it is missing."""
    folder = Path(folder_paths.get_output_directory()) / STATES
    folder.mkdir(parents=True, exist_ok=True)
    return folder
