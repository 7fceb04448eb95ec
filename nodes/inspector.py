"""The cache inspector: the sampler's record as a report, as pictures and as numbers."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..packforcing.generate.record import CacheRecord
from ..packforcing.inspector import numbers_json, overview, picture, report, story_of
from . import types
from .files import check_output_name, new_output_file

OVERVIEW, EVERYTHING = "overview", "everything"


class CacheInspectorNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingCacheInspector",
            display_name="PackForcing Cache Inspector",
            category=types.CATEGORY,
            description="Shows what the cache did: where every block was over time, which layer chose which mid block "
            "and by what affinity, how many bytes each partition held, and where the time went.",
            inputs=[
                types.CacheRecord.Input("record", tooltip="The cache record of the Long Video Sampler."),
                io.Combo.Input(
                    "show",
                    options=[OVERVIEW, EVERYTHING],
                    default=OVERVIEW,
                    optional=True,
                    tooltip="The picture on the node: two panels with large letters, or all of them. The output "
                    "'picture' always has all of them.",
                ),
                io.String.Input(
                    "save_json",
                    default="",
                    optional=True,
                    tooltip="A name such as packforcing/cache: the numbers become a JSON file of this name, with a "
                    "counter, in ComfyUI's output folder. Empty: no file.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="picture"),
                io.String.Output(display_name="json", tooltip="Everything in the record, and what is drawn from it."),
                types.CacheRecord.Output(display_name="record", tooltip="The record that came in."),
                io.String.Output(
                    display_name="story",
                    tooltip="What was told and said, as text for PackForcing Prompt Schedule: with the same seed and "
                    "settings it makes the same video.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, save_json=None) -> bool | str:
        """Tells a mistake before anything runs, by an exception; a name from another node is read when it is there."""
        if save_json is not None:
            check_output_name(save_json)
        return True

    @classmethod
    def execute(cls, record: CacheRecord, show: str = OVERVIEW, save_json: str = "") -> io.NodeOutput:
        text, numbers, whole = report(record), numbers_json(record), _image(picture(record))
        on_node = whole if show == EVERYTHING else _image(overview(record))
        shown = ui.PreviewImage(on_node, cls=cls).as_dict() | {"text": (text,)}
        if save_json.strip():
            path, place = new_output_file(save_json, ".json")
            path.write_text(numbers, encoding="utf-8")
            shown |= {"text": (f"{text}\nsaved in the output folder: {place.label}\n",), "files": (place.as_dict(),)}
        return io.NodeOutput(text, whole, numbers, record, story_of(record), ui=shown)


def _image(drawn: Image.Image) -> torch.Tensor:
    """ComfyUI's IMAGE: float32 [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32) / 255)[None]
