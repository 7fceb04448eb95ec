"""The record as JSON: there and back, from earlier versions, and what must not be in it."""

from __future__ import annotations

import json
from array import array

import numpy as np
import pytest

from packforcing.cache.layer_cache import Affinity
from packforcing.config import CacheConfig, FrameSize, ModelShape
from packforcing.errors import PackForcingError
from packforcing.generate.record import VERSION, BlockRecord, CacheRecord, PromptRecord
from packforcing.inspector import numbers, numbers_json, picture, report, selection_facts, token_counts
from packforcing.inspector.returns import returns

LAYERS = 3


def make_record(blocks: int = 30, **changes: object) -> CacheRecord:
    """A run of three stretches, the last of which returns; random choices, scores and times."""
    random = np.random.default_rng(0)
    record = CacheRecord(
        model=ModelShape(LAYERS, 256, 2),
        config=CacheConfig(top_k=3, kv_dtype="fp8_e4m3"),
        size=FrameSize(832, 480),
        fps=16.0,
        temporal_stride=2,
        compressor="hr.safetensors",
        dtype="bfloat16",
        device="cuda:0",
        rounding_error=0.0213,
        prompts=[PromptRecord(0, "a fox"), PromptRecord(8, 'rain, "heavy"'), PromptRecord(20, "a fox")],
        prompt_switch="refresh",
    )
    for i in range(blocks):
        mids, count = record.config.partition(i).mid, record.config.attended_mids(i)
        selected = [sorted(random.choice(mids, count, replace=False).tolist()) if count else [] for _ in range(LAYERS)]
        scored = [Affinity(array("f", random.normal(size=count)), *random.random(2).tolist()) for _ in range(LAYERS)]
        record.blocks.append(
            BlockRecord(
                block=i,
                selected=selected,
                mid_slots_written=i,
                recent_rotated=1,
                bytes={"sink": 10**9 + i, "mid": i},
                seconds={"denoise": float(random.random()), "decode": 0.1, "warm-up": 0.2},
                affinity=[*scored] if len(mids) > count else [None] * LAYERS,
            )
        )
    for name, value in changes.items():
        setattr(record, name, value)
    return record


@pytest.mark.parametrize("blocks", [0, 1, 30])
def test_the_record_comes_back_from_its_json(blocks):
    record = make_record(blocks)
    text = numbers_json(record)
    assert CacheRecord.from_dict(json.loads(text)) == record
    assert numbers_json(CacheRecord.from_dict(json.loads(text))) == text


def test_the_summary_tells_what_report_and_picture_tell():
    record = make_record()
    summary, facts = numbers(record)["summary"], selection_facts(record)
    assert summary["tokens"] == {name: int(values[-1]) for name, values in token_counts(record).items()}
    assert summary["selection"]["mean_age"] == facts.mean_age
    assert summary["selection"]["most_attended"][0]["block"] == facts.most_attended[0][0]
    denoise = [block.seconds["denoise"] for block in record.blocks]
    stages = summary["seconds"]["stages"]
    assert list(stages) == ["denoise", "decode", "warm-up"]
    assert stages["denoise"]["total"] == pytest.approx(sum(denoise))
    assert stages["denoise"]["slowest"] == max(denoise)
    assert summary["seconds"]["loop"] == pytest.approx(sum(denoise) + 30 * 0.3)
    [found] = returns(record)
    assert [each["block"] for each in summary["returns"][0]["taken"]] == list(found.taken)
    assert (summary["frames"], summary["video_seconds"]) == (30 * 16 - 3, (30 * 16 - 3) / 16)


def test_a_report_of_an_earlier_version_can_still_be_read():
    """`generate --report` wrote this before there were versions."""
    record = make_record()
    old = json.loads(json.dumps(numbers(record)))
    for name in ("format", "version", "summary", "prompts", "prompt_switch"):
        del old[name]
    for block in old["blocks"]:
        del block["affinity"]
    del old["config"]["kv_dtype"]
    found = CacheRecord.from_dict(old)
    assert [block.selected for block in found.blocks] == [block.selected for block in record.blocks]
    assert found.config.kv_dtype == "model"
    assert found.prompts == []
    assert report(found).startswith("PackForcing cache: 30 blocks")
    assert picture(found).mode == "RGB"


def test_what_a_later_field_says_is_left_out():
    document = json.loads(numbers_json(make_record(3)))
    document["mood"] = document["config"]["mood"] = document["blocks"][0]["mood"] = "fine"
    assert CacheRecord.from_dict(document) == make_record(3)


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"version": VERSION + 1}, f"version of at most {VERSION}, but this has {VERSION + 1}"),
        ({"version": "new"}, "but this has 'new'"),
        ({"version": 5000 * "0"}, "but this has '" + 56 * "0" + "...: update"),
        ({}, "This is no cache record"),
        ([1, 2], "but this has None"),
        ({"model": 3, "config": {}, "size": {}}, "This is no cache record"),
    ],
)
def test_what_is_no_record_is_refused_in_a_sentence(document, told):
    with pytest.raises(PackForcingError, match=told):
        CacheRecord.from_dict(document)


def test_the_json_names_no_folder_and_is_strict():
    record = make_record(compressor="C:\\Users\\ann\\models/private/hr.safetensors", rounding_error=float("nan"))
    record.blocks[10].affinity[0] = Affinity(array("f", [float("inf"), 1, 2]), float("nan"), 1.0)
    text = numbers_json(record)
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["compressor"] == "hr.safetensors"
    assert "ann" not in text
    assert document["blocks"][10]["affinity"][0]["chosen"][0] is None
    assert picture(record).mode == "RGB"
