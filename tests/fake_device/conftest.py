"""What the tests of this folder share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors this small lose more to a second thread than they gain, and its sums would have other last bits."""
    torch.set_num_threads(1)
