"""The option --live of `generate`: lines that are typed while the video is made rule from the next block on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from threading import Thread

import torch
from torch import Tensor

from ..demo.text import encode_prompt
from ..errors import PackForcingError
from ..files.state_file import StatePrompt
from ..generate.live import LivePrompts, Mailbox, live_words
from ..generate.long_video import LongVideo
from ..generate.story import block_seconds, time_of
from ..known_models import TINY
from ..telling import tell
from .text import tell_cut, text_encoder


def add_live_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--live",
        action="store_true",
        help="read prompts from standard input while the video is made: a line rules from the next block on",
    )


def check_live(options: argparse.Namespace) -> None:
    """Raises PackForcingError when there is nobody to type, or nothing that could encode what is typed."""
    if not options.live:
        return
    if options.model != TINY and not options.text_encoder:
        raise PackForcingError(
            "--live encodes what is typed, and for that needs the text encoder: give --text-encoder PATH and --prompt, "
            "instead of a file of encoded prompts."
        )
    if sys.stdin is None or sys.stdin.closed:
        raise PackForcingError("--live reads from standard input, but it is closed: leave --live out.")


def listening(
    options: argparse.Namespace, video: LongVideo, prompts: Sequence[StatePrompt], device: torch.device
) -> LivePrompts:
    """Lets a video hear what is typed from now on, until standard input or the program ends.

    Its own thread reads, without Python's buffer: that has a lock, which a thread that still waits for a line would
    keep from the program's end.
    """
    box = Mailbox()
    lines = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115  the thread reads to the end
    Thread(target=hear, args=(lines, box), daemon=True, name="packforcing-live").start()
    fps, frames = video.record.fps, video.layout.config.block_frames

    def on_heard(block: int, words: str, refused: str) -> None:
        begins = time_of(round(block_seconds(block, fps, frames), 2))
        tell_on_a_line(f"not taken: {refused}" if refused else f"from block {block:,} at {begins} on: {words}")

    return LivePrompts(video, prompts, box.take, encoder_of_words(options, device), on_heard)


def hear(lines: Iterable[bytes], box: Mailbox) -> None:
    """Leaves each line's words in the box, until there are no more. Empty lines say nothing."""
    for line in lines:
        try:
            if line.strip():
                box.say(live_words(line.decode("utf-8")))
        except UnicodeDecodeError:
            tell_on_a_line("not taken: the line is no text in UTF-8, set the terminal to UTF-8")
        except PackForcingError as error:
            tell_on_a_line(f"not taken: {error}")


def encoder_of_words(options: argparse.Namespace, device: torch.device) -> Callable[[str], Tensor]:
    """What encodes a line to [1, L, 4096]: the demo's encoder, or the one that the options name."""
    if options.model == TINY:
        return encode_prompt
    encoder = text_encoder(options, device)

    def encode(words: str) -> Tensor:
        tell_cut(encoder, [words])
        return encoder.encode([words])[0][None]

    return encode


def tell_on_a_line(sentence: str) -> None:
    """Says a sentence below the line of the progress."""
    tell(f"\n{sentence}")
