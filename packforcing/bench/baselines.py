"""The same block, with the same weights and noise, over other caches: what the method's cache is worth in time.

A long history is not made but filled with random keys and values, since time does not depend on their values; every
contestant then makes the same blocks, turn by turn, so that a slow moment of the machine meets all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..cache.cache import Cache
from ..cache.kv_buffer import KVBuffer
from ..cache.rope import EAGER_ROTARY, RotaryOps
from ..config import LATENT_CHANNELS, Layout, ModelShape
from ..generate.sampling import Sampling, noise_generator
from ..generate.schedule import denoising_step
from ..model.causal_wan import CausalWan, TextKV
from .clock import elapsed_ms, free_bytes
from .stages import spread

OURS = "packforcing"
UNBOUNDED = "unbounded-full-cache"
CONCATENATING = "concatenating-three-partition"
ROLLING = "self-forcing-rolling-window"
BASELINES = (UNBOUNDED, ROLLING, CONCATENATING)  # in the order in which they are reported

WINDOW_FRAMES = 21  # latent frames that Self-Forcing's rolling cache holds, the current block's included


class UnboundedCache(Cache):
    """What Self-Forcing and ComfyUI's own autoregressive sampler keep: every block at full resolution.

    One preallocated buffer a layer, in which the current block is written where it will live: the whole video is sink.
    Where all layers' buffers do not fit into half of the free memory, all layers share one (`shared`): then the results
    mean nothing, but the time is that of a device with room for the complete cache.
    """

    def __init__(
        self,
        layout: Layout,
        model: ModelShape,
        blocks: int,
        device: torch.device,
        dtype: torch.dtype,
        rotary: RotaryOps = EAGER_ROTARY,
    ) -> None:
        frames = layout.config.block_frames
        config = replace(layout.config, sink_frames=blocks * frames, recent_frames=0, top_k=0, position_range=0)
        layout = replace(layout, config=config)
        self.complete_bytes = model.kv_bytes(blocks * layout.tokens_per_block, dtype.itemsize)
        self.shared = 2 * self.complete_bytes > free_bytes(device)
        super().__init__(layout, replace(model, layers=1) if self.shared else model, device, dtype, rotary=rotary)
        if self.shared:
            self.layers *= model.layers
            self.model = model


class RollingCache(Cache):
    """Self-Forcing's rolling window: the last `WINDOW_FRAMES` latent frames, the current block's included.

    As its code keeps them (`CausalWanSelfAttention`, with `local_attn_size`): one buffer a layer, in time's order.
    Where a new block has no room, what stays is copied to the front in each layer's first pass, through a clone, and
    the new keys and values go to the end. Keys are rotated once, where they were made. Not done as there: its indices
    lie on the device, so that the host waits for it in every layer and pass.
    """

    def __init__(
        self,
        layout: Layout,
        model: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        rotary: RotaryOps = EAGER_ROTARY,
    ) -> None:
        frames = layout.config.block_frames
        held = max(WINDOW_FRAMES, frames)
        recent = -(-(held - frames) // frames) * frames  # whole blocks, the oldest of which may be held in part
        config = replace(
            layout.config,
            sink_frames=0,
            recent_frames=recent,
            top_k=0,
            position_range=0,
            rope_adjustment=False,
            kv_dtype="model",
        )
        self.window = held * layout.size.tokens_per_frame
        self._written = [(-1, 0)] * model.layers  # of each layer: the newest block, and where its tokens end
        super().__init__(replace(layout, config=config), model, device, dtype, rotary=rotary)

    def new_buffer(self, tokens: int) -> KVBuffer:
        return super().new_buffer(self.window)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        block, end = self._written[layer]
        kv, new = self.layers[layer].kv, keys.shape[1]
        if block != self.block:
            evicted = max(0, end + new - self.window)
            if evicted:
                kv.copy(slice(0, end - evicted), kv.keys[:, evicted:end].clone(), kv.values[:, evicted:end].clone())
            end += new - evicted
            self._written[layer] = self.block, end
        kv.write(slice(end - new, end), keys, values, self.rotations.current)

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.layers[layer].kv.read(self._written[layer][1])


class ConcatenatingCache(Cache):
    """The same three partitions kept as separate tensors, joined by `torch.cat` in every layer of every step."""

    def __init__(
        self,
        layout: Layout,
        model: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        rotary: RotaryOps = EAGER_ROTARY,
    ) -> None:
        super().__init__(layout, model, device, dtype, rotary=rotary)
        self._fresh: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * model.layers

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._fresh[layer] = self._rotary.rotate(keys, self.rotations.current), values

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        kv, (keys, values) = self.layers[layer].kv, self._fresh[layer]
        history = [*map(self.block_tokens, self.partition.sink), self.mid_tokens]
        history += map(self.block_tokens, self.partition.recent)
        return (
            torch.cat([*(kv.keys[:, tokens] for tokens in history), keys], dim=1),
            torch.cat([*(kv.values[:, tokens] for tokens in history), values], dim=1),
        )

    def end(self) -> None:
        for layer, (keys, values) in zip(self.layers, self._fresh, strict=True):
            layer.kv.copy(self.block_tokens(self.block), keys, values)
        super().end()


# ---------------------------------------------------------------------- a history without its making


def fill(cache: Cache, blocks: int) -> None:
    """Brings a new cache to where `blocks` blocks have been made, with random keys and values."""
    model, layout, config = cache.model, cache.layout, cache.config
    generator = torch.Generator(cache.device).manual_seed(0)

    def random_kv(tokens: int) -> tuple[Tensor, Tensor]:
        shape = (2, cache.batch, tokens, model.heads, model.head_dim)
        keys, values = torch.randn(shape, generator=generator, device=cache.device, dtype=cache.dtype)
        return keys, values

    history = config.partition(blocks)
    for block in range(blocks):
        cache.begin(block)
        if block in history.sink or block in history.recent:
            full = random_kv(layout.tokens_per_block)
            for layer in range(model.layers):
                cache.write(layer, *full)
        if config.becomes_mid(block):
            compressed = random_kv(layout.compressed_tokens_per_block)
            for layer in range(model.layers):
                cache.write_compressed(layer, *compressed)
        cache.end()


# ---------------------------------------------------------------------- one block


@dataclass(frozen=True)
class BlockInput:
    """What one block is made from: the noise of each step [B, 16, T, h, w], and its compressed tokens [B, N_c, d]."""

    noises: tuple[Tensor, ...]
    compressed: Tensor


def block_input(wan: CausalWan, layout: Layout, sampling: Sampling, index: int) -> BlockInput:
    """The sampler's own noise of block `index`, and random tokens in place of the compressor's."""
    generator = noise_generator(sampling.seed, index)
    size = layout.size
    latent = (1, LATENT_CHANNELS, layout.config.block_frames, size.latent_height, size.latent_width)
    precision = torch.promote_types(wan.dtype, torch.float32)
    steps = sampling.steps_of(index)
    noises = tuple(torch.randn(latent, generator=generator).to(wan.device, precision) for _ in steps)
    compressed = torch.randn((1, layout.compressed_tokens_per_block, wan.shape.dim), generator=generator)
    return BlockInput(noises, compressed.to(wan.device, wan.dtype))


@torch.no_grad()
def make_block(wan: CausalWan, text: TextKV, cache: Cache, sampling: Sampling, given: BlockInput) -> Tensor:
    """Denoises the cache's next block and runs its clean pass: latents [B, 16, T, h, w]."""
    index = cache.block + 1
    cache.begin(index)
    noises = iter(given.noises)
    x = next(noises)
    for step in sampling.steps_of(index):
        velocity = wan.denoise(x, step.told, text, cache)
        x = denoising_step(x, velocity, step, "few-step", partial(next, noises))
    wan.clean_pass(x, text, cache, given.compressed if cache.config.becomes_mid(index) else None)
    cache.end()
    return x


# ---------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Contestant:
    """Times (ms) of one cache at one place of the video: the passes, and the compression where it needs one."""

    median_ms: float
    spread_ms: float
    shared_layers: bool
    kv_bytes: int


def contest(
    wan: CausalWan,
    text: TextKV,
    layout: Layout,
    sampling: Sampling,
    index: int,
    repeats: int,
    compression_ms: float,
    progress: Callable[[str], None],
) -> dict[str, Contestant]:
    """Times every cache at block `index` (counted from 0), over that block and the `repeats - 1` that follow.

    The block before is made as well, untimed, so that kernels and memory are warm and the mid slots hold a selection.

    Args:
        compression_ms: added to the caches that need the compressor's tokens.
    """
    shape, device, dtype = wan.shape, wan.device, wan.dtype
    unbounded = UnboundedCache(layout, shape, index + repeats, device, dtype, wan.rotary)
    rolling = RollingCache(layout, shape, device, dtype, wan.rotary)
    caches: dict[str, Cache] = {
        OURS: Cache(layout, shape, device, dtype, rotary=wan.rotary),
        UNBOUNDED: unbounded,
        ROLLING: rolling,
        CONCATENATING: ConcatenatingCache(layout, shape, device, dtype, wan.rotary),
    }
    kv_bytes = dict.fromkeys(caches, shape.kv_bytes(layout.context_tokens, dtype.itemsize))
    kv_bytes |= {UNBOUNDED: unbounded.complete_bytes, ROLLING: shape.kv_bytes(rolling.window, dtype.itemsize)}
    with torch.no_grad():
        for cache in caches.values():
            fill(cache, index - 1)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for block in range(index - 1, index + repeats):
        given = block_input(wan, layout, sampling, block)
        for name, cache in caches.items():
            progress(f"block {block}: {name}")
            ms = elapsed_ms(partial(make_block, wan, text, cache, sampling, given), device)
            if block >= index:
                times[name].append(ms + (compression_ms if cache.config.top_k else 0.0))
    return {
        name: Contestant(
            statistics.median(times[name]),
            spread(times[name]),
            cache is unbounded and unbounded.shared,
            kv_bytes[name],
        )
        for name, cache in caches.items()
    }


def comparison(contests: Mapping[int, Mapping[str, Contestant]], frames: int) -> list[dict[str, object]]:
    """One entry a baseline, from contests by block index; `frames` is the number of video frames a block.

    `speedup` is the baseline's time over ours, at the last block measured.
    """
    last = max(contests)
    entries = []
    for name in BASELINES:
        blocks = [_at(index, contests[index][name], contests[index][OURS]) for index in sorted(contests)]
        entries.append(
            {
                "name": name,
                "fps_denoise": 1000 * frames / contests[last][name].median_ms,
                "fps_denoise_ours": 1000 * frames / contests[last][OURS].median_ms,
                "speedup": contests[last][name].median_ms / contests[last][OURS].median_ms,
                "blocks": blocks,
            }
        )
    return entries


def _at(index: int, theirs: Contestant, ours: Contestant) -> dict[str, object]:
    return {
        "block": index,
        "ms": theirs.median_ms,
        "spread_ms": theirs.spread_ms,
        "ours_ms": ours.median_ms,
        "ours_spread_ms": ours.spread_ms,
        "speedup": theirs.median_ms / ours.median_ms,
        "kv_bytes": theirs.kv_bytes,
        "ours_kv_bytes": ours.kv_bytes,
        "layers_share_a_buffer": theirs.shared_layers,
    }
