"""Commands in processes of their own that need not import PyTorch anew: forks of one that has, and that does no more.

    with Warm() as warm:
        process = warm.start(["train", "base", ...])
        process.wait(timeout=300)

A fork has its own memory, files, session and end, as a command that is started by a shell; its first second is left
out. This file is also the program that is forked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from torchrun import ENVIRONMENT


class Warm:
    """The process that has imported everything."""

    def __enter__(self) -> Warm:
        self._program = subprocess.Popen(
            [sys.executable, __file__], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._program.communicate()

    def ask(self, question: dict[str, object]) -> int | None:
        self._program.stdin.write(json.dumps(question) + "\n")
        self._program.stdin.flush()
        return json.loads(self._program.stdout.readline())

    def start(self, arguments: list[str], errors: Path | str = os.devnull, processes: int = 1) -> WarmProcess:
        """`python -m packforcing` in a session of its own, by as many processes as `torchrun` would start."""
        return WarmProcess(self, self.ask({"start": arguments, "errors": f"{errors}", "processes": processes}))


@dataclass
class WarmProcess:
    """A started command, as `subprocess.Popen` has it."""

    warm: Warm
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.warm.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, "the command takes too long"
            time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        """Kills all processes of the command."""
        os.killpg(self.pid, signal.SIGKILL)


# --- the program ------------------------------------------------------------------------------------------------------


def serve() -> None:
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo
    import torch.distributed.launcher.api  # noqa: F401

    import packforcing.cli.main  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            os._exit(run(question["start"], question["errors"], question["processes"]))
        print(json.dumps(answer), flush=True)


def run(arguments: list[str], errors: str, processes: int) -> int:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from packforcing.cli.main import main

    os.setsid()
    for path, number in ((os.devnull, 0), (os.devnull, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.argv[1:] = arguments
    try:
        if processes == 1:
            return main(arguments)
        # What `torchrun --standalone` does, but for processes that are forked.
        config = LaunchConfig(
            *(1, 1, processes),
            run_id=f"{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="fork",
        )
        return max(elastic_launch(config, main)(arguments).values())
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    serve()
