"""The plan's bytes against what runs of random configurations allocate.

First the buffers of keys and values, for the real models' sizes, on tensors without data: equal to the plan's terms to
the byte. Then whole runs of a small model on a CPU, all tensors counted: the most that they hold at once beside the
weights is what the plan says, to TOLERANCE.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from unittest.mock import patch

import torch
from live_bytes import LiveBytes
from torch import Tensor

from packforcing.cache.cache import Cache
from packforcing.cache.deferred import DeferredCache
from packforcing.config import MODELS, CacheConfig, FrameSize, Layout, ModelShape, default_temporal_stride
from packforcing.errors import PackForcingError
from packforcing.generate.long_video import LongVideo, VideoModels, VideoSettings
from packforcing.generate.memory_budget import DecoderMemory, MemoryDemand
from packforcing.generate.sampling import Sampling
from packforcing.known_models import WanSizes
from packforcing.model.attention import sdpa
from packforcing.model.causal_wan import CausalWan, TextKV
from packforcing.model.compressor import Compressor
from packforcing.model.vae import StreamingDecoder, WanVAE, init_vae
from packforcing.model.wan_modules import build_wan_modules, random_state_dict

TOLERANCE = 0.15  # the plan's terms for hidden states and the decoder are rounded
SIZES = WanSizes(dim=256, ffn_dim=1024, layers=4, heads=2, text_dim=32)
VAE_DIM = 24


@dataclass
class Memory:
    """All configurations."""

    buffers: int = 0  # configurations whose buffers were compared
    runs: int = 0  # that were made
    deferred: int = 0  # configurations with late compressed blocks
    fp8: int = 0
    smallest_ratio: float = float("inf")  # of what a run held at most to what was said
    largest_ratio: float = 0.0
    problems: list[str] = field(default_factory=list)


def layout_of(rng: random.Random, size: FrameSize) -> Layout:
    """A layout that the library accepts."""
    while True:
        block = rng.choice((1, 2, 3, 4, 5))
        try:
            config = CacheConfig(
                block_frames=block,
                sink_frames=block * rng.randrange(4),
                recent_frames=block * rng.randrange(4),
                top_k=rng.choice((0, 1, 2, 3, 16)),
                selection=rng.choice(("affinity", "recency")),
                archive_device=rng.choice(("auto", "device", "host")),
                archive_budget_gb=rng.choice((1.0, 1e-5, 0.0)),
                kv_dtype=rng.choice(("model", "fp8_e4m3")),
                head_fraction=rng.choice((0.5, 1.0)),
            )
            return Layout(config, size, rng.choice((1, default_temporal_stride(block))))
        except PackForcingError:
            continue


def campaign(buffers: int, runs: int, seed: int) -> Memory:
    """So many configurations, and so many runs."""
    found = Memory()
    for number in range(buffers):
        _compare_buffers(random.Random(f"{seed} buffers {number}"), found)
    for number in range(runs):
        _compare_run(random.Random(f"{seed} run {number}"), found)
    print(f"memory: {found.buffers} configurations, {found.runs} runs, {found.problems}", file=sys.stderr, flush=True)
    return found


# --- buffers --------------------------------------------------------------------------------------------------------


def _compare_buffers(rng: random.Random, found: Memory) -> None:
    model = MODELS[rng.choice(list(MODELS))]
    dtype = rng.choice((torch.bfloat16, torch.float32))
    layout = layout_of(rng, FrameSize(16 * rng.randrange(4, 81), 16 * rng.randrange(4, 81)))
    deferred = layout.config.can_defer and rng.random() < 0.5
    made = (DeferredCache if deferred else Cache)(layout, model, "meta", dtype)
    allocated, planned = buffer_bytes(made), planned_buffer_bytes(model, layout, dtype.itemsize, deferred)
    found.buffers += 1
    found.deferred += deferred
    found.fp8 += layout.config.kv_dtype != "model"
    if allocated != planned:
        found.problems.append(f"{layout}: the buffers hold {allocated} bytes, and {planned} are planned")


def planned_buffer_bytes(model: ModelShape, layout: Layout, itemsize: int, deferred: bool) -> int:
    """What the plan says of keys and values on the device, and two compressed blocks: a spare slot, and its own."""
    spare = 2 * layout.compressed_tokens_per_block if layout.config.top_k else 0
    tokens = layout.context_tokens + spare + (layout.aside_tokens if deferred else 0)
    return model.kv_bytes(tokens, layout.config.bytes_per_value(itemsize))


def buffer_bytes(made: Cache) -> int:
    """Bytes of the tensors of keys and values that a cache allocates before the first block, each storage once."""
    buffers = [*(layer.kv for layer in made.layers), *getattr(made, "_aside", [])]
    tensors: Sequence[Tensor] = [made._compressed, *(t for each in buffers for t in (each.keys, each.values))]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


# --- whole runs -----------------------------------------------------------------------------------------------------


@cache
def models() -> tuple[CausalWan, WanVAE, TextKV]:
    wan = CausalWan(build_wan_modules(SIZES, random_state_dict(SIZES, 0)).float(), sdpa, torch.float32)
    return wan, init_vae(VAE_DIM).requires_grad_(False), wan.embed_text(torch.zeros(1, 512, SIZES.text_dim))


def _compare_run(rng: random.Random, found: Memory) -> None:
    wan, vae, text = models()
    layout, overlap, blocks = layout_of(rng, FrameSize(64, 16 * rng.randrange(4, 6))), rng.random() < 0.5, 4
    config = layout.config
    frames = config.block_frames if overlap else 1
    beside = LiveBytes()  # what is decoded in another thread, whose tensors this one's count does not see
    decode = StreamingDecoder.decode

    def counted(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
        with beside:
            return decode(decoder, latents)

    weights = [*wan.modules.parameters(), *vae.parameters()]
    with (
        LiveBytes([*weights, *(tensor for pair in text.layers for tensor in pair)]) as live,
        patch.object(StreamingDecoder, "decode", counted if overlap else decode),
    ):
        settings = VideoSettings(layout, Sampling(steps=1), decode_frames=frames, overlap=overlap)
        compressor = Compressor(layout.temporal_stride) if config.top_k else None
        video = LongVideo(VideoModels(wan, vae, compressor), text, settings)
        for _ in video.blocks(blocks):
            pass
    said = MemoryDemand(wan.shape, 4, layout, blocks, DecoderMemory(VAE_DIM, 4)).bytes(frames, overlap)
    held = live.peak + beside.peak - sum(tensor.nbytes for tensor in weights) - video.cache.archive.host_bytes
    found.runs += 1
    found.smallest_ratio = min(found.smallest_ratio, held / said)
    found.largest_ratio = max(found.largest_ratio, held / said)
    if abs(held / said - 1) > TOLERANCE:
        found.problems.append(f"{layout}, overlap {overlap}: {held / said:.3f} of what is said was held")
