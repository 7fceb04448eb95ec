"""Prompts over time: which prompt a block sees, what a switch does to the history, and what a story refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from story_reference import StoryWan
from toy_videos import (
    CELLS,
    CONFIG,
    FRAMES,
    SAMPLING,
    SIZE,
    StopHere,
    ToyVAE,
    assert_same,
    causal_wan,
    collect,
    latents_of,
    long_video,
    prompt,
    weights,
)
from wan_reference import TEXT_DIM, TEXT_LENGTH, Method, assert_close, seeded

from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, Layout, Length
from packforcing.errors import PackForcingError
from packforcing.generate.long_video import Block
from packforcing.generate.record import PromptRecord
from packforcing.generate.sampling import noise_generator
from packforcing.generate.state import encoded_prompts, story_from
from packforcing.generate.story import (
    SWITCHES,
    Story,
    Stretch,
    TimedPrompt,
    block_seconds,
    check_story_times,
    parse_story,
    refresh_passes,
    start_block,
    story_text,
    time_of,
    times_text,
)
from packforcing.model.causal_wan import BlendedText, CausalWan, TextKV
from packforcing.model.compressor import Compressor

STARTS = 0, 4, 6
LENGTHS = TEXT_LENGTH, TEXT_LENGTH + 4, 3  # of the prompts, in tokens: no two alike
BLOCKS = 9
TWO_RECENT = {"recent_frames": 2 * FRAMES}


@pytest.fixture(scope="module")
def texts(wan) -> list[TextKV]:
    return [prompt(wan, seed=20 + i, length=length) for i, length in enumerate(LENGTHS)]


def story(texts: list[TextKV], switch: str = "keep", blend_blocks: int = 3, starts: Any = STARTS) -> Story:
    return Story(tuple(Stretch(*pair) for pair in zip(starts, texts, strict=True)), switch, blend_blocks)


@pytest.fixture(scope="module")
def whole(make, texts):
    """Nine blocks of a story in one go, by switch: what the other ways of making them are compared with."""
    videos = {}
    for switch in SWITCHES:
        video = make(text=story(texts, switch))
        blocks = list(video.blocks(BLOCKS))
        videos[switch] = SimpleNamespace(blocks=blocks, latents=latents_of(blocks), record=video.record)
    return videos


# --- against the method by the letter -----------------------------------------------------------------

# What share of the attention to the prompt is whose, by block. Blends of three blocks; the second begins in the first.
ONE_AT_A_TIME = [{0: 1.0}] * 4 + [{1: 1.0}] * 2 + [{2: 1.0}] * 3
BLENDED = [{0: 1.0}] * 4 + [
    {0: 0.75, 1: 0.25},
    {0: 0.5, 1: 0.5},
    {0: 0.1875, 1: 0.5625, 2: 0.25},
    {1: 0.5, 2: 0.5},
    {1: 0.25, 2: 0.75},
]


@pytest.mark.parametrize("changes", [{}, TWO_RECENT], ids=str)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_story_is_the_methods_by_the_letter(make, wan, texts, switch, changes):
    """Each block's steps, clean pass and compressed form are under its own prompt; recent blocks are computed again."""
    config, compressor = replace(CONFIG, **changes), Compressor(1)
    found = list(make(config, text=story(texts, switch), compressor=compressor).blocks(BLOCKS))

    recents = config.recent_blocks
    method = Method(rows=4, columns=8, temporal_stride=1, top_k=2, recent_blocks=recents)
    words = [seeded(1, length, TEXT_DIM, seed=20 + i) for i, length in enumerate(LENGTHS)]
    reference = StoryWan(weights(), method, words)
    levels = [1.0, 5 * 0.5 / (1 + 4 * 0.5), 0.0]
    for block in range(BLOCKS):
        reference.use((BLENDED if switch == "blend" else ONE_AT_A_TIME)[block])
        if switch == "refresh" and block in STARTS:
            reference.refresh({b: found[b].latents for b in range(block)})
        generator = noise_generator(SAMPLING.seed, block)
        x = torch.randn((1, 16, FRAMES, *CELLS), generator=generator)
        for sigma, following in pairwise(levels):
            noise = torch.randn(x.shape, generator=generator) if following else 0
            x = (1 - following) * (x - sigma * reference.denoise(x, sigma)) + following * noise
        assert_close(found[block].latents, x)
        x0, frames = found[block].latents, found[block].frames  # so that rounding does not add up over blocks
        compressed = compressor(x0, frames, Layout(config, SIZE, 1), ToyVAE(), wan.patch_tokens) if block else None
        reference.clean_pass(x0, compressed)


def test_the_switches_make_other_videos_from_the_first_switch_on(whole):
    keep, refresh, blend = (whole[switch].blocks for switch in SWITCHES)
    for one, other in ((keep, refresh), (keep, blend), (refresh, blend)):
        same = [torch.equal(a.latents, b.latents) for a, b in zip(one, other, strict=True)]
        assert same == [block < STARTS[1] for block in range(BLOCKS)]


# --- who sees what ------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("changed", [1, 2])
def test_a_prompt_has_no_influence_before_its_stretch(make, wan, texts, whole, switch, changed):
    others = [*texts[:changed], prompt(wan, seed=90), *texts[changed + 1 :]]
    blocks = list(make(text=story(others, switch)).blocks(STARTS[changed] + 1))
    same = [torch.equal(a.latents, b.latents) for a, b in zip(blocks, whole[switch].blocks, strict=False)]
    assert same == [True] * STARTS[changed] + [False]


@pytest.mark.parametrize("overlap", [False, True])
def test_every_pass_runs_under_its_own_blocks_prompt(texts, overlap):
    """Watched from outside: which keys the prompt's attention is given in the passes of each block."""
    seen: list[tuple[str, int, set[int]]] = []

    class Watched(CausalWan):
        def denoise(self, x, sigma, text, cache):
            return self.watched("denoise", cache, lambda: super(Watched, self).denoise(x, sigma, text, cache))

        def clean_pass(self, x0, text, cache, *compressed):
            self.watched("clean", cache, lambda: super(Watched, self).clean_pass(x0, text, cache, *compressed))

        def watched(self, kind: str, cache: Cache, work: Any) -> Any:
            seen.append((kind, cache.block, set()))
            return work()

    watched = Watched(causal_wan(weights()).modules)
    inner = watched.attention

    def attention(queries, keys, values):
        seen[-1][2].update(n for n, length in enumerate(LENGTHS) if keys.shape[1] == length)
        return inner(queries, keys, values)

    watched.attention = attention
    list(long_video(watched, text=story(texts), overlap=overlap).blocks(BLOCKS))
    owner = [max(n for n, start in enumerate(STARTS) if start <= block) for block in range(BLOCKS)]
    assert {(kind, block) for kind, block, _ in seen} == {
        (kind, block) for kind in ("denoise", "clean") for block in range(BLOCKS)
    } - {("clean", BLOCKS - 1)}
    for kind, block, prompts in seen:
        late = {owner[block - 1]} if overlap and kind == "clean" and block > 1 else set()  # block 0 is a sink
        assert prompts == {owner[block]} | late, f"{kind} of block {block}"


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_story_of_one_prompt_changes_no_bit(make, texts, switch):
    alone = list(make(text=texts[0]).blocks(6))
    assert_same(list(make(text=Story((Stretch(0, texts[0]),), switch)).blocks(6)), alone)


@pytest.mark.parametrize("switch", ["keep", "blend"])
def test_a_switch_to_the_same_prompt_changes_no_bit(make, texts, switch):
    """A copy of the prompt, so that nothing can tell by identity. (Encoding it again may give other last bits.)"""
    again = TextKV(tuple((keys.clone(), values.clone()) for keys, values in texts[0].layers))
    alone = list(make(text=texts[0]).blocks(7))
    assert_same(list(make(text=story([texts[0], again], switch, starts=(0, 3))).blocks(7)), alone)
    assert_same(list(make(text=story([texts[0], again], switch, starts=(0, 3)), overlap=True).blocks(7)), alone)


def test_a_blend_of_all_or_nothing_is_the_one_prompt(wan, texts):
    x = seeded(1, 16, FRAMES, *CELLS)
    old, new = texts[:2]

    def velocity(text: Any) -> torch.Tensor:
        cache = Cache(Layout(CONFIG, SIZE, 1), wan.shape)
        cache.begin(0)
        return wan.denoise(x, 0.7, text, cache)

    assert torch.equal(velocity(BlendedText(old, new, 1.0)), velocity(new))
    assert torch.equal(velocity(BlendedText(old, new, 0.0)), velocity(old))
    halfway = velocity(BlendedText(old, new, 0.5))
    assert min((halfway - velocity(text)).abs().max() for text in (old, new)) > 0.01


def test_a_blend_ends_after_its_blocks(texts):
    blend = story(texts, "blend", blend_blocks=1)
    assert [blend.text(block) is text for block, text in ((3, texts[0]), (5, texts[1]), (7, texts[2]))] == [True] * 3
    assert [blend.text(block).weight for block in (4, 6)] == [0.5, 0.5]


# --- the ways of making it ----------------------------------------------------------------------------

KINDS = [{}, TWO_RECENT, {"kv_dtype": "fp8_e4m3"}, {"sink_frames": 0, "selection": "recency", **TWO_RECENT}]


@pytest.mark.parametrize("changes", [*KINDS, {"position_range": 8}, {"rope_adjustment": False}], ids=str)
@pytest.mark.parametrize("switch", SWITCHES)
def test_decoding_beside_the_next_block_changes_no_bit_of_a_story(make, texts, switch, changes):
    config, told = replace(CONFIG, **changes), story(texts, switch)
    apart, beside = make(config, text=told), make(config, text=told, overlap=True)
    assert_same(list(beside.blocks(BLOCKS)), list(apart.blocks(BLOCKS)))
    assert [a.selected for a in apart.record.blocks] == [b.selected for b in beside.record.blocks]


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("count", [4, 5, 7])
def test_a_longer_story_begins_with_the_shorter_one(make, texts, whole, switch, count):
    assert_same(list(make(text=story(texts, switch)).blocks(count)), whole[switch].blocks[:count])


@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_replayed_story_goes_on_as_if_it_had_never_stopped(make, texts, switch, overlap, changes):
    """From before a switch, from the switch itself, and from right after it."""
    config, told = replace(CONFIG, **changes), story(texts, switch)
    expected = list(make(config, text=told).blocks(BLOCKS))
    for count in (3, 4, 5, 8):
        video = make(config, text=told, overlap=overlap)
        replayed = list(video.replay(latents_of(expected[:count])))
        assert_same(replayed + list(video.blocks(BLOCKS - count)), expected)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_run_stopped_while_it_refreshes_has_lost_nothing_and_goes_on(make, texts, overlap, nth):
    """At the first and at the second of the blocks that are computed again before block 4."""
    config, told = replace(CONFIG, **TWO_RECENT), story(texts, "refresh")
    expected = list(make(config, text=told).blocks(BLOCKS))
    refreshed: list[int] = []

    def on_step(block: int, step: int) -> None:
        if video.cache.block == STARTS[1] and block < STARTS[1]:
            refreshed.append(block)
            if len(refreshed) > nth:
                raise StopHere

    video = make(config, text=told, on_step=on_step, overlap=overlap)
    found: list[Block] = []
    with pytest.raises(StopHere):
        collect(found, video.blocks(BLOCKS))
    assert refreshed == [2, 3][: nth + 1]
    assert_same(found, expected[: STARTS[1]])
    video.on_step = lambda block, step: None
    assert_same(found + list(video.blocks(BLOCKS - STARTS[1])), expected)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("step", [0, 1])
def test_a_run_stopped_within_a_block_goes_on(make, texts, whole, step, switch, overlap):
    def on_step(*now: int) -> None:
        if now == (STARTS[2], step):
            raise StopHere

    video = make(text=story(texts, switch), on_step=on_step, overlap=overlap)
    found: list[Block] = []
    with pytest.raises(StopHere):
        collect(found, video.blocks(BLOCKS))
    video.on_step = lambda block, step: None
    assert_same(found + list(video.blocks(BLOCKS - STARTS[2])), whole[switch].blocks)


@pytest.mark.parametrize("changes", [{}, TWO_RECENT, {"recent_frames": 0}, {"sink_frames": 10}], ids=str)
@pytest.mark.parametrize("switch", SWITCHES)
def test_passes_are_counted_before_they_run(make, texts, switch, changes):
    config, told = replace(CONFIG, **changes), story(texts, switch)
    passes: list[int] = []
    list(make(config, text=told, on_step=lambda *now: passes.append(now)).blocks(BLOCKS))
    usual = BLOCKS * (SAMPLING.steps + 1) - 1
    recents = {"{}": 1, str(TWO_RECENT): 2, "{'recent_frames': 0}": 0}.get(str(changes))
    extra = 0 if switch != "refresh" else 2 * recents if recents is not None else 1  # 5 sinks: block 6 has one recent
    assert len(passes) == usual + extra
    assert refresh_passes(told, config, 0, BLOCKS) == extra
    assert refresh_passes(told, config, 0, 5) + refresh_passes(told, config, 5, 4) == extra
    assert refresh_passes(texts[0], config, 0, BLOCKS) == 0


def test_the_record_tells_the_story(make, texts):
    stretches = (Stretch(0, texts[0], "a cat"), Stretch(3, texts[1], "it rains"))
    video = make(text=Story(stretches, "refresh"))
    list(video.blocks(5))
    assert video.record.prompts == [PromptRecord(0, "a cat"), PromptRecord(3, "it rains")]
    assert video.record.prompt_switch == "refresh"
    assert video.record.as_dict()["prompts"][1] == {"start": 3, "prompt": "it rains"}
    assert [block.block for block in video.record.blocks if "refresh" in block.seconds] == [3]
    alone = make(text=texts[0]).record
    assert (alone.prompts, alone.prompt_switch) == ([PromptRecord(0, "")], "keep")


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "rest", "sentence"),
    [
        ((), {}, "needs at least one prompt"),
        ((1, 4), {}, "must start at block 0, but it starts at block 1"),
        ((0, 4, 4), {}, "one at block 4 follows one at block 4"),
        ((0,), {"switch": "cut"}, "one of keep, refresh, blend, but it is 'cut'"),
        ((0,), {"switch": "blend", "blend_blocks": 0}, "blend_blocks is 0"),
        ((0,), {"blend_blocks": 1.5}, "must be a whole number, but it is 1.5"),
    ],
    ids=str,
)
def test_a_story_that_makes_no_sense_is_refused(starts, rest, sentence):
    with pytest.raises(PackForcingError, match=sentence):
        Story(tuple(Stretch(start, TextKV(())) for start in starts), **rest)


TEXT = """
# the story of a cat
0:00   a cat walks on grass
  0:20.5 it starts to rain

1:00:05 the sun comes out, at 0:30
"""


def test_a_storys_text_is_read():
    assert parse_story(TEXT) == [
        TimedPrompt(0.0, "a cat walks on grass"),
        TimedPrompt(20.5, "it starts to rain"),
        TimedPrompt(3605.0, "the sun comes out, at 0:30"),
    ]
    assert [line.seconds for line in parse_story("0 a\n75 b\n90:00 c")] == [0, 75, 5400]
    assert parse_story(story_text(parse_story(TEXT))) == parse_story(TEXT)
    assert story_text([TimedPrompt(61.0, "a\nb")]) == "1:01 a b"
    assert [time_of(seconds) for seconds in (0, 20.5, 75, 3605, 9.8125)] == [
        "0:00", "0:20.5", "1:15", "1:00:05", "0:09.812",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no prompt"),
        ("# only a comment\n\n", "has no prompt"),
        ("0:00 a\nthen b", "Line 2 of the story, 'then b', must begin with a time"),
        ("0:00 a\n\n0:75 b", 'Line 3 .* "0:75" is none'),
        ("0:00 a\n-0:10 b", '"-0:10" is none'),
        ("0:00 a\n1:2:3:4 b", '"1:2:3:4" is none'),
        ("0:00 a\nnan b", '"nan" is none'),
        ("0:00 a\n1e3 b", '"1e3" is none'),
        (f"0:00 a\n{'9' * 400} b", "is none"),
        ("0:00 a\n0:10", "Line 2 of the story, '0:10', has a time but no prompt"),
        ("0:10 a", "Line 1 .* first prompt and must start at 0:00"),
        ("0:00 a\n0:20 b\n0:20 c", "Line 3 .* must start after the prompt before it, which starts at 0:20"),
    ],
    ids=lambda text: text[-20:],
)
def test_a_storys_text_with_a_mistake_names_the_line(text, sentence):
    with pytest.raises(PackForcingError, match=sentence) as error:
        parse_story(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block_frames", [1, 3, 4])
@pytest.mark.parametrize("fps", [16.0, 24.0, 12.5])
def test_a_prompt_starts_with_the_block_nearest_to_its_time(block_frames, fps):
    """A block of n latent frames has 4n frames of video, the first one 4n - 3."""
    begins = [0.0]
    for block in range(40):
        begins.append(begins[-1] + (4 * block_frames - (0 if block else 3)) / fps)
    assert [block_seconds(block, fps, block_frames) for block in range(41)] == pytest.approx(begins)
    assert [start_block(seconds, fps, block_frames) for seconds in begins] == list(range(41))
    for tenth in range(int(begins[-2] * 10)):
        seconds = tenth / 10
        distances = [abs(begin - seconds) for begin in begins]
        assert distances[start_block(seconds, fps, block_frames)] == pytest.approx(min(distances))


def test_times_that_fit_become_a_story(texts):
    prompts = parse_story("0:00 a\n0:02 b\n0:05 c")
    check_story_times(prompts, 16.0, 4, 6)
    encoded = encoded_prompts(prompts, [torch.full((1, 1, 1), n) for n in range(3)], 16.0, 4)
    told = story_from(encoded, lambda context: texts[context.item()], "blend", 5)
    assert [(stretch.start, stretch.prompt) for stretch in told.stretches] == [(0, "a"), (2, "b"), (5, "c")]
    assert all(stretch.text is text for stretch, text in zip(told.stretches, texts, strict=True))
    assert (told.switch, told.blend_blocks) == ("blend", 5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0 a\n0:06 b", "The prompt at 0:06, 'b', has no block of its own before the video's end at 0:05.812"),
        ("0 a\n0:05.6 b", "The prompt at 0:05.6, 'b', has no block of its own"),
        ("0 a\n2 b\n2.2 c", "The prompts at 0:02 and 0:02.2 fall into the same block, which begins at 0:01.812"),
        ("0 a\n0.1 b", "The prompts at 0:00 and 0:00.1 fall into the same block"),
    ],
)
def test_times_that_do_not_fit_are_refused(text, sentence):
    """Six blocks of four latent frames at 16 fps are 93 frames, 5.8125 s; the last one begins at 4.8125 s."""
    with pytest.raises(PackForcingError, match=sentence):
        check_story_times(parse_story(text), 16.0, 4, 6)
    assert CacheConfig().block_frames == 4


def test_the_times_text_says_with_which_block_each_prompt_starts():
    """40 blocks of 16 frames, the first of which is 3 frames short: block b begins at (16 b - 3) / 16 s."""
    prompts = parse_story("0 a\n0:05 b\n0:33.4 c")
    rows = times_text(prompts, Length(40.0, 16.0, 4)).splitlines()
    assert [row.split() for row in rows] == [
        ["0:00", "block", "0", "begins", "at", "0:00"],
        ["0:05", "block", "5", "begins", "at", "0:04.81"],
        ["0:33.4", "block", "34", "begins", "at", "0:33.81"],
        ["0:39.81", "end", "of", "40", "blocks"],
    ]
    with pytest.raises(PackForcingError, match="has no block of its own before the video's end"):
        times_text(prompts, Length(20.0, 16.0, 4))
