"""How sizes are written for people: decimal units, 1 GB = 10^9 bytes."""

from __future__ import annotations

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def byte_unit(size: float) -> tuple[float, str]:
    """The largest unit that is not above a size in bytes, and its name; bytes for a size below 1."""
    return next(((unit, name) for unit, name in UNITS if size >= unit), UNITS[-1])


def readable_bytes(size: float) -> str:
    """3987210240 -> '3.99 GB'."""
    unit, name = byte_unit(size)
    return f"{size / unit:,.2f} {name}" if unit > 1 else f"{size:,.0f} {name}"
