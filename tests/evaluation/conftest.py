"""What the tests of both kinds of evaluation share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from packforcing.evaluation.models import Models, Sources, load
from packforcing.model.compressor import TRAINING_FREE


@pytest.fixture(scope="module")
def models() -> Models:
    """The demo's, whatever is trained of it by now, with the training-free compressor."""
    torch.set_num_threads(1)
    return replace(load(Sources()), trained=TRAINING_FREE)
