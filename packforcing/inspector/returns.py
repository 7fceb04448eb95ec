"""A story's stretches in a record, and its returns: stretches whose prompt was there before.

At the first block of a return the recent blocks still show something else. What the prompt showed before is then in the
mid blocks, if it is not in the sink. So that block's selection tells whether the cache finds the past again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from ..generate.record import BlockRecord, CacheRecord
from .facts import attended_mids, selected_by

PLACE = "place "  # how a prompt begins that names a place; the name ends at the first colon


@dataclass(frozen=True)
class StretchBlocks:
    """The blocks that were made under one prompt."""

    blocks: range  # up to the newest block made
    prompt: str  # "" where its words are not known
    number: int  # of the prompt, from 0 in order of first appearance; the same again when the prompt returns


@dataclass(frozen=True)
class Return:
    """What the first block of a return took up. Fractions are in 0..1."""

    stretch: StretchBlocks  # the return
    earlier: tuple[StretchBlocks, ...]  # the stretches of the same prompt before it, oldest first
    choices: tuple[int, ...]  # the mid blocks that the first block could choose from
    taken: dict[int, int]  # mid block of an earlier stretch, and by how many layers it was taken up; oldest first
    attended: int  # mid blocks that a layer attended
    layers: int  # layers that attended mid blocks
    layers_taken: int  # those of them that took up at least one mid block of an earlier stretch
    share: (
        float | None
    )  # of the mid blocks taken up, counted over all layers, those of earlier stretches; None: no mids
    chance: float | None  # the same share of `choices`: what layers that choose at random would have; None: no choices

    @property
    def block(self) -> int:
        """The return's first block."""
        return self.stretch.blocks.start

    @property
    def earlier_mids(self) -> tuple[int, ...]:
        """Those of `choices` that are of earlier stretches."""
        return tuple(block for block in self.choices if any(block in stretch.blocks for stretch in self.earlier))

    @property
    def has_choice(self) -> bool:
        """Whether `share` tells anything: a layer could leave mid blocks out, and some but not all show the prompt."""
        return 0 < self.attended < len(self.choices) and 0 < len(self.earlier_mids) < len(self.choices)


def prompt_key(prompt: str) -> str:
    """Two prompts with the same key are the same: the name of a place ("place two"), else all words.

    Case and the width of spaces do not count. A prompt whose words are not known has the key "" and is like no other.
    """
    words = " ".join(prompt.casefold().split())
    return words.partition(":")[0].rstrip() if words.startswith(PLACE) else words


def stretches(record: CacheRecord) -> list[StretchBlocks]:
    """The stretches that have begun, oldest first; the last one ends with the newest block made."""
    made = record.blocks[-1].block + 1 if record.blocks else 0
    begun = [prompt for prompt in record.prompts if prompt.start < made]
    starts = [*(prompt.start for prompt in begun), made]
    numbers: dict[object, int] = {}
    found = []
    for prompt, end in zip(begun, starts[1:], strict=True):
        key = prompt_key(prompt.prompt) or prompt.start  # unknown words: a prompt of its own
        number = numbers.setdefault(key, len(numbers))
        found.append(StretchBlocks(range(prompt.start, end), prompt.prompt, number))
    return found


def returns(record: CacheRecord) -> list[Return]:
    """The returns of a story, in order of time, as far as their first block is in the record.

    A stretch is a return if its prompt ruled before and another one came between. So "place two" right after
    "place two: a red house" is none.
    """
    by_index = {block.block: block for block in record.blocks}
    story = stretches(record)
    found = []
    for i, (before, stretch) in enumerate(pairwise(story), start=1):
        earlier = tuple(one for one in story[:i] if one.number == stretch.number)
        first = by_index.get(stretch.blocks.start)
        if earlier and before.number != stretch.number and first is not None:
            found.append(_return(record, stretch, earlier, first))
    return found


def selected_share(block: BlockRecord, wanted: Collection[int]) -> float | None:
    """Of the mid blocks that `block` attended, counted over all its layers, the share that is in `wanted`.

    None where it attended none.
    """
    selected = selected_by(block)
    return float(np.isin(selected, list(wanted)).mean()) if selected.size else None


def chance_share(choices: Collection[int], wanted: Collection[int]) -> float | None:
    """The share of `choices` that is in `wanted`: the mean of `selected_share` for layers that choose at random.

    None where there are no choices.
    """
    return len(set(choices) & set(wanted)) / len(choices) if choices else None


def runs(numbers: Iterable[int]) -> list[range]:
    """Rising whole numbers as ranges without gaps."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def _return(
    record: CacheRecord, stretch: StretchBlocks, earlier: tuple[StretchBlocks, ...], first: BlockRecord
) -> Return:
    """The return whose first block is `first`."""
    shown = set(chain.from_iterable(one.blocks for one in earlier))
    choices = tuple(record.config.partition(first.block).mid) if record.config.top_k else ()
    taken = [sorted(shown.intersection(mids)) for mids in first.selected]
    blocks, layers = np.unique([mid for mids in taken for mid in mids], return_counts=True)
    return Return(
        stretch=stretch,
        earlier=earlier,
        choices=choices,
        taken={int(block): int(count) for block, count in zip(blocks, layers, strict=True)},
        attended=attended_mids(first),
        layers=sum(bool(mids) for mids in first.selected),
        layers_taken=sum(bool(mids) for mids in taken),
        share=selected_share(first, shown),
        chance=chance_share(choices, shown),
    )
