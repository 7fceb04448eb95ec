"""The cache inspector: a run's record as a text report and as a picture. Neither computes anything of the method."""

from .colours import COLOURS, STORED, mid_colour
from .facts import selection_facts, token_counts
from .picture import cell_box, picture
from .report import report

__all__ = ["COLOURS", "STORED", "cell_box", "mid_colour", "picture", "report", "selection_facts", "token_counts"]
