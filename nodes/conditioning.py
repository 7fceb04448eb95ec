"""Prompts over time as CONDITIONING: each entry carries when it starts and, where they are known, its words.

Other samplers do not look at these keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ..packforcing.checks import shown
from ..packforcing.errors import PackForcingError
from ..packforcing.generate.story import TimedPrompt, check_story_times, parse_time, time_of

START, PROMPT = "packforcing_start", "packforcing_prompt"  # seconds; words

Conditioning = list[list[Any]]  # ComfyUI's: [embedding, {"pooled_output": ..., ...}] for each entry


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt of a story, encoded."""

    timed: TimedPrompt
    context: Tensor  # [1, L, width]


def with_start(conditioning: Conditioning, seconds: float, prompt: str = "") -> Conditioning:
    """The conditioning with its start, and with its words where they are given."""
    marks: dict[str, Any] = {START: seconds} | ({PROMPT: prompt} if prompt else {})
    return [[entry[0], {**entry[1], **marks}] for entry in conditioning]


def start_seconds(start: str) -> float:
    """The seconds of a start such as 0:20. Raises PackForcingError for what is no time."""
    seconds = parse_time(start.strip())
    if seconds is None:
        raise PackForcingError(f"The start must be a time such as 0:20, 1:02:03 or 20, but it is {shown(start)}.")
    return seconds


def prompts_over_time(conditioning: Conditioning, fps: float, block_frames: int, blocks: int) -> list[EncodedPrompt]:
    """The prompts of a video in the order of their starts. A single entry without a start starts at 0:00.

    Raises PackForcingError when they make no story for a video of that many blocks.
    """
    if not conditioning:
        raise PackForcingError("The conditioning is empty: connect a CLIP Text Encode node.")
    unmarked = sum(START not in entry[1] for entry in conditioning)
    if unmarked > 1:
        raise PackForcingError(
            f"The sampler follows one prompt at a time, but the conditioning has {unmarked} entries without a start: "
            "give each its own by PackForcing Conditioning At, or connect one CLIP Text Encode node without "
            "Conditioning (Combine)."
        )
    prompts = [encoded(entry) for entry in conditioning]
    prompts.sort(key=lambda prompt: prompt.timed.seconds)
    times = [prompt.timed for prompt in prompts]
    check_starts(times)
    check_story_times(times, fps, block_frames, blocks)
    return prompts


def encoded(entry: list[Any]) -> EncodedPrompt:
    """An entry's prompt. Raises PackForcingError when it is several at once."""
    context, marks = entry[0], entry[1]
    if context.shape[0] != 1:
        raise PackForcingError(f"The sampler makes one video at a time, but the prompt is {context.shape[0]} prompts.")
    return EncodedPrompt(TimedPrompt(marks.get(START, 0.0), marks.get(PROMPT, "")), context)


def check_starts(times: list[TimedPrompt]) -> None:
    """Raises PackForcingError unless the prompts, in order, begin at 0:00 and each has a start of its own."""
    if times[0].seconds:
        raise PackForcingError(
            f"The first prompt starts at {time_of(times[0].seconds)}, but one must start at 0:00: combine it with a "
            "CLIP Text Encode node for the beginning, or give it the start 0:00."
        )
    for before, after in pairwise(times):
        if before.seconds == after.seconds:
            zero = "" if after.seconds else " (a prompt without a start has that one, too)"
            raise PackForcingError(
                f"Two prompts start at {time_of(after.seconds)}{zero}: give one of them another start, by PackForcing "
                "Conditioning At."
            )
