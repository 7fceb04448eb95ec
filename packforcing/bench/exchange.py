"""What several processes exchange for a block (`model.tensor_parallel`), by count, and the speed-up to expect of it.

With N tokens a block, N_c compressed ones, width d, n layers and M stored mid blocks:

    a denoising pass    n layers, each: three sums of hidden tokens [N, d], three of a number a token [N]
    the clean pass      the same of N + N_c tokens in n - 1 layers; in the last, two of a number a token
    selection           n sums of M scores, where there are more mid blocks than are attended
    compressed tokens   [N_c, d] from the main process to the others
"""

from __future__ import annotations

from dataclasses import dataclass

from .work import PassWork, Workload, attended_tokens, clean_work, denoise_work, vae_flop

EXACT_BYTES = 4  # of the sums that are exchanged in float32


@dataclass(frozen=True)
class Exchange:
    """Collective operations of one block. Bytes are those of the tensors, as each process holds them."""

    sums: int = 0  # all-reduces
    summed_bytes: int = 0
    sent_bytes: int = 0  # broadcast by the main process

    def wire_bytes(self, processes: int) -> float:
        """Bytes that each process sends: a sum in a ring passes all parts but one twice."""
        return 2 * (processes - 1) / processes * self.summed_bytes + self.sent_bytes


def block_exchange(workload: Workload, block: int, exact_bytes: int = EXACT_BYTES) -> Exchange:
    """What the processes exchange for block `block`, its clean pass included.

    Args:
        exact_bytes: of a number of norms and scores: 8 in float64.
    """
    sizes, layout = workload.sizes, workload.layout
    config, tokens = layout.config, layout.tokens_per_block
    compressed = layout.compressed_tokens_per_block if config.becomes_mid(block) else 0
    rows = tokens if layout.direct else tokens + compressed
    hidden, layers = sizes.dim * workload.dtype.itemsize, sizes.layers
    numbers = workload.steps * layers * 3 * tokens + (layers - 1) * 3 * rows + 2 * rows
    sums = workload.steps * layers * 6 + (layers - 1) * 6 + 2
    if layout.direct and compressed:
        numbers, sums = numbers + layers * compressed, sums + layers
    stored = len(config.partition(block).mid)
    if config.selection == "affinity" and stored > config.attended_mids(block) > 0:
        numbers, sums = numbers + layers * stored, sums + layers
    wide = 3 * hidden * (workload.steps * layers * tokens + (layers - 1) * rows)
    return Exchange(sums, wide + numbers * exact_bytes, compressed * hidden)


@dataclass(frozen=True)
class Link:
    """Assumed rates of the devices and of what connects them."""

    flop: float  # FLOP/s of one device
    bandwidth: float  # bytes/s that each device sends in a large sum
    latency: float  # seconds that a sum takes beside its bytes


def block_seconds(workload: Workload, processes: int, link: Link, block: int = 60) -> float:
    """Counted seconds of a block: a share of the passes, what is exchanged, and all of the VAE's work on one device.

    The main process decodes beside the denoising; its device does both, and the others wait for it in the next sum.
    """
    sizes, layout, itemsize = workload.sizes, workload.layout, workload.dtype.itemsize
    context, compressed = attended_tokens(layout, block), layout.compressed_tokens_per_block
    passes = workload.steps * _flop(
        denoise_work(sizes, layout.tokens_per_block, context, workload.text_tokens, itemsize)
    )
    passes += _flop(clean_work(sizes, layout.tokens_per_block, compressed, context, workload.text_tokens, itemsize))
    vae = 0 if workload.vae_dim is None else sum(vae_flop(workload.vae_dim, layout))
    seconds = (passes / processes + vae) / link.flop
    if processes > 1:
        exchange = block_exchange(workload, block)
        seconds += exchange.wire_bytes(processes) / link.bandwidth + exchange.sums * link.latency
    return seconds


def _flop(work: PassWork) -> int:
    return work.linear.flop + work.attention.flop + work.cross_attention.flop
