"""A copy stream that is none, for weights that are read ahead of their layer where there is no device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

ELSEWHERE = torch.device("meta")  # as the layers' device it makes everything on the CPU lie somewhere else


class Recorder:
    """Stands for a copy stream. Copies at once, and notes what was asked for and in which order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.names: dict[int, str] = {}  # of a weight's storage
        self.events = 0

    def copy(self, pairs: list[tuple[Tensor, Tensor]], after: str) -> str:
        for target, source in pairs:
            target.copy_(source)
        self.asked.append(f"copy {self.names.get(pairs[0][1].data_ptr(), '?')} after {after}")
        return f"copy {self.names.get(pairs[0][1].data_ptr(), '?')}"

    def wait(self, event: str) -> None:
        self.asked.append(f"wait for {event}")

    def mark(self) -> str:
        self.events += 1
        return f"mark {self.events}"


def slots_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets slots lie on the CPU, whatever the device is called."""
    empty_like = torch.empty_like

    def on_the_cpu(like: Tensor, **options: Any) -> Tensor:
        return empty_like(like, **options | {"device": "cpu"})

    monkeypatch.setattr(torch, "empty_like", on_the_cpu)
