"""The command `encode`: prompts to a file of embeddings, for training and for `generate --text-embedding`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from ..checks import shown
from ..command_options import default_device
from ..devices import usable_device
from ..errors import PackForcingError
from ..files.encoded_prompts import EncodedPrompt, encoder_of, read_prompts, write_prompts
from ..files.weights import SAFETENSORS_SUFFIXES
from ..files.writing import check_output_file
from ..telling import tell
from ..text.encoder import TextEncoder
from .options import Commands
from .text import add_text_encoder_options, tell_cut, tell_work, text_encoder, text_file

TOKENS_AT_ONCE = 16_384  # what is encoded before the file is written: 268 MB of hidden states in float32


def add_command(commands: Commands) -> None:
    """Adds `encode` and its options."""
    command = commands.add_parser("encode", help="encode prompts by UMT5-XXL, for training and for generate")
    command.add_argument("--prompts", required=True, metavar="FILE", help="a text file with a prompt on each line")
    add_text_encoder_options(command, required=True)
    command.add_argument(
        "--output",
        default="prompts.safetensors",
        metavar="FILE",
        help="the file to write; prompts that it has from an earlier run are not encoded again",
    )
    command.add_argument("--device", default=default_device())
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Encodes the prompts that the file does not have yet, and says what it has then."""
    output = Path(options.output)
    check_output(output)
    words = prompt_lines(text_file(options.prompts, "file of prompts"), options.prompts)
    encoder = text_encoder(options, usable_device(options.device))
    name = f"{encoder.file.path.name}, {options.text_dtype}"
    done = encoded_before(output, name) if output.exists() else {}
    missing = [prompt for prompt in words if prompt not in done]
    tell_cut(encoder, missing)
    if missing:
        tell_work(encoder, len(missing))
    else:
        save(output, words, done, name)  # fewer prompts, or in another order
    encoded = 0
    for part in parts_of(encoder, missing):
        contexts = encoder.encode(part)
        done |= {prompt: EncodedPrompt(each, prompt) for prompt, each in zip(part, contexts, strict=True)}
        save(output, words, done, name)
        encoded += len(part)
        tell(f"encoded {encoded} of {len(missing)}")
    summary = {"output": str(output), "prompts": len(words), "encoded": len(missing)}
    print(
        json.dumps(summary) if options.json else f"written: {output}, {len(words)} prompts, {len(missing)} of them now"
    )


def check_output(output: Path) -> None:
    """Raises PackForcingError when the file could not be written."""
    check_output_file(output, "encoded prompts")
    if output.suffix not in SAFETENSORS_SUFFIXES or output.is_dir():
        raise PackForcingError(f"Encoded prompts are written as safetensors, but --output is {output}: name a file so.")


def prompt_lines(text: str, path: str) -> list[str]:
    """The prompts of a text, each once. Empty lines, and those that begin with #, are skipped.

    Raises PackForcingError when there is none.
    """
    lines = (line.strip() for line in text.splitlines())
    words = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not words:
        raise PackForcingError(f"The file {path} has no prompt: write one on each line.")
    return words


def encoded_before(output: Path, encoder: str) -> dict[str, EncodedPrompt]:
    """The prompts of an earlier run, by their words. Raises PackForcingError when another encoder made them."""
    before = encoder_of(output)
    if before != encoder:
        raise PackForcingError(
            f"{output} was not written by this text encoder ({shown(before)} is not {shown(encoder)}): choose another "
            "--output."
        )
    # Copies: the file is replaced while they are in use, which some systems refuse for a mapped one.
    return {
        prompt.words: EncodedPrompt(prompt.context.clone(), prompt.words) for prompt in read_prompts(output).values()
    }


def parts_of(encoder: TextEncoder, words: list[str]) -> Iterator[list[str]]:
    """The prompts in parts that are encoded together; between them the file is written."""
    part: list[str] = []
    tokens = 0
    for prompt in words:
        count = len(encoder.tokenizer.ids(prompt))
        if part and tokens + count > TOKENS_AT_ONCE:
            yield part
            part, tokens = [], 0
        part.append(prompt)
        tokens += count
    if part:
        yield part


def save(output: Path, words: list[str], done: dict[str, EncodedPrompt], encoder: str) -> None:
    """Writes what is encoded so far, in the order of the prompts: 00001, 00002 and so on."""
    ready = {f"{number:05d}": done[prompt] for number, prompt in enumerate(words, 1) if prompt in done}
    write_prompts(output, ready, encoder)
