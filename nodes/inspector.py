"""The cache inspector: the sampler's record as a report and as a picture."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..packforcing.generate.record import CacheRecord
from ..packforcing.inspector import picture, report
from . import types


class CacheInspectorNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingCacheInspector",
            display_name="PackForcing Cache Inspector",
            category=types.CATEGORY,
            description="Shows what the cache did: where every block was over time, which mid blocks each block "
            "attended to, how many bytes each partition held, and where the time went.",
            inputs=[types.CacheRecord.Input("record", tooltip="The cache record of the Long Video Sampler.")],
            outputs=[io.String.Output(display_name="report"), io.Image.Output(display_name="picture")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, record: CacheRecord) -> io.NodeOutput:
        text = report(record)
        image = torch.from_numpy(np.asarray(picture(record), dtype=np.float32) / 255)[None]
        shown = ui.PreviewImage(image, cls=cls).as_dict() | {"text": (text,)}
        return io.NodeOutput(text, image, ui=shown)
