"""Known videos through the model block by block, as inference would take them, and noise levels for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ..cache.cache import Cache
from ..model.causal_wan import CausalWan, TextKV


def walk(
    wan: CausalWan,
    cache: Cache,
    text: TextKV,
    blocks: Sequence[Tensor],
    compressed: Callable[[int], Tensor],
    visit: Callable[[int], None],
) -> None:
    """Takes known blocks [B, 16, T, h, w] through the model as inference would; `visit(i)` may denoise in block i's
    place, and `compressed(i)` gives the tokens [B, N_c, d] of a block that becomes a mid block."""
    for i, x0 in enumerate(blocks):
        cache.begin(i)
        visit(i)
        if i + 1 < len(blocks):
            wan.clean_pass(x0, text, cache, compressed(i) if cache.config.becomes_mid(i) else None)
            cache.end()


def noise_levels(rng: np.random.Generator, count: int, shift: float) -> np.ndarray:
    """`count` noise levels in (0, 1), evenly spread before the shift, in random order."""
    even = (rng.permutation(count) + rng.random(count)) / count
    return shift * even / (1 + (shift - 1) * even)


def spread(levels: Tensor, like: Tensor) -> Tensor:
    """Noise levels [B] that multiply tensors like [B, 16, T, h, w]."""
    return levels.to(like).view(-1, 1, 1, 1, 1)
