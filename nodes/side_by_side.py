"""Videos side by side, to compare them."""

from __future__ import annotations

import comfy.utils
from comfy_api.latest import io

from ..packforcing.files.side_by_side import Labelled, join_side_by_side
from . import adapter, types
from .files import temporary_video
from .run_files import TemporaryVideo

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
        files = [temporary_video() for _ in videos]
        output = temporary_video()
        bar = comfy.utils.ProgressBar(1)

        def on_frames(done: int, frames: int) -> None:
            adapter.check_interrupted()
            bar.update_absolute(done, frames)

        try:
            for (video, _), file in zip(videos, files, strict=True):
                video.save_to(str(file))  # copies packets, where the video is a file already
            labels = [label for _, label in videos]
            join_side_by_side([Labelled(*pair) for pair in zip(files, labels, strict=True)], output, on_frames)
        finally:
            for file in files:
                file.unlink(missing_ok=True)
        return io.NodeOutput(TemporaryVideo(output))
