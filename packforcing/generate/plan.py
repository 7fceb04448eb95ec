"""What a run will hold before it starts: the arithmetic of docs/method.md, section 2, as numbers and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..byte_units import readable_bytes
from ..config import CacheConfig, FrameSize, Layout, Length, ModelShape, default_temporal_stride
from .memory_budget import DecoderMemory, MemoryDemand


@dataclass(frozen=True)
class Plan:
    """What a run will hold, in tokens and bytes; see `plan`."""

    width: int
    height: int
    fps: float
    seconds: float
    blocks: int
    latent_frames: int
    video_frames: int
    tokens_per_frame: int
    tokens_per_block: int
    compressed_tokens_per_block: int
    sink_tokens: int
    mid_tokens: int
    recent_tokens: int
    cached_tokens: int
    context_tokens: int
    cache_bytes: int
    context_bytes: int
    archive_bytes_per_block: int
    archive_blocks: int
    archive_bytes: int
    full_tokens: int
    full_cache_bytes: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    max_position: float

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


def plan(
    model: ModelShape,
    config: CacheConfig,
    size: FrameSize,
    seconds: float,
    fps: float = 16.0,
    temporal_stride: int | None = None,
    bytes_per_value: int = 2,
    vae_dim: int = 96,
) -> Plan:
    """Tokens and bytes of a run with the bounded cache, and of the full cache that it replaces.

    The arithmetic is that of docs/method.md, section 2.

    Args:
        seconds: wanted duration; it is rounded up to whole blocks.
        temporal_stride: the compressor's; None takes the default for the block size.
        bytes_per_value: of the type that model and VAE run in, 2 for bfloat16; `kv_dtype` may be smaller.
        vae_dim: the VAE's width.

    Its `device_bytes` are the least that a run takes beside the weights (`MemoryDemand.least`), its `host_bytes` those
    of latents and archive in the machine's own memory, and its `disk_bytes` the archive's file.
    """
    stride = default_temporal_stride(config.block_frames) if temporal_stride is None else temporal_stride
    layout = Layout(config, size, stride)
    length = Length(seconds, fps, config.block_frames)
    full_tokens = length.latent_frames * size.tokens_per_frame
    # While the last block is made, every block before it that is no sink lies in the archive, the recent ones too.
    archive_blocks = config.archived_blocks(length.blocks)
    kept = config.bytes_per_value(bytes_per_value)
    demand = MemoryDemand(model, bytes_per_value, layout, length.blocks, DecoderMemory(vae_dim, bytes_per_value))
    archive_bytes_per_block = model.kv_bytes(layout.compressed_tokens_per_block, kept)
    return Plan(
        width=size.width,
        height=size.height,
        fps=fps,
        seconds=length.video_frames / fps,
        blocks=length.blocks,
        latent_frames=length.latent_frames,
        video_frames=length.video_frames,
        tokens_per_frame=size.tokens_per_frame,
        tokens_per_block=layout.tokens_per_block,
        compressed_tokens_per_block=layout.compressed_tokens_per_block,
        sink_tokens=layout.sink_tokens,
        mid_tokens=layout.mid_tokens,
        recent_tokens=layout.recent_tokens,
        cached_tokens=layout.cached_tokens,
        context_tokens=layout.context_tokens,
        cache_bytes=model.kv_bytes(layout.cached_tokens, kept),
        context_bytes=model.kv_bytes(layout.context_tokens, kept),
        archive_bytes_per_block=archive_bytes_per_block,
        archive_blocks=archive_blocks,
        archive_bytes=archive_blocks * archive_bytes_per_block,
        full_tokens=full_tokens,
        full_cache_bytes=model.kv_bytes(full_tokens, bytes_per_value),
        device_bytes=demand.least,
        host_bytes=demand.host_bytes,
        disk_bytes=demand.disk_bytes,
        max_position=max_position(config, length),
    )


def max_position(config: CacheConfig, length: Length) -> int:
    """The temporal position, in latent frames, below which all blocks of a video stand (docs/method.md, section 6)."""
    if not config.rope_adjustment:
        return length.latent_frames
    frames = config.sink_frames + config.top_k * config.block_frames + config.recent_frames + config.block_frames
    return min(frames, config.position_range) if config.position_range else frames


def plan_text(plan: Plan, model: str) -> str:
    """The plan for people, a few aligned lines."""
    rows = [
        (
            "video",
            f"{plan.width}x{plan.height}, {plan.video_frames:,} frames: {plan.seconds:.1f} s at {plan.fps:g} fps",
        ),
        ("", f"{plan.blocks:,} blocks, {plan.latent_frames:,} latent frames, {model}"),
        ("block", f"{plan.tokens_per_block:,} tokens ({plan.tokens_per_frame:,} a latent frame)"),
        ("compressed", f"{plan.compressed_tokens_per_block:,} tokens a block"),
        ("context", f"{plan.context_tokens:,} tokens, constant"),
        ("", f"sink {plan.sink_tokens:,} + mid {plan.mid_tokens:,} + recent {plan.recent_tokens:,}"),
        (
            "cache",
            f"{readable_bytes(plan.cache_bytes)} of KV ({readable_bytes(plan.context_bytes)} with the current block)",
        ),
        (
            "archive",
            f"{readable_bytes(plan.archive_bytes)} at the end ({readable_bytes(plan.archive_bytes_per_block)} a block)",
        ),
        ("device", f"{readable_bytes(plan.device_bytes)} at least, beside the weights"),
        ("host", f"{readable_bytes(plan.host_bytes)} for the latents{_rest(plan)}"),
        ("full cache", f"{readable_bytes(plan.full_cache_bytes)}, {plan.full_tokens:,} tokens"),
    ]
    return "\n".join(f"{label:<11}{value}" for label, value in rows)


def _rest(plan: Plan) -> str:
    """What host memory holds of the archive, or the disk."""
    if plan.disk_bytes:
        return f", and a file of {readable_bytes(plan.disk_bytes)} for the archive"
    return " and the rest of the archive" if plan.archive_bytes else ""
