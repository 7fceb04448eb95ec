"""A small state of a video."""

from __future__ import annotations

import torch

from packforcing.config import CacheConfig, FrameSize, ModelShape
from packforcing.files.state_file import StatePrompt, VideoState

# Blocks 0 is the sink, and the one before is recent: block 2 attends to none, block 3 to block 1.
SELECTED = torch.full((4, 2, 3), -1, dtype=torch.int32)
SELECTED[3, :, 0] = 1


def small_state() -> VideoState:
    return VideoState(
        model=ModelShape(2, 256, 2),
        digest="0123456789abcdef",
        dtype="float32",
        compressor="none",
        config=CacheConfig(block_frames=2, sink_frames=2, recent_frames=2, top_k=3),
        size=FrameSize(64, 64),
        temporal_stride=1,
        prompt_switch="keep",
        blend_blocks=2,
        prompts=(StatePrompt(0, "a cat", torch.zeros(1, 3, 8)), StatePrompt(1, "", torch.ones(1, 2, 8))),
        latents=torch.randn(1, 16, 8, 8, 8),
        selected=SELECTED.clone(),
    )
