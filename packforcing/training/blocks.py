"""Known videos taken through the model block by block (teacher forcing), and noise levels for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ..cache.cache import Cache
from ..devices import to_device
from ..model.causal_wan import CausalWan, Text


def walk_blocks(
    wan: CausalWan,
    cache: Cache,
    texts: Sequence[Text],
    blocks: Sequence[Tensor],
    compressed: Callable[[int], Tensor],
    visit: Callable[[int], None],
) -> None:
    """Takes a known video through the model as inference would: each block is visited, then has its clean pass.

    Args:
        wan: the model.
        cache: empty; the blocks are written into it.
        texts: each block's prompts.
        blocks: the video's blocks, each [B, 16, T, h, w].
        compressed: the tokens [B, N_c, d] of block i; asked for blocks that become mid blocks.
        visit: called when the cache stands at block i; it may denoise there.
    """
    for i, x0 in enumerate(blocks):
        cache.begin(i)
        visit(i)
        if i + 1 < len(blocks):
            wan.clean_pass(x0, texts[i], cache, compressed(i) if cache.config.becomes_mid(i) else None)
            cache.end()


def noise_levels(rng: np.random.Generator, count: int, shift: float) -> np.ndarray:
    """`count` noise levels in (0, 1), evenly spread before the shift, in random order."""
    even = (rng.permutation(count) + rng.random(count)) / count
    return shift * even / (1 + (shift - 1) * even)


def levels_like(levels: Tensor, like: Tensor) -> Tensor:
    """Noise levels [B] as [B, 1, 1, 1, 1], of the type and on the device of `like` [B, 16, T, h, w]."""
    return to_device(levels, like.device, like.dtype).view(-1, 1, 1, 1, 1)
