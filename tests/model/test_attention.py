"""Attention: every form of it is the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from packforcing.model import attention
from packforcing.model.attention import Attention, fast_attention, matmul_attention, sdpa, training_attention


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64, row by row."""
    rows = []
    for head in range(q.shape[2]):
        for query in q[0, :, head].double():
            weights = torch.exp(k[0, :, head].double() @ query / q.shape[-1] ** 0.5)
            rows.append(weights @ v[0, :, head].double() / weights.sum())
    return torch.stack(rows).view(1, q.shape[2], q.shape[1], -1).transpose(1, 2)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, generator=g, dtype=torch.float64).to(dtype) for n in (5, 7, 7))
    return q, k, v


@pytest.mark.parametrize("form", [sdpa, matmul_attention, fast_attention])
def test_every_form_is_the_definition(form: Attention) -> None:
    given = inputs(torch.float64)
    torch.testing.assert_close(form(*given), by_definition(*given), rtol=0, atol=1e-14)
    given = inputs(torch.bfloat16)
    torch.testing.assert_close(form(*given).double(), by_definition(*given), rtol=0, atol=0.02)  # 8 bits, twice


@pytest.mark.parametrize(
    ("dtype", "most", "expected"),
    [(torch.bfloat16, 70, "matmul"), (torch.bfloat16, 69, "sdpa"), (torch.float32, 70, "sdpa")],
)
def test_plain_products_where_they_win(
    dtype: torch.dtype, most: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(attention, "MOST_SCORES", most)  # 5 queries, 7 keys, 2 heads: 70 scores
    monkeypatch.setattr(attention, "sdpa", lambda *given: taken.append("sdpa"))
    monkeypatch.setattr(attention, "matmul_attention", lambda *given: taken.append("matmul"))
    fast_attention(*inputs(dtype))
    assert taken == [expected]


def test_training_on_a_cpu_takes_plain_products() -> None:
    assert training_attention(torch.device("cpu")) is matmul_attention
    assert training_attention(torch.device("cuda")) is sdpa
