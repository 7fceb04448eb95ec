"""What a block takes at least: its arithmetic and its bytes, at the rates that this machine reaches.

Each kind of work has a floor of its own, max(FLOP / rate, bytes / copy rate). A stage's floor is their sum. A stage
that reached its floor would be as fast as this machine's matrix products and attention kernels on the same shapes. It
would spend no time on norms, rotations, launches or waiting. See docs/method.md, section 9.
"""

from __future__ import annotations

from ..config import LATENT_CHANNELS, PATCH
from .rates import Rates
from .work import PassWork, Work, Workload, attended_tokens, clean_work, denoise_work, matmul, vae_flop


def pass_ms(work: PassWork, rates: Rates) -> float:
    """Milliseconds of one pass at these rates."""
    kinds = (
        (work.linear, rates.gemm),
        (work.attention, rates.attention),
        (work.cross_attention, rates.cross_attention),
    )
    return sum(_floor_ms(kind, rate, rates.copy) for kind, rate in kinds)


def _floor_ms(work: Work, rate: float, copy: float) -> float:
    return 1000 * max(work.flop / rate, work.bytes / copy)


def stage_floors(
    workload: Workload, rates: Rates, block: int, slots_written: float, archive_on_host: bool
) -> dict[str, float]:
    """Floors (ms) of the stages that have one, for one block.

    Args:
        block: its index.
        slots_written: (layer, mid slot) pairs that a block has to fill, by the record.
        archive_on_host: whether they come over the bus.
    """
    sizes, layout, itemsize = workload.sizes, workload.layout, workload.dtype.itemsize
    tokens, context, text = layout.tokens_per_block, attended_tokens(layout, block), workload.text_tokens
    compressed = layout.compressed_tokens_per_block if layout.config.becomes_mid(block) else 0
    streamed_ms = 1000 * workload.streamed_bytes / rates.host_copy  # beside the pass that needs them
    denoise = pass_ms(denoise_work(sizes, tokens, context, text, itemsize), rates)
    clean = pass_ms(clean_work(sizes, tokens, compressed, context, text, itemsize), rates)
    floors = {"denoise": workload.steps * max(denoise, streamed_ms), "clean_pass": max(clean, streamed_ms)}
    slot_bytes = compressed * 2 * sizes.dim * itemsize
    # To be filled: each slot is read and written on the device, or crosses the bus once. To be archived: every layer
    # of the block that has been made.
    moved = (slots_written + (sizes.layers if compressed else 0)) * slot_bytes
    floors["selection"] = 1000 * (moved / rates.host_copy if archive_on_host else 2 * moved / rates.copy)
    if workload.vae_dim is not None:
        decode, encode = vae_flop(workload.vae_dim, layout)
        floors["decode"] = 1000 * decode / rates.vae_gemm
        if compressed:
            patches = matmul(compressed, LATENT_CHANNELS * PATCH * PATCH, sizes.dim, itemsize)
            floors["compression"] = 1000 * (encode / rates.vae_gemm + patches.flop / rates.gemm)
    return floors
