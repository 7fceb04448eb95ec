"""What the nodes' routes answer, asked without a server: the plan of a query, and what it says that it assumes."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import pytest

FULL = {"width": "832", "height": "480", "seconds": "120", "fps": "16", "model": "wan2.1-1.3b"}


@pytest.fixture(scope="module")
def routes(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.nodes.routes")


def test_a_plan_of_known_values_assumes_nothing(routes: ModuleType):
    answer = routes.planned(FULL)
    assert answer["text"].startswith("video      832x480, 1,917 frames: 119.8 s at 16 fps\n")
    assert answer["plan"]["context_tokens"] == 27_872


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        (("width", "height", "seconds", "fps", "model"), "832x480, 120 s, wan2.1-1.3b"),
        (("width",), "832x480"),
        (("seconds",), "120 s"),
        (("fps",), "16 fps"),
        (("model",), "wan2.1-1.3b"),
    ],
)
def test_what_the_page_does_not_know_is_said_to_be_assumed(routes: ModuleType, left_out: tuple, told: str):
    query = {name: value for name, value in FULL.items() if name not in left_out}
    answer = routes.planned({**query, "why": "no sampler is connected"})
    assert answer["text"].startswith(f"assumed    {told}\n           as no sampler is connected\nvideo      832x480")
    assert answer["plan"] == routes.planned(FULL)["plan"]


def test_a_cache_setting_that_is_linked_is_said_to_be_assumed(routes: ModuleType):
    answer = routes.planned({**FULL, "linked": "top_k,nonsense"})
    assert answer["text"].startswith("assumed    top_k 16\nvideo ")


def test_a_plan_for_one_of_several_samplers_says_so(routes: ModuleType):
    assert routes.planned({**FULL, "samplers": "2"})["text"].startswith("for        the first of 2 samplers\nvideo ")


def test_the_usual_frame_is_the_known_models_own(routes: ModuleType):
    answer = routes.planned({"model": "tiny"})
    assert answer["text"].startswith("assumed    128x128, 120 s\nvideo      128x128, ")


@pytest.mark.parametrize(("frames", "blocks"), [(1, 1), (4, 1), (5, 2), (21, 6)])
def test_the_length_may_come_in_latent_frames(routes: ModuleType, frames: int, blocks: int):
    query = {name: value for name, value in FULL.items() if name != "seconds"}
    answer = routes.planned({**query, "latent_frames": str(frames)})
    assert answer["plan"]["blocks"] == blocks
    assert not answer["text"].startswith("assumed")


def test_a_whole_number_may_be_written_with_a_point(routes: ModuleType):
    assert routes.planned({**FULL, "block_frames": "4.0"}) == routes.planned({**FULL, "block_frames": "4"})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"block_frames": "4.5"}, "block_frames must be a whole number, but it is '4.5'."),
        ({"block_frames": "four"}, "block_frames must be a number, but it is 'four'."),
        ({"block_frames": "0"}, "A block needs at least 1 latent frame, but block_frames is 0."),
        ({"width": "nan"}, "width must be a number of at most 1e+12, but it is 'nan'."),
        ({"width": "1e300"}, "width must be a number of at most 1e+12, but it is '1e300'."),
        ({"fps": "1e-300"}, "The frame rate must be from 0.01 to 1,000 a second, but it is 1e-300."),
        ({"fps": "1e9"}, "The frame rate must be from 0.01 to 1,000 a second, but it is 1000000000.0."),
        ({"fps": "0", "latent_frames": "4"}, "The frame rate must be above 0, but it is 0.0."),
        ({"rope_adjustment": "maybe"}, "rope_adjustment must be true or false, but it is 'maybe'."),
        ({"model": "gpt"}, "There is no model 'gpt' to plan for: choose one of wan2.1-1.3b, wan2.1-14b, tiny"),
    ],
)
def test_a_mistake_is_one_sentence(routes: ModuleType, wrong: dict, told: str):
    answer = routes.planned({**FULL, **wrong})
    assert answer["error"].startswith(told)
    assert answer["error"].count(". ") == 0
    assert not re.search(r"\d{20}", answer["error"])


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ({"seconds": "8", "block_frames": "4.5"}, "block_frames must be a whole number, but it is '4.5'."),
        ({"seconds": "8", "block_frames": "0"}, "A block needs at least 1 latent frame, but block_frames is 0."),
        ({"seconds": "long"}, "seconds must be a number, but it is 'long'."),
        ({"seconds": "8", "fps": "1e-300"}, "The frame rate must be from 0.01 to 1,000 a second, but it is 1e-300."),
    ],
)
def test_a_storys_mistake_is_one_sentence(routes: ModuleType, query: dict, told: str):
    assert routes.story_times({"text": "0:00 a", **query}) == {"error": told}


def test_a_story_without_a_known_length_is_shown_without_blocks(routes: ModuleType):
    assert "block" not in routes.story_times({"text": "0:00 a\n0:05 b"})["text"]
