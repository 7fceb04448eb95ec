"""The commands of `benchmarks/` as modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def imported(name: str) -> ModuleType:
    """A benchmark, which puts the repository on the path for itself: that must not stay (see `conftest.py`)."""
    path = [*sys.path]
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = path
