"""A disk that fails on request: `failing_disk.c` in processes that are forked from this one."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("failing_disk.c")
CONTROL = struct.Struct("<qqiii")  # `struct control` there, without its padding
SIZE = 4096


def compiler() -> str | None:
    """The C compiler of this machine."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def is_failing() -> bool:
    """Whether this process has a disk that can fail."""
    return "FAILING_DISK_FOLDER" in os.environ


def restart_on_failing_disk(base: Path) -> None:
    """Begins this process anew, with a disk that can fail below the folder `runs` of `base`."""
    library, control, folder = base / "failing_disk.so", base / "control", base / "runs"
    folder.mkdir()
    found = compiler()
    assert found is not None
    subprocess.run([found, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    control.write_bytes(bytes(SIZE))
    environment = {
        "LD_PRELOAD": str(library),
        "FAILING_DISK_CONTROL": str(control),
        "FAILING_DISK_FOLDER": str(folder),
        "FAILING_DISK_SYNCED": str(base / "synced"),
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


class FailingDisk:
    """Says at which call the disk fails, and reads how many there were."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["FAILING_DISK_FOLDER"])
        self._synced = Path(os.environ["FAILING_DISK_SYNCED"])
        with open(os.environ["FAILING_DISK_CONTROL"], "r+b") as file:
            self._control = mmap.mmap(file.fileno(), SIZE)

    def arm(self, at: int = 0, error: int = 0, lasting: bool = False, torn: bool = False) -> None:
        """The next process fails at its call `at` (0: at none), with an errno, or with SIGKILL where that is 0."""
        self._synced.write_bytes(b"")
        self._control[: CONTROL.size] = CONTROL.pack(0, at, error, lasting, torn)

    @property
    def calls(self) -> int:
        """Calls since `arm` that change files."""
        return CONTROL.unpack(self._control[: CONTROL.size])[0]

    def cut_power(self, folder: Path, older: set[str]) -> None:
        """Cuts each file to what was on the disk for sure: its length at its last fsync; `older` ones stay."""
        lengths = dict(line.split() for line in self._synced.read_text().splitlines())
        for file in (each for each in folder.rglob("*") if each.is_file() and each.name not in older):
            found = file.stat()
            os.truncate(file, min(found.st_size, int(lengths.get(str(found.st_ino), 0))))
