"""The cache inspector: a run's record as a text report and as a picture. Neither computes anything of the method."""

from .colours import COLOURS, STORED, mid_colour
from .facts import selection_facts, token_counts
from .numbers import numbers, numbers_json
from .picture import cell_box, overview, overview_boxes, panel_boxes, picture
from .report import report
from .story_report import story_of

__all__ = [
    "COLOURS",
    "STORED",
    "cell_box",
    "mid_colour",
    "numbers",
    "numbers_json",
    "overview",
    "overview_boxes",
    "panel_boxes",
    "picture",
    "report",
    "selection_facts",
    "story_of",
    "token_counts",
]
