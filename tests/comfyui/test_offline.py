"""The quick start in a real ComfyUI with the network off: only the server's own address answers there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from no_network import ALONE, can_be_alone

REPO = Path(__file__).resolve().parents[2]

# A new namespace has a loopback device that is down: SIOCSIFFLAGS with IFF_UP and IFF_RUNNING.
DEMO = """
import fcntl, socket, struct, sys
from pathlib import Path
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x41))
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print("off:", error)
import demo
demo.OUT, demo.LOG = Path("out").resolve(), Path("log.txt").resolve()
sys.exit(demo.main(["--seconds", "2"]))
"""


@pytest.mark.skipif(not can_be_alone(), reason="no network namespace for this user")
def test_the_quick_start_runs_with_the_network_off(comfy_path: Path, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(REPO / "scripts")}
    made = subprocess.run(
        [*ALONE, sys.executable, "-c", DEMO], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "off: [Errno 101] Network is unreachable" in made.stdout
    assert list((tmp_path / "out").glob("*.mp4"))
