"""The record as numbers: everything in it, and what report and picture make of it, ready for JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from ..generate.record import STAGES, CacheRecord
from .ages import ages, choices
from .facts import SelectionFacts, frames_made, loop_seconds, model_bytes_per_value, selection_facts, token_counts
from .returns import Return, returns
from .story_report import story_of


def numbers(record: CacheRecord) -> dict[str, Any]:
    """`CacheRecord.as_dict`, and under "summary" what is drawn from it; the help page of the node has the fields."""
    return record.as_dict() | {"summary": _summary(record)}


def numbers_json(record: CacheRecord) -> str:
    """`numbers` as JSON on one line."""
    return json.dumps(numbers(record), allow_nan=False, separators=(",", ":"))


def _summary(record: CacheRecord) -> dict[str, Any]:
    frames = frames_made(record, record.blocks)
    tokens = {name: int(values[-1]) if len(values) else 0 for name, values in token_counts(record).items()}
    return {
        "blocks": len(record.blocks),
        "frames": frames,
        "video_seconds": frames / record.fps,
        "tokens": tokens,
        "full_cache_bytes": record.model.kv_bytes(tokens["full"], model_bytes_per_value(record)),
        "selection": _selection(selection_facts(record)),
        "ages": _ages(record),
        "seconds": _seconds(record),
        "story": story_of(record),
        "returns": [_return(found) for found in returns(record)],
    }


def _selection(facts: SelectionFacts) -> dict[str, Any]:
    names = ("block", "times", "share")
    most = [dict(zip(names, each, strict=True)) for each in facts.most_attended]
    return asdict(facts) | {"most_attended": most}


def _ages(record: CacheRecord) -> dict[str, Any]:
    found = ages(record, choices(record))
    affinity = [float(each) if np.isfinite(each) else None for each in found.affinity]
    return {
        "age": found.age.tolist(),
        "chosen": found.chosen.tolist(),
        "stored": found.stored.tolist(),
        "affinity": affinity,
    }


def _seconds(record: CacheRecord) -> dict[str, Any]:
    """The loop's time, and by stage its sum, mean, median and largest, over the blocks that were timed."""
    timed = [block for block in record.blocks if block.seconds]
    found: dict[str, Any] = {"blocks": len(timed), "loop": float(sum(map(loop_seconds, timed)))}
    ran = {stage for block in timed for stage in block.seconds}
    stages = {}
    for stage in (*(stage for stage in STAGES if stage in ran), *sorted(ran - set(STAGES))):
        seconds = np.array([block.seconds.get(stage, 0.0) for block in timed])
        stages[stage] = {
            "total": float(seconds.sum()),
            "mean": float(seconds.mean()),
            "median": float(np.median(seconds)),
            "slowest": float(seconds.max()),
        }
    return found | {"stages": stages}


def _return(found: Return) -> dict[str, Any]:
    return {
        "block": found.block,
        "prompt": found.stretch.number,
        "taken": [{"block": block, "layers": layers} for block, layers in found.taken.items()],
        "share": found.share,
        "chance": found.chance,
    }
