"""What the tests of the loop over blocks share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from toy_videos import causal_wan, long_video, weights

from packforcing.generate.long_video import LongVideo
from packforcing.model.causal_wan import CausalWan


@pytest.fixture(scope="module")
def wan() -> CausalWan:
    return causal_wan(weights())


@pytest.fixture(scope="module")
def make(wan: CausalWan) -> Callable[..., LongVideo]:
    """`long_video` under one prompt; everything can be replaced."""
    return partial(long_video, wan)
