"""Cache configurations with a reason, for the kinds of checkpoints there are; docs/presets.md has the sources."""

from __future__ import annotations

from dataclasses import dataclass

from .config import CacheConfig
from .errors import PackForcingError


@dataclass(frozen=True)
class Preset:
    """A cache configuration, for whom it is, and why."""

    name: str
    config: CacheConfig
    what: str  # one line: which checkpoints
    why: str  # one line: what speaks for it


PRESETS = (
    Preset(
        "training-free",
        CacheConfig(block_frames=3, sink_frames=9, recent_frames=6, top_k=1, position_range=21),
        "chunk-wise checkpoints that never saw compressed history: Self-Forcing, Causal-Forcing, CausVid, Krea",
        "9 + 3 + 6 + 3 are the 21 latent frames of their training, 43% of them sink (Deep Forcing: 40 to 60%), and one "
        "mid block: with 16 an open reproduction jumped after 5 to 10 s, with 1 it did not",
    ),
    Preset(
        "deep-sink",
        CacheConfig(block_frames=3, sink_frames=12, recent_frames=6, top_k=0),
        "the same checkpoints, without mid blocks and without compressor",
        "Deep Forcing's sink: 12 + 6 + 3 are 21, 57% of them sink; the safest, but it forgets what left the window",
    ),
    Preset(
        "frame-wise",
        CacheConfig(block_frames=1, sink_frames=10, recent_frames=8, top_k=2, position_range=21),
        "frame-wise checkpoints: Causal-Forcing framewise, Causal-Forcing++ with 1 and 2 steps",
        "the same shares in blocks of one: 10 + 2 + 8 + 1 are 21, 48% of them sink",
    ),
    Preset(
        "longlive",
        CacheConfig(block_frames=3, sink_frames=3, recent_frames=6, top_k=0),
        "LongLive",
        "the window of 12 with a sink of 3 that it was trained with",
    ),
    Preset(
        "reward-forcing",
        CacheConfig(block_frames=3, sink_frames=3, recent_frames=3, top_k=0),
        "Reward-Forcing",
        "the window of 9 with a sink of 3 that it was trained with",
    ),
    Preset(
        "packforcing",
        CacheConfig(),
        "a model that was trained with its compressor (train forcing): the paper's numbers",
        "8 sink, 16 of the mid blocks, 4 recent frames, blocks of 4, the paper's spacing of positions",
    ),
    Preset(
        "demo",
        CacheConfig(),
        "the demo models",
        "what they were trained with: blocks of 4, and the mid slots filled (docs/demo-models.md)",
    ),
)
PRESET_NAMES = tuple(preset.name for preset in PRESETS)


def preset_named(name: str) -> Preset:
    """The preset of a name. Raises PackForcingError when there is none."""
    for preset in PRESETS:
        if preset.name == name:
            return preset
    raise PackForcingError(f"There is no preset '{name}': choose one of {', '.join(PRESET_NAMES)}.")
