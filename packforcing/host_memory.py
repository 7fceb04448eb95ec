"""Memory of the machine itself: how much this process can still have, and how it is told that there is no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Of a control group, by the kernel's documents: its limit, what it holds, and which part of that is a file's cache.
GROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still have: of the machine, and of the container that it runs in; None if unknown.

    Args:
        root: where /proc and /sys lie.
    """
    found = [*_machine(root), *_groups(root)]
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(found, default=None)


def _machine(root: Path) -> Iterator[int]:
    """What the kernel thinks can be used without swapping."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What is left of the limits of this process's control group and of those around it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            version, base = 2, root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            version, base = 1, root / "sys/fs/cgroup/memory"
        else:
            continue
        group = base / name.lstrip("/")
        for folder in (group, *group.parents):  # within a container the outer ones are not there
            yield from _left(folder, *GROUP_FILES[version])
            if folder == base:
                break


def _left(folder: Path, limit_file: str, usage_file: str, cache: str) -> Iterator[int]:
    """What is left of a group's limit, if it has one. The cache of files is given back when memory is short."""
    limit, usage = _lines(folder / limit_file), _lines(folder / usage_file)
    if not limit or not usage or not limit[0].isdigit():  # "max": there is none
        return
    cached = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.split()[0] == cache]
    yield max(0, int(limit[0]) - int(usage[0]) + sum(cached))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether an error says that the machine's own memory ran out. PyTorch has no type for that."""
    text = str(error)
    told = "DefaultCPUAllocator" in text or "not enough memory" in text or "can't allocate memory" in text
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told)
