"""Words in pictures: a font that has their letters, and as many of them as there is room for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from PIL import ImageFont

Font: TypeAlias = ImageFont.ImageFont | ImageFont.FreeTypeFont

# Pillow's own font has few letters beyond English, so for others a system's font is asked for by its file name.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothR.ttc", "malgun.ttf", "PingFang.ttc", "Arial Unicode.ttf"),
)
NO_CHARACTER = "\U0010ffff"  # no font has it, so it is drawn as the sign for a missing letter
FEWEST_LETTERS = 3  # of a shortened text
# A line may end between these parts: words, and every letter of a script that writes without spaces.
_PARTS = re.compile("[\u3000-\u9fff\uac00-\ud7ff\uff00-\uffef]|[^ \u3000-\u9fff\uac00-\ud7ff\uff00-\uffef]+| +")


class Fonts:
    """Pillow's own font at any size; the small bitmap font where Pillow is older than 10.1 or has no FreeType."""

    def __init__(self) -> None:
        self._fonts: dict[int, Font] = {}

    def __getitem__(self, size: int) -> Font:
        if size not in self._fonts:
            try:
                self._fonts[size] = ImageFont.load_default(size=size)
            except (TypeError, ImportError, OSError):
                self._fonts[size] = ImageFont.load_default()
        return self._fonts[size]

    def width(self, text: str, size: int) -> int:
        return text_width(text, self[size])

    def height(self, size: int) -> int:
        """From the top of the line to the bottom of a letter with a tail."""
        return int(np.ceil(self[size].getbbox("Mg")[3]))


def has_letters(font: Font, text: str) -> bool:
    """Whether the font can draw every character."""
    try:
        missing = bytes(font.getmask(NO_CHARACTER))
    except UnicodeEncodeError:  # Pillow's bitmap font, which has Latin-1 only
        return all(ord(character) < 256 for character in text)
    return all(bytes(font.getmask(character)) != missing for character in set(text))


def readable(prompt: str, fonts: Fonts, size: int) -> tuple[str, Font]:
    """The prompt on one line, and a font that has all of its letters; "" where there is none.

    Where no font has everything, pictures such as emoji are left out, and then accents.
    """
    text = _on_one_line(c if c.isprintable() else " " for c in prompt)
    letters = _on_one_line(c for c in text if unicodedata.category(c) not in ("So", "Sk", "Mn", "Cf"))
    plain = _on_one_line(c for c in unicodedata.normalize("NFKD", letters) if not unicodedata.combining(c))
    own = fonts[size]
    others = [font for name in SYSTEM_FONTS if (font := _system_font(name, size)) is not None]
    for words, choice in ((text, [own, *others]), (letters, [own, *others]), (plain, [own])):
        for font in choice:
            if words and has_letters(font, words):
                return words, font
    return "", own


def _on_one_line(characters: Iterable[str]) -> str:
    return " ".join("".join(characters).split())


@lru_cache(maxsize=64)
def _system_font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except (OSError, ImportError):
        return None


def fitted(text: str, font: Font, width: int, most_lines: int) -> list[str]:
    """`text` on at most `most_lines` lines of `width` pixels, with "…" where more of it follows.

    No line where not even a few letters fit.
    """
    parts: list[str] = _PARTS.findall(text)
    lines: list[str] = []
    while parts and len(lines) < most_lines - 1:
        count = _count_that_fits(parts, font, width)
        if not count:  # a single long word
            break
        lines.append("".join(parts[:count]).strip())
        parts = _PARTS.findall("".join(parts[count:]).strip())
    if not parts:
        return lines
    last = shortened("".join(parts), font, width)
    return [*lines, last] if last else []


def shortened(text: str, font: Font, width: int) -> str:
    """`text`, or its beginning and "…", so that it is at most `width` pixels wide; "" if too little would be left."""
    if text_width(text, font) <= width:
        return text
    more = "…" if has_letters(font, "…") else "..."
    for length in range(min(len(text) - 1, width), FEWEST_LETTERS - 1, -1):
        if text_width(text[:length].rstrip() + more, font) <= width:
            return text[:length].rstrip() + more
    return ""


def text_width(text: str, font: Font) -> int:
    """In pixels."""
    return int(np.ceil(font.getbbox(text)[2]))


def _count_that_fits(parts: list[str], font: Font, width: int) -> int:
    """How many of the first `parts` fit on a line."""
    count = 0
    while count < len(parts) and text_width("".join(parts[: count + 1]).strip(), font) <= width:
        count += 1
    return count
