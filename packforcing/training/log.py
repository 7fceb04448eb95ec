"""The log of a run: `log.jsonl`, its curves as a picture, and progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from .. import plots
from ..checks import is_of
from ..files.weights import read_json
from ..telling import tell


class Log:
    """`log.jsonl`, one object a line; its curves as a picture; and progress on stderr."""

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self.picture = folder / "curve.png"
        self.steps = steps
        # A killed run leaves lines after its checkpoint, and half a line. This one writes those steps anew.
        lines = [entry for entry in read_log(self.path) if entry["step"] <= first]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        self._first, self._start = first, time.monotonic()
        self._drawn = self._start
        self._sums: dict[str, list[float]] = {}
        if not plots.available():
            tell(f"no {self.picture.name} will be drawn: {plots.MISSING}")

    def add(self, step: int, record: Mapping[str, float], minutes: float, write: bool) -> None:
        """Take in a step's record; `write`: put the mean of those since the last line into the file."""
        for name, value in record.items():
            self._sums.setdefault(name, []).append(value)
        self._show(step, record, write)
        if write:
            means = {name: sum(values) / len(values) for name, values in self._sums.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "minutes": round(minutes, 3), **means}) + "\n")
            self._sums = {}

    def _show(self, step: int, record: Mapping[str, float], write: bool) -> None:
        in_terminal = sys.stderr.isatty()
        if not in_terminal and not write:
            return
        pace = (time.monotonic() - self._start) / (step - self._first)
        values = "  ".join(f"{name} {value:.4g}" for name, value in record.items())
        left = pace * (self.steps - step) / 60
        line = f"step {step} of {self.steps}  {values}  {pace:.2f} s a step, {left:.0f} min left"
        end = "\n" if write else ""
        tell(f"\r\x1b[K{line}" if in_terminal else line, end=end)

    def draw(self, at_once: bool) -> None:
        """Draw the curves; unless `at_once`, only a minute after the start or the last time."""
        if plots.available() and (at_once or time.monotonic() - self._drawn > 60):
            plots.curves(read_log(self.path), self.picture)
            self._drawn = time.monotonic()


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The lines of a `log.jsonl`; none if it is not there. What is no entry, such as a last line that a kill cut off,
    is left out."""
    path = Path(path)
    if not path.exists():
        return []
    return [entry for line in path.read_text(errors="replace").splitlines() if (entry := _entry(line)) is not None]


def _entry(line: str) -> dict[str, float] | None:
    """What a line holds; None unless that is a step's numbers."""
    try:
        entry = read_json(line)
    except ValueError:
        return None
    return entry if is_of(entry, dict[str, float]) and is_of(entry.get("step"), int) else None
