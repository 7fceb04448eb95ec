"""Streams and events of a device that is not there: what has surely happened before what.

Work is numbered in each stream. A stream knows, of every other stream, up to which number its work is over before the
stream's own next work begins; so does the host. A stream learns from events that it waits for, and from the host when
work is queued; the host learns by waiting. Work that reads what another stream has written without knowing it to be
over is a race, whatever the clock on the wall says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fake_device import FakeDevice

Known = dict["Stream", int]  # stream -> number of the last piece of its work that is surely over


def learn(known: Known, more: Known) -> None:
    """Adds to what is known."""
    for stream, number in more.items():
        known[stream] = max(number, known.get(stream, 0))


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, fake: FakeDevice, name: str) -> None:
        self.fake = fake
        self.name = name
        self.queued = 0  # number of its newest work
        self.known: Known = {}

    def __repr__(self) -> str:
        return f"the {self.name} stream"

    def now(self) -> Known:
        """What is over once all that is queued here is over."""
        return {**self.known, self: self.queued}

    def synchronize(self) -> None:
        self.fake.wait_for(self.now(), "stream.synchronize()")

    def wait_event(self, event: Event) -> None:
        learn(self.known, event.recorded or {})

    def wait_stream(self, other: Stream) -> None:
        learn(self.known, other.now())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.fake)
        event.record(self)
        return event

    def query(self) -> bool:
        return self.fake.is_over(self.now())


class Event:
    """Stands in for `torch.cuda.Event`. Times are those at which the host queued it."""

    def __init__(self, fake: FakeDevice, enable_timing: bool = False) -> None:
        self.fake = fake
        self.timing = enable_timing
        self.recorded: Known | None = None
        self._at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = (stream or self.fake.current_stream()).now()
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        self.fake.wait_for(self.recorded or {}, "event.synchronize()")

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.fake.current_stream()).wait_event(self)

    def query(self) -> bool:
        return self.fake.is_over(self.recorded or {})

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds. CUDA refuses where an event has no time, or is not over yet."""
        for event in (self, end):
            if not event.timing or event.recorded is None:
                self.fake.refuse("elapsed_time() needs two events with timing that were recorded")
            if not event.query():
                self.fake.refuse("elapsed_time() of an event that may not be over: synchronise first")
        return 1000 * (end._at - self._at)


class Memory:
    """One allocation, on the device or in pinned host memory: which work wrote it last, and which reads it.

    Attributes:
        home: the stream whose allocator has it, and takes it back when nothing refers to it any more.
        recorded: streams that the allocator was told of (`record_stream`).
    """

    def __init__(self, fake: FakeDevice, home: Stream | None) -> None:
        self.fake = fake
        self.home = home
        self.written: tuple[Stream, int] | None = None
        self.read: Known = {}
        self.recorded: set[Stream] = set()

    def check(self, known: Known, who: str, writes: bool = False) -> None:
        """Refuses to let somebody who knows this much read it, or write it."""
        if self.written is not None and known.get(self.written[0], 0) < self.written[1]:
            self.fake.refuse(f"{who} takes what {self.written[0]} may not have written yet")
        if writes:
            for stream, number in self.read.items():
                if known.get(stream, 0) < number:
                    self.fake.refuse(f"{who} overwrites what {stream} may not have read yet")

    def used_by(self, stream: Stream, number: int, writes: bool) -> None:
        if writes:
            self.written, self.read = (stream, number), {}
        else:
            self.read[stream] = number

    def __del__(self) -> None:
        """The allocator gives it to the next who asks in `home`; no other stream may still be at it."""
        if self.home is None:
            return
        uses = [*self.read.items(), *([self.written] if self.written else [])]
        for stream, number in uses:
            told = stream is self.home or stream in self.recorded
            if not told and self.home.known.get(stream, 0) < number and self.fake.host.get(stream, 0) < number:
                self.fake.errors.append(f"memory of {self.home} was freed while {stream} may still use it")


@contextmanager
def in_stream(fake: FakeDevice, stream: Stream | None) -> Iterator[None]:
    """Stands in for `torch.cuda.stream`."""
    before = fake.current_stream()
    fake.here.stream = stream or before
    try:
        yield
    finally:
        fake.here.stream = before
