"""Dynamic context selection of docs/method.md, section 5."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packforcing.cache.selection import affinity, sampled_queries, scored_choice, scored_heads, token_sum, top_k


def double_sum(queries: Tensor, blocks: list[Tensor], scored: int) -> list[float]:
    """s_m word by word: queries [B, Lq, H, D], blocks of keys [B, Lk, H, D]."""
    batch, _, _, dim = queries.shape
    scores = []
    for keys in blocks:
        total = 0.0
        for b in range(batch):
            for h in range(scored):
                for i in range(queries.shape[1]):
                    for j in range(keys.shape[1]):
                        total += float(queries[b, i, h] @ keys[b, j, h]) / sqrt(dim)
        scores.append(total / (batch * scored))
    return scores


# ---------------------------------------------------------------------- affinity


@pytest.mark.parametrize(("batch", "heads", "scored"), [(1, 4, 2), (2, 3, 1), (3, 2, 2)])
def test_the_factorised_score_equals_the_double_sum(batch: int, heads: int, scored: int) -> None:
    queries = torch.randn(batch, 7, heads, 12, dtype=torch.float64)
    blocks = [torch.randn(batch, 5, heads, 12, dtype=torch.float64) for _ in range(4)]
    key_sums = torch.stack([token_sum(keys, scored) for keys in blocks])
    found = affinity(token_sum(queries, scored), key_sums)
    torch.testing.assert_close(found.tolist(), double_sum(queries, blocks, scored), rtol=0, atol=1e-13)


def test_sums_of_half_precision_are_kept_in_float32() -> None:
    keys = torch.randn(2, 6_240, 3, 12).bfloat16()
    found = token_sum(keys, 2)
    assert found.dtype == torch.float32
    assert found.shape == (2, 2, 12)
    expected = keys[:, :, :2].double().sum(dim=1)
    # Pairwise or not, a sum of n float32 numbers errs by less than n roundings of the sum of their magnitudes.
    bound = 6_240 * torch.finfo(torch.float32).eps * keys[:, :, :2].double().abs().sum(dim=1)
    assert ((found.double() - expected).abs() < bound).all()
    assert (found.double() - expected).abs().max() < 1e-3  # bfloat16 sums would err by more than 1


def test_half_of_the_heads_are_scored_and_one_at_least() -> None:
    assert [scored_heads(heads, 0.5) for heads in (12, 40, 2, 1)] == [6, 20, 1, 1]
    assert [scored_heads(12, fraction) for fraction in (1.0, 0.25, 0.01)] == [12, 3, 1]


# ---------------------------------------------------------------------- S_q


@given(tokens=st.integers(1, 7_000), fraction=st.floats(1e-4, 1.0))
@settings(deadline=None, derandomize=True)
def test_sampled_queries_are_a_uniform_subsample(tokens: int, fraction: float) -> None:
    chosen = sampled_queries(tokens, fraction).tolist()
    assert len(chosen) == max(1, round(tokens * fraction))
    assert chosen[0] >= 0
    assert chosen[-1] < tokens
    # Around the circle of tokens, two neighbouring steps differ by one token at most.
    steps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + tokens], strict=True)]
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1


def test_a_quarter_of_the_queries_is_every_fourth() -> None:
    assert sampled_queries(6_240, 0.25).tolist() == list(range(0, 6_240, 4))
    assert sampled_queries(10, 1.0).tolist() == list(range(10))
    assert sampled_queries(10, 0.3).tolist() == [0, 3, 6]


def test_sampled_queries_are_the_same_every_time() -> None:
    first = sampled_queries(6_240, 0.1)
    torch.manual_seed(1)
    assert torch.equal(first, sampled_queries(6_240, 0.1))


# ---------------------------------------------------------------------- top-k of the mid blocks


@given(scores=st.lists(st.integers(-3, 3), max_size=12), k=st.integers(0, 14))
@settings(deadline=None, derandomize=True)
def test_top_k_keeps_the_highest_scores_the_newer_of_equals_in_chronological_order(scores: list[int], k: int) -> None:
    best = sorted(range(len(scores)), key=lambda m: (scores[m], m), reverse=True)[:k]
    assert top_k(torch.tensor(scores, dtype=torch.float32), k).tolist() == sorted(best)


def test_of_equals_the_newer_wins() -> None:
    assert top_k(torch.tensor([5.0, 1.0, 1.0, 1.0]), 2).tolist() == [0, 3]
    assert top_k(torch.zeros(5), 2).tolist() == [3, 4]


def test_the_chosen_are_in_chronological_order() -> None:
    assert top_k(torch.tensor([3.0, 9.0, 1.0, 7.0]), 3).tolist() == [0, 1, 3]


def test_with_fewer_candidates_than_k_all_are_chosen() -> None:
    assert top_k(torch.tensor([2.0, 1.0]), 16).tolist() == [0, 1]
    assert top_k(torch.empty(0), 16).tolist() == []


def test_the_choice_comes_with_its_scores_and_their_spread():
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0])
    found = scored_choice(scores, 2).tolist()
    assert found[:4] == [1, 3, 9.0, 7.0]
    assert found[4:] == pytest.approx([10**0.5, 5.0])  # deviations from the mean 5: -2, 4, -4, 2
