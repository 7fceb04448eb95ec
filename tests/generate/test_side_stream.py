"""Work beside the main work, and its clock; CUDA's part against stand-ins for its streams and events."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from packforcing.devices import from_device, to_device
from packforcing.generate.side_stream import SideStream, overlap_wanted
from packforcing.generate.stopwatch import Stopwatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


def test_a_call_runs_in_another_thread_and_one_after_the_other():
    side, order, go = SideStream(CPU), [], threading.Event()

    def first() -> int:
        assert go.wait(timeout=60)
        order.append(threading.get_ident())
        return 1

    results = [side.submit(first), side.submit(lambda: order.append(threading.get_ident()))]
    assert not order, "the caller goes on"
    go.set()
    assert results[0].result()[0] == 1
    results[1].result()
    assert len(order) == 2
    assert set(order) != {threading.get_ident()}
    assert len(set(order)) == 1
    assert results[0].result()[1] > 0, "seconds"


@pytest.mark.parametrize("inference", [False, True])
def test_a_call_has_the_callers_inference_mode_and_no_gradients(inference: bool):
    def modes() -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with torch.inference_mode(inference):
        assert SideStream(CPU).submit(modes).result()[0] == (inference, False)


def test_an_exception_comes_with_the_result():
    def fails() -> None:
        raise torch.OutOfMemoryError("no room")

    side = SideStream(CPU)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        side.submit(fails).result()
    assert side.submit(lambda: 3).result()[0] == 3, "and the next call runs"


@pytest.mark.parametrize(("choice", "cpu", "cuda"), [("auto", False, True), ("on", True, True), ("off", False, False)])
def test_who_wants_it(choice: str, cpu: bool, cuda: bool):
    assert (overlap_wanted(choice, CPU), overlap_wanted(choice, CUDA)) == (cpu, cuda)


# --- CUDA -----------------------------------------------------------------------------------------------------


class FakeCuda:
    """Streams that note what happens on them, and events that are 0.25 s apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        cuda, self.times = self, 0.0

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.device = device

            def synchronize(self) -> None:
                cuda.log.append(f"wait for {self.device}")

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.timed = enable_timing

            def record(self, stream: Stream) -> None:
                cuda.log.append(f"event on {stream.device}")
                cuda.times += 0.25
                self.at = cuda.times

            def synchronize(self) -> None:
                cuda.log.append("wait for an event")

            def elapsed_time(self, other: Event) -> float:
                assert self.timed
                assert other.timed
                return 1000 * (other.at - self.at)

        @contextmanager
        def stream(given: Stream) -> Iterator[None]:
            cuda.log.append("enter")
            yield
            cuda.log.append("leave")

        for name, value in (("Stream", Stream), ("Event", Event), ("stream", stream), ("current_stream", Stream)):
            monkeypatch.setattr(torch.cuda, name, value)


def test_on_cuda_a_result_is_there_when_its_own_stream_has_finished(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda(monkeypatch)
    assert SideStream(CUDA).submit(lambda: cuda.log.append("call")).result()[0] is None
    assert cuda.log == ["enter", "call", "leave", "wait for cuda:1"]


def test_on_cuda_a_stretch_lies_between_two_events_and_nobody_waits_until_asked(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda(monkeypatch)
    watch, seconds, others = Stopwatch(CUDA), {"a": 1.0}, {}
    with watch.stretch(seconds, "a"), watch.stretch(others, "b"):
        cuda.log.append("work")
    with pytest.raises(ValueError, match="broken"), watch.stretch(others, "c"):
        raise ValueError("broken")
    assert cuda.log[:5] == ["event on cuda:1"] * 2 + ["work"] + ["event on cuda:1"] * 2
    assert (seconds, others) == ({"a": 1.0}, {})
    watch.settle()
    assert (seconds, others) == ({"a": 1.75}, {"b": 0.25})
    assert cuda.log.count("wait for an event") == 2
    watch.settle()
    assert seconds == {"a": 1.75}, "once"


class NotedTensor:
    """Notes what is done to it."""

    device = CPU

    def __init__(self, log: tuple[str, ...] = ()) -> None:
        self.log = log

    def pin_memory(self) -> NotedTensor:
        return NotedTensor((*self.log, "pinned"))

    def to(self, target: torch.device | torch.dtype, non_blocking: bool = False) -> NotedTensor:
        return NotedTensor((*self.log, f"to {target}{' without waiting' if non_blocking else ''}"))


def test_tensors_go_to_cuda_through_pinned_memory():
    assert to_device(NotedTensor(), CUDA).log == ("pinned", "to cuda:1 without waiting")
    assert to_device(NotedTensor(), CUDA, torch.bfloat16).log[0] == "to torch.bfloat16", "before it travels"


def test_reading_from_cuda_waits_for_that_alone(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda(monkeypatch)

    class OnCuda:
        is_cuda, device = True, CUDA

        def to(self, target: str, non_blocking: bool) -> str:
            cuda.log.append(f"to {target}, non_blocking {non_blocking}")
            return "the copy"

    read = from_device(OnCuda())
    assert cuda.log == ["to cpu, non_blocking True", "event on cuda:1"]
    assert read() == "the copy"
    assert cuda.log[2:] == ["wait for an event"]
    x = torch.randn(3)
    assert from_device(x)() is x


def test_tensors_stay_on_a_cpu():
    x = torch.randn(3)
    assert to_device(x, CPU) is x
    assert torch.equal(to_device(x, CPU, torch.bfloat16), x.bfloat16())


def test_on_a_cpu_a_stretch_is_there_at_once(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("packforcing.generate.stopwatch.time.perf_counter", lambda: next(ticks))
    watch, seconds = Stopwatch(CPU), {}
    for _ in range(2):
        with watch.stretch(seconds, "a"):
            pass
    assert seconds == {"a": 5.0}
