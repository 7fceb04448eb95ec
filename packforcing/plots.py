"""Pictures of a training run: curves of its log, and frames beside their reconstructions.

matplotlib and Pillow are imported only when a picture is drawn: training needs them, a user of the pack does not.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "matplotlib is not installed; `pip install matplotlib`, and the next checkpoint draws it."
_NOT_DRAWN = {"step", "minutes"}


def available() -> bool:
    """Whether curves can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(log: Sequence[Mapping[str, float]], path: str | Path, from_zero: bool = False) -> None:
    """Draw a PNG with one panel for each logged quantity, over the steps.

    Args:
        log: entries with a "step" and the quantities that were logged at it.
        path: the PNG; it is replaced as a whole.
        from_zero: draw linear axes that start at zero. Else quantities above zero have a logarithmic axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for entry in log for name in entry} - _NOT_DRAWN)
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    # A figure of its own, not pyplot's: no state is left behind and no window system is asked for.
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names, 1):
        panel = figure.add_subplot(rows, columns, number)
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
        if from_zero:
            panel.set_ylim(bottom=0)
        elif all(value > 0 for _, value in points) and name != "lr":
            panel.set_yscale("log")
    save_figure(figure, path, dpi=100)


def save_figure(figure: Figure, path: str | Path, dpi: int = 110) -> None:
    """Writes a figure as a PNG, which is replaced as a whole: a viewer never sees half a picture."""
    part = Path(path).with_suffix(".part.png")
    figure.savefig(part, dpi=dpi)
    os.replace(part, path)


def contact_sheet(rows: Sequence[Tensor], path: str | Path, gap: int = 2) -> None:
    """Draw a PNG with one row for each of the videos [3, F, H, W] in [-1, 1]: its frames side by side.

    All videos have the same size; `gap` pixels are left between frames.
    """
    from PIL import Image

    lines = [torch.cat([torch.nn.functional.pad(f, (0, gap, 0, gap)) for f in row.unbind(1)], dim=2) for row in rows]
    sheet = torch.cat(lines, dim=1).float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(path)
