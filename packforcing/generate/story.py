"""A story: prompts over time (docs/method.md, section 7).

A story is made of stretches, each a prompt and the block from which it rules. Where one stretch ends and the next
begins is a switch. Each block's denoising and clean pass run under the prompt that rules it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..checks import check_between, check_kind, check_whole, shown
from ..config import LONGEST_SECONDS, CacheConfig, Length, video_frames
from ..errors import PackForcingError
from ..model.causal_wan import BlendedText, Text, TextKV

SWITCHES = ("keep", "refresh", "blend")


@dataclass(frozen=True)
class Stretch:
    """A prompt, and the block from which it rules."""

    start: int  # first block
    text: TextKV
    prompt: str = ""  # its words, for the record; "" where they are not known


@dataclass(frozen=True)
class Story:
    """The prompts of a video, in order.

    `switch` says what happens to the history where the prompt changes:

        keep     nothing: it stays under the prompt that it was made with
        refresh  the recent blocks' keys and values are computed again under the new prompt
        blend    nothing; over `blend_blocks` blocks the attention to the prompt goes from the old one to the new one

    Raises PackForcingError without a stretch, when the first one does not start at block 0, when starts do not rise,
    for an unknown switch, and for fewer than one block of blending.
    """

    stretches: tuple[Stretch, ...]
    switch: str = "keep"
    blend_blocks: int = 2

    def __post_init__(self) -> None:
        if not self.stretches:
            raise PackForcingError("A story needs at least one prompt, but it has none: give one that starts at 0.")
        starts = [stretch.start for stretch in self.stretches]
        for start in starts:
            check_whole("A story's start of a prompt", start)
        if starts[0] != 0:
            raise PackForcingError(f"A story's first prompt must start at block 0, but it starts at block {starts[0]}.")
        for before, start in pairwise(starts):
            if start <= before:
                raise PackForcingError(
                    f"A story's prompts must start one after another, but one at block {start} follows one at block "
                    f"{before}."
                )
        check_switch(self.switch, self.blend_blocks)

    def text(self, block: int) -> Text:
        """The prompt under which a block is made.

        With "blend", a stretch that starts at block s has the weight min(1, (b - s + 1) / (blend_blocks + 1)) in block
        b, and what the stretches before it give there has the rest.
        """
        text: Text = self.stretches[0].text
        for stretch in self.stretches[1:]:
            after = block - stretch.start
            if after < 0:
                break
            if self.switch == "blend" and after < self.blend_blocks:
                text = BlendedText(text, stretch.text, (after + 1) / (self.blend_blocks + 1))
            else:
                text = stretch.text
        return text

    def refreshes(self, block: int) -> bool:
        """Whether the recent blocks are computed again before this block is made."""
        return self.switch == "refresh" and any(stretch.start == block for stretch in self.stretches[1:])

    def then(self, stretch: Stretch) -> Story:
        """The story with a further stretch, in place of one that starts with the same block. Later ones still come."""
        others = (each for each in self.stretches if each.start != stretch.start)
        return replace(self, stretches=tuple(sorted((*others, stretch), key=lambda each: each.start)))

    def since(self, block: int) -> Story:
        """What is left of the story for that block and those after it: `text` gives them the same prompts.

        Prompts that none of them sees are left out. The first one that is left starts at block 0, as a story's must.
        """
        ruled = block - (self.blend_blocks if self.switch == "blend" else 0)  # a stretch from there on rules alone
        first = max((i for i, stretch in enumerate(self.stretches) if stretch.start <= ruled), default=0)
        return replace(self, stretches=(replace(self.stretches[first], start=0), *self.stretches[first + 1 :]))


def check_switch(switch: str, blend_blocks: int) -> None:
    """Raises PackForcingError for an unknown switch, and for fewer than one block of blending."""
    if switch not in SWITCHES:
        raise PackForcingError(f"A prompt's switch must be one of {', '.join(SWITCHES)}, but it is {shown(switch)}.")
    check_whole("The number of blocks over which prompts blend", blend_blocks)
    if blend_blocks < 1:
        raise PackForcingError(f"Prompts blend over at least 1 block, but blend_blocks is {blend_blocks}.")


def as_story(text: TextKV | Story) -> Story:
    """A single prompt as a story of one stretch."""
    return text if isinstance(text, Story) else Story((Stretch(0, text),))


def refresh_passes(story: TextKV | Story, config: CacheConfig, first: int, count: int) -> int:
    """Model passes that a run of blocks first .. first + count - 1 takes beside the usual ones: refreshed blocks."""
    blocks = range(first, first + count)
    told = as_story(story)
    return sum(len(config.partition(block).recent) for block in blocks if told.refreshes(block))


# --- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimedPrompt:
    """A line of a story."""

    seconds: float
    prompt: str

    def __post_init__(self) -> None:
        check_between("A prompt's time in seconds", self.seconds, 0, LONGEST_SECONDS)
        check_kind("A prompt", self.prompt, str)


def parse_time(text: str) -> float | None:
    """Seconds of "20", "0:20.5" or "1:02:03"; None for what is no time."""
    parts = text.split(":")
    wanted = [r"\d+"] * (len(parts) - 1) + [r"\d+(\.\d+)?"]
    if len(parts) > 3 or not all(re.fullmatch(form, part, re.ASCII) for form, part in zip(wanted, parts, strict=True)):
        return None
    if any(float(part) >= 60 for part in parts[1:]):
        return None
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + float(part)
    return seconds if seconds < float("inf") else None


def parse_story(text: str) -> list[TimedPrompt]:
    """The prompts of a story's text: a line "0:20 it starts to rain" for each.

    A time is m:ss, h:mm:ss or seconds, and may have a fraction. Empty lines, and those that begin with #, are skipped.

    Raises PackForcingError, with the line, for a bad time, no prompt, a first time other than 0:00, times that do not
    rise; and for a text without a prompt.
    """
    prompts: list[TimedPrompt] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            prompts.append(_timed(stripped, prompts, f"Line {number} of the story, {shown(stripped)},"))
    if not prompts:
        raise PackForcingError('The story has no prompt: write a line such as "0:00 a cat walks on grass" for each.')
    return prompts


def _timed(line: str, before: Sequence[TimedPrompt], what: str) -> TimedPrompt:
    time, *rest = line.split(maxsplit=1)
    return timed_prompt(time, "".join(rest), before, what)


def timed_prompt(time: str, prompt: str, before: Sequence[TimedPrompt], what: str) -> TimedPrompt:
    """The prompt that follows those `before`. Raises PackForcingError, about `what`, when it cannot."""
    seconds = parse_time(time)
    if seconds is None:
        raise PackForcingError(
            f'{what} must begin with a time such as 0:20, 1:02:03 or 20, but "{time[:40]}" is none: put it before the '
            "prompt."
        )
    if not prompt.strip():
        raise PackForcingError(f"{what} has a time but no prompt: write the prompt after it.")
    if not before and seconds != 0:
        raise PackForcingError(f"{what} is the first prompt and must start at 0:00.")
    if before and seconds <= before[-1].seconds:
        raise PackForcingError(
            f"{what} must start after the prompt before it, which starts at {time_of(before[-1].seconds)}: put them in "
            "order."
        )
    return TimedPrompt(seconds, prompt)


def time_of(seconds: float) -> str:
    """Seconds as 0:20, 0:20.5 or 1:02:03."""
    whole, fraction = divmod(round(seconds * 1000), 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    start = f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return start + (f".{fraction:03}".rstrip("0") if fraction else "")


def story_text(prompts: Sequence[TimedPrompt]) -> str:
    """The text from which `parse_story` reads these prompts. Times are to a thousandth of a second, and a prompt of
    several lines becomes one of one line."""
    return "\n".join(f"{time_of(prompt.seconds)} {' '.join(prompt.prompt.splitlines())}" for prompt in prompts)


def block_seconds(block: int, fps: float, block_frames: int) -> float:
    """When a block begins. The first block is three frames short, so the others begin three frames early."""
    return video_frames(block * block_frames) / fps


def start_block(seconds: float, fps: float, block_frames: int) -> int:
    """The block whose beginning is nearest to that time; of two equally near ones, the later."""
    frame = round(seconds * fps, 9)  # so that 2.3125 s * 16 fps is frame 37 in any rounding
    guess = (int(frame) + 3) // (4 * block_frames)  # the block that runs then
    return min((guess + 1, guess), key=lambda block: abs(video_frames(block * block_frames) - frame))


def check_story_times(prompts: Sequence[TimedPrompt], fps: float, block_frames: int, blocks: int) -> None:
    """Raises PackForcingError when a prompt starts at or beyond the end of the video, or two start with one block."""
    end = block_seconds(blocks, fps, block_frames)
    starts = [start_block(prompt.seconds, fps, block_frames) for prompt in prompts]
    for i, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        if start >= blocks or prompt.seconds >= end:
            words = f", {shown(prompt.prompt)}," if prompt.prompt else ""
            raise PackForcingError(
                f"The prompt at {time_of(prompt.seconds)}{words} has no block of its own before the video's end at "
                f"{time_of(end)}: move it to an earlier time, or make the video longer."
            )
        if i and start == starts[i - 1]:
            raise PackForcingError(
                f"The prompts at {time_of(prompts[i - 1].seconds)} and {time_of(prompt.seconds)} fall into the same "
                f"block, which begins at {time_of(block_seconds(start, fps, block_frames))}: put them at least "
                f"{time_of(4 * block_frames / fps)} apart."
            )


def times_text(prompts: Sequence[TimedPrompt], length: Length) -> str:
    """When each prompt really starts, for people: a line each. Raises what `check_story_times` raises."""
    fps, frames = length.fps, length.block_frames
    check_story_times(prompts, fps, frames, length.blocks)
    rows = []
    for prompt in prompts:
        start = start_block(prompt.seconds, fps, frames)
        begins = time_of(round(block_seconds(start, fps, frames), 2))
        rows.append(f"{time_of(prompt.seconds):<10}block {start:<7,}begins at {begins}")
    end = time_of(round(block_seconds(length.blocks, fps, frames), 2))
    return "\n".join([*rows, f"{end:<10}end of {length.blocks:,} blocks"])
