"""The options that name a text encoder, and what several commands do with words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..byte_units import readable_bytes
from ..checks import is_utf8, shown
from ..config import TEXT_TOKENS
from ..errors import PackForcingError
from ..telling import tell
from ..text.encoder import DTYPES, TextEncoder, open_text_encoder


def add_text_encoder_options(command: argparse.ArgumentParser, required: bool = False) -> None:
    """--text-encoder, --tokenizer and --text-dtype."""
    command.add_argument(
        "--text-encoder",
        required=required,
        metavar="PATH",
        help="UMT5-XXL, for a real model's prompts: ComfyUI's file, the Wan authors', or a Hugging Face folder",
    )
    command.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="its spiece.model, or the folder of it; default: beside the encoder, or in it",
    )
    command.add_argument("--text-dtype", default="float32", choices=DTYPES, help="what the text encoder computes in")


def text_encoder(options: argparse.Namespace, device: torch.device) -> TextEncoder:
    """The encoder that the options name, opened. Raises PackForcingError when it cannot be used."""
    return open_text_encoder(options.text_encoder, options.tokenizer, device, DTYPES[options.text_dtype])


def tell_work(encoder: TextEncoder, prompts: int) -> None:
    """Says what is encoded by what, and the memory that it takes."""
    noun = "prompt" if prompts == 1 else "prompts"
    tell(
        f"encoding {prompts} {noun} by {encoder.file.path.name}, one of {encoder.file.layers} layers at a time: about "
        f"{readable_bytes(encoder.needed_bytes)} on {encoder.device}"
    )


def tell_cut(encoder: TextEncoder, words: Sequence[str]) -> None:
    """Says which prompts are too long."""
    for prompt, tokens in encoder.cut(words):
        tell(f"the prompt {shown(prompt)} has {tokens:,} tokens, of which Wan reads the first {TEXT_TOKENS}")


def check_words(prompt: str) -> None:
    """Raises PackForcingError for bytes that are no text: Python keeps those of an argument as surrogates."""
    if not is_utf8(prompt):
        raise PackForcingError(
            f"The prompt {shown(prompt)} is no text in UTF-8: set the terminal to UTF-8, or write a --story file."
        )


def text_file(path: str, what: str) -> str:
    """The text of a file. Raises PackForcingError when there is none; `what` says what it should be."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PackForcingError(f"The {what} {path} is no text file: save it as plain text in UTF-8.") from error
    except OSError as error:
        raise PackForcingError(f"The {what} {path} cannot be read ({error.strerror}): give a text file.") from error
