"""Checks of single values: what a user gives may be of any type, and of any size."""

from __future__ import annotations

from numbers import Integral, Real

from .errors import PackForcingError


def check_whole(name: str, value: object) -> None:
    """Raises PackForcingError for what is no whole number: 2.5, infinity, NaN, text, a list, True."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise PackForcingError(f"{name} must be a whole number, but it is {shown(value)}.")


def check_number(name: str, value: object) -> None:
    """Raises PackForcingError for what is no number: text, a list, True. Ranges are checked after it, NaN with them."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise PackForcingError(f"{name} must be a number, but it is {shown(value)}.")


def shown(value: object) -> str:
    """A value as a message shows it, cut to a line's length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: Python keeps bytes that are no text as surrogates, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
