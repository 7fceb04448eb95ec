"""What scripts/demo.py makes of a workflow and of the user's words, without a server."""

from __future__ import annotations

import argparse
import sys

import pytest

from packforcing.errors import PackForcingError

STORY = "0:00 a house\n0:05 a star\n0:10 a lake"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the module adds to it
    import demo

    return demo


def api_prompt(text: str = STORY, seconds: float = 20.0) -> dict:
    """Two samplers under one story, in blocks of 16 frames at 16 a second."""
    sampler = {"seed": 1, "seconds": seconds, "fps": 16.0, "cache_config": ["2", 0]}
    return {
        "1": {"class_type": "PackForcingPromptSchedule", "inputs": {"text": text, "clip": ["9", 1]}},
        "2": {"class_type": "PackForcingCacheConfig", "inputs": {"block_frames": 4}},
        "3": {"class_type": "PackForcingSampler", "inputs": {**sampler}},
        "4": {"class_type": "PackForcingSampler", "inputs": {**sampler}},
    }


def apply(demo, graph: dict, **changes):
    options = {"prompt": None, "story": None, "seconds": None, "seed": None} | changes
    return demo.apply(argparse.Namespace(**options), graph)


def test_the_story_of_the_workflow_stays_as_it_is(demo):
    prompt = api_prompt()
    story = apply(demo, prompt)
    assert prompt == api_prompt()
    # Stretches rule frames 0..76, 77..156, 157..316: blocks 0..4, 5..9, 10..19, the first of which is 3 frames short.
    assert story.middle_frames() == [(0 + 77) // 2, (77 + 157) // 2, (157 + 317) // 2]


def test_a_shorter_video_leaves_out_what_starts_after_its_end(demo):
    prompt = api_prompt()
    story = apply(demo, prompt, seconds=10.0, seed=7)
    assert [line.prompt for line in story.prompts] == ["a house", "a star"]
    assert prompt["1"]["inputs"]["text"] == "0:00 a house\n0:05 a star"
    for name in ("3", "4"):  # both, or they could not be compared
        assert (prompt[name]["inputs"]["seconds"], prompt[name]["inputs"]["seed"]) == (10.0, 7)


def test_one_prompt_is_a_story_of_one(demo):
    prompt = api_prompt()
    story = apply(demo, prompt, prompt="a red\ncircle")
    assert prompt["1"]["inputs"]["text"] == "0:00 a red circle"
    assert story.middle_frames() == [317 // 2]


def test_a_workflow_without_a_schedule_takes_a_prompt_alone(demo, tmp_path):
    prompt = {"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "old", "clip": ["9", 1]}}}
    assert apply(demo, prompt, prompt="new") is None
    assert prompt["1"]["inputs"]["text"] == "new"
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    with pytest.raises(demo.DemoError, match="no PackForcingPromptSchedule whose text"):
        apply(demo, prompt, story=file)


def test_a_bad_story_is_told(demo, tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("0:00 a house\nlater a star")
    with pytest.raises(PackForcingError, match=r"Line 2 of the story, 'later a star', must begin with a time"):
        apply(demo, api_prompt(), story=file)
