"""Partitions of a training clip's history: which of its earlier blocks the model sees, and in which form."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import CacheConfig

BLOCK_FRAMES = 4


@dataclass(frozen=True)
class History:
    """A partition of the history of a training clip, and how often it is used."""

    sink_frames: int
    recent_frames: int
    top_k: int
    share: float  # of the micro-batches
    repeat_mids: bool = False
    block_frames: int = BLOCK_FRAMES

    def config(self) -> CacheConfig:
        sizes = self.block_frames, self.sink_frames, self.recent_frames, self.top_k
        return CacheConfig(*sizes, repeat_mids=self.repeat_mids)


HISTORIES = (
    History(sink_frames=16, recent_frames=4, top_k=0, share=0.35),  # everything
    History(sink_frames=8, recent_frames=4, top_k=0, share=0.15),  # gaps
    History(sink_frames=4, recent_frames=4, top_k=16, share=0.10),  # compressed blocks between
    History(sink_frames=0, recent_frames=4, top_k=16, share=0.05),
    History(sink_frames=8, recent_frames=4, top_k=16, share=0.10, repeat_mids=True),
    History(sink_frames=4, recent_frames=4, top_k=16, share=0.10, repeat_mids=True),
    History(sink_frames=4, recent_frames=4, top_k=6, share=0.10, repeat_mids=True),
    History(sink_frames=0, recent_frames=4, top_k=16, share=0.05, repeat_mids=True),
)

# For tours through places (`world.places`): whatever is not the block before must come from further back.
PLACE_HISTORIES = (
    History(sink_frames=16, recent_frames=4, top_k=0, share=0.25),  # everything
    History(sink_frames=4, recent_frames=4, top_k=16, share=0.25),  # compressed blocks between
    History(sink_frames=0, recent_frames=4, top_k=16, share=0.30),  # nothing but compressed blocks
    History(sink_frames=8, recent_frames=4, top_k=16, share=0.04, repeat_mids=True),
    History(sink_frames=4, recent_frames=4, top_k=16, share=0.08, repeat_mids=True),
    History(sink_frames=0, recent_frames=4, top_k=16, share=0.08, repeat_mids=True),
)

MIDS_ONLY = History(sink_frames=0, recent_frames=BLOCK_FRAMES, top_k=16, share=0.0)
BLOCK_BEFORE = History(sink_frames=0, recent_frames=BLOCK_FRAMES, top_k=0, share=0.0)


def bidirectional(latent_frames: int) -> tuple[History, ...]:
    """The whole clip as one block, all of whose frames see each other: how a teacher for DMD is trained."""
    return (History(sink_frames=0, recent_frames=0, top_k=0, share=1.0, block_frames=latent_frames),)
