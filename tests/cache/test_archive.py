"""The archive's host memory: what was stored comes back, and little more than that is allocated."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from packforcing.cache import archive
from packforcing.cache.archive import SLAB_BYTES, Archive, Slabs, pieces_in_a_slab
from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape


@pytest.mark.parametrize("slab_pieces", [1, 2, 3, 7, 100])
def test_pieces_come_back_wherever_slabs_end(slab_pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = torch.randn(10, 3, 2, 5)  # ten entries of three pieces
    monkeypatch.setattr(archive, "SLAB_BYTES", slab_pieces * entries[0, 0].nbytes)
    slabs = Slabs(pinned=False)
    for entry in entries:
        slabs.append(entry)
        entry += 1  # a copy was stored
    for number, piece in enumerate(entries.flatten(0, 1)):
        assert torch.equal(slabs[number] + 1, piece)


@pytest.mark.parametrize("slab_pieces", [0, 2, 100])
def test_keys_and_values_come_back_from_device_and_host(slab_pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = torch.randn(9, 3, 2, 1, 4, 2, 8)  # nine blocks, three layers
    monkeypatch.setattr(archive, "SLAB_BYTES", slab_pieces * entries[0, 0].nbytes)
    config = CacheConfig(archive_device="auto", archive_budget_gb=4.5 * entries[0].nbytes / 1e9)
    held = Archive(config, torch.device("cpu"))
    for number, entry in enumerate(entries):
        held.append(entry, torch.full((3, 1, 2, 8), float(number)))
    assert len(held) == 9
    assert held.device_bytes == 4 * entries[0].nbytes
    assert held.host_bytes == 5 * entries[0].nbytes
    for layer in range(3):
        keys, values = held.read([8, 3, 4], layer)
        assert torch.equal(keys, torch.cat([entries[block, layer, 0] for block in (8, 3, 4)], dim=1))
        assert torch.equal(values, torch.cat([entries[block, layer, 1] for block in (8, 3, 4)], dim=1))
        assert held.key_sums(layer, 5)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("width", "height"), [(832, 480), (1280, 720), (480, 832), (624, 624)])
@pytest.mark.parametrize("model", [ModelShape(30, 1536, 12), ModelShape(40, 5120, 40)], ids=["1.3B", "14B"])
def test_pinned_memory_in_powers_of_two_is_hardly_more_than_what_it_holds(
    model: ModelShape, width: int, height: int
) -> None:
    """Counted for 600 blocks, each slab as PyTorch rounds it."""
    tokens = Layout(CacheConfig(), FrameSize(width, height), 2).compressed_tokens_per_block
    entry = model.kv_bytes(tokens, 2)
    piece = entry // model.layers
    together = pieces_in_a_slab(piece, model.layers)
    slabs = ceil(600 * model.layers / together)
    rounded = 1 << (together * piece - 1).bit_length()
    assert rounded <= SLAB_BYTES
    assert slabs * rounded <= 1.08 * 600 * entry + SLAB_BYTES
