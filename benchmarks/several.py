"""Counts what several GPUs exchange for a block, and the speed-up to expect: the tables of docs/performance.md.

    python benchmarks/several.py

Nothing is measured; the rates are the assumptions below.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from packforcing.bench.exchange import Link, block_exchange, block_seconds
from packforcing.bench.work import Workload
from packforcing.config import CacheConfig, FrameSize, Layout
from packforcing.errors import PackForcingError
from packforcing.known_models import KNOWN_MODELS, TEXT_TOKENS
from packforcing.model.tensor_parallel import check_shares

FLOP = 700e12
LINKS = {
    "NVLink, 350 GB/s": Link(FLOP, 350e9, 20e-6),
    "PCIe 5, 40 GB/s": Link(FLOP, 40e9, 30e-6),
    "PCIe 4, 20 GB/s": Link(FLOP, 20e9, 30e-6),
}
BLOCK = 60  # whose cache is full
GPUS = (2, 4, 8)
FRAMES = 16  # of a block


def workload(name: str) -> Workload:
    model = KNOWN_MODELS[name]
    layout = Layout(CacheConfig(), FrameSize(832, 480), 2)
    return Workload(model.sizes, layout, 4, TEXT_TOKENS, torch.device("meta"), torch.bfloat16, model.vae_dim)


def fits(name: str, gpus: int) -> bool:
    sizes = KNOWN_MODELS[name].sizes
    try:
        check_shares(sizes.shape, sizes.ffn_dim, gpus)
    except PackForcingError:
        return False
    return True


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|")


def main() -> None:
    names = ("wan2.1-1.3b", "wan2.1-14b")
    row("model", "sums a block", "of GB", "GPUs", "GB that each sends")
    row(*["---"] * 5)
    for name in names:
        exchange = block_exchange(workload(name), BLOCK)
        for gpus in (each for each in GPUS if fits(name, each)):
            sent = exchange.wire_bytes(gpus) / 1e9
            row(name, f"{exchange.sums:,}", f"{exchange.summed_bytes / 1e9:.1f}", gpus, f"{sent:.1f}")
    print()
    row("model", "GPUs", *LINKS)
    row(*["---"] * (2 + len(LINKS)))
    for name in names:
        one = block_seconds(workload(name), 1, next(iter(LINKS.values())), BLOCK)
        row(name, 1, *[f"{one:.2f} s, {FRAMES / one:.1f} frames/s"] * len(LINKS))
        for gpus in (each for each in GPUS if fits(name, each)):
            times = [block_seconds(workload(name), gpus, link, BLOCK) for link in LINKS.values()]
            row(name, gpus, *[f"x{one / each:.2f}, {FRAMES / each:.1f} frames/s" for each in times])


if __name__ == "__main__":
    main()
