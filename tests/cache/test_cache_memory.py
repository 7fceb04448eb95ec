"""The memory of the cache: allocated once, counted to the byte, and only the archive grows."""

from __future__ import annotations

import pytest
import torch
from cache_reference import TINY, Stream, contexts, run_blocks, same_bits, small_layout
from torch import Tensor

from packforcing.cache.cache import Cache
from packforcing.generate.record import PARTITIONS


def storages(cache: Cache) -> list[int]:
    """Addresses of the memory behind every tensor that the cache's contexts and buffers show."""
    shown = [*(layer.kv.keys for layer in cache.layers), *(layer.kv.values for layer in cache.layers)]
    for layer in range(cache.model.layers):
        shown += cache.context(layer)
    return [x.data_ptr() for x in shown]


def test_buffers_are_allocated_once() -> None:
    layout = small_layout(position_range=12)
    cache = Cache(layout, TINY)
    kvs = [layer.kv for layer in cache.layers]
    addresses = [x.data_ptr() for x in (*(kv.keys for kv in kvs), *(kv.values for kv in kvs))]
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


def test_archives_give_the_same_bits_wherever_they_lie() -> None:
    entry = TINY.kv_bytes(small_layout().compressed_tokens_per_block, 4)
    on_device, expected = archive_run(archive_device="device")
    on_host, host = archive_run(archive_device="host")
    split, auto = archive_run(archive_device="auto", archive_budget_gb=3.5 * entry / 1e9)
    on_disk, disk = archive_run(archive_device="disk")
    assert same_bits(host, expected)
    assert same_bits(auto, expected)
    assert same_bits(disk, expected)
    assert on_disk.archive.bytes() == {"archive_device": 0, "archive_host": 0, "archive_disk": 13 * entry}
    assert (on_device.archive.device_bytes, on_device.archive.host_bytes) == (13 * entry, 0)
    assert (on_host.archive.device_bytes, on_host.archive.host_bytes) == (0, 13 * entry)
    assert (split.archive.device_bytes, split.archive.host_bytes) == (3 * entry, 10 * entry)
