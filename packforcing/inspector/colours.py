"""The picture's colours, and what each of them is called."""

from __future__ import annotations

from typing import TypeAlias

Colour: TypeAlias = tuple[int, int, int]

BACKGROUND, PANEL, GRID = (22, 24, 29), (30, 33, 40), (58, 63, 74)
TEXT, FAINT = (232, 234, 238), (160, 166, 178)
FULL = (255, 255, 255)  # the line of a full cache
# Of each partition. It is Okabe and Ito's palette, whose colours people with any colour vision can tell apart.
COLOURS: dict[str, Colour] = {
    "sink": (86, 180, 233),
    "mid": (230, 159, 0),
    "recent": (0, 158, 115),
    "current": (240, 228, 66),
    "aside": (0, 114, 178),
    "archive_device": (204, 121, 167),
    "archive_host": (122, 88, 150),
    "archive_disk": (153, 153, 153),
    "key_sums": (213, 94, 0),
}
# A mid block that is only stored, and one that the fewest layers attend; with more layers it turns to COLOURS["mid"].
STORED, FAINTEST_MID = (62, 66, 78), (112, 84, 34)
# Of a block's stages; Paul Tol's muted palette, so that none of them is taken for a partition.
STAGE_COLOURS: dict[str, Colour] = {
    "denoise": (136, 204, 238),
    "clean_pass": (170, 68, 153),
    "compression": (204, 102, 119),
    "refresh": (221, 204, 119),
    "decode": (68, 170, 153),
    "wait": (238, 238, 238),
    "preview": (153, 153, 51),
}
OTHER_STAGE = (128, 132, 140)
# Of a story's prompts, under dark text; Paul Tol's light palette. Further prompts have the same colours, darker.
PROMPTS: tuple[Colour, ...] = (
    (119, 170, 221),
    (238, 136, 102),
    (187, 204, 51),
    (255, 170, 187),
    (153, 221, 255),
    (238, 221, 136),
    (170, 170, 0),
    (68, 187, 153),
    (221, 221, 221),
)
PROMPT_TEXT = (22, 24, 29)
RETURN = (255, 255, 255)  # the frame around what a return took up
LABELS = {
    "sink": "sink",
    "mid": "mid, attended",
    "recent": "recent",
    "current": "current",
    "aside": "set aside",
    "archive_device": "archive, device",
    "archive_host": "archive, host",
    "archive_disk": "archive, disk",
    "key_sums": "key sums",
}


def mid_colour(share: float) -> Colour:
    """The colour of a mid block that `share` of the layers attend; 0 is a stored block that none selected."""
    if share <= 0:
        return STORED
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(FAINTEST_MID, COLOURS["mid"], strict=True))
    return red, green, blue


def share_colour(share: float) -> Colour:
    """The colour of a mid block that a layer chose in `share` of its chances. By its root: most shares are small."""
    return mid_colour(max(0.0, share) ** 0.5)


def prompt_colour(number: int) -> Colour:
    """The colour of a story's prompt, counted from 0; from 18 on the colours come again."""
    colour = PROMPTS[number % len(PROMPTS)]
    if number // len(PROMPTS) % 2 == 0:
        return colour
    red, green, blue = (round(0.68 * part) for part in colour)
    return red, green, blue
