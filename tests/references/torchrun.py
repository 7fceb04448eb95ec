"""Commands in several processes, as `torchrun` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{REPO}"}


def launcher(processes: int) -> list[str]:
    """What stands before a script, or before -m and a module."""
    # --standalone takes a free port and keeps it; a port chosen here could be another program's a moment later.
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(several if processes > 1 else [])]


def run_two(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in two processes."""
    return subprocess.run([*launcher(2), *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
