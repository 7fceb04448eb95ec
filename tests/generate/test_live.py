"""Prompts that are said while a video is made: the video is that of the story which they make, to the bit."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_videos import CONFIG, FRAMES, StopHere, assert_same, collect, latents_of
from wan_reference import TEXT_DIM, TEXT_LENGTH, seeded

from packforcing.errors import PackForcingError
from packforcing.files.state_file import StatePrompt
from packforcing.generate.live import MOST_HELD, LivePrompts, Mailbox, live_words, most_held
from packforcing.generate.record import PromptRecord
from packforcing.generate.state import selected_of, state_of, story_from
from packforcing.generate.story import SWITCHES, Story, Stretch
from packforcing.model.causal_wan import BlendedText, TextKV

BLOCKS = 9
WORDS = ("a cat", "it rains", "the sun")
STARTS = 0, 4, 6  # a blend of three blocks that begins in block 4 is interrupted by the next one
LENGTHS = {"a cat": TEXT_LENGTH, "it rains": TEXT_LENGTH + 4, "the sun": 3}
TWO_RECENT = replace(CONFIG, recent_frames=2 * FRAMES)


def encode(words: str) -> torch.Tensor:
    return seeded(1, LENGTHS[words], TEXT_DIM, seed=len(words))


def prompts(*pairs: tuple[int, str]) -> tuple[StatePrompt, ...]:
    return tuple(StatePrompt(start, words, encode(words)) for start, words in pairs)


PAIRS = list(zip(STARTS, WORDS, strict=True))
TOLD = prompts(*PAIRS)
RECORDED = [PromptRecord(*pair) for pair in PAIRS]


def heard_at(said: dict[int, str], video: Any, told: Any = TOLD[:1], encode: Any = encode, **given: Any) -> LivePrompts:
    """A listener to whom `said` says words right before some blocks."""
    return LivePrompts(video, told, lambda: said.get(len(video.record.blocks)), encode, **given)


def the_story(make: Any, wan: Any, told: Any, switch: str, *config: Any, **given: Any) -> Any:
    return make(*config, text=story_from(told, wan.embed_text, switch, 3), **given)


@pytest.fixture(scope="module")
def whole(make, wan) -> dict[str, list[Any]]:
    """The blocks of the told story, by switch: what saying it must make."""
    return {switch: list(the_story(make, wan, TOLD, switch).blocks(BLOCKS)) for switch in SWITCHES}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_said_makes_the_video_of_the_told_story(make, wan, whole, switch, overlap):
    video = the_story(make, wan, TOLD[:1], switch, overlap=overlap)
    live = heard_at({4: "it rains", 6: "the sun"}, video)
    assert_same(list(video.blocks(BLOCKS)), whole[switch])
    assert video.record.prompts == RECORDED
    assert (video.record.prompt_switch, video.record.blend_blocks) == (switch, 3)
    assert [(prompt.start, prompt.prompt) for prompt in live.prompts] == PAIRS
    refreshed = [block.block for block in video.record.blocks if "refresh" in block.seconds]
    assert refreshed == (list(STARTS[1:]) if switch == "refresh" else [])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_caller_may_tell_between_blocks(make, wan, switch, overlap):
    """From the next block to make on: beside decoding that is one later than the next to be yielded."""
    video = the_story(make, wan, TOLD[:1], switch, overlap=overlap)
    found = []
    for block in video.blocks(BLOCKS):
        found.append(block)
        if block.index == 3:
            video.tell(wan.embed_text(encode("it rains")), "it rains")
    start = 5 if overlap else 4
    assert video.record.prompts == [PromptRecord(0, "a cat"), PromptRecord(start, "it rains")]
    told = the_story(make, wan, prompts((0, "a cat"), (start, "it rains")), switch)
    assert_same(found, list(told.blocks(BLOCKS)))


def test_a_told_prompt_still_comes_unless_its_block_is_said_otherwise(make, wan):
    story = prompts((0, "a cat"), (5, "it rains"), (7, "a cat"))
    video = the_story(make, wan, story, "blend")
    heard_at({3: "the sun", 5: "the sun", 7: "it rains"}, video, story)  # at 5 it is not the ruling prompt that is said
    found = list(video.blocks(BLOCKS))
    after = prompts((0, "a cat"), (3, "the sun"), (5, "the sun"), (7, "it rains"))
    assert [prompt.start for prompt in video.record.prompts] == [0, 3, 5, 7]
    assert_same(found, list(the_story(make, wan, after, "blend").blocks(BLOCKS)))


def test_the_prompt_that_rules_said_again_is_no_switch(make, wan, whole):
    video = the_story(make, wan, TOLD[:1], "refresh")
    answers: list[tuple[int, str, str]] = []
    heard_at({2: "a cat", 3: "a cat"}, video, on_heard=lambda *heard: answers.append(heard))
    assert_same(list(video.blocks(4)), whole["refresh"][:4])
    assert not any("refresh" in block.seconds for block in video.record.blocks)
    assert video.record.prompts == [PromptRecord(0, "a cat")]
    assert answers == [(2, "a cat", ""), (3, "a cat", "")]


def test_words_said_before_the_first_block_take_the_storys_place(make, wan):
    video = the_story(make, wan, TOLD[:1], "refresh")
    heard_at({0: "the sun"}, video)
    assert_same(list(video.blocks(4)), list(the_story(make, wan, prompts((0, "the sun")), "refresh").blocks(4)))
    assert video.record.prompts == [PromptRecord(0, "the sun")]


@pytest.mark.parametrize("switch", SWITCHES)
def test_memory_does_not_grow_with_what_is_said(make, wan, switch):
    """Something new before each block. Prompts that no pass needs any more are really gone."""
    video = the_story(make, wan, TOLD[:1], switch)
    held: list[weakref.ref[TextKV]] = []
    alive: list[int] = []

    def on_block(block: int) -> None:
        text = wan.embed_text(encode(WORDS[block % 3]))
        held.append(weakref.ref(text))
        video.tell(text, WORDS[block % 3])
        del text
        gc.collect()
        alive.append(sum(each() is not None for each in held))

    video.on_block = on_block
    list(video.blocks(10))
    assert len(video.record.prompts) == 10
    assert max(alive) == alive[-1] <= most_held(switch, 3) < 10
    assert most_held("blend", 1000) == MOST_HELD


def flat(text: Any) -> dict[int, float]:
    """What share of a text is whose."""
    if isinstance(text, TextKV):
        return {id(text): 1.0}
    assert isinstance(text, BlendedText)
    shares: dict[int, float] = {}
    for part, weight in ((text.old, 1 - text.weight), (text.new, text.weight)):
        for whose, share in flat(part).items():
            shares[whose] = shares.get(whose, 0.0) + weight * share
    return shares


@pytest.mark.parametrize(("switch", "blend_blocks"), [("keep", 2), ("refresh", 2), ("blend", 1), ("blend", 4)])
@pytest.mark.parametrize("since", range(14))
def test_what_is_left_of_a_story_gives_later_blocks_the_same(since, switch, blend_blocks):
    starts = (0, 2, 3, 7, 8, 11)
    story = Story(tuple(Stretch(start, TextKV(())) for start in starts), switch, blend_blocks)
    left = story.since(since)
    for block in range(since, 20):
        assert flat(left.text(block)) == pytest.approx(flat(story.text(block)))
        assert left.refreshes(block) == story.refreshes(block) or block == since
    seen = {whose for block in range(since, 20) for whose in flat(story.text(block))}
    assert {id(stretch.text) for stretch in left.stretches} == seen


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_state_keeps_what_was_said_and_goes_on(make, wan, whole, switch, overlap):
    """Replayed blocks hear nothing; what is said after them rules from there on."""
    video = the_story(make, wan, TOLD[:1], switch, overlap=overlap)
    live = heard_at({4: "it rains"}, video)
    first = list(video.blocks(5))
    state = state_of(video, live.prompts, latents_of(first))
    assert [(prompt.start, prompt.prompt) for prompt in state.prompts] == [(0, "a cat"), (4, "it rains")]
    again = the_story(make, wan, state.prompts, switch, overlap=overlap)
    heard_at({2: "the sun", 6: "the sun"}, again, state.prompts)
    found = list(again.replay(state.latents, selected_of(state))) + list(again.blocks(BLOCKS - 5))
    assert_same(found, whole[switch])
    assert again.record.prompts == RECORDED


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_stopped_in_the_block_that_heard_goes_on(make, wan, overlap):
    """Also where the listener itself stops it, as Cancel does."""
    expected = list(the_story(make, wan, TOLD, "refresh", TWO_RECENT).blocks(BLOCKS))
    for where in ("step", "block"):
        video = the_story(make, wan, TOLD[:1], "refresh", TWO_RECENT, overlap=overlap)
        live = heard_at({4: "it rains", 6: "the sun"}, video)
        stopped: list[int] = []

        def stop(block: int, *step: int, video: Any = video, stopped: Any = stopped, live: Any = live) -> None:
            if not step:
                live.listen(block)
            if block == 6 and step != (0,) and not stopped:
                stopped.append(block)
                raise StopHere

        setattr(video, f"on_{where}", stop)
        found: list[Any] = []
        with pytest.raises(StopHere):
            collect(found, video.blocks(BLOCKS))
        assert_same(found, expected[:6])
        assert_same(found + list(video.blocks(BLOCKS - 6)), expected)


# --- encoding and answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_is_decoded_while_words_are_encoded_and_each_is_encoded_once(make, wan, overlap):
    video = the_story(make, wan, TOLD[:1], "keep", overlap=overlap)
    encoded: list[str] = []

    def watched(words: str) -> torch.Tensor:
        encoded.append(words)
        if overlap:
            assert video.decoder.beside
            assert all(made.decoding.frames is not None for made in video._unfinished)
            newest = video.record.blocks[-1].seconds
            assert {"decode", "wait"} <= set(newest)
        return encode(words)

    heard_at({2: "it rains", 4: "the sun", 6: "it rains"}, video, encode=watched)
    list(video.blocks(7))
    assert encoded == ["it rains", "the sun"]


def test_words_that_cannot_be_encoded_end_no_run(make, wan, whole):
    video = the_story(make, wan, TOLD[:1], "keep")
    answers: list[tuple[int, str, str]] = []

    def wrong(words: str) -> torch.Tensor:
        if words == "the sun":
            raise PackForcingError("No such words.")
        return seeded(1, 4, 7, seed=1)  # of another model's encoder

    heard_at({1: "it rains", 3: "the sun"}, video, encode=wrong, on_heard=lambda *heard: answers.append(heard))
    assert_same(list(video.blocks(4)), whole["keep"][:4])
    assert [(block, words) for block, words, _ in answers] == [(1, "it rains"), (3, "the sun")]
    assert f"encoded 7 wide, but the model takes text embeddings {TEXT_DIM} wide" in answers[0][2]
    assert answers[1][2] == "No such words."
    assert video.record.prompts == [PromptRecord(0, "a cat")]


def test_of_two_words_within_a_block_the_last_wins(make, wan):
    box, video = Mailbox(), the_story(make, wan, TOLD[:1], "keep")
    LivePrompts(video, TOLD[:1], box.take, encode)
    found = []
    for block in video.blocks(BLOCKS):
        found.append(block)
        if block.index == 3:
            box.say("it rains")
            box.say("the sun")
            assert box.words == "the sun"
    assert box.words is box.take() is None
    assert video.record.prompts == [PromptRecord(0, "a cat"), PromptRecord(4, "the sun")]
    assert_same(found, list(the_story(make, wan, prompts((0, "a cat"), (4, "the sun")), "keep").blocks(BLOCKS)))


def test_words_become_one_line():
    assert live_words("  it\n starts\x85to\u2028rain\t ") == "it starts to rain"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no words"),
        (" \n\t ", "has no words"),
        (None, "must be text, but it is None"),
        (7, "must be text, but it is 7"),
        ("a" * 10_001, "has 10,001 letters, and at most 10,000"),
        ("a \ud800", "is no text in UTF-8"),
    ],
)
def test_what_is_no_prompt_is_refused(text, sentence):
    with pytest.raises(PackForcingError, match=sentence):
        live_words(text)
