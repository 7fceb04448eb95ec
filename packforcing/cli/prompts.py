"""The options that say what a video shows: one prompt, or a story of several."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checks import shown
from ..config import Length
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..files.encoded_prompts import read_prompt
from ..files.state_file import StatePrompt
from ..generate.state import encoded_prompts
from ..generate.story import (
    SWITCHES,
    TimedPrompt,
    check_story_times,
    check_switch,
    parse_story,
    story_text,
    timed_prompt,
)
from ..known_models import TINY
from .text import add_text_encoder_options, check_words, tell_cut, tell_work, text_encoder, text_file


def add_prompt_options(command: argparse.ArgumentParser) -> None:
    """One prompt or several, what encodes them, and what happens where they change."""
    command.add_argument("--prompt", help="what the video shows; a real model needs --text-encoder, too")
    command.add_argument(
        "--text-embedding",
        metavar="FILE",
        help="a file of one encoded prompt [L, 4096], or FILE:NAME for one of several, as `encode` writes them",
    )
    command.add_argument(
        "--story", metavar="FILE", help="a text file with a line '0:20 it starts to rain' for each prompt, instead"
    )
    command.add_argument(
        "--at",
        nargs=2,
        action="append",
        default=[],
        metavar=("TIME", "PROMPT"),
        help='another prompt from that time on, such as 0:20 "it starts to rain"; may be given often',
    )
    command.add_argument(
        "--at-embedding",
        nargs=2,
        action="append",
        default=[],
        metavar=("TIME", "FILE"),
        help="likewise, with a file as for --text-embedding",
    )
    add_text_encoder_options(command)
    command.add_argument(
        "--prompt-switch", default="keep", choices=SWITCHES, help="what happens to the history where the prompt changes"
    )
    command.add_argument(
        "--blend-blocks", type=int, default=2, help="over how many blocks 'blend' goes from one prompt to the next"
    )


@dataclass(frozen=True)
class Prompts:
    """The checked options."""

    timed: tuple[TimedPrompt, ...]  # with the words, or "" where a file of an encoded prompt does not tell them
    encode: Callable[[], list[Tensor]]  # the prompts, encoded [1, L, 4096]
    switch: str
    blend_blocks: int

    @property
    def comment(self) -> str:
        """The words for the video's file: the prompt, or the story's text; "" where some words are not known."""
        if not all(prompt.prompt for prompt in self.timed):
            return ""
        return self.timed[0].prompt if len(self.timed) == 1 else story_text(self.timed)

    def told(self, length: Length) -> tuple[StatePrompt, ...]:
        """The prompts, encoded, each with its first block. Encoding may take long: it is the encoder's whole work."""
        return encoded_prompts(self.timed, self.encode(), length.fps, length.block_frames)


def prompts_of(options: argparse.Namespace, length: Length, device: torch.device) -> Prompts:
    """What the options say. Raises PackForcingError when that is nothing, too much, or does not fit the video."""
    check_sources(options)
    encoded = options.text_embedding is not None or bool(options.at_embedding)
    if options.story is not None:
        timed = parse_story(text_file(options.story, "story"))
    elif encoded:
        timed = in_order("--at-embedding", options.text_embedding, options.at_embedding)
    else:
        timed = in_order("--at", options.prompt, options.at)
    for prompt in timed:
        check_words(prompt.prompt)
    check_switch(options.prompt_switch, options.blend_blocks)
    check_story_times(timed, length.fps, length.block_frames, length.blocks)
    encode: Callable[[], list[Tensor]]
    if encoded:
        files = [read_prompt(prompt.prompt) for prompt in timed]
        timed = [TimedPrompt(prompt.seconds, file.words) for prompt, file in zip(timed, files, strict=True)]
        encode = partial(list, [file.context[None] for file in files])
    else:
        encode = encoder_of(options, [prompt.prompt for prompt in timed], device)
    return Prompts(tuple(timed), encode, options.prompt_switch, options.blend_blocks)


def encoder_of(options: argparse.Namespace, words: list[str], device: torch.device) -> Callable[[], list[Tensor]]:
    """What encodes the prompts: the demo's encoder, or the opened one that the options name."""
    if options.model == TINY:
        return lambda: [encode_prompt(prompt) for prompt in words]
    encoder = text_encoder(options, device)
    tell_cut(encoder, words)

    def encode() -> list[Tensor]:
        tell_work(encoder, len(words))
        return [context[None] for context in encoder.encode(words)]

    return encode


def check_sources(options: argparse.Namespace) -> None:
    """Raises PackForcingError unless the options name prompts in one way, and in one that the model can take."""
    story, words, files = ways = [
        [name for name in names if getattr(options, name.replace("-", "_")) not in (None, [])]
        for names in (("story",), ("prompt", "at"), ("text-embedding", "at-embedding"))
    ]
    given = [names[0] for names in ways if names]
    if not given:
        raise PackForcingError(
            "Nothing says what the video shows: give --prompt TEXT or --story FILE, and for a real model its "
            "--text-encoder, or --text-embedding FILE instead."
        )
    if len(given) > 1:
        raise PackForcingError(
            f"The prompts must come in one way, but both --{given[0]} and --{given[1]} are there: leave one out."
        )
    if options.model == TINY and (options.vae or files or options.text_encoder):
        raise PackForcingError(
            "The tiny model brings its own VAE and text encoder: leave --vae, --text-encoder, --text-embedding and "
            "--at-embedding out, and give --prompt, --at or --story."
        )
    if options.model != TINY and (story or words) and not options.text_encoder:
        raise PackForcingError(
            "A real model needs a prompt encoded by UMT5-XXL: give its file or folder as --text-encoder PATH, or an "
            "encoded prompt as --text-embedding FILE."
        )
    if files and options.text_encoder:
        raise PackForcingError(
            f"The prompts of --{files[0]} are encoded already: leave --text-encoder out, or give --prompt instead."
        )
    if options.prompt is not None and not options.prompt.strip():
        raise PackForcingError(f"--prompt {shown(options.prompt)} has no words: say what the video shows.")


def in_order(option: str, first: str | None, later: list[list[str]]) -> list[TimedPrompt]:
    """The prompt that starts at 0:00, if there is one, and those of an option that is given often."""
    timed = [] if first is None else [TimedPrompt(0.0, first)]
    for time, prompt in later:
        timed.append(timed_prompt(time, prompt, timed, f"{option} {time} {shown(prompt)}"))
    return timed
