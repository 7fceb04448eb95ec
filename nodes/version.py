"""Which versions of ComfyUI the pack runs in."""

from __future__ import annotations

OLDEST = "0.3.60"


def check_version(found: str) -> None:
    """Raises ImportError, which ComfyUI shows when it starts, where ComfyUI is older than the pack can use.

    What does not read as a version passes: a fork may count in its own way.
    """
    numbers = numbers_of(found)
    if numbers and numbers < numbers_of(OLDEST):
        raise ImportError(
            f"ComfyUI-PackForcing needs ComfyUI {OLDEST} or newer, but this is {found}: update ComfyUI, and start it "
            "again."
        )


def numbers_of(version: str) -> tuple[int, ...]:
    """0.3.75 -> (0, 3, 75); nothing for what is not numbers between dots."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()


def check_comfyui() -> None:
    """`check_version` of the ComfyUI that imports the pack. Raises ImportError."""
    try:
        from comfyui_version import __version__ as found
    except ImportError:  # a fork without it
        return
    check_version(found)
