"""What the text report says of a story: its stretches, and what its returns took up."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..generate.record import CacheRecord
from ..generate.story import TimedPrompt, block_seconds, story_text
from .facts import clock, counted
from .returns import Return, returns, runs, stretches

WIDTH = 110  # of a line
MOST_RETURNS = 4  # that are told one by one
FEWEST_LETTERS = 12  # of a prompt
MOST_RUNS = 2  # of block numbers


def story_report(record: CacheRecord) -> str:
    """A heading, a line for each of the first returns, and one for all; "" for a video of one prompt."""
    story, found = stretches(record), returns(record)
    if len(story) < 2:
        return ""
    prompts = counted(len({stretch.number for stretch in story}), "prompt")
    counts = f"{len(story):,} stretches of {prompts}, {counted(len(found), 'return')}"
    over = f" over {counted(record.blend_blocks, 'block')}" if _blend_known(record) else ""
    heading = f"Story: {counts}; the history at a switch: {record.prompt_switch}{over}"
    return "\n".join([heading, *(_return_line(record, each) for each in found[:MOST_RETURNS]), *_last_line(found)])


def _blend_known(record: CacheRecord) -> bool:
    return record.prompt_switch == "blend" and record.blend_blocks > 0


def story_of(record: CacheRecord) -> str:
    """The story that a record tells, as the text of which `story.parse_story` makes it again: block for block.

    With the same seed and settings it makes the same video. A prompt whose words the record does not know leaves a line
    that is a comment.
    """
    lines = []
    for prompt in record.prompts:
        seconds = block_seconds(prompt.start, record.fps, record.config.block_frames)
        line = story_text([TimedPrompt(seconds, prompt.prompt)])
        lines.append(line if prompt.prompt.strip() else f"# {line.strip()} (words not known: write them here)")
    return "\n".join(lines)


def number_list(numbers: Iterable[int]) -> str:
    """Rising whole numbers, such as "2, 3" or "2 to 9, 14 and 5 more"."""
    found = runs(numbers)
    told = [", ".join(map(str, run)) if len(run) < 3 else f"{run[0]:,} to {run[-1]:,}" for run in found[:MOST_RUNS]]
    more = sum(map(len, found[MOST_RUNS:]))
    return ", ".join(told) + (f" and {more:,} more" if more else "")


def _return_line(record: CacheRecord, found: Return) -> str:
    """When a prompt returns, and what its first block took up: as much of it as there is room for."""
    start = f"  {clock(record, found.block)}  '"
    prompt = " ".join(found.stretch.prompt.split())
    for what in _taken_up(record, found):
        room = WIDTH - len(start) - len(what)
        if room >= min(FEWEST_LETTERS, len(prompt)):
            break
    return start + (prompt if len(prompt) <= room else prompt[: room - 1].rstrip() + "…") + what


def _taken_up(record: CacheRecord, found: Return) -> list[str]:
    """The end of a return's line, in full and shorter."""
    mids, past = len(found.choices), len(found.earlier_mids)
    if not past:
        return [f"' returns: {_where(record, found)}"]
    if past == mids:
        return [f"' returns: all {mids:,} mid blocks show it"]
    if not found.has_choice:
        return [f"' returns: all {mids:,} mid blocks are attended, {past:,} of them show it"]
    shares = f"{found.share:.0%} of mids, {found.chance:.0%} by chance"
    if not found.taken:
        return [f"' returns: no layer took up a block of its past: {shares}"]
    *_, last = found.taken
    times = f"{clock(record, min(found.taken))} to {clock(record, last + 1)}"
    took = f"' returns: {found.layers_taken} of {counted(found.layers, 'layer')} took up"
    blocks = f"block{'' if len(found.taken) == 1 else 's'} {number_list(found.taken)} ({times})"
    return [f"{took} {blocks}: {shares}", f"{took} {times}: {shares}"]


def _where(record: CacheRecord, found: Return) -> str:
    """Where the prompt's past is, when no mid block shows it."""
    partition = record.config.partition(found.block)
    places = {"sink": partition.sink, "recent": partition.recent}
    held = [name for name, held in places.items() if any(set(held) & set(each.blocks) for each in found.earlier)]
    return f"its past is in {' and '.join(held)} only" if held else "its past is no longer in the cache"


def _last_line(found: list[Return]) -> list[str]:
    """The mean over all returns whose layers had a choice. It also says what the shares are of."""
    chosen = [each for each in found if each.has_choice]
    if not chosen:
        return []
    if len(found) == 1:
        return ["  (of the mids taken up, those that show the returning prompt; by chance: of all that could be)"]
    share, chance = (float(np.mean([getattr(each, name) for each in chosen])) for name in ("share", "chance"))
    of = "" if len(chosen) == len(found) else f" of {len(found):,}, where layers had a choice"
    told = f"{share:.0%} of the mids taken up show the returning prompt, {chance:.0%} by chance"
    return [f"  mean of {len(chosen):,}{of}: {told}"]
