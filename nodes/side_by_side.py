"""Videos side by side, to compare them."""

from __future__ import annotations

import uuid
from pathlib import Path

import comfy.utils
import folder_paths
from comfy_api.input_impl import VideoFromFile
from comfy_api.latest import io

from ..packforcing.files.side_by_side import Labelled, join_side_by_side
from . import adapter, types

MOST_VIDEOS = 4


class SideBySideNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[io.Input] = []
        for number in range(1, MOST_VIDEOS + 1):
            optional = number > 2
            inputs.append(
                io.Video.Input(
                    f"video_{number}",
                    optional=optional,
                    tooltip="All videos have the same size and frames a second.",
                )
            )
            inputs.append(
                io.String.Input(f"label_{number}", default="", optional=optional, tooltip="The words above the video.")
            )
        return io.Schema(
            node_id="PackForcingSideBySide",
            display_name="PackForcing Side By Side",
            category=types.CATEGORY,
            description="Joins two to four videos of one size into one, side by side, each under its label. It ends "
            "with the longest one; a shorter one holds its last frame until then.",
            inputs=inputs,
            outputs=[io.Video.Output(display_name="video")],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        given = [(inputs.get(f"video_{n}"), inputs.get(f"label_{n}") or "") for n in range(1, MOST_VIDEOS + 1)]
        videos = [(video, label) for video, label in given if video is not None]
        files = [temporary_file() for _ in videos]
        output = temporary_file()
        try:
            for (video, _), file in zip(videos, files, strict=True):
                video.save_to(str(file))  # copies packets, where the video is a file already
            labels = [label for _, label in videos]
            join_side_by_side([Labelled(*pair) for pair in zip(files, labels, strict=True)], output, on_frames)
        finally:
            for file in files:
                file.unlink(missing_ok=True)
        return io.NodeOutput(VideoFromFile(str(output)))


def on_frames(done: int, frames: int) -> None:
    """Shows how far it is, and hears Cancel."""
    adapter.check_interrupted()
    comfy.utils.ProgressBar(frames).update_absolute(done)


def temporary_file() -> Path:
    """A new name for a video in ComfyUI's temporary folder."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"packforcing_{uuid.uuid4().hex}.mp4"
