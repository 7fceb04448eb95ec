"""Prompts to embeddings, from the files that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import TEXT_TOKENS
from ..errors import PackForcingError
from .tokenizer import Tokenizer, check_sentencepiece, read_tokenizer
from .umt5 import encode_tokens, layer_bytes
from .umt5_files import EMBEDDING, SPIECE_FILE, UMT5File, read_umt5, tokenizer_near

# float16 is no choice: activations of T5 leave its range.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TextEncoder:
    """UMT5's encoder and tokenizer, opened. Weights stay in their file until they are used, and are dropped after."""

    file: UMT5File
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype = torch.float32

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """The embeddings [L, d] of each prompt, on the CPU, L at most 512.

        Raises PackForcingError when they are not finite.
        """
        contexts = encode_tokens(self.file, [self.tokenizer.ids(prompt) for prompt in prompts], self.device, self.dtype)
        if not all(context.isfinite().all() for context in contexts):
            raise PackForcingError(
                f"The text encoder {self.file.path} gave numbers that are not finite: download the file again."
            )
        return contexts

    @property
    def needed_bytes(self) -> int:
        """Bytes on the device: a layer's weights. The prompts themselves take little beside it."""
        return layer_bytes(self.file, self.dtype)

    def cut(self, prompts: Sequence[str]) -> list[tuple[str, int]]:
        """The prompts that are too long, each with its number of tokens: only the first 512 are read."""
        counted = ((prompt, self.tokenizer.count(prompt)) for prompt in prompts)
        return [(prompt, tokens) for prompt, tokens in counted if tokens > TEXT_TOKENS]


def open_text_encoder(
    path: str, tokenizer: str | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Opens the encoder of a file or a folder (`umt5_files`), with its tokenizer or that of another path.

    Raises PackForcingError when sentencepiece is not installed, when a file is missing or is not what it should be,
    and when both do not belong together.
    """
    check_sentencepiece()
    file = read_umt5(path)
    words = tokenizer_of(file, Path(path), tokenizer)
    rows = file.tensors[EMBEDDING].shape[0]
    if words.size > rows:
        raise PackForcingError(
            f"The tokenizer has {words.size:,} tokens, but {file.path} has embeddings for {rows:,}: take both from the "
            "same UMT5."
        )
    return TextEncoder(file, words, device, dtype)


def tokenizer_of(file: UMT5File, path: Path, given: str | None) -> Tokenizer:
    """The tokenizer that is given, else the one in the weights' file, else one near it."""
    if given is not None:
        return read_tokenizer(Path(given))
    if file.spiece is not None:
        return Tokenizer(file.spiece, str(file.path))
    near = tokenizer_near(path)
    if near is None:
        raise PackForcingError(
            f"{path} comes without a tokenizer, and there is no {SPIECE_FILE} near it: give --tokenizer the file "
            f"{SPIECE_FILE} of google/umt5-xxl, or its folder."
        )
    return read_tokenizer(near)
