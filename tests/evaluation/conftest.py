"""What the tests of both kinds of evaluation share."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packforcing.evaluation.models import Models, Sources, load
from packforcing.model.compressor import TRAINING_FREE


@pytest.fixture(scope="module")
def models() -> Models:
    """The demo's, whatever is trained of it by now, with the training-free compressor."""
    return replace(load(Sources()), trained=TRAINING_FREE)
