"""The three-partition cache of methods 3, 5 and 6, against a model that forgets nothing and builds every context anew.

No transformer: queries, keys and values are random, and what a block attends to is compared row by row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from packforcing.cache.cache import Cache, runs
from packforcing.cache.deferred import DeferredCache
from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape
from packforcing.generate.record import PARTITIONS

EXACT = 1e-12  # float64: angles below 100 radians and a handful of roundings


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors this small only wait for each other's threads."""
    torch.set_num_threads(1)


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
        """Method 3: sink blocks 0..S-1, the last R as recent, mid blocks between."""
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
        """Method 5: the top-k of the mid blocks by the literal double sum, in chronological order."""
        c, (_, mid, _) = self.layout.config, self.history(block)
        if c.repeat_mids and 0 < len(mid) < c.top_k:
            slots = range(c.top_k)
            return [m for i, m in enumerate(mid) for s in slots if i / len(mid) <= s / c.top_k < (i + 1) / len(mid)]
        if c.selection == "recency":
            return mid[max(0, len(mid) - c.top_k) :]
        tokens = queries.shape[1]
        count = max(1, round(tokens * c.query_fraction))
        sampled = [n * tokens // count for n in range(count)]
        scored = max(1, int(self.model.heads * c.head_fraction))
        q = self.full_grid(0).still().turn(queries)[:, sampled, :scored]

        def score(m: int) -> float:
            k = self.compressed_grid(0).still().turn(self.blocks[m][layer].compressed_keys)[:, :, :scored]
            return torch.einsum("bihd,bjhd->bhij", q, k).sum().item()

        return sorted(sorted(mid, key=lambda m: (score(m), m))[max(0, len(mid) - c.top_k) :])

    def places(self, block: int, chosen: list[int]) -> list[Place]:
        """Method 6: sinks, chosen mids, recent blocks and the current one, without gaps, from position 0 on.

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
        archive_device=draw(st.sampled_from(("device", "host"))),
    )
    size = FrameSize(draw(st.sampled_from((64, 80, 112, 128))), draw(st.sampled_from((64, 80))))
    model = ModelShape(layers=draw(st.integers(1, 2)), dim=24, heads=2)
    layout = Layout(config, size, temporal_stride=draw(st.sampled_from((2, 1) if frames > 1 else (1,))))
    blocks = draw(st.sampled_from((16, 8, 3, 25)))
    return Setup(layout, model, draw(st.integers(1, 2)), blocks, draw(st.integers(0, 2**30)))


def check_block(cache: Cache, everything: Everything, stream: Stream) -> list[list[Place]]:
    """One block's life: the first denoising step, the clean pass; each layer's context against the slow model's."""
    block, layers = cache.block, range(cache.model.layers)
    places = []
    everything.blocks.append([])
    for layer in layers:
        made = stream(block, layer, DENOISE)
        cache.score(layer, made.queries)
        cache.select(layer)
        cache.write(layer, made.raw.keys, made.raw.values)
        chosen = everything.choose(block, layer, made.queries)
        places.append(everything.places(block, chosen))
        everything.blocks[block].append(made.raw)
        assert cache.selected[layer] == chosen
        assert_same_rows(cache.context(layer), everything.rows(places[layer], layer))
    for layer in layers:
        made = stream(block, layer, CLEAN)
        cache.score(layer, made.queries)  # of other queries, and without effect
        cache.select(layer)
        cache.write(layer, made.raw.keys, made.raw.values)
        everything.blocks[block][layer] = made.raw
        check_full(cache, everything, places[layer], layer, made.queries)
        if cache.config.top_k:
            before = contexts(cache)
            cache.write_compressed(layer, made.raw.compressed_keys, made.raw.compressed_values)
            check_compressed(cache, everything, places[layer], layer, made.compressed_queries)
            assert same_bits(contexts(cache), before)  # full-resolution results do not depend on the compressor
    return places


def check_full(cache: Cache, everything: Everything, places: list[Place], layer: int, queries: Tensor) -> None:
    """Full queries see [sink | selected mid | recent | current]."""
    keys, values = cache.context(layer)
    expected = everything.rows(places, layer)
    assert keys.shape[1] <= cache.layout.context_tokens
    assert_same_rows((keys, values), expected)
    found = attend(cache.rotate_queries(queries)[:, ::7], keys, values)
    turned = everything.full_grid(places[-1].start).turn(queries)[:, ::7]
    torch.testing.assert_close(found, attend(turned, *expected), rtol=0, atol=EXACT)


def check_compressed(cache: Cache, everything: Everything, places: list[Place], layer: int, queries: Tensor) -> None:
    """Compressed queries see the context without the current block, and the compressed tokens themselves."""
    seen = cache.compressed_context(layer)
    current = places[-1]
    expected = everything.rows([*places[:-1], current._replace(compressed=True)], layer)
    assert_same_rows(seen, expected)
    found = attend(cache.rotate_compressed_queries(queries), *seen)
    turned = everything.compressed_grid(current.start).turn(queries)
    torch.testing.assert_close(found, attend(turned, *expected), rtol=0, atol=EXACT)


def changed_slots(before: list[list[Place]], after: list[list[Place]]) -> int:
    """(layer, slot) pairs that must be filled: those whose mid block, or its place, is another than before."""
    count = 0
    for old, new in zip(before, after, strict=True):
        held = [p for p in old if p.compressed]
        wanted = [p for p in new if p.compressed]
        count += sum(slot >= len(held) or held[slot] != place for slot, place in enumerate(wanted))
    return count


def moved_recent_blocks(before: list[Place], after: list[Place], recent: list[int]) -> int:
    stood = {p.block: p.start for p in before}
    return sum(p.block in recent and stood[p.block] != p.start for p in after)


@given(wanted=setups())
@example(wanted=setup(blocks=25, layers=2, batch=2, side=80))
@example(wanted=setup(selection="recency", archive_device="host"))
@example(wanted=setup(position_range=11))
@example(wanted=setup(blocks=25, layers=2, rope_adjustment=False))
@example(wanted=setup(selection="recency", recent_frames=2, rope_adjustment=False))
@example(wanted=setup(position_range=9, stride=1, side=128, head_fraction=1.0))
@example(wanted=setup(block_frames=3, sink_frames=3, recent_frames=3, stride=2, position_range=13))
@example(wanted=setup(block_frames=3, sink_frames=0, recent_frames=9, stride=1, query_fraction=0.1))
@example(wanted=setup(block_frames=4, sink_frames=8, recent_frames=0, position_range=16))
@example(wanted=setup(block_frames=1, sink_frames=0, recent_frames=0, top_k=4, stride=1, query_fraction=1.0))
@example(wanted=setup(top_k=0))
@example(wanted=setup(blocks=12, top_k=5, repeat_mids=True, layers=2))
@example(wanted=setup(blocks=12, top_k=4, repeat_mids=True, sink_frames=0, position_range=9))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_every_context_is_what_a_model_that_forgets_nothing_would_build(wanted: Setup) -> None:
    layout, model, batch, blocks, seed = wanted
    cache = Cache(layout, model, dtype=torch.float64, batch=batch)
    everything = Everything(layout, model)
    stream = Stream(layout, model, batch, torch.float64, seed)
    before: list[list[Place]] = [[] for _ in range(model.layers)]
    for block in range(blocks):
        cache.begin(block)
        places = check_block(cache, everything, stream)
        cache.end()
        assert cache.mid_slots_written == changed_slots(before, places)
        recent = everything.history(block)[2]
        assert cache.recent_rotated == moved_recent_blocks(before[0], places[0], recent)
        before = places


# ---------------------------------------------------------------------- compressed blocks one block late


def live_late(cache: DeferredCache, stream: Stream, blocks: int) -> Iterator[list[Tensor]]:
    """As `run_blocks`, the compressed form of each block in the clean pass of the next; yields what it attends to, and
    what its queries become."""
    for block in range(blocks):
        cache.begin(block)
        run_pass(cache, stream, DENOISE)
        due = block > 0 and cache.config.becomes_mid(block - 1)
        seen = []
        for layer in range(cache.model.layers):
            raw = stream(block, layer, CLEAN).raw
            cache.write(layer, raw.keys, raw.values)
            if due:
                late = stream(block - 1, layer, CLEAN)
                before = contexts(cache)
                cache.write_compressed(layer, late.raw.compressed_keys, late.raw.compressed_values)
                seen += [*cache.compressed_context(layer), cache.rotate_compressed_queries(late.compressed_queries)]
                assert same_bits(contexts(cache), before)
        yield seen
        cache.end()


@given(wanted=setups().filter(lambda wanted: wanted.layout.config.can_defer))
@example(wanted=setup(blocks=25, layers=2, batch=2, side=80))
@example(wanted=setup(selection="recency", recent_frames=2, rope_adjustment=False))
@example(wanted=setup(position_range=9, stride=1, side=128))
@example(wanted=setup(block_frames=3, sink_frames=0, recent_frames=9, stride=1))
@example(wanted=setup(kv_dtype="fp8_e4m3"))
@settings(deadline=None, derandomize=True, max_examples=15)
def test_late_compressed_blocks_see_the_same_and_are_the_same(wanted: Setup) -> None:
    """To the bit: all contexts, the compressed ones a block later, and so what is archived and selected."""
    layout, model, batch, blocks, seed = wanted
    made = {"dtype": torch.float64, "batch": batch}
    stream = Stream(layout, model, batch, torch.float64, seed)
    cache, late = Cache(layout, model, **made), DeferredCache(layout, model, **made)
    due: list[Tensor] = []
    for block, seen in zip(run_blocks(cache, stream, blocks), live_late(late, stream, blocks), strict=True):
        assert late.selected == cache.selected
        assert same_bits(contexts(late), contexts(cache))
        assert same_bits(seen, due)
        due = []
        for layer in range(model.layers) if layout.config.becomes_mid(block) else ():
            # The layers have been gone through; what they saw is still there, but for the exact compressed tokens.
            passed = stream(block, layer, CLEAN)
            cache.write_compressed(layer, passed.raw.compressed_keys, passed.raw.compressed_values)
            due += [*cache.compressed_context(layer), cache.rotate_compressed_queries(passed.compressed_queries)]
    assert len(cache.archive) == len(late.archive) + layout.config.becomes_mid(blocks - 1)


@pytest.mark.parametrize("changes", [{"top_k": 0}, {"recent_frames": 0}], ids=str)
def test_compressed_blocks_that_are_needed_at_once_cannot_be_late(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="recent ones before them"):
        DeferredCache(small_layout(**changes), TINY)


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize(("sink_frames", "recent_frames"), [(0, 0), (2, 4), (4, 2), (0, 6)])
def test_every_attended_block_is_in_exactly_one_place(top_k: int, sink_frames: int, recent_frames: int) -> None:
    layout = small_layout(top_k=top_k, sink_frames=sink_frames, recent_frames=recent_frames)
    cache, stream = Cache(layout, TINY), Stream(layout, TINY, dtype=torch.float32)
    full, compressed = layout.tokens_per_block, layout.compressed_tokens_per_block
    longest = 0
    for block in range(15):
        cache.begin(block)
        for layer in range(TINY.layers):
            made = stream(block, layer, CLEAN)
            cache.score(layer, made.queries)
            cache.select(layer)
            cache.write(layer, made.raw.keys, torch.full_like(made.raw.values, block))
            if top_k:
                cache.write_compressed(
                    layer, made.raw.compressed_keys, torch.full_like(made.raw.compressed_values, block)
                )
            values = cache.context(layer)[1][0, :, 0, 0]
            longest = max(longest, len(values))
            sink = range(min(sink_frames // 2, block))
            recent = range(max(len(sink), block - recent_frames // 2), block)
            expected = dict.fromkeys([*sink, *recent, block], full) | dict.fromkeys(cache.selected[layer], compressed)
            assert Counter(values.int().tolist()) == expected
            assert cache.selected[layer] == sorted(cache.selected[layer])
        cache.end()
    assert longest == layout.context_tokens


# ---------------------------------------------------------------------- memory


def storages(cache: Cache) -> list[int]:
    """Addresses of the memory behind every tensor that the cache's contexts and buffers show."""
    shown = [*cache.keys, *cache.values]
    for layer in range(cache.model.layers):
        shown += cache.context(layer)
    return [x.data_ptr() for x in shown]


def test_buffers_are_allocated_once() -> None:
    layout = small_layout(position_range=12)
    cache = Cache(layout, TINY)
    addresses = [x.data_ptr() for x in (*cache.keys, *cache.values)]
    pairs = list(zip(addresses[: TINY.layers], addresses[TINY.layers :], strict=True))
    for _ in run_blocks(cache, Stream(layout, TINY, dtype=torch.float32), 25):
        shown = [address for pair in pairs for address in pair]
        assert storages(cache) == [*addresses, *shown]


@pytest.mark.parametrize("archive_device", ["device", "host"])
def test_only_the_archive_grows(archive_device: str) -> None:
    layout = small_layout(archive_device=archive_device)
    cache = Cache(layout, TINY)
    entry = TINY.kv_bytes(layout.compressed_tokens_per_block, 4)
    fixed, room = set(), 0
    for block in run_blocks(cache, Stream(layout, TINY, dtype=torch.float32), 40):
        archive = cache.archive
        assert len(archive) == max(0, block - 1)
        assert (archive.device_bytes, archive.host_bytes)[archive_device == "host"] == len(archive) * entry
        assert (archive.device_bytes, archive.host_bytes)[archive_device == "device"] == 0
        fixed.add(cache.allocated_bytes - archive.device_bytes - archive.allocated_key_sum_bytes)
        room = max(room, archive.allocated_key_sum_bytes)
    assert len(fixed) == 1
    assert cache.archive.key_sum_bytes <= room <= 2 * cache.archive.key_sum_bytes  # doubled when full


def test_the_fixed_memory_is_the_context_and_two_compressed_blocks() -> None:
    """One compressed block's room beside the context, one until it is archived; and its key sums."""
    layout = small_layout()
    kv = TINY.kv_bytes(layout.context_tokens + 2 * layout.compressed_tokens_per_block, 4)
    assert Cache(layout, TINY).allocated_bytes == kv + TINY.layers * 1 * 12 * 4


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_bytes_are_what_the_tensors_in_use_occupy(dtype: torch.dtype, size: int) -> None:
    layout = small_layout(archive_device="host")
    cache = Cache(layout, TINY, dtype=dtype, batch=2)
    for block in run_blocks(cache, Stream(layout, TINY, 2, dtype), 12):
        found = cache.bytes()
        assert tuple(found) == PARTITIONS
        attended = [x for layer in range(TINY.layers) for x in cache.context(layer)]
        assert found["sink"] + found["recent"] + found["current"] + found["mid"] == sum(x.nbytes for x in attended)

        archived = max(0, block - 1)
        kept = [x for b in range(archived) for layer in range(TINY.layers) for x in cache.archive.read([b], layer)]
        assert found["archive_host"] == sum(x.nbytes for x in kept)
        assert found["archive_device"] == 0
        sums = [cache.archive.key_sums(layer, archived) for layer in range(TINY.layers)] if archived else []
        assert found["key_sums"] == sum(x.nbytes for x in sums) == archived * 2 * TINY.layers * 1 * 12 * 4

        token = 2 * TINY.layers * 2 * 24 * size  # batch, layers, K and V, width
        sinks, recents, mids = min(block, 1), min(max(block - 1, 0), 2), min(max(block - 3, 0), 3)
        assert found["sink"] == sinks * 2 * 20 * token
        assert found["recent"] == recents * 2 * 20 * token
        assert found["current"] == 2 * 20 * token
        assert found["mid"] == mids * token


def archive_run(**archive: object) -> tuple[Cache, list[Tensor]]:
    layout = small_layout(**archive)
    cache = Cache(layout, TINY)
    seen: list[Tensor] = []
    for _ in run_blocks(cache, Stream(layout, TINY, dtype=torch.float32), 14):
        seen += contexts(cache)
    return cache, seen


def test_host_and_device_archives_give_the_same_bits() -> None:
    entry = TINY.kv_bytes(small_layout().compressed_tokens_per_block, 4)
    on_device, expected = archive_run(archive_device="device")
    on_host, host = archive_run(archive_device="host")
    split, auto = archive_run(archive_device="auto", archive_budget_gb=3.5 * entry / 1e9)
    assert same_bits(host, expected)
    assert same_bits(auto, expected)
    assert (on_device.archive.device_bytes, on_device.archive.host_bytes) == (13 * entry, 0)
    assert (on_host.archive.device_bytes, on_host.archive.host_bytes) == (0, 13 * entry)
    assert (split.archive.device_bytes, split.archive.host_bytes) == (3 * entry, 10 * entry)


# ---------------------------------------------------------------------- selection over time


def test_the_first_steps_choice_holds_for_the_other_steps_and_the_clean_pass() -> None:
    layout = small_layout()
    stream = Stream(layout, TINY, dtype=torch.float32)
    cache, other = Cache(layout, TINY), Cache(layout, TINY)
    for twin in (cache, other):
        for _ in run_blocks(twin, stream, 12):
            pass
        twin.begin(12)
    for layer in range(TINY.layers):
        queries = stream(12, layer, DENOISE).queries
        cache.score(layer, queries)
        cache.select(layer)
        other.score(layer, -queries)
        other.select(layer)
        assert cache.selected[layer] != other.selected[layer]  # so another choice there would be
        chosen, held = list(cache.selected[layer]), contexts(cache)
        cache.score(layer, -queries)
        cache.select(layer)
        assert cache.selected[layer] == chosen
        assert same_bits(contexts(cache), held)


ONE_HOT = ModelShape(layers=1, dim=48, heads=2)  # head 0 is scored; its first 8 channels carry time


def answering(stream: Stream, block: int) -> Raw:
    """Block `block` answers to channel `block` of head 0, which content scores leave unrotated; the rest is random."""
    raw = stream(block, 0, CLEAN).raw
    raw.compressed_keys[:, :, 0] = 0
    raw.compressed_keys[:, :, 0, block] = 1
    return raw


def run_asking(wanted: dict[int, list[int]], blocks: int, **changes: object) -> tuple[Cache, list[Tensor]]:
    """Runs blocks whose queries ask for the mid blocks in `wanted`; stops in the last one, before it ends.

    The second result is a copy of the archive as each block entered it.
    """
    layout = small_layout(recent_frames=2, top_k=2, **changes)
    stream, cache = Stream(layout, ONE_HOT, dtype=torch.float32), Cache(layout, ONE_HOT)
    pristine: list[Tensor] = []
    for block in range(blocks):
        if block:
            cache.end()
            pristine += [x.clone() for x in cache.archive.read([len(cache.archive) - 1], 0)] if block > 1 else []
        cache.begin(block)
        raw = answering(stream, block)
        queries = torch.zeros_like(raw.keys)
        queries[:, :, 0, wanted.get(block, [])] = 1
        cache.score(0, queries)
        cache.select(0)
        assert cache.selected[0] == wanted.get(block, cache.selected[0])
        cache.write(0, raw.keys, raw.values)
        cache.write_compressed(0, raw.compressed_keys, raw.compressed_values)
    return cache, pristine


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([], []), ([3], [(3, 3)]), ([0, 1, 2], [(0, 2)]), ([0, 2, 3, 7], [(0, 0), (2, 3), (7, 7)])],
)
def test_neighbouring_slots_are_written_together(numbers: list[int], expected: list[tuple[int, int]]) -> None:
    assert runs(numbers) == expected


def test_an_unselected_block_comes_back_as_if_it_had_never_been_elsewhere() -> None:
    # Block 3 stands in the second slot, then in the first, leaves, and returns; in the other run it is chosen once.
    wandering, pristine = run_asking({5: [2, 3], 6: [3, 4], 7: [4, 5], 8: [4, 5], 9: [3, 6]}, blocks=10)
    direct, _ = run_asking({5: [1, 2], 6: [1, 2], 7: [4, 5], 8: [4, 5], 9: [3, 6]}, blocks=10)
    assert same_bits(contexts(wandering), contexts(direct))
    kept = [x for block in range(len(wandering.archive)) for x in wandering.archive.read([block], 0)]
    assert same_bits(kept, pristine)


@pytest.mark.parametrize(
    ("wanted", "written"),
    [([4, 5], 0), ([4, 6], 1), ([3, 5], 1), ([3, 4], 2), ([5, 6], 2)],
)
def test_mid_slots_that_do_not_change_are_not_written(wanted: list[int], written: int) -> None:
    cache, _ = run_asking({5: [2, 3], 6: [3, 4], 7: [4, 5], 8: [4, 5]}, blocks=9)
    assert cache.mid_slots_written == 0
    cache.end()
    compressed = cache.layout.compressed_tokens_per_block
    values = cache.context(0)[1]
    slots = values[:, values.shape[1] - 2 * compressed :].split(compressed, dim=1)  # mid slots end the valid prefix
    for slot in slots:
        slot.fill_(float("nan"))  # whoever writes a slot wipes this out
    cache.begin(9)
    queries = torch.zeros(1, cache.layout.tokens_per_block, 2, 24)
    queries[:, :, 0, wanted] = 1
    cache.score(0, queries)
    cache.select(0)
    assert cache.selected[0] == wanted
    assert cache.mid_slots_written == written
    kept = [a == b for a, b in zip(wanted, [4, 5], strict=True)]
    assert [bool(slot.isnan().all()) for slot in slots] == kept
    assert [bool(slot.isnan().any()) for slot in slots] == kept


def test_blocks_come_one_after_the_other() -> None:
    cache = Cache(small_layout(), TINY)
    with pytest.raises(ValueError, match="block 1 cannot follow block -1"):
        cache.begin(1)
    cache.begin(0)
    with pytest.raises(ValueError, match="block 0 cannot follow block 0"):
        cache.begin(0)


# ---------------------------------------------------------------------- no error accumulates


def key_error(cache: Cache, everything: Everything) -> float:
    """Largest error of the context's keys against keys computed in float64 where they stand in the end."""
    places = everything.places(cache.block, cache.selected[0])
    found, found_values = in_order(*cache.context(0))
    expected, values = in_order(*everything.rows(places, 0))
    assert torch.equal(found_values, values)
    return (found - expected).abs().max().item()


def test_after_ten_thousand_blocks_keys_are_as_exact_as_after_ten() -> None:
    model = ModelShape(layers=1, dim=24, heads=2)
    config = CacheConfig(block_frames=1, sink_frames=1, recent_frames=3, top_k=2, archive_device="host")
    layout = Layout(config, FrameSize(64, 64), temporal_stride=1)
    cache, everything = Cache(layout, model), Everything(layout, model)
    # A recent key is turned when it is written, and once for each of the 3 slots it moves through. A turn rounds two
    # cosines, two products and a sum of numbers below 2, 4.5 * 2^-24 in all, in both channels of a pair.
    bound = 4 * 2**0.5 * 4.5 * 2**-24
    errors = {}
    for block in range(10_000):
        cache.begin(block)
        queries, keys, values = (2 * torch.rand(1, 16, 2, 12) - 1 for _ in range(3))
        raw = Raw(keys, values, keys[:, ::16].clone(), values[:, ::16] + 2)
        everything.blocks.append([raw])
        cache.score(0, queries)
        cache.select(0)
        cache.write(0, raw.keys, raw.values)
        cache.write_compressed(0, raw.compressed_keys, raw.compressed_values)
        if block in (10, 9_999):
            errors[block] = key_error(cache, everything)
        cache.end()
    assert len(cache.archive) == 9_999
    assert 0 < errors[10] < bound
    assert 0 < errors[9_999] < bound
