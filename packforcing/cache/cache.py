"""The three-partition KV cache (method 3; paper section 3.2 and 3.3).

Every layer has one buffer of keys and one of values, allocated once:

    [ sink blocks | ring of recent blocks, one slot for the current block | mid slots | room for one compressed block ]

A block is written where it will live. Attention does not care about the order of keys, so what is valid is a prefix of
the buffer, and nothing is concatenated or moved in the loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import Layout, ModelShape
from ..devices import from_device
from ..fp8 import FP8, saturated
from .archive import Archive
from .positions import Anchors, anchors, mid_anchors
from .rope import (
    EAGER_ROTARY,
    RotaryOps,
    Rotation,
    block_positions,
    centres,
    grid_positions,
    joined,
    rotate,
    rotation,
    temporal_rotation,
)
from .selection import affinity, sampled_queries, scored_heads, token_sum, top_k


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbouring numbers: [0, 1, 2, 5] -> [(0, 2), (5, 5)]."""
    firsts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    lasts = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return list(zip(firsts, lasts, strict=True))


class Cache:
    """Keys and values of the history, and of the block being made.

    The life of a block: `begin(i)`; then for each denoising step and layer `score` and `select` (in the first step),
    `write` and `context`; in the clean pass also `write_compressed` and `compressed_context`; then `end`. While
    `begin`..`end` runs, the history is what the configuration's partition says for block i.

    Tensors of queries, keys and values are [B, L, H, D]; `turns` rotates those of the block that is being made.

    In training, keys and values that carry a gradient are written like others (without it), and also kept as they are;
    `context` then concatenates them with the rest of the buffer, which would otherwise lose their graph. They carry
    gradients into later blocks until `detach`.
    """

    def __init__(
        self,
        layout: Layout,
        model: ModelShape,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        rotary: RotaryOps = EAGER_ROTARY,
    ) -> None:
        self.layout = layout
        self.config = layout.config
        self.model = model
        self.device = torch.device(device)
        self.dtype = dtype
        self.kept_dtype = FP8 if self.config.kv_dtype == "fp8_e4m3" else dtype
        self.batch = batch
        self._rotary = rotary
        self.archive = Archive(self.config, self.device)
        self.heads = scored_heads(model.heads, self.config.head_fraction)
        # Angles keep the precision of the cache, so that a float64 cache is exact to float64.
        self._angle_dtype = torch.promote_types(dtype, torch.float32)

        full, compressed = layout.tokens_per_block, layout.compressed_tokens_per_block if self.config.top_k else 0
        self._ring_slots = self.config.recent_blocks + 1
        self._mid_start = (self.config.sink_blocks + self._ring_slots) * full
        capacity = self._mid_start + (self.config.top_k + 1) * compressed
        self.keys = [self._empty(capacity) for _ in range(model.layers)]
        self.values = [self._empty(capacity) for _ in range(model.layers)]
        # Compressed keys and values of the current block, at their base positions, until `end` archives them.
        self._compressed = torch.empty(
            (model.layers, 2, batch, compressed, model.heads, model.head_dim), device=self.device, dtype=self.kept_dtype
        )
        self._key_sums = torch.empty(
            (model.layers, batch, self.heads, model.head_dim), device=self.device, dtype=self._angle_dtype
        )

        size = layout.size
        self._sampled = sampled_queries(full, self.config.query_fraction).to(self.device)
        # Scores compare content: height and width are rotated, time is not (method 5).
        still = torch.zeros(self.config.block_frames)
        queries = grid_positions(still, torch.arange(size.rows), torch.arange(size.columns))
        self._content_queries = self._rotation(queries)[self._sampled]
        self._compressed_base = self._rotation(self._compressed_positions(self._base_times))
        self._content_keys = self._rotation(self._compressed_positions(torch.zeros(layout.compressed_frames)))

        self.block = -1
        self.anchors = Anchors((), (), (), current=-1.0)  # equal to no block's
        self._slot_anchor: dict[int, float] = {}  # full-resolution slot -> position at which its keys stand
        self._mid_content: list[list[tuple[int, float, float] | None]] = [
            [None] * self.config.top_k for _ in range(model.layers)
        ]
        self.selected: list[list[int] | None] = [None] * model.layers
        self._best: Callable[[], Tensor]  # indices of the mid blocks that the layer at hand scores highest
        self.mid_slots_written = 0
        self.recent_rotated = 0
        # In training: what carries a gradient. By layer, token at which it starts -> keys, values; and of compressed
        # blocks, (block, layer) -> keys at base positions, values.
        self._live: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(model.layers)]
        self._live_compressed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # With a `kv_dtype` smaller than the model's: what the current block wrote into the layer written last, still
        # exact (token at which it starts -> keys, values); and by layer the squares of what rounding took from the
        # first block, and of what it took it from.
        self._exact_layer = -1
        self._exact: dict[int, tuple[Tensor, Tensor]] = {}
        self._squares = torch.zeros((model.layers, 2), device=self.device)

    # ------------------------------------------------------------------ positions

    @property
    def _base_times(self) -> Tensor:
        """Times of a compressed block's token frames, counted from the block's first latent frame."""
        return centres(self.layout.compressed_frames, self.layout.temporal_stride)

    def _compressed_positions(self, times: Tensor) -> Tensor:
        size = self.layout.size
        return grid_positions(times, centres(size.compressed_rows, 4), centres(size.compressed_columns, 4))

    def _rotation(self, positions: Tensor) -> Rotation:
        return rotation(positions, self.model.head_dim, self._angle_dtype).to(self.device)

    def _temporal_rotation(self, offsets: Tensor) -> Rotation:
        return temporal_rotation(offsets, self.model.head_dim, self._angle_dtype).to(self.device)

    def _anchor_rotations(self) -> None:
        """Rotations that follow from where the mid slots and the current block stand."""
        current, size = self.anchors.current, self.layout.size
        full = block_positions(current, self.config.block_frames, size.rows, size.columns)
        self._current_rotation = self._rotation(full)
        self._compressed_rotation = self._rotation(self._compressed_positions(current + self._base_times))
        self._mid_rotations = {anchor: self._mid_rotation(anchor) for anchor in self.anchors.mid}

    # ------------------------------------------------------------------ the life of a block

    def begin(self, block: int) -> None:
        """Makes room for block `block`, which must follow the block before, and re-anchors what moved."""
        if block != self.block + 1:
            raise ValueError(f"block {block} cannot follow block {self.block}")
        self.block = block
        self.partition = self.config.partition(block)
        before, self.anchors = self.anchors, anchors(self.config, block)
        if self.anchors != before:  # they stay the same once all slots are in use
            self._anchor_rotations()
        self.selected = [None] * self.model.layers
        self.mid_slots_written = 0
        self.recent_rotated = 0
        self._exact_layer, self._exact = -1, {}
        self._rotate_recent()

        self._slot_anchor[self._slot(block)] = self.anchors.current

    def _slot(self, block: int) -> int:
        """Slot of a block at full resolution: sinks first, then the ring."""
        sinks = self.config.sink_blocks
        return block if block < sinks else sinks + (block - sinks) % self._ring_slots

    def _slot_tokens(self, block: int) -> slice:
        start = self._slot(block) * self.layout.tokens_per_block
        return slice(start, start + self.layout.tokens_per_block)

    def _rotate_recent(self) -> None:
        for block, target in zip(self.partition.recent, self.anchors.recent, strict=True):
            offset = target - self._slot_anchor[self._slot(block)]
            if offset == 0:
                continue
            tokens = self._slot_tokens(block)
            by = self._temporal_rotation(torch.full((1,), offset))
            for layer, keys in enumerate(self.keys):
                temporal = keys[:, tokens, :, : 2 * by.cos.shape[-1]]  # the other channels stay as they are
                temporal.copy_(self._kept(rotate(temporal.to(self.dtype), by)))
                if tokens.start in self._live[layer]:
                    live_keys, live_values = self._live[layer][tokens.start]
                    self._live[layer][tokens.start] = rotate(live_keys, by), live_values
            self._slot_anchor[self._slot(block)] = target
            self.recent_rotated += 1

    def end(self) -> None:
        """Closes the block after its clean pass: its compressed form, if it will be read, enters the archive."""
        if self.config.becomes_mid(self.block):
            self._archive_compressed()
            for live in self._live:  # the room of the compressed block is free again
                live.pop(self._valid, None)

    def _archive_compressed(self) -> None:
        self.archive.append(self._compressed, self._key_sums)

    # ------------------------------------------------------------------ selection

    def score(self, layer: int, queries: Tensor) -> None:
        """Begins the choice of the layer's mid blocks by the current block's queries (not rotated).

        `select` ends it. What does not depend on it is best asked of the device in between, since the choice is read
        back to the host.
        """
        mids, count = self.partition.mid, self.config.attended_mids(self.block)
        if self.selected[layer] is not None or self.config.selection == "recency" or not 0 < count < len(mids):
            return
        sampled = rotate(queries[:, self._sampled, : self.heads], self._content_queries)
        scores = affinity(token_sum(sampled, self.heads), self.archive.key_sums(layer, len(mids)))
        self._best = from_device(top_k(scores, count))

    def select(self, layer: int) -> None:
        """Chooses the layer's mid blocks, after `score`, and fills the mid slots.

        Does nothing when the layer has chosen for this block already: the choice of the first denoising step holds for
        the other steps and for the clean pass.
        """
        if self.selected[layer] is not None:
            return
        mids, count = self.partition.mid, self.config.attended_mids(self.block)
        if count == 0:
            chosen = []
        elif count >= len(mids):  # all of them, each as often as the others where `repeat_mids` asks for more
            chosen = [mids[slot * len(mids) // count] for slot in range(count)]
        elif self.config.selection == "recency":
            chosen = list(mids[-count:])
        else:
            chosen = [mids[best] for best in self._best().tolist()]
        self.selected[layer] = chosen
        self._fill_mid_slots(layer, chosen)

    def _fill_mid_slots(self, layer: int, chosen: list[int]) -> None:
        """Copies chosen blocks into the slots that do not hold them yet, and rotates their keys into place."""
        places = mid_anchors(self.config, self.anchors, chosen)
        contents = [(block, anchor, self.anchors.mid_scale) for block, anchor in zip(chosen, places, strict=True)]
        held = self._mid_content[layer]
        stale = [slot for slot, content in enumerate(contents) if held[slot] != content]
        if not stale:
            return
        held[: len(contents)] = contents
        self.mid_slots_written += len(stale)

        # Read and rotated together: launching a few small kernels for each slot takes a GPU longer than running them.
        keys, values = self.archive.read([chosen[slot] - self.config.sink_blocks for slot in stale], layer)
        keys = self._kept(rotate(keys.to(self.dtype), joined([self._rotation_to(places[slot]) for slot in stale])))
        size = self.layout.compressed_tokens_per_block
        for first, last in runs(stale):
            source = slice(stale.index(first) * size, (stale.index(last) + 1) * size)
            target = slice(self._mid_start + first * size, self._mid_start + (last + 1) * size)
            self.keys[layer][:, target] = keys[:, source]
            self.values[layer][:, target] = values[:, source]
        for slot in stale:
            start = self._mid_start + slot * size
            self._live[layer].pop(start, None)
            if (chosen[slot], layer) in self._live_compressed:
                live_keys, live_values = self._live_compressed[chosen[slot], layer]
                self._live[layer][start] = rotate(live_keys, self._rotation_to(places[slot])), live_values

    def _rotation_to(self, anchor: float) -> Rotation:
        """`_mid_rotation`, made once; without RoPE adjustment only the choice says which are needed."""
        if anchor not in self._mid_rotations:
            self._mid_rotations[anchor] = self._mid_rotation(anchor)
        return self._mid_rotations[anchor]

    def _mid_rotation(self, anchor: float) -> Rotation:
        """From a compressed block's base position to the mid slot at `anchor`."""
        offsets = anchor + (self.anchors.mid_scale - 1) * self._base_times
        per_frame = self.layout.size.compressed_rows * self.layout.size.compressed_columns
        return self._temporal_rotation(offsets.repeat_interleave(per_frame))

    # ------------------------------------------------------------------ the current block

    @property
    def _mid_tokens(self) -> int:
        return self.config.attended_mids(self.block) * self.layout.compressed_tokens_per_block

    @property
    def _valid(self) -> int:
        """Length of the valid prefix: full-resolution slots in use, then the selected mid blocks."""
        slots = min(self.block + 1, self.config.sink_blocks + self._ring_slots)
        return slots * self.layout.tokens_per_block + self._mid_tokens

    def rotate_queries(self, queries: Tensor) -> Tensor:
        return self._rotary.rotate(queries, self._current_rotation)

    def rotate_compressed_queries(self, queries: Tensor) -> Tensor:
        return rotate(queries, self._compressed_rotation)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Writes the current block's keys (rotated here) and values [B, N, H, D] into its slot."""
        self._put(layer, self._slot_tokens(self.block), keys, self._current_rotation, values)

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the current block attends to, itself included: views of the buffers."""
        return self._prefix(layer, self._valid)

    def _put(self, layer: int, tokens: slice, keys: Tensor, by: Rotation, values: Tensor) -> None:
        """Writes keys, rotated, and values."""
        slots = self.keys[layer][:, tokens], self.values[layer][:, tokens]
        self._live[layer].pop(tokens.start, None)
        if self.kept_dtype == self.dtype and not (keys.requires_grad or values.requires_grad):
            self._rotary.place(*slots, keys, values, by)
            return
        keys = rotate(keys, by)
        for slot, written in zip(slots, (keys, values), strict=True):
            slot.copy_(self._kept(written.detach()))
        if self.kept_dtype != self.dtype:
            if layer != self._exact_layer:
                self._exact_layer, self._exact = layer, {}
            self._exact[tokens.start] = keys.detach(), values.detach()
            if self.block == 0 and tokens == self._slot_tokens(0):
                self._measure_rounding(layer, tokens, *self._exact[tokens.start])
        if keys.requires_grad or values.requires_grad:
            self._live[layer][tokens.start] = keys, values

    def _prefix(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` tokens of a layer's buffers: views, or copies when some of them carry a gradient or when
        they are kept in a smaller type."""
        buffers = self.keys[layer][:, :length], self.values[layer][:, :length]
        if self.kept_dtype != self.dtype:
            buffers = buffers[0].to(self.dtype), buffers[1].to(self.dtype)
            for start, pair in self._exact.items() if layer == self._exact_layer else ():
                if start < length:
                    for buffer, exact in zip(buffers, pair, strict=True):
                        buffer[:, start : start + exact.shape[1]] = exact.to(self.dtype)
        live = sorted((start, pair) for start, pair in self._live[layer].items() if start < length)
        if not live:
            return buffers
        pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
        end = 0
        for start, pair in live:
            for part, buffer, tensor in zip(pieces, buffers, pair, strict=True):
                part += (buffer[:, end:start], tensor.to(buffer.dtype))
            end = start + pair[0].shape[1]
        for part, buffer in zip(pieces, buffers, strict=True):
            part.append(buffer[:, end:])
        keys, values = (torch.cat(part, dim=1) for part in pieces)
        return keys, values

    def _kept(self, x: Tensor) -> Tensor:
        """Keys or values as they are kept."""
        return x if self.kept_dtype == self.dtype else saturated(x)

    def _measure_rounding(self, layer: int, tokens: slice, *exact: Tensor) -> None:
        kept = self.keys[layer][:, tokens], self.values[layer][:, tokens]
        pairs = [(k.float(), e.float()) for k, e in zip(kept, exact, strict=True)]
        self._squares[layer, 0] = sum((k - e).square().sum() for k, e in pairs)
        self._squares[layer, 1] = sum(e.square().sum() for _, e in pairs)

    @property
    def rounding_error(self) -> float:
        """What `kv_dtype` takes from keys and values, relative to them (root mean square over the first block)."""
        lost, whole = self._squares.sum(dim=0).tolist()
        return (lost / whole) ** 0.5 if whole else 0.0

    def detach(self) -> None:
        """Ends the gradients of all that was written: the history is a constant from here on."""
        for live in self._live:
            live.clear()
        self._live_compressed.clear()

    def write_compressed(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keeps the compressed block's keys (not rotated) and values [B, N_c, H, D], for the archive and its attention.

        The archive's copy stands at its base position; the key sum has no temporal rotation.
        """
        self._keep_compressed(layer, keys, values)
        room = slice(self._valid, self._valid + keys.shape[1])
        self._put(layer, room, keys, self._compressed_rotation, values)

    def _keep_compressed(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keeps what the archive will take."""
        at_base = rotate(keys, self._compressed_base)
        self._compressed[layer, 0] = self._kept(at_base.detach())
        self._compressed[layer, 1] = self._kept(values.detach())
        if at_base.requires_grad or values.requires_grad:
            self._live_compressed[self.block, layer] = at_base, values
        content = rotate(keys[:, :, : self.heads].detach(), self._content_keys)
        self._key_sums[layer] = token_sum(content, self.heads)

    def compressed_context(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, H, D] that compressed queries attend to: the history without the current block, and
        the compressed tokens themselves. Copies: the fastest attention kernels take no mask, and these queries are few.
        """
        end = self._valid + self.layout.compressed_tokens_per_block
        parts = [self._slot_tokens(block) for block in (*self.partition.sink, *self.partition.recent)]
        parts.append(slice(self._valid - self._mid_tokens, end))
        keys, values = (torch.cat([x[:, part] for part in parts], dim=1) for x in self._prefix(layer, end))
        return keys, values

    # ------------------------------------------------------------------ accounting

    def _empty(self, tokens: int) -> Tensor:
        shape = (self.batch, tokens, self.model.heads, self.model.head_dim)
        return torch.empty(shape, device=self.device, dtype=self.kept_dtype)

    def bytes(self) -> dict[str, int]:
        """Bytes in use, by owner (`record.PARTITIONS`)."""
        token = self.batch * self.model.kv_bytes(1, self.kept_dtype.itemsize)
        full = self.layout.tokens_per_block * token
        return {
            "sink": len(self.partition.sink) * full,
            "recent": len(self.partition.recent) * full,
            "current": full,
            "mid": self._mid_tokens * token,
            "aside": 0,
            "archive_device": self.archive.device_bytes,
            "archive_host": self.archive.host_bytes,
            "key_sums": self.archive.key_sum_bytes,
        }

    @property
    def allocated_bytes(self) -> int:
        """Device bytes of everything this cache holds, the archive's device part included."""
        buffers = sum(t.nbytes for t in (*self.keys, *self.values)) + self._compressed.nbytes + self._key_sums.nbytes
        return buffers + self.archive.device_bytes + self.archive.allocated_key_sum_bytes
