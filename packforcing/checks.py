"""Checks of single values: what a user gives may be of any type, and of any size."""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin

from .errors import PackForcingError


def check_whole(name: str, value: object) -> None:
    """Raises PackForcingError for what is no whole number: 2.5, infinity, NaN, text, a list, True."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise PackForcingError(f"{name} must be a whole number, but it is {shown(value)}.")


def check_number(name: str, value: object) -> None:
    """Raises PackForcingError for what is no number: text, a list, True. Ranges are checked after it, NaN with them."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise PackForcingError(f"{name} must be a number, but it is {shown(value)}.")


def check_count(name: str, value: object, least: int = 0) -> None:
    """Raises PackForcingError for what is no whole number from `least` up."""
    check_whole(name, value)
    if value < least:  # type: ignore[operator]
        raise PackForcingError(f"{name} must be at least {least}, but it is {shown(value)}.")


def check_between(name: str, value: object, least: float, most: float | None = None) -> None:
    """Raises PackForcingError for what is no finite number from `least` to `most`; without `most`, from `least` up."""
    check_number(name, value)
    if not (isinstance(value, int) or isfinite(value)) or value < least or (most is not None and value > most):  # type: ignore[arg-type,operator]
        wanted = f"at least {least:g}" if most is None else f"from {least:g} to {most:g}"
        raise PackForcingError(f"{name} must be {wanted}, but it is {shown(value)}.")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises PackForcingError for what is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise PackForcingError(f"{name} must be one of {', '.join(choices)}, but it is {shown(value)}.")


def check_kind(name: str, value: object, kind: type) -> None:
    """Raises PackForcingError for what is no object of a class."""
    if not isinstance(value, kind):
        raise PackForcingError(f"{name} must be a {kind.__name__}, but it is {shown(value)}.")


def is_of(value: object, kind: Any) -> bool:
    """Whether what was read from JSON is of a type such as `int`, `float | None` or `dict[str, list[float]]`.

    A whole number is a float too, as far as a float can hold it.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(is_of(value, each) for each in inner)
    if origin is dict:
        return isinstance(value, dict) and all(is_of(k, inner[0]) and is_of(v, inner[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(is_of(each, inner[0]) for each in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000)
    return isinstance(value, kind)


def shown(value: object, most: int = 60) -> str:
    """A value as a message shows it, in one line, cut to `most` letters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: Python keeps bytes that are no text as surrogates, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
