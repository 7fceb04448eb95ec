"""3D rotary position embedding: angles from positions, rotation by an offset in time (docs/method.md, section 6).

Wan splits the channels of a head into a temporal, a vertical and a horizontal part (44 + 42 + 42 of 128), and rotates
neighbouring channel pairs. Angles are computed from positions and never looked up, so that a position may be
fractional and no table limits the length of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from ..devices import to_device

THETA = 10_000.0


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of L tokens' angles, [L, P], for the first P channel pairs of a head; the others stay."""

    cos: Tensor
    sin: Tensor

    @cached_property
    def points(self) -> Tensor:
        """The angles as complex numbers of length 1, [L, P]: made once, since a pass asks for them in every layer."""
        return torch.complex(self.cos, self.sin)

    @property
    def channels(self) -> int:
        """How many of a head's channels, from the first on, are rotated."""
        return 2 * self.cos.shape[-1]

    def __getitem__(self, tokens: Tensor | slice) -> Rotation:
        return Rotation(self.cos[tokens], self.sin[tokens])

    def to(self, device: torch.device) -> Rotation:
        return Rotation(to_device(self.cos, device), to_device(self.sin, device))


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that carry time, height and width: (44, 42, 42) for 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def _angles(positions: Tensor, dim: int) -> Tensor:
    """positions [L] -> angles [L, dim / 2], float64."""
    frequencies = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(positions.to("cpu", torch.float64), frequencies)


def _rotation(angles: Tensor, dtype: torch.dtype) -> Rotation:
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotation(positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Rotation:
    """Rotation of tokens at positions [L, 3] = (time, height, width), in latent frames and full-resolution tokens."""
    parts = [_angles(positions[:, axis], dim) for axis, dim in enumerate(axis_dims(head_dim))]
    return _rotation(torch.cat(parts, dim=-1), dtype)


def temporal_rotation(offsets: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Rotation:
    """Rotation of tokens by temporal offsets [L], in latent frames; height and width stay as they are."""
    return _rotation(_angles(offsets, axis_dims(head_dim)[0]), dtype)


def joined(rotations: Sequence[Rotation]) -> Rotation:
    """The rotations of several runs of tokens, as that of all of them in this order."""
    return Rotation(torch.cat([by.cos for by in rotations]), torch.cat([by.sin for by in rotations]))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotates x [B, L, H, D]; the arithmetic is float32 at least, the result has x's dtype.

    Rotations compose: rotating by positions p and then by a temporal offset d equals rotating by p + (d, 0, 0).
    """
    return _with_the_rest(_rotated(x, by).to(x.dtype), x)


def place(keys_slot: Tensor, values_slot: Tensor, keys: Tensor, values: Tensor, by: Rotation) -> None:
    """Writes keys, rotated, and values, all [B, L, H, D], into slots of a cache, which may be of another dtype."""
    turned = _rotated(keys, by)
    keys_slot[..., : turned.shape[-1]] = turned
    keys_slot[..., turned.shape[-1] :] = keys[..., turned.shape[-1] :]
    values_slot.copy_(values)


def rotate_in_reals(x: Tensor, by: Rotation) -> Tensor:
    """`rotate` of [..., L, H, D] for torch.compile, which makes one kernel of real operations, none of complex ones."""
    return _with_the_rest(_rotated_in_reals(x, by).to(x.dtype), x)


def place_in_reals(keys_slot: Tensor, values_slot: Tensor, keys: Tensor, values: Tensor, by: Rotation) -> None:
    """`place`, for torch.compile."""
    keys_slot.copy_(rotate_in_reals(keys, by))
    values_slot.copy_(values)


def _rotated(x: Tensor, by: Rotation) -> Tensor:
    """The channels of x that are rotated, [B, L, H, 2 P], in float32 at least."""
    pairs = rearrange(x[..., : by.channels], "b l h (pair two) -> b l h pair two", two=2)
    # As complex numbers: one multiplication that reads and writes everything once, where real ones take six.
    points = torch.view_as_complex(pairs.to(torch.promote_types(x.dtype, torch.float32)).contiguous())
    return torch.view_as_real(points * by.points[:, None]).flatten(-2)


def _rotated_in_reals(x: Tensor, by: Rotation) -> Tensor:
    pairs = torch.unflatten(x[..., : by.channels], -1, (-1, 2))
    first, second = pairs.to(torch.promote_types(x.dtype, torch.float32)).unbind(-1)
    cos, sin = by.cos[:, None], by.sin[:, None]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


def _with_the_rest(turned: Tensor, x: Tensor) -> Tensor:
    """`turned`, and those channels of x that stay as they are."""
    channels = turned.shape[-1]
    return turned if channels == x.shape[-1] else torch.cat((turned, x[..., channels:]), dim=-1)


@dataclass(frozen=True)
class RotaryOps:
    """`rotate` and `place`, as they are or compiled."""

    rotate: Callable[[Tensor, Rotation], Tensor] = rotate
    place: Callable[[Tensor, Tensor, Tensor, Tensor, Rotation], None] = place


EAGER_ROTARY = RotaryOps()


def compiled_rotary() -> RotaryOps:
    """By torch.compile, once for each number of tokens.

    Sample by sample: with a batch axis there would be another graph for each of its strides, and so for each size of
    buffer and each slice of a pass's tokens.
    """
    turn = torch.compile(rotate_in_reals, dynamic=False, fullgraph=True)
    put = torch.compile(place_in_reals, dynamic=False, fullgraph=True)

    def rotate_each(x: Tensor, by: Rotation) -> Tensor:
        return turn(x[0], by)[None] if len(x) == 1 else torch.stack([turn(sample, by) for sample in x])

    def place_each(keys_slot: Tensor, values_slot: Tensor, keys: Tensor, values: Tensor, by: Rotation) -> None:
        for sample in zip(keys_slot, values_slot, keys, values, strict=True):
            put(*sample, by)

    return RotaryOps(rotate_each, place_each)


def grid_positions(times: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """Positions [T * H * W, 3] of a grid of tokens, time slowest; the arguments are the positions along each axis."""
    return torch.cartesian_prod(times.double(), heights.double(), widths.double()).reshape(-1, 3)


def block_positions(start: float, frames: int, rows: int, columns: int) -> Tensor:
    """Positions [frames * rows * columns, 3] of a full-resolution block whose first frame stands at time `start`."""
    return grid_positions(start + torch.arange(frames), torch.arange(rows), torch.arange(columns))


def centres(count: int, span: int) -> Tensor:
    """Centres [count] of `count` neighbouring runs of `span` positions each: span 4 gives 1.5, 5.5, 9.5, ..."""
    return span * torch.arange(count, dtype=torch.float64) + (span - 1) / 2
