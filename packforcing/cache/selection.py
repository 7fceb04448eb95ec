"""Dynamic context selection: the affinity of mid blocks to the current block, and its top-k (docs/method.md section 5).

    s_m = 1 / (B N_opt sqrt(d)) * sum_b sum_{h < N_opt} sum_{i in S_q} sum_{j in m} Q[b,h,i] . K[m,b,h,j]

is linear in the sums of queries and keys, so one vector a head stands for a whole mid block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor


def scored_heads(heads: int, fraction: float) -> int:
    """N_opt, the number of heads that the affinity sums over: the first `fraction` of them, one at least."""
    return max(1, int(heads * fraction))


def sampled_queries(tokens: int, fraction: float) -> Tensor:
    """S_q: indices of a uniform, deterministic subsample of a block's queries, `fraction` of them, one at least."""
    count = max(1, round(tokens * fraction))
    return torch.arange(count) * tokens // count


def token_sum(x: Tensor, heads: int) -> Tensor:
    """Sum over tokens of queries or keys x [B, L, H, D], for the first `heads` heads: [B, heads, D], float32."""
    return x[:, :, :heads].sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def affinity(query_sum: Tensor, key_sums: Tensor, heads: int | None = None) -> Tensor:
    """Scores [M] of M mid blocks from the query sum [B, N_opt, D] and the blocks' key sums [M, B, N_opt, D].

    Where only some of N_opt = `heads` heads are here, perhaps none, they are these heads' part of the scores.
    """
    batch, here, dim = query_sum.shape
    products: Tensor = einsum(query_sum, key_sums, "b h d, m b h d -> m")
    scale: float = batch * (here if heads is None else heads) * dim**0.5
    return products / scale


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores (all, if fewer), in chronological order; of equals the newer block wins."""
    newest_first = scores.flip(0).argsort(descending=True, stable=True)[:k]
    return (len(scores) - 1 - newest_first).sort().values


def scored_choice(scores: Tensor, k: int) -> Tensor:
    """The choice and what it was made by, in one tensor [2 k' + 2] of the scores' type, k' = min(k, M).

    `top_k`, the scores of what it chose, and the standard deviation and mean of all scores: the host fetches them
    together. Indices are exact up to 2^24.
    """
    best = top_k(scores, k)
    spread = torch.stack(torch.std_mean(scores, correction=0))
    return torch.cat((best.to(scores.dtype), scores[best], spread))


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbouring numbers: [0, 1, 2, 5] -> [(0, 2), (5, 5)]."""
    firsts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    lasts = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return list(zip(firsts, lasts, strict=True))
