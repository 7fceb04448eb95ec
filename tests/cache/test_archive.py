"""The archive's host memory and file: what was stored comes back, and little more than that is taken."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from math import ceil
from pathlib import Path

import pytest
import torch
from failing_memory import FailingMemory
from torch import Tensor

from packforcing.cache import archive
from packforcing.cache.archive import SLAB_BYTES, Archive, Slabs, pieces_in_a_slab
from packforcing.cache.archive_file import ArchiveFile
from packforcing.config import CacheConfig, FrameSize, Layout, ModelShape
from packforcing.errors import PackForcingError


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


# --- in a file, and from one place to another --------------------------------------------------------


def filled(held: Archive, entries: Tensor) -> Archive:
    for number, entry in enumerate(entries):
        held.append(entry, torch.full((3, 1, 2, 8), float(number)))
    return held


def assert_holds(held: Archive, entries: Tensor) -> None:
    assert len(held) == len(entries)
    assert held.device_bytes + held.host_bytes + held.disk_bytes == entries.nbytes
    blocks = [8, 3, 4, 0]
    for layer in range(3):
        for found, which in zip(held.read(blocks, layer), (0, 1), strict=True):
            wanted = torch.cat([entries[block, layer, which] for block in blocks], dim=1)
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
        assert held.key_sums(layer, len(entries))[:, 0, 0, 0].tolist() == list(range(len(entries)))


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moved", [None, Archive.leave_device, Archive.leave_memory], ids=["stays", "host", "file"])
@pytest.mark.parametrize("where", ["device", "auto", "host", "disk"])
def test_entries_come_back_from_wherever_they_lie_and_lay(
    where: str, moved: Callable[[Archive], bool] | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The move comes after the sixth of nine."""
    entries = torch.randn(9, 3, 2, 1, 4, 2, 8).to(dtype)
    config = CacheConfig(archive_device=where, archive_budget_gb=4.5 * entries[0].nbytes / 1e9)
    held = filled(Archive(config, torch.device("cpu"), tmp_path), entries[:6])
    if moved is not None:
        assert moved(held) == (where in ("device", "auto") or (moved is Archive.leave_memory and where == "host"))
        assert not moved(held), "a second time there is nothing to move"
    for number, entry in enumerate(entries[6:], 6):
        held.append(entry, torch.full((3, 1, 2, 8), float(number)))
    assert_holds(held, entries)
    assert (held.device_bytes == 0) == (where in ("host", "disk") or moved is not None)
    in_memory = where in ("auto", "host") or (where == "device" and moved is Archive.leave_device)
    assert (held.host_bytes > 0) == (in_memory and moved is not Archive.leave_memory)
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_an_entry_that_cannot_be_stored_is_not_half_stored(tmp_path: Path) -> None:
    """Whichever allocation fails, of any append; the next try stores it."""
    entries = torch.randn(20, 3, 2, 1, 4, 2, 8)  # the key sums grow at the 17th
    for where in ("device", "host", "disk"):
        held = Archive(CacheConfig(archive_device=where), torch.device("cpu"), tmp_path)
        faults = 0
        for number, entry in enumerate(entries):
            failing = 0 if number in (0, 1, 16) else 9
            while len(held) == number:
                with FailingMemory({failing}):
                    try:
                        held.append(entry, torch.full((3, 1, 2, 8), float(number)))
                    except torch.OutOfMemoryError:
                        faults += 1
                failing += 1
        assert_holds(held, entries)
        assert faults > 2


def test_what_leaves_memory_when_memory_is_short_is_moved_in_part_and_then_wholly(tmp_path: Path) -> None:
    entries = torch.randn(9, 3, 2, 1, 4, 2, 8)
    for move in (Archive.leave_device, Archive.leave_memory):
        held = filled(Archive(CacheConfig(archive_device="device"), torch.device("cpu"), tmp_path), entries)
        with FailingMemory({0}), pytest.raises(torch.OutOfMemoryError):
            move(held)
        assert_holds(held, entries)
        move(held)
        assert_holds(held, entries)
        assert held.device_bytes == 0


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    """By a limit on the size of files, which the system enforces."""
    entries = torch.randn(9, 3, 2, 1, 4, 2, 8)
    on_disk = Archive(CacheConfig(archive_device="disk"), torch.device("cpu"), tmp_path)
    in_memory = filled(Archive(CacheConfig(archive_device="host"), torch.device("cpu"), tmp_path), entries)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(6.5 * entries[0].nbytes), limits[1]))
    try:
        with pytest.raises(
            PackForcingError, match=r"^The archive's file in .* cannot be written \(.*: free some space, "
        ):
            filled(on_disk, entries)
        with pytest.raises(PackForcingError, match="cannot be written"):
            in_memory.leave_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(on_disk) == 6
    for number, entry in enumerate(entries[6:], 6):
        on_disk.append(entry, torch.full((3, 1, 2, 8), float(number)))
    assert_holds(on_disk, entries)
    assert_holds(in_memory, entries)


def test_a_folder_that_cannot_be_used_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(PackForcingError, match=r"^The archive's file in .*/missing cannot be made \(No such file"):
        Archive(CacheConfig(archive_device="disk"), torch.device("cpu"), tmp_path / "missing")
    Archive(CacheConfig(archive_device="disk", top_k=0), torch.device("cpu"), tmp_path / "missing")  # needs none


GROW = """
import os, sys, torch
from packforcing.cache.archive import Archive
from packforcing.config import CacheConfig

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

entry, sums = torch.ones(4, 2, 1, 64, 16, 64), torch.ones(4, 1, 2, 8)  # 2 MB
for where in ("disk", "host"):
    held = Archive(CacheConfig(archive_device=where), torch.device("cpu"), sys.argv[1])
    held.append(entry, sums)
    held.read([0], 0)
    before = resident()
    for block in range(1, 100):
        held.append(entry, sums)
        held.read([block, block // 2], 3)
    print(resident() - before, flush=True)
held = Archive(CacheConfig(archive_device="disk"), torch.device("cpu"), sys.argv[1])
held.append(entry, sums)
print("written", flush=True)
sys.stdin.read()
"""


def test_resident_memory_stays_flat_and_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    """200 MB of archive."""
    command = [sys.executable, "-c", GROW, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        on_disk, in_memory = int(process.stdout.readline()), int(process.stdout.readline())
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []
    assert in_memory > 190e6
    assert on_disk < 10e6


def test_a_file_that_has_become_shorter_is_told(tmp_path: Path) -> None:
    file = ArchiveFile(tmp_path)
    file.append(torch.ones(2, 3))
    file._file.truncate(20)
    assert file[0].tolist() == [1, 1, 1]
    with pytest.raises(PackForcingError, match=r"cannot be read \(it has become shorter\)"):
        file[1]
