"""The options that say what a video shows: one prompt, or a story of several."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checks import shown
from ..config import Length
from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..files.state_file import StatePrompt
from ..files.weights import read_state_dict
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
from ..model.causal_wan import padded_prompt


def add_prompt_options(command: argparse.ArgumentParser) -> None:
    """One prompt or several, and what happens where they change."""
    command.add_argument("--prompt", help="for --model tiny")
    command.add_argument(
        "--text-embedding",
        metavar="FILE",
        help="a safetensors file with one tensor [1, L, 4096]: the prompt, encoded by UMT5-XXL; L may be less than 512",
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
    command.add_argument(
        "--prompt-switch", default="keep", choices=SWITCHES, help="what happens to the history where the prompt changes"
    )
    command.add_argument(
        "--blend-blocks", type=int, default=2, help="over how many blocks 'blend' goes from one prompt to the next"
    )


@dataclass(frozen=True)
class Prompts:
    """The checked options. Of an encoded prompt, `TimedPrompt.prompt` is the file."""

    timed: tuple[TimedPrompt, ...]
    encoded: bool
    switch: str
    blend_blocks: int

    @property
    def comment(self) -> str:
        """The words for the video's file: the prompt, or the story's text; "" for encoded ones."""
        if self.encoded:
            return ""
        return self.timed[0].prompt if len(self.timed) == 1 else story_text(self.timed)

    def contexts(self) -> list[Tensor]:
        """The encoded prompts [1, L, 4096]. Raises PackForcingError for a file that holds none."""
        if self.encoded:
            return [padded_prompt(only_tensor(prompt.prompt)) for prompt in self.timed]
        return [encode_prompt(prompt.prompt) for prompt in self.timed]

    def told(self, length: Length) -> tuple[StatePrompt, ...]:
        """The prompts, encoded, each with its first block. Raises what `contexts` raises."""
        named = [TimedPrompt(prompt.seconds, "") if self.encoded else prompt for prompt in self.timed]
        return encoded_prompts(named, self.contexts(), length.fps, length.block_frames)


def prompts_of(options: argparse.Namespace, length: Length) -> Prompts:
    """What the options say. Raises PackForcingError when that is nothing, too much, or does not fit the video."""
    check_sources(options)
    encoded = options.text_embedding is not None or bool(options.at_embedding)
    if options.story is not None:
        timed = parse_story(story_file(options.story))
    elif encoded:
        timed = in_order("--at-embedding", options.text_embedding, options.at_embedding)
    else:
        timed = in_order("--at", options.prompt, options.at)
    check_switch(options.prompt_switch, options.blend_blocks)
    check_story_times(timed, length.fps, length.block_frames, length.blocks)
    return Prompts(tuple(timed), encoded, options.prompt_switch, options.blend_blocks)


def check_sources(options: argparse.Namespace) -> None:
    """Raises PackForcingError unless the options name prompts in one way, and in one that the model can take."""
    story, words, files = ways = [
        [name for name in names if getattr(options, name.replace("-", "_")) not in (None, [])]
        for names in (("story",), ("prompt", "at"), ("text-embedding", "at-embedding"))
    ]
    given = [names[0] for names in ways if names]
    if not given:
        raise PackForcingError(
            "Nothing says what the video shows: give --prompt TEXT or --story FILE for the tiny model, and "
            "--text-embedding FILE for a real one."
        )
    if len(given) > 1:
        raise PackForcingError(
            f"The prompts must come in one way, but both --{given[0]} and --{given[1]} are there: leave one out."
        )
    if options.model == TINY and (options.vae or files):
        raise PackForcingError(
            "The tiny model brings its own VAE and text encoder: leave --vae, --text-embedding and --at-embedding out, "
            "and give --prompt, --at or --story."
        )
    if options.model != TINY and (story or words):
        raise PackForcingError(
            "A real model needs a prompt encoded by UMT5-XXL, and the command line has no UMT5: give "
            "--text-embedding FILE, or generate in ComfyUI."
        )


def in_order(option: str, first: str | None, later: list[list[str]]) -> list[TimedPrompt]:
    """The prompt that starts at 0:00, if there is one, and those of an option that is given often."""
    timed = [] if first is None else [TimedPrompt(0.0, first)]
    for time, prompt in later:
        timed.append(timed_prompt(time, prompt, timed, f"{option} {time} {shown(prompt)}"))
    return timed


def story_file(path: str) -> str:
    """The text of a story's file. Raises PackForcingError when there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PackForcingError(f"The story {path} is no text file: save it as plain text in UTF-8.") from error
    except OSError as error:
        raise PackForcingError(f"The story {path} cannot be read ({error.strerror}): give a text file.") from error


def only_tensor(path: str) -> Tensor:
    """The one tensor of a file. Raises PackForcingError when there are more, or none."""
    tensors, _ = read_state_dict(path)
    if len(tensors) != 1:
        raise PackForcingError(f"{path} must hold one tensor, the encoded prompt [1, L, 4096], but has {len(tensors)}.")
    tensor: Tensor = next(iter(tensors.values()))
    if tensor.ndim != 3 or len(tensor) != 1:
        raise PackForcingError(
            f"{path} must hold an encoded prompt [1, L, 4096], but its tensor has the shape {list(tensor.shape)}."
        )
    return tensor
