"""What the tests of the cache share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread() -> None:
    """Small tensors only wait for each other's threads."""
    torch.set_num_threads(1)
