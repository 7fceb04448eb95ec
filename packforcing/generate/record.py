"""What the cache did, block by block: what it kept, selected and moved, and in how many bytes.

The inspector reads nothing else. As JSON a record is what `CacheRecord.as_dict` gives; the help page of the Cache
Inspector has its fields.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite, nan
from pathlib import PureWindowsPath
from typing import Any, get_type_hints

from ..cache.layer_cache import Affinity
from ..checks import is_of, shown
from ..config import FASTEST_FPS, SLOWEST_FPS, CacheConfig, FrameSize, Layout, ModelShape
from ..errors import PackForcingError

# The owners of cache memory, in the order in which a picture stacks them.
PARTITIONS = ("sink", "recent", "current", "mid", "aside", "archive_device", "archive_host", "archive_disk", "key_sums")
ARCHIVES = ("archive_device", "archive_host", "archive_disk")  # the first of them on the device
STAGES = ("refresh", "denoise", "decode", "wait", "compression", "clean_pass", "preview")

FORMAT = "packforcing-cache-record"
MOST_LEFT_OUT = 1_000_000  # blocks between two of a record; a picture has a column for each
TAG = "packforcing"  # the tag of a video file that holds its record
VERSION = 2  # of the JSON; 1 had neither a version nor affinity. A new field alone makes no new version.


@dataclass
class BlockRecord:
    """What the cache did for one block.

    Attributes:
        block: index of the block, from 0.
        selected: for each layer the mid blocks that were attended, oldest first; all of these lists are equally long.
        mid_slots_written: how many (layer, slot) pairs had to be filled; the others already held the right block.
        recent_rotated: recent blocks whose keys were rotated to a new temporal position (counted once, not per layer).
        bytes: bytes in use by each of PARTITIONS after the block.
        seconds: time of each of STAGES; a stage that did not run is absent. "wait" is there when blocks are decoded
            beside the denoising of the next one: it is how long the loop waited for the frames, and all that decoding
            then cost the loop.
        affinity: for each layer, by what it chose `selected`; None where it scored nothing. Empty in old records.
    """

    block: int
    selected: list[list[int]]
    mid_slots_written: int = 0
    recent_rotated: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    affinity: list[Affinity | None] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {name: getattr(self, name) for name in _names(BlockRecord)} | {
            "affinity": [None if each is None else _affinity_dict(each) for each in self.affinity],
        }


@dataclass(frozen=True)
class PromptRecord:
    """A stretch of the story."""

    start: int  # first block
    prompt: str  # its words; "" where they are not known


@dataclass
class CacheRecord:
    """The record of a run: its conditions, and one entry a block."""

    model: ModelShape
    config: CacheConfig
    size: FrameSize
    fps: float
    temporal_stride: int  # latent frames that a compressed token spans
    compressor: str  # its name, or "none"
    dtype: str  # of the transformer, such as "bfloat16"
    device: str
    rounding_error: float = 0.0  # of keys and values in the configuration's kv_dtype: root mean square, relative
    blocks: list[BlockRecord] = field(default_factory=list)
    prompts: list[PromptRecord] = field(default_factory=list)  # one a stretch; a run without a story has one, too
    prompt_switch: str = "keep"  # what happens to the history where the prompt changes (`story.SWITCHES`)
    blend_blocks: int = 0  # over how many blocks "blend" goes; 0 in records from before it was kept
    update: str = ""  # how a denoising step is made (`schedule.UPDATES`); "" in records from before it was kept
    timesteps: list[float] = field(default_factory=list)  # what the model is told in each step of a block, of 1000
    first_timesteps: list[float] = field(default_factory=list)  # likewise in the video's first block
    made_with: dict[str, Any] = field(default_factory=dict)  # what else decides every bit (`made_with`); {} in old ones
    notes: list[str] = field(default_factory=list)  # what happened within the run, such as that memory was short

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON. It names no folder, and no number is infinite or NaN."""
        parts = {name: getattr(self, name) for name in _names(CacheRecord)}
        return (
            {"format": FORMAT, "version": VERSION}
            | parts
            | {
                "model": asdict(self.model),
                "config": asdict(self.config),
                "size": asdict(self.size),
                "compressor": PureWindowsPath(self.compressor).name,  # knows both kinds of slashes
                "rounding_error": _number(self.rounding_error),
                "blocks": [block.as_dict() for block in self.blocks],
                "prompts": [asdict(prompt) for prompt in self.prompts],
            }
        )

    def as_tag(self) -> dict[str, str]:
        """The tag for the video's file: what is known of the run before its first block."""
        known = replace(self, blocks=[], rounding_error=0.0).as_dict()
        return {TAG: json.dumps(known, allow_nan=False, sort_keys=True)}  # sorted: the same run has the same bytes

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> CacheRecord:
        """The record that `as_dict` was made of, in this version or an earlier one. What it does not know it leaves.

        Raises PackForcingError for what is no record, or one of a later version.
        """
        version = document.get("version", 1) if isinstance(document, Mapping) else None
        if not isinstance(version, int) or version > VERSION:
            raise PackForcingError(
                f"A cache record has a version of at most {VERSION}, but this has {shown(version)}: "
                "update PackForcing, or choose a file that `generate --report` or the Cache Inspector wrote."
            )
        try:
            record = cls(
                **_known(CacheRecord, document)
                | {
                    "model": ModelShape(**_known(ModelShape, document["model"])),
                    "config": CacheConfig(**_known(CacheConfig, document["config"])),
                    "size": FrameSize(**_known(FrameSize, document["size"])),
                    "rounding_error": _or_nan(document.get("rounding_error", 0.0)),
                    "blocks": [_block(block) for block in document["blocks"]],
                    "notes": [str(note) for note in document.get("notes", [])],
                    "prompts": [PromptRecord(**_known(PromptRecord, each)) for each in document.get("prompts", [])],
                }
            )
            _check(record)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            reason = str(error) if isinstance(error, PackForcingError) else repr(error)
            raise PackForcingError(
                f"This is no cache record ({reason[:200].rstrip('.')}): choose a file that `generate --report` or the "
                "Cache Inspector wrote."
            ) from error
        return record


def _check(record: CacheRecord) -> None:
    """Raises ValueError for values of other types than a record has, and for blocks that no run makes."""
    for part in (record, *record.blocks, *record.prompts):
        for name, kind in get_type_hints(type(part)).items():
            checked = name in ("model", "config", "size", "blocks", "prompts", "affinity")
            if not checked and not is_of(getattr(part, name), kind):
                raise ValueError(f"{name} is {shown(getattr(part, name))}")
    if not SLOWEST_FPS <= record.fps <= FASTEST_FPS:
        raise ValueError(f"fps is {record.fps}")
    Layout(record.config, record.size, record.temporal_stride)
    before = -1
    for block in record.blocks:
        if not before < block.block <= before + MOST_LEFT_OUT:
            raise ValueError(f"block {block.block} follows block {before}")
        _check_block(block, record.model.layers)
        before = block.block


def _check_block(block: BlockRecord, layers: int) -> None:
    """Raises ValueError unless each layer attended to as many mid blocks that had been made, and scored those."""
    counts = {len(mids) for mids in block.selected}
    if len(block.selected) not in (0, layers) or len(counts) > 1:
        raise ValueError(f"block {block.block} has not as many mid blocks in each of {layers} layers")
    if any(not 0 <= mid < block.block for mids in block.selected for mid in mids):
        raise ValueError(f"block {block.block} attended to a block that was not made")
    if any(number < 0 or number > 2**60 for number in (*block.bytes.values(), *block.seconds.values())):
        raise ValueError(f"block {block.block} has bytes or seconds that cannot be")
    if len(block.affinity) not in (0, layers) or any(
        each is not None and len(each.chosen) != len(block.selected[0]) for each in block.affinity
    ):
        raise ValueError(f"block {block.block} has not a score for each mid block")


def _names(kind: Any) -> list[str]:
    return [each.name for each in fields(kind)]


def _known(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of a dataclass."""
    return {name: values[name] for name in _names(kind) if name in values}


def _block(values: Mapping[str, Any]) -> BlockRecord:
    affinity = [None if each is None else _affinity(each) for each in values.get("affinity", [])]
    return BlockRecord(**_known(BlockRecord, values) | {"affinity": affinity})


def _affinity_dict(affinity: Affinity) -> dict[str, Any]:
    return {
        "chosen": [_number(float(f"{score:.9g}")) for score in affinity.chosen],  # all that float32 can hold
        "mean": _number(affinity.mean),
        "deviation": _number(affinity.deviation),
    }


def _affinity(values: Mapping[str, Any]) -> Affinity:
    chosen = array("f", map(_or_nan, values["chosen"]))
    return Affinity(chosen, _or_nan(values["mean"]), _or_nan(values["deviation"]))


def _number(value: float) -> float | None:
    """A number as JSON can have it: None for infinity and NaN."""
    return value if isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return nan if value is None else value
