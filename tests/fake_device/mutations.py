"""Wrong placements on purpose: one function of the library at a time, with one piece of its text exchanged."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands in a function once, becomes `new`."""

    function: Callable[..., Any]
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.function.__module__.removeprefix('packforcing.')}.{self.function.__qualname__}: {self.new}"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Whoever holds the function runs the other text meanwhile."""
        function = inspect.unwrap(self.function)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.old!r} stands {source.count(self.old)} times in {function}"
        text = source[source.index("def ") :].replace(self.old, self.new)
        scope: dict[str, Any] = {}
        code = compile(f"from __future__ import annotations\n{text}", inspect.getfile(function), "exec")
        exec(code, function.__globals__, scope)
        before = function.__code__
        function.__code__ = scope[function.__name__].__code__
        try:
            yield
        finally:
            function.__code__ = before
