"""A deterministic text encoder without weights, for the demo models: words to fixed pseudo-random vectors.

A word's vector is hashed from its spelling. So there is nothing to store or to download, and a prompt gives the same
bits on every machine and version. Wan's cross-attention does not see the order of words. Therefore each vector also
holds the word before it ("red circle" is not "circle red") and its place in the sentence.
"""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import torch
from torch import Tensor

TEXT_DIM = 4096
MAX_WORDS = 64

_WORD = re.compile(r"\w+|[^\w\s]", re.UNICODE)
_END = "<end>"
_LENGTH = np.float32(math.sqrt(1.5))  # float32, so that NumPy 1 and 2 divide in the same precision


def words(prompt: str) -> list[str]:
    """The lower-case words and punctuation marks of a prompt, 63 at most, and a mark for its end."""
    return [*_WORD.findall(prompt.lower())[: MAX_WORDS - 1], _END]


def sign_vector(text: str) -> np.ndarray:
    """A vector [4096] of +1 and -1, hashed from a string: two strings' vectors are nearly orthogonal."""
    digest = hashlib.shake_256(text.encode()).digest(TEXT_DIM // 8)
    return 2.0 * np.unpackbits(np.frombuffer(digest, dtype=np.uint8)).astype(np.float32) - 1.0


def encode_prompt(prompt: str) -> Tensor:
    """Text embeddings [1, L, 4096], float32, of unit variance, for a prompt of L - 1 words (63 at most)."""
    tokens = words(prompt)
    rows = []
    for place, (before, word) in enumerate(zip(["<start>", *tokens], tokens, strict=False)):
        row = sign_vector(word) + 0.5 * sign_vector(f"{before} {word}") + 0.5 * sign_vector(f"#{place}")
        rows.append(row / _LENGTH)
    return torch.from_numpy(np.stack(rows))[None]
