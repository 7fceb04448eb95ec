"""The shapes of the synthetic world as geometry."""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
# The circumradius of each shape, over the radius of a circle that looks as large.
RELATIVE_RADIUS = {"circle": 1.0, "square": 1.2, "triangle": 1.35, "star": 1.35}
# Of each polygon: how many tips it has, and the distance of the corners between them from the centre, where a tip's
# is 1. (A convex polygon has none between; there it is the distance of its edges' middles.)
CORNERS = {"square": (4, 0.5**0.5), "triangle": (3, 0.5), "star": (5, 0.45)}


def tips(shape: str) -> np.ndarray:
    """Outermost points [N, 2] of an upright shape of circumradius 1."""
    count = CORNERS[shape][0] if shape in CORNERS else 64
    turn = (np.arange(count) + (0.5 if shape == "square" else 0)) / count
    return np.stack([np.sin(2 * pi * turn), -np.cos(2 * pi * turn)], axis=-1)


def signed_distance(shape: str, points: np.ndarray, radius: float) -> np.ndarray:
    """Distance [...] of points [..., 2] to the edge of an upright shape, negative inside.

    It is exact near the edge, but not at tips. A polygon is folded about its symmetry axes onto the wedge between a tip
    and the corner beside it, because there its edge is one straight line.
    """
    x, y = points[..., 0], points[..., 1]
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance - radius
    count, inner = CORNERS[shape]
    wedge = pi / count
    angle = np.arctan2(x, -y) - (wedge if shape == "square" else 0)
    angle = np.abs((angle + wedge) % (2 * wedge) - wedge)
    corner = (inner * cos(wedge), inner * sin(wedge))
    along = np.array([corner[0] - 1, corner[1]])
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    return (distance * np.cos(angle) - radius) * normal[0] + distance * np.sin(angle) * normal[1]
