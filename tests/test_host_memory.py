"""How much memory this process can have, by what the kernel's files say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from packforcing.devices import memory_of
from packforcing.host_memory import available_memory, is_out_of_host_memory

GB = 10**9
MEMINFO = f"MemTotal: {24 * GB // 1024} kB\nMemFree: 1000 kB\nMemAvailable: {20 * GB // 1024} kB\n"

GROUPS: dict[str, tuple[str, dict[str, str], float]] = {
    "none": ("", {}, 20),
    "version 2": (
        "0::/a/b\n",
        {
            "a/b/memory.max": f"{8 * GB}\n",
            "a/b/memory.current": f"{5 * GB}\n",
            "a/b/memory.stat": f"anon 1\ninactive_file {GB}\n",
        },
        4,
    ),
    "around it": (
        "0::/a/b\n",
        {"a/b/memory.max": "max\n", "a/b/memory.current": "1\n", "a/memory.max": f"{GB}\n", "a/memory.current": "0\n"},
        1,
    ),
    "within a container": ("0::/\n", {"memory.max": f"{2 * GB}\n", "memory.current": f"{3 * GB}\n"}, 0),
    "version 1": (
        "5:cpu:/x\n4:memory:/x\n",
        {
            "memory/x/memory.limit_in_bytes": f"{6 * GB}\n",
            "memory/x/memory.usage_in_bytes": f"{GB}\n",
            "memory/x/memory.stat": f"cache 9\ntotal_inactive_file {GB // 2}\n",
        },
        5.5,
    ),
    "version 1 from outside": (
        "4:memory:/docker/123\n",
        {"memory/memory.limit_in_bytes": f"{3 * GB}\n", "memory/memory.usage_in_bytes": "0\n"},
        3,
    ),
    "no limit": (
        "4:memory:/\n",
        {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "5\n"},
        20,
    ),
}


@pytest.mark.parametrize(("groups", "files", "expected"), GROUPS.values(), ids=GROUPS)
def test_the_least_of_machine_and_container_is_taken(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float
):
    contents = {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups}
    for name, content in {**contents, **{f"sys/fs/cgroup/{name}": content for name, content in files.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert available_memory(tmp_path) == pytest.approx(expected * GB, abs=1024)


def test_this_machine_has_memory():
    found = memory_of(torch.device("cpu"))
    assert found is not None
    assert found > 10**8


def test_running_out_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_host_memory(caught.value)
    assert is_out_of_host_memory(MemoryError())
    assert not is_out_of_host_memory(RuntimeError("shapes cannot be multiplied"))
