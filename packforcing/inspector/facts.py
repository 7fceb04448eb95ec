"""Numbers that report and picture draw from a record."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import Layout, video_frames
from ..generate.record import BlockRecord, CacheRecord

TOP_MIDS = 5  # most attended mid blocks that are listed


def layout_of(record: CacheRecord) -> Layout:
    return Layout(record.config, record.size, record.temporal_stride)


def model_bytes_per_value(record: CacheRecord) -> int:
    """Bytes of a number in the type that the model ran in: a full cache's."""
    return next(
        (size for name, size in (("64", 8), ("32", 4), ("8", 1)) if record.dtype.split("_")[0].endswith(name)), 2
    )


def bytes_per_value(record: CacheRecord) -> int:
    """Bytes of a cached number."""
    return record.config.bytes_per_value(model_bytes_per_value(record))


def selected_by(block: BlockRecord) -> np.ndarray:
    """The mid blocks attended, int [layers, mids]."""
    return np.array(block.selected, dtype=np.int64).reshape(len(block.selected), attended_mids(block))


def attended_mids(block: BlockRecord) -> int:
    """Mid blocks that a layer attended."""
    return len(block.selected[0]) if block.selected else 0


def token_counts(record: CacheRecord) -> dict[str, np.ndarray]:
    """Tokens that each made block attended, by partition, and a full cache's (`full`); int64 [blocks]."""
    layout, config = layout_of(record), record.config
    parts = [config.partition(block.block) for block in record.blocks]
    counts = {
        "sink": [len(part.sink) * layout.tokens_per_block for part in parts],
        "mid": [attended_mids(block) * layout.compressed_tokens_per_block for block in record.blocks],
        "recent": [len(part.recent) * layout.tokens_per_block for part in parts],
        "current": [layout.tokens_per_block] * len(parts),
        "full": [(block.block + 1) * layout.tokens_per_block for block in record.blocks],
    }
    return {name: np.array(values, dtype=np.int64) for name, values in counts.items()}


@dataclass(frozen=True)
class SelectionFacts:
    """What the layers attended to, over a whole run."""

    # (mid block, times, share of its chances), most times first. A chance is a layer of a block made while the mid
    # block was stored.
    most_attended: list[tuple[int, int, float]]
    mean_age: float | None  # mean blocks from a mid block to the block that attended it; None if none was attended
    mean_stored_age: float | None  # the same for all mid blocks that were stored
    returns: int  # times that a layer attended a mid block again after at least one block without it
    returned_blocks: int  # mid blocks with a return
    seen_blocks: int  # mid blocks ever attended
    agreement: float | None  # mean share of a layer's mid blocks that another one attends; None without a choice
    chance_agreement: float | None  # the same for layers that choose at random


def selection_facts(record: CacheRecord) -> SelectionFacts:
    """Count what was selected, how old it was, what came back, and how far the layers agree."""
    made, layers, mids = _attended(record)
    if not mids.size:
        return SelectionFacts([], None, None, 0, 0, 0, None, None)
    indices = np.array([block.block for block in record.blocks])
    times = np.bincount(mids)
    # Sorted by layer and mid block, and by time within: a step of more than one block is an absence that ended.
    key = layers * len(times) + mids
    order = np.argsort(key, kind="stable")
    back = (np.diff(key[order]) == 0) & (np.diff(made[order]) > 1)
    agreement, chance_agreement = _agreement(record)
    return SelectionFacts(
        most_attended=_most_attended(record, times),
        mean_age=float((indices[made] - mids).mean()),
        mean_stored_age=_mean_stored_age(record),
        returns=int(back.sum()),
        returned_blocks=len(np.unique(mids[order][1:][back])),
        seen_blocks=int((times > 0).sum()),
        agreement=agreement,
        chance_agreement=chance_agreement,
    )


def _attended(record: CacheRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every mid block that a layer attended, in order of time: (index into the record's blocks, layer, mid block)."""
    nothing = np.empty(0, np.int64)
    made, layers, mids = [nothing], [nothing], [nothing]
    for order, block in enumerate(record.blocks):
        selection = selected_by(block)
        depth, count = selection.shape
        made.append(np.full(selection.size, order))
        layers.append(np.repeat(np.arange(depth), count))
        mids.append(selection.ravel())
    return np.concatenate(made), np.concatenate(layers), np.concatenate(mids)


def _most_attended(record: CacheRecord, times: np.ndarray) -> list[tuple[int, int, float]]:
    """See `SelectionFacts`; `times` [mids] is how often each mid block was attended."""
    indices = np.array([block.block for block in record.blocks])
    # Mid block m was stored while blocks m + recent + 1, ... were made.
    first_read = np.searchsorted(indices, np.arange(len(times)) + record.config.recent_blocks + 1)
    depth = max(len(block.selected) for block in record.blocks)
    top = sorted(np.flatnonzero(times), key=lambda mid: (-times[mid], mid))[:TOP_MIDS]
    share = {mid: times[mid] / max(1, depth * (len(indices) - first_read[mid])) for mid in top}
    return [(int(mid), int(times[mid]), float(share[mid])) for mid in top]


def _mean_stored_age(record: CacheRecord) -> float | None:
    """Mean blocks from all mid blocks that were stored to the block being made; None where none was."""
    ages = []  # (mid blocks stored, their mean age) while each block was made
    for block in record.blocks:
        stored = record.config.partition(block.block).mid
        ages.append((len(stored), sum(block.block - end for end in (stored.start, stored.stop - 1)) / 2))
    total = sum(count for count, _ in ages)
    return sum(count * age for count, age in ages) / total if total else None


def _agreement(record: CacheRecord) -> tuple[float | None, float | None]:
    """Mean share of a layer's mid blocks that another layer attends, and that of layers that choose at random."""
    shares, chances = [], []
    for block in record.blocks:
        selection = selected_by(block)
        depth, count = selection.shape
        stored = len(record.config.partition(block.block).mid)
        if count and depth > 1 and stored > count:
            times = np.unique(selection, return_counts=True)[1]
            shares.append((times * (times - 1)).sum() / (count * depth * (depth - 1)))
            chances.append(count / stored)
    return (float(np.mean(shares)), float(np.mean(chances))) if shares else (None, None)


def frames_made(record: CacheRecord, blocks: list[BlockRecord]) -> int:
    """Video frames of `blocks`: the first latent frame of a video is one frame, all others are four."""
    size = record.config.block_frames
    return sum(video_frames((block.block + 1) * size) - video_frames(block.block * size) for block in blocks)


def loop_seconds(block: BlockRecord) -> float:
    """What a block's stages took one after the other; decoding not, where it ran beside others."""
    beside = block.seconds.get("decode", 0.0) if "wait" in block.seconds else 0.0
    return sum(block.seconds.values()) - beside


def seconds_per_block(record: CacheRecord) -> float:
    return frames_made(record, [BlockRecord(1, [])]) / record.fps


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def clock(record: CacheRecord, block: int) -> str:
    """When block `block` begins, such as "0:32" or "1:02:05"; with tenths where a block is shorter than a second."""
    decimals = 0 if seconds_per_block(record) >= 1 else 1
    seconds = round(video_frames(block * record.config.block_frames) / record.fps, decimals)
    minutes, seconds = divmod(seconds, 60)
    rest = f"{seconds:0{2 + 2 * (decimals > 0)}.{decimals}f}"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest}" if hours else f"{minutes}:{rest}"


def tokens_saved(record: CacheRecord) -> list[str]:
    """How much smaller the context of the newest block is than a full cache, as phrases; none while it is not."""
    if not record.blocks:
        return []
    last = {name: int(values[-1]) for name, values in token_counts(record).items()}
    full = last.pop("full")
    times = full / sum(last.values())
    return [f"{times:.1f}x less than a full cache"] if times >= 1.05 else []
