"""The clock sums what it is told to, and nothing twice."""

from __future__ import annotations

import torch

from packforcing.bench import clock
from packforcing.bench.clock import Clock, best_ms, held_bytes, peak_bytes, reset_peak
from packforcing.generate import stopwatch

CPU = torch.device("cpu")


def test_a_clock_sums_its_parts_and_starts_anew(monkeypatch):
    seconds = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(seconds))
    watch = Clock(CPU)
    with watch.part("a"):
        pass
    assert watch.timed("a", lambda x: x + 1)(2) == 3
    with watch.part("b"):
        pass
    assert watch.take() == {"a": 3000.0, "b": 500.0}
    assert watch.take() == {}
    assert watch.take()["a"] == 0


def test_the_best_of_many_is_per_call(monkeypatch):
    calls = []
    times = iter([4.0, 30.0, 24.0])  # one call to find out how many; then twice that many
    monkeypatch.setattr(clock, "elapsed_ms", lambda call, device: (call(), next(times))[1])
    assert best_ms(lambda: calls.append(1), CPU, repeats=2) == 8
    assert len(calls) == 1 + 1 + 2 * 3


def test_resident_memory_is_below_its_peak():
    reset_peak(CPU)
    held = held_bytes(CPU)
    big = torch.ones(16 * 2**20)  # more than malloc would ever take from memory that it has kept
    if held is None:  # not Linux
        return
    assert held_bytes(CPU) - held > big.nbytes / 2
    assert peak_bytes(CPU, [held]) > held
