"""A process without a network: in a namespace of its own, on Linux."""

from __future__ import annotations

import functools
import subprocess

ALONE = ["unshare", "--net", "--map-root-user"]  # before a command


@functools.cache
def can_be_alone() -> bool:
    """Whether this user may have a network namespace; not in every container, and only on Linux."""
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False
