"""UMT5's tokenizer, and what Wan does to a prompt before it."""

from __future__ import annotations

import html
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TEXT_TOKENS
from ..errors import PackForcingError
from .umt5_files import SPIECE_FILE

# What `ftfy`, which the Wan authors call here, does to text that was read as UTF-8 and that the tokenizer's own
# normalisation (NFKC) does not do as well: quotation marks become straight.
_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))


def cleaned(prompt: str) -> str:
    """A prompt as Wan's encoder gets it: HTML's entities are characters, quotes straight, white space single blanks."""
    text = html.unescape(html.unescape(prompt.translate(_QUOTES))).translate(_QUOTES)
    return " ".join(text.split())


def check_sentencepiece() -> None:
    """Raises PackForcingError when the tokenizer's package is not installed."""
    if importlib.util.find_spec("sentencepiece") is None:
        raise PackForcingError(
            "Encoding prompts needs the package sentencepiece, which is not installed: pip install "
            '"comfyui-packforcing[text]", or pip install sentencepiece.'
        )


class Tokenizer:
    """Words to token ids.

    Args:
        model: the sentencepiece model's bytes.
        source: where they come from, for messages.

    Raises PackForcingError when they are no such model, or when it lacks a token for a prompt's end.
    """

    def __init__(self, model: bytes, source: str) -> None:
        check_sentencepiece()
        import sentencepiece

        self._pieces: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise PackForcingError(f"{source} is no sentencepiece model: give UMT5's {SPIECE_FILE}.") from error
        self.end: int = self._pieces.eos_id()
        if self.end < 0:
            raise PackForcingError(
                f"The tokenizer of {source} has no token for a prompt's end: give UMT5's {SPIECE_FILE}."
            )
        self.size: int = self._pieces.get_piece_size()

    def count(self, prompt: str) -> int:
        """Tokens of a whole prompt, its end included."""
        return len(self._pieces.encode(cleaned(prompt))) + 1

    def ids(self, prompt: str) -> Tensor:
        """The token ids [L] of a prompt and of its end; a longer one is cut to 512, as Wan does it."""
        return torch.tensor([*self._pieces.encode(cleaned(prompt))[: TEXT_TOKENS - 1], self.end])


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds it. Raises PackForcingError when there is none."""
    file = path / SPIECE_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise PackForcingError(f"The folder {path} has no {SPIECE_FILE}: give the tokenizer's folder of UMT5-XXL.")
    try:
        model = file.read_bytes()
    except OSError as error:
        raise PackForcingError(
            f"The tokenizer {file} cannot be read ({error.strerror}): give UMT5's {SPIECE_FILE}."
        ) from error
    return Tokenizer(model, str(file))
