"""A cache that forgets nothing and builds every context anew: slow, and obviously right. And what drives a cache.

No transformer: queries, keys and values are random, and what a block attends to is compared row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from packforcing.cache.cache import Cache
from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape

EXACT = 1e-12  # float64: angles below 100 radians and a handful of roundings


# ---------------------------------------------------------------------- the slow, obviously right model


@lru_cache(maxsize=4096)
def rotary(times: tuple[float, ...], heights: tuple[float, ...], widths: tuple[float, ...], dim: int) -> Tensor:
    """e^{i p 10000^(-2k/n)} of a grid of tokens [1, L, 1, dim / 2], time slowest; an axis has n channels."""
    points = torch.tensor([(t, h, w) for t in times for h in heights for w in widths], dtype=torch.float64)
    side = dim // 6 * 2
    angles = []
    for axis, n in enumerate((dim - 2 * side, side, side)):
        frequencies = torch.tensor([10000 ** (-2 * k / n) for k in range(n // 2)], dtype=torch.float64)
        angles.append(points[:, axis, None] * frequencies)
    return torch.exp(1j * torch.cat(angles, dim=1))[None, :, None]


class Grid(NamedTuple):
    """Where the tokens of a block stand along each axis."""

    times: tuple[float, ...]
    heights: tuple[float, ...]
    widths: tuple[float, ...]

    def turn(self, x: Tensor) -> Tensor:
        """x [B, L, H, D] in float64, its channel pairs as complex numbers, multiplied."""
        pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double())
        return torch.view_as_real(pairs * rotary(*self, x.shape[-1])).flatten(-2)

    def still(self) -> Grid:
        """The same without temporal rotation."""
        return self._replace(times=(0.0,) * len(self.times))


class Raw(NamedTuple):
    """One layer's unrotated keys and values of one block, at full resolution and compressed."""

    keys: Tensor
    values: Tensor
    compressed_keys: Tensor
    compressed_values: Tensor


class Place(NamedTuple):
    """A block of the context: which, compressed or not, where its first frame stands, how far apart its frames are."""

    block: int
    compressed: bool
    start: float
    scale: float


@dataclass
class Everything:
    """Every block's raw keys and values, kept for ever."""

    layout: Layout
    model: ModelShape
    blocks: list[list[Raw]] = field(default_factory=list)  # [block][layer]

    def history(self, block: int) -> tuple[list[int], list[int], list[int]]:
        """Sink blocks 0..S-1, the last R as recent, mid blocks between."""
        config = self.layout.config
        sinks, recents = config.sink_frames // config.block_frames, config.recent_frames // config.block_frames
        sink = [b for b in range(block) if b < sinks]
        later = [b for b in range(block) if b >= sinks]
        cut = max(0, len(later) - recents)
        return sink, later[:cut], later[cut:]

    def full_grid(self, start: float) -> Grid:
        frames, size = self.layout.config.block_frames, self.layout.size
        times = tuple(start + f for f in range(frames))
        return Grid(times, tuple(range(size.height // 16)), tuple(range(size.width // 16)))

    def compressed_grid(self, start: float, scale: float = 1.0) -> Grid:
        """A compressed token stands at the centre of the frames and of the 4x4 tokens that it covers."""
        frames, size, stride = self.layout.config.block_frames, self.layout.size, self.layout.temporal_stride
        times = tuple(start + scale * (stride * f + (stride - 1) / 2) for f in range(frames // stride))
        heights = tuple(4 * r + 1.5 for r in range(size.height // 64))
        return Grid(times, heights, tuple(4 * c + 1.5 for c in range(size.width // 64)))

    def choose(self, block: int, layer: int, queries: Tensor) -> list[int]:
        """The top-k of the mid blocks by the literal double sum, in chronological order."""
        c, (_, mid, _) = self.layout.config, self.history(block)
        if c.repeat_mids and 0 < len(mid) < c.top_k:
            slots = range(c.top_k)
            return [m for i, m in enumerate(mid) for s in slots if i / len(mid) <= s / c.top_k < (i + 1) / len(mid)]
        if c.selection == "recency":
            return mid[max(0, len(mid) - c.top_k) :]
        score = {m: self.score(m, layer, queries) for m in mid}
        return sorted(sorted(mid, key=lambda m: (score[m], m))[max(0, len(mid) - c.top_k) :])

    def score(self, mid: int, layer: int, queries: Tensor) -> float:
        """The affinity of a mid block: the literal double sum over queries and keys."""
        c, tokens = self.layout.config, queries.shape[1]
        count = max(1, round(tokens * c.query_fraction))
        sampled = [n * tokens // count for n in range(count)]
        heads = max(1, int(self.model.heads * c.head_fraction))
        q = self.full_grid(0).still().turn(queries)[:, sampled, :heads]
        k = self.compressed_grid(0).still().turn(self.blocks[mid][layer].compressed_keys)[:, :, :heads]
        return torch.einsum("bihd,bjhd->bhij", q, k).sum().item() / (len(q) * heads * q.shape[-1] ** 0.5)

    def places(self, block: int, chosen: list[int]) -> list[Place]:
        """Sinks, chosen mids, recent blocks and the current one, without gaps, from position 0 on.

        Without RoPE adjustment: each where it was made.
        """
        c, (sink, _, recent) = self.layout.config, self.history(block)
        frames, scale = c.block_frames, 1.0
        if c.position_range and chosen:
            room = c.position_range - c.sink_frames - c.recent_frames - frames
            scale = min(1.0, room / (len(chosen) * frames))
        places, time = [], 0.0
        for b in [*sink, *chosen, *recent, block]:
            compressed = b in chosen
            start = time if c.rope_adjustment else float(b * frames)
            places.append(Place(b, compressed, start, scale if compressed else 1.0))
            time += frames * places[-1].scale
        return places

    def rows(self, places: list[Place], layer: int) -> tuple[Tensor, Tensor]:
        """Keys, turned to where they stand, and values [B, L, H, D] of blocks of the context."""
        keys, values = [], []
        for place in places:
            raw = self.blocks[place.block][layer]
            if place.compressed:
                keys.append(self.compressed_grid(place.start, place.scale).turn(raw.compressed_keys))
                values.append(raw.compressed_values)
            else:
                keys.append(self.full_grid(place.start).turn(raw.keys))
                values.append(raw.values)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)


# ---------------------------------------------------------------------- driving a cache


class Pass(NamedTuple):
    """What one layer makes of one block in one pass, nothing rotated."""

    queries: Tensor
    compressed_queries: Tensor
    raw: Raw


@dataclass(frozen=True)
class Stream:
    """Random queries, keys and values, the same for the same (seed, block, layer, step)."""

    layout: Layout
    model: ModelShape
    batch: int = 1
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __call__(self, block: int, layer: int, step: int) -> Pass:
        generator = torch.Generator().manual_seed(hash((self.seed, block, layer, step)) % 2**63)
        full, compressed = self.layout.tokens_per_block, self.layout.compressed_tokens_per_block

        def draw(tokens: int) -> Tensor:
            shape = (self.batch, tokens, self.model.heads, self.model.head_dim)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        return Pass(draw(full), draw(compressed), Raw(draw(full), draw(full), draw(compressed), draw(compressed)))


DENOISE, CLEAN = 0, 1
TINY = ModelShape(layers=2, dim=24, heads=2)


def small_config(**changes: object) -> CacheConfig:
    """Blocks of 2 frames; a sink block, two recent blocks, at most 3 mids."""
    return CacheConfig(**({"block_frames": 2, "sink_frames": 2, "recent_frames": 4, "top_k": 3} | changes))


def small_layout(**changes: object) -> Layout:
    return Layout(small_config(**changes), FrameSize(64, 80), temporal_stride=2)


def run_pass(cache: Cache, stream: Stream, step: int) -> None:
    """One pass of all layers over the current block, as the transformer does it."""
    for layer in range(cache.model.layers):
        made = stream(cache.block, layer, step)
        cache.score(layer, made.queries)
        cache.select(layer)
        cache.write(layer, made.raw.keys, made.raw.values)
        if step == CLEAN and cache.config.top_k:
            cache.write_compressed(layer, made.raw.compressed_keys, made.raw.compressed_values)


def run_blocks(cache: Cache, stream: Stream, blocks: int) -> Iterator[int]:
    """Lives through the blocks; yields each after its clean pass, before it ends."""
    for block in range(blocks):
        cache.begin(block)
        run_pass(cache, stream, DENOISE)
        run_pass(cache, stream, CLEAN)
        yield block
        cache.end()


def contexts(cache: Cache) -> list[Tensor]:
    """A copy of all layers' keys and values of the context."""
    return [x.clone() for layer in range(cache.model.layers) for x in cache.context(layer)]


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------- comparing


def in_order(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by their values, which are copies and never rounded; a repeated block's by their keys, too."""
    order = torch.from_numpy(np.lexsort((keys[0, :, 0, 0].numpy(), values[0, :, 0, 0].numpy())))
    return keys[:, order].double(), values[:, order].double()


def assert_same_rows(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same set of (key, value) rows: attention does not care about their order."""
    assert found[0].shape == expected[0].shape
    (found_keys, found_values), (keys, values) = in_order(*found), in_order(*expected)
    assert torch.equal(found_values, values)
    torch.testing.assert_close(found_keys, keys, rtol=0, atol=EXACT)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", queries, keys) / queries.shape[-1] ** 0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), values)


# ---------------------------------------------------------------------- any configuration, any length


class Setup(NamedTuple):
    layout: Layout
    model: ModelShape
    batch: int
    blocks: int
    seed: int


def setup(
    seed: int = 0, blocks: int = 16, batch: int = 1, layers: int = 1, side: int = 64, stride: int = 2, **config: object
) -> Setup:
    """A setup by hand: `small_config` with changes."""
    layout = Layout(small_config(**config), FrameSize(64, side), stride)
    return Setup(layout, ModelShape(layers=layers, dim=24, heads=2), batch, blocks, seed)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Any configuration; the first choice of each draw is the likeliest, and the most telling."""
    frames = draw(st.sampled_from((2, 4, 3, 1)))
    sink, recent, top_k = (draw(st.sampled_from(choice)) for choice in ((2, 1, 3, 0), (2, 3, 1, 0), (4, 2, 3, 1, 0)))
    smallest = frames * (sink + recent + 1) + (1 if top_k else 0)
    positions = draw(
        st.sampled_from(
            ({}, {"rope_adjustment": False}, {"position_range": smallest + draw(st.integers(0, 3 * frames))})
        )
    )
    config = CacheConfig(
        block_frames=frames,
        sink_frames=frames * sink,
        recent_frames=frames * recent,
        top_k=top_k,
        selection=draw(st.sampled_from(("affinity", "recency"))),
        query_fraction=draw(st.sampled_from((0.25, 0.1, 1.0))),
        head_fraction=draw(st.sampled_from((0.5, 1.0))),
        **positions,
        archive_device=draw(st.sampled_from(("device", "host", "disk"))),
    )
    size = FrameSize(draw(st.sampled_from((64, 80, 112, 128))), draw(st.sampled_from((64, 80))))
    model = ModelShape(layers=draw(st.integers(1, 2)), dim=24, heads=2)
    layout = Layout(config, size, temporal_stride=draw(st.sampled_from((2, 1) if frames > 1 else (1,))))
    blocks = draw(st.sampled_from((16, 8, 3, 25)))
    return Setup(layout, model, draw(st.integers(1, 2)), blocks, draw(st.integers(0, 2**30)))
