"""Cache policies that an evaluation compares: what is kept of the history, and in which form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import CacheConfig
from ..errors import PackForcingError


@dataclass(frozen=True)
class Policy:
    """A cache configuration under a name."""

    name: str
    description: str  # one line, for people
    # "trained" (which falls back to the training-free form where nothing is trained), "lr" (the training-free form in
    # any case), or "none" where nothing is compressed
    compressor: str = "trained"
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of `CacheConfig` that differ from its defaults
    keeps_everything: bool = False  # every block is a sink, so that the history is whole and grows with the video
    longest: float = math.inf  # seconds of video up to which it is evaluated; longer durations are left out

    def config(self, blocks: int) -> CacheConfig:
        """The configuration for a video of `blocks` blocks. Raises PackForcingError when it cannot be."""
        config = CacheConfig(**self.changes)
        return replace(config, sink_frames=blocks * config.block_frames) if self.keeps_everything else config


_POLICIES = (
    Policy(
        "full",
        "the whole history at full resolution; its cost grows with the video",
        "none",
        {"recent_frames": 0, "top_k": 0},
        keeps_everything=True,
        longest=30.0,
    ),
    # Self-Forcing rolls over 21 latent frames, the current ones included; of whole blocks of 4 that is 16 + 4.
    Policy(
        "window",
        "Self-Forcing's rolling cache: the last 16 latent frames and the current 4",
        "none",
        {"sink_frames": 0, "recent_frames": 16, "top_k": 0},
    ),
    Policy("sink-recent", "8 sink frames and 4 recent ones, nothing between", "none", {"top_k": 0}),
    Policy("packforcing", "sink, recent, and the 16 compressed mid blocks of the highest affinity"),
    Policy("packforcing-recency", "the newest 16 compressed mid blocks", changes={"selection": "recency"}),
    Policy("packforcing-no-rope", "every block stands where it was made", changes={"rope_adjustment": False}),
    Policy("packforcing-lr", "with the training-free compressor", "lr"),
)
POLICIES = {policy.name: policy for policy in _POLICIES}
ABLATIONS = {"sink": "sink_frames", "range": "position_range", "top": "top_k"}
_WHAT = {
    "sink": "{} sink frames",
    "range": "the context squeezed into {} latent frames",
    "top": "{} compressed mid blocks at most",
}


def policy(text: str) -> Policy:
    """A policy by its name: one of POLICIES, or packforcing with one other number: sink-N, range-N (latent frames),
    top-N (mid blocks).

    NAME@SECONDS is evaluated for no longer than that. Raises PackForcingError for another name, for a number that the
    cache cannot have, and for what is no duration.
    """
    name, at, seconds = text.partition("@")
    found = _named(name.strip())
    if not at:
        return found
    try:
        longest = float(seconds)
    except ValueError:
        longest = math.nan
    if not 0 < longest < math.inf:
        raise PackForcingError(f"'{text}' should end with a number of seconds above 0, as full@30 does.")
    return replace(found, longest=longest)


def _named(name: str) -> Policy:
    if name in POLICIES:
        return POLICIES[name]
    match = re.fullmatch(r"(sink|range|top)-(\d+)", name)
    if not match:
        raise PackForcingError(
            f"There is no cache policy '{name}': choose from {', '.join(POLICIES)}, sink-N, range-N and top-N (such "
            "as sink-16, range-24, top-4)."
        )
    number = int(match[2])
    made = Policy(name, f"packforcing with {_WHAT[match[1]].format(number)}", changes={ABLATIONS[match[1]]: number})
    made.config(blocks=1)  # checks the number
    return made
