"""Nothing is fetched and nobody is called: the pack makes its videos with the network off.

On Linux in a network namespace of its own, where there is no network to reach; elsewhere, and beside it, every socket
to the outside raises in the process itself.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from no_network import ALONE, can_be_alone
from small_options import SMALL_VIDEO

REPO = Path(__file__).resolve().parent.parent
COMMAND = ["generate", "--model", "tiny", "--prompt", "a red circle", *SMALL_VIDEO, "--seconds", "0.5"]

# Before anything of the pack is imported: whoever opens a connection, or asks for a name, ends the process.
GUARDED = """
import os, socket, sys
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        print("NETWORK", event, arguments, file=sys.stderr, flush=True)
        os._exit(86)
sys.addaudithook(guard)
"""
RUN = "from packforcing.cli.main import main; sys.exit(main(sys.argv[1:]))"
CALL_OUT = "socket.create_connection(('192.0.2.1', 80), timeout=2)"


def run(code: str, folder: Path, *arguments: str, alone: bool) -> subprocess.CompletedProcess[str]:
    """Runs Python code; `alone`: in a namespace without a network."""
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [*(ALONE if alone else ()), sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_quick_start_opens_no_connection(tmp_path: Path):
    """The command line, and all modules of the library."""
    alone = can_be_alone()
    made = run(GUARDED + RUN, tmp_path, *COMMAND, "--output", "out.mp4", "--report", "r.json", alone=alone)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 1000
    called = run(GUARDED + CALL_OUT, tmp_path, alone=alone)
    assert called.returncode == 86  # the guard can see one
    assert "NETWORK socket." in called.stderr


@pytest.mark.skipif(not can_be_alone(), reason="no network namespace for this user")
def test_a_namespace_without_a_network_has_none(tmp_path: Path):
    """What the first test runs in: a connection fails there at once, without the guard."""
    assert "Network is unreachable" in run("import socket; " + CALL_OUT, tmp_path, alone=True).stderr


def test_no_module_of_the_pack_imports_what_could_call_out():
    """Nor another program, nor pickle. The routes of the nodes are ComfyUI's server's."""
    could = {"requests", "urllib", "http", "httpx", "ftplib", "socket", "huggingface_hub", "subprocess", "pickle"}
    for file in [REPO / "__init__.py", *(REPO / "packforcing").rglob("*.py"), *(REPO / "nodes").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found = could & {name.partition(".")[0] for name in names}
            assert not found, f"{file}:{node.lineno}"
