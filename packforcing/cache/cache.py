"""The three-partition KV cache (docs/method.md, section 3; paper section 3.2 and 3.3).

Every layer has one buffer of keys and one of values, allocated once:

    [ sink blocks | ring of recent blocks, one slot for the current block | mid slots | one compressed block ]

A block is written where it will live. Attention does not care about the order of keys, so what is valid is a prefix of
the buffer, and nothing is concatenated or moved in the loop.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..config import Layout, ModelShape
from ..devices import from_device, to_device
from ..fp8 import FP8, saturated
from .archive import Archive
from .archive_file import Folder
from .fp8_kv import ExactTokens, Fp8Buffer, rounding_error
from .head_share import WHOLE, HeadShare
from .kv_buffer import KVBuffer
from .layer_cache import Affinity, Attended, LayerCache, MidSlot
from .positions import Anchors, anchors, mid_anchors
from .rope import EAGER_ROTARY, RotaryOps, Rotation, rotate
from .rotations import BlockRotations
from .selection import affinity, runs, sampled_queries, scored_choice, scored_heads, token_sum

Timer = Callable[[str], AbstractContextManager[None]]


def untimed(part: str) -> AbstractContextManager[None]:
    """The default `Cache.timer`."""
    return nullcontext()


class Cache:
    """Keys and values of the history, and of the block being made.

    The life of a block: `begin(i)`; then, in every pass and layer, `attend` with the block's tokens; in the clean pass
    also `attend_compressed` with those of its compressed form; then `end`. In between, the history is what the
    configuration's partition says for block i. The last layer of the clean pass attends to nothing any more, so there
    it is `store` and `write_compressed`. Right after `begin`, recent blocks may be computed again (`refresh`). Passes
    may be of a part of the block only (`narrow`). A call that fails, for memory say, or a whole pass, can be repeated.

    Queries, keys and values are [B, L, H, D]. For generating only: what carries a gradient needs a `GradientCache`.

    Attributes:
        layers: one `LayerCache` a layer.
        archive: the compressed blocks.
        timer: called as timer("selection") and timer("archive"), for a context in which that part of the work is done.
    """

    def __init__(
        self,
        layout: Layout,
        model: ModelShape,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        rotary: RotaryOps = EAGER_ROTARY,
        share: HeadShare = WHOLE,
        archive_folder: Folder = None,
    ) -> None:
        self.layout, self.config = layout, layout.config
        self.share, self.model = share, share.of(model)  # what is here of the model
        self.device = torch.device(device)
        self.dtype = dtype
        self.kept_dtype = FP8 if self.config.kv_dtype == "fp8_e4m3" else dtype
        self.batch = batch
        self.timer: Timer = untimed
        self.archive = Archive(self.config, self.device, archive_folder)
        self.scored_heads = scored_heads(model.heads, self.config.head_fraction)  # of all
        self.heads = share.scored(model, self.config.head_fraction)  # of these, those that are here
        self._rotary = rotary
        self._exact = ExactTokens()
        self._allocate()
        self._sampled = to_device(sampled_queries(layout.tokens_per_block, self.config.query_fraction), self.device)
        self.rotations = BlockRotations(layout, model.head_dim, self.device, self._precision)
        self._content_queries = self.rotations.content_queries[self._sampled]
        self.block = -1
        self._best: Callable[[], Tensor]  # `scored_choice` of the layer at hand
        self._begun, self.mid_slots_written, self.recent_rotated = -1, 0, 0

    @property
    def _precision(self) -> torch.dtype:
        """The type of angles and key sums: float32 at least."""
        return torch.promote_types(self.dtype, torch.float32)

    def _allocate(self) -> None:
        model, config = self.model, self.config
        compressed = self.layout.compressed_tokens_per_block if config.top_k else 0
        self._ring_slots = config.recent_blocks + 1
        self._mid_start = (config.sink_blocks + self._ring_slots) * self.layout.tokens_per_block
        capacity = self._mid_start + (config.top_k + 1) * compressed
        self.layers = [LayerCache(self.new_buffer(capacity), [None] * config.top_k) for _ in range(model.layers)]
        # Keys and values of the current block's compressed form, at their base positions, until `end` archives them.
        self._compressed = torch.empty(
            (model.layers, 2, self.batch, compressed, model.heads, model.head_dim),
            device=self.device,
            dtype=self.kept_dtype,
        )
        self._key_sums = torch.empty(
            (model.layers, self.batch, self.heads, model.head_dim), device=self.device, dtype=self._precision
        )

    def new_buffer(self, tokens: int) -> KVBuffer:
        """A buffer of `tokens` tokens, as the configuration's kv_dtype wants it."""
        shape = (self.batch, tokens, self.model.heads, self.model.head_dim)
        if self.kept_dtype != self.dtype:
            return Fp8Buffer(shape, self.device, self.dtype, self._exact)
        return KVBuffer(shape, self.device, self.dtype, self._rotary)

    @property
    def selected(self) -> list[list[int] | None]:
        """For each layer, the mid blocks that the current block attends to, oldest first; None: not chosen yet."""
        return [layer.selected for layer in self.layers]

    @property
    def affinities(self) -> list[Affinity | None]:
        """For each layer, by what it has chosen; None: it has scored nothing."""
        return [layer.affinity for layer in self.layers]

    # ------------------------------------------------------------------ the life of a block

    def begin(self, block: int) -> None:
        """Makes room for block `block`, which must follow the block before, and re-anchors what moved."""
        if block != self.block + 1:
            raise ValueError(f"block {block} cannot follow block {self.block}")
        self.partition = self.config.partition(block)
        self.anchors: Anchors = anchors(self.config, block)
        self.rotations.move(self.anchors)
        if self._begun != block:
            self._begun, self.mid_slots_written, self.recent_rotated = block, 0, 0
        self._rotate_recent()
        for layer in self.layers:
            layer.anchors[self._slot(block)] = self.anchors.current
        self.block = block
        self._open(block, self.rotations.current)

    def refresh(self, block: int) -> None:
        """Opens a recent block again: until `refreshed`, or the next `refresh`, passes are of this block.

        They write into its slot, where it stands now. They attend to sinks, mid blocks (chosen by this block's
        queries), the recent blocks before it, and itself.
        """
        recent = self.partition.recent
        self._open(block, self.rotations.at(self.anchors.recent[recent.index(block)]))

    def refreshed(self) -> None:
        """Goes on with the current block, which chooses its own mid blocks."""
        self._open(self.block, self.rotations.current)

    def narrow(self, tokens: slice) -> None:
        """Passes are of these tokens of the current block only, until `widen`. The mid blocks must be chosen.

        Its tokens before them, which were written already, are attended like history, and those after them not at all.
        """
        self._part, self._place = tokens, self.rotations.current[tokens]
        self._exact.begin(self.block)

    def widen(self) -> None:
        """Passes are of the whole current block again."""
        self.narrow(slice(0, self.layout.tokens_per_block))

    def _open(self, block: int, place: Rotation) -> None:
        """Passes are of this block from now on, whose tokens stand at `place`; no mid block is chosen yet."""
        self._opened, self._place, self._part = block, place, slice(0, self.layout.tokens_per_block)
        for layer in self.layers:
            layer.selected = layer.affinity = None
        self._exact.begin(self.block)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Attended:
        """Takes the current block's queries, keys and values at one layer, none of them rotated.

        Writes the keys and values, and selects the layer's mid blocks if this is the block's first pass. Gives back
        what the block's attention takes, the block itself included.
        """
        self.score(layer, queries)
        self.write(layer, keys, values)
        rotated = self.rotate_queries(queries)
        self.select(layer)  # only now: the device is busy with the above while the host waits for the choice
        return Attended(rotated, *self.context(layer))

    def attend_compressed(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Attended:
        """The same for the compressed form of a block: it attends to that block's history and to itself."""
        self.write_compressed(layer, keys, values)
        return Attended(self.rotate_compressed_queries(queries), *self.compressed_context(layer))

    def store(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """`attend` where nothing attends."""
        self.score(layer, queries)
        self.write(layer, keys, values)
        self.select(layer)

    def end(self) -> None:
        """Closes the block after its clean pass: its compressed form, if it will be read, enters the archive."""
        if self.config.becomes_mid(self.block):
            self.archive_compressed()

    def archive_compressed(self) -> None:
        """Takes the compressed block that was written last into the archive."""
        with self.timer("archive"):
            self.archive.append(self._compressed, self._key_sums)

    # ------------------------------------------------------------------ full resolution

    def _slot(self, block: int) -> int:
        """Slot of a block at full resolution: sinks first, then the ring."""
        sinks = self.config.sink_blocks
        return block if block < sinks else sinks + (block - sinks) % self._ring_slots

    def block_tokens(self, block: int) -> slice:
        """Where a sink, recent or current block lies in the buffers."""
        start = self._slot(block) * self.layout.tokens_per_block
        return slice(start, start + self.layout.tokens_per_block)

    def _rotate_recent(self) -> None:
        for block, target in zip(self.partition.recent, self.anchors.recent, strict=True):
            slot = self._slot(block)
            to_move = [layer for layer in self.layers if layer.anchors[slot] != target]
            if not to_move:
                continue
            by = self.rotations.by_time(target - to_move[0].anchors[slot])
            self.recent_rotated += len(to_move) == len(self.layers)  # else it was begun before
            for layer in to_move:
                layer.kv.rotate(self.block_tokens(block), by)
                layer.anchors[slot] = target

    def rotate_queries(self, queries: Tensor) -> Tensor:
        """The current block's queries where the block stands."""
        return self._rotary.rotate(queries, self._place)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Writes the current block's keys (rotated here) and values [B, N, H, D] into its slot."""
        slot = self.block_tokens(self._opened).start
        tokens = slice(slot + self._part.start, slot + self._part.stop)
        self.layers[layer].kv.write(tokens, keys, values, self._place)

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the current block attends to, itself included. Of a refreshed block, and of a block's
        first part, they are copies."""
        if self._opened == self.block and self._part.stop == self.layout.tokens_per_block:
            return self.layers[layer].kv.read(self._valid)
        slot = self.block_tokens(self._opened).start
        recent = range(self.partition.recent.start, self._opened)
        return self._gathered(layer, recent, slice(slot, slot + self._part.stop), self.mid_tokens)

    def _gathered(self, layer: int, recent: range, *others: slice) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of sinks, some recent blocks, and others, the last of which ends last."""
        parts = [*map(self.block_tokens, (*self.partition.sink, *recent)), *others]
        full = self.layers[layer].kv.read(parts[-1].stop)
        keys, values = (torch.cat([x[:, part] for part in parts], dim=1) for x in full)
        return keys, values

    # ------------------------------------------------------------------ selection

    def score(self, layer: int, queries: Tensor) -> None:
        """Begins the choice of the layer's mid blocks by the current block's queries (not rotated).

        `select` ends it. The choice is read back to the host, so the device is best given other work in between.
        """
        mids, count = self.partition.mid, self.config.attended_mids(self.block)
        chosen = self.layers[layer].selected is not None
        if chosen or self.config.selection == "recency" or not 0 < count < len(mids):
            return
        with self.timer("selection"):
            sampled = rotate(queries[:, self._sampled, : self.heads], self._content_queries)
            key_sums = self.archive.key_sums(layer, len(mids))
            scores = self.share.summed(affinity(token_sum(sampled, self.heads), key_sums, self.scored_heads).detach())
            self._best = from_device(scored_choice(scores, count))

    def select(self, layer: int) -> None:
        """Chooses the layer's mid blocks, after `score`, and fills the mid slots.

        Does nothing when the layer has chosen for this block already: the choice of the first denoising step holds for
        the other steps and for the clean pass.
        """
        if self.layers[layer].selected is None:
            with self.timer("selection"):
                self.choose(layer, self._choice(self.layers[layer]))

    def choose(self, layer: int, chosen: list[int]) -> None:
        """Fills the mid slots with these mid blocks, which the current block then attends to."""
        self._fill_mid_slots(layer, chosen)
        self.layers[layer].selected = chosen

    def _choice(self, layer: LayerCache) -> list[int]:
        mids, count = self.partition.mid, self.config.attended_mids(self.block)
        if count == 0:
            return []
        if count >= len(mids):  # all of them, each as often as the others where `repeat_mids` asks for more
            return [mids[slot * len(mids) // count] for slot in range(count)]
        if self.config.selection == "recency":
            return list(mids[-count:])
        *numbers, deviation, mean = self._best().tolist()
        layer.affinity = Affinity(array("f", numbers[count:]), mean, deviation)
        return [mids[int(best)] for best in numbers[:count]]

    def _fill_mid_slots(self, layer: int, chosen: list[int]) -> None:
        """Copies chosen blocks into the slots that do not hold them yet, and rotates their keys into place."""
        scale = self.anchors.mid_scale
        places = mid_anchors(self.config, self.anchors, chosen)
        wanted = [MidSlot(block, anchor, scale) for block, anchor in zip(chosen, places, strict=True)]
        held = self.layers[layer].mid_slots
        stale = [slot for slot, content in enumerate(wanted) if held[slot] != content]
        if not stale:
            return
        # Read and rotated together: launching a few small kernels for each slot takes a GPU longer than running them.
        keys, values = self.archive.read([chosen[slot] - self.config.sink_blocks for slot in stale], layer)
        by = self.rotations.to_mid_slots([places[slot] for slot in stale], scale)
        keys = self._kept(rotate(keys.to(self.dtype), by))
        size = self.layout.compressed_tokens_per_block
        for slot in stale:
            held[slot] = None  # what they hold is not sure until all is copied
        for first, last in runs(stale):
            source = slice(stale.index(first) * size, (stale.index(last) + 1) * size)
            target = slice(self._mid_start + first * size, self._mid_start + (last + 1) * size)
            self.layers[layer].kv.copy(target, keys[:, source], values[:, source])
        held[: len(wanted)] = wanted
        self.mid_slots_written += len(stale)

    @property
    def mid_tokens(self) -> slice:
        """Where the selected mid blocks lie in the buffers: right after the full-resolution slots in use."""
        slots = min(self.block + 1, self.config.sink_blocks + self._ring_slots)
        start = slots * self.layout.tokens_per_block
        attended = self.config.attended_mids(self.block) * self.layout.compressed_tokens_per_block
        return slice(start, start + attended)

    @property
    def _valid(self) -> int:
        """Length of the valid prefix."""
        return int(self.mid_tokens.stop)

    # ------------------------------------------------------------------ the compressed form

    def rotate_compressed_queries(self, queries: Tensor) -> Tensor:
        """The compressed form's queries where it stands."""
        return rotate(queries, self.rotations.compressed)

    def write_compressed(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keeps the compressed form's keys (not rotated) and values [B, N_c, H, D], for the archive and its attention.

        The archive's copy stands at its base position; the key sum has no temporal rotation.
        """
        self._keep_compressed(layer, keys, values)
        room = slice(self._valid, self._valid + keys.shape[1])
        self.layers[layer].kv.write(room, keys, values, self.rotations.compressed)

    def _keep_compressed(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keeps what the archive will take."""
        self._compressed[layer, 0] = self._kept(rotate(keys, self.rotations.compressed_base))
        self._compressed[layer, 1] = self._kept(values)
        content = rotate(keys[:, :, : self.heads], self.rotations.content_keys)
        self._key_sums[layer] = token_sum(content, self.heads)

    def compressed_context(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that compressed queries attend to: the history without the current block, and themselves.

        Copies: the fastest attention kernels take no mask, and these queries are few.
        """
        end = self._valid + self.layout.compressed_tokens_per_block
        return self._gathered(layer, self.partition.recent, slice(self.mid_tokens.start, end))

    def _kept(self, x: Tensor) -> Tensor:
        """Keys or values in the type in which they are kept."""
        return x if self.kept_dtype == self.dtype else saturated(x)

    # ------------------------------------------------------------------ accounting

    def bytes(self) -> dict[str, int]:
        """Bytes in use, by owner (`record.PARTITIONS`)."""
        token = self.batch * self.model.kv_bytes(1, self.kept_dtype.itemsize)
        full = self.layout.tokens_per_block * token
        return {
            "sink": len(self.partition.sink) * full,
            "recent": len(self.partition.recent) * full,
            "current": full,
            "mid": (self.mid_tokens.stop - self.mid_tokens.start) * token,
            "aside": 0,
            **self.archive.bytes(),
            "key_sums": self.archive.key_sum_bytes,
        }

    @property
    def allocated_bytes(self) -> int:
        """Device bytes of everything this cache holds, the archive's device part included."""
        buffers = sum(layer.kv.nbytes for layer in self.layers) + self._compressed.nbytes + self._key_sums.nbytes
        return buffers + self.archive.device_bytes + self.archive.allocated_key_sum_bytes

    @property
    def rounding_error(self) -> float:
        """What `kv_dtype` takes from keys and values, relative to them (root mean square over the first block)."""
        return rounding_error([layer.kv for layer in self.layers if isinstance(layer.kv, Fp8Buffer)], self.share)
