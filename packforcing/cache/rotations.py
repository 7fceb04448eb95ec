"""The rotations that one block needs: of its own tokens, of its compressed form, and of mid blocks into their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import COMPRESSED_SPACE_STRIDE, Layout
from .positions import Anchors
from .rope import Rotation, block_positions, centres, grid_positions, joined, rotation, temporal_rotation


class BlockRotations:
    """Rotations on the device, made again only when what they follow from has moved.

    Args:
        dtype: of the angles: the cache's precision, so that a float64 cache is exact to float64.
    """

    current: Rotation  # of the current block's tokens
    compressed: Rotation  # of the current block's compressed tokens

    def __init__(self, layout: Layout, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self._layout = layout
        self._head_dim = head_dim
        self._device = device
        self._dtype = dtype
        size, frames = layout.size, layout.config.block_frames
        # Scores compare content: height and width are rotated, time is not (docs/method.md, section 5).
        still = grid_positions(torch.zeros(frames), torch.arange(size.rows), torch.arange(size.columns))
        self.content_queries = self._of(still)
        self.content_keys = self._of(self._compressed_positions(torch.zeros(layout.compressed_frames)))
        self.compressed_base = self._of(self._compressed_positions(self._base_times))
        self._anchors: Anchors | None = None
        self._mid: dict[float, Rotation] = {}  # by the anchor of the mid slot

    @property
    def _base_times(self) -> Tensor:
        """Times of a compressed block's token frames, counted from the block's first latent frame."""
        return centres(self._layout.compressed_frames, self._layout.temporal_stride)

    def _compressed_positions(self, times: Tensor) -> Tensor:
        size, span = self._layout.size, 1 if self._layout.direct else COMPRESSED_SPACE_STRIDE
        return grid_positions(times, centres(size.compressed_rows, span), centres(size.compressed_columns, span))

    def _of(self, positions: Tensor) -> Rotation:
        return rotation(positions, self._head_dim, self._dtype).to(self._device)

    def move(self, anchors: Anchors) -> None:
        """Follows the anchors of the block that begins. They stay the same once all slots are in use."""
        if anchors == self._anchors:
            return
        self.current = self.at(anchors.current)
        self.compressed = self._of(self._compressed_positions(anchors.current + self._base_times))
        self._mid = {}
        for anchor in anchors.mid:
            self._to_mid(anchor, anchors.mid_scale)
        self._anchors = anchors  # only now: what failed midway is done again

    def at(self, anchor: float) -> Rotation:
        """Rotation of the tokens of a block that stands at this anchor."""
        size, frames = self._layout.size, self._layout.config.block_frames
        return self._of(block_positions(anchor, frames, size.rows, size.columns))

    def by_time(self, offset: float) -> Rotation:
        """Rotation of any tokens by `offset` latent frames."""
        return temporal_rotation(torch.full((1,), offset), self._head_dim, self._dtype).to(self._device)

    def to_mid_slots(self, anchors: list[float], scale: float) -> Rotation:
        """Rotation of compressed blocks, side by side, from their base positions to slots at these anchors."""
        return joined([self._to_mid(anchor, scale) for anchor in anchors])

    def _to_mid(self, anchor: float, scale: float) -> Rotation:
        """Made once: without RoPE adjustment only the selection says which are needed."""
        if anchor not in self._mid:
            offsets = anchor + (scale - 1) * self._base_times
            per_frame = self._layout.size.compressed_rows * self._layout.size.compressed_columns
            spread = offsets.repeat_interleave(per_frame)
            self._mid[anchor] = temporal_rotation(spread, self._head_dim, self._dtype).to(self._device)
        return self._mid[anchor]
