"""Runs a workflow file in a real, headless ComfyUI and puts what it made into out/demo/; see scripts/demo.sh."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import av
from comfyui import (
    REPO,
    Client,
    ComfyUIError,
    Event,
    Preview,
    PromptRejected,
    Result,
    Server,
    WorkflowError,
    set_widget,
    widget_names,
    workflow_to_prompt,
)

QUICKSTART = REPO / "workflows" / "quickstart.json"
OUT = REPO / "out" / "demo"
LOG = OUT / "comfyui.log"
LONGEST_RUN = 3600  # seconds; a stuck run ends


class DemoError(RuntimeError):
    """The demo cannot give what it promises; the message is one sentence for the user."""


class Progress:
    """Prints which node runs and how far it is, a line where the output is a file, a moving line on a terminal."""

    def __init__(self, titles: dict[str, str]):
        self.titles = titles
        self.moving = False  # the current line is rewritten in place
        self.quarter = (None, 0)

    def __call__(self, event: Event | Preview) -> None:
        if isinstance(event, Preview):
            return
        if event.type == "executing" and event.data.get("node"):
            self._line(f"  {self.titles.get(event.data['node'], event.data['node'])}")
        elif event.type == "progress":
            node, value, total = event.data["node"], event.data["value"], event.data["max"]
            text = f"    {value:g} of {total:g}"
            if sys.stdout.isatty():
                print(f"\r{text}", end="", flush=True)
                self.moving = True
            elif total and (quarter := (node, int(4 * value / total))) != self.quarter:
                self.quarter = quarter
                self._line(text)

    def _line(self, text: str) -> None:
        print(f"\n{text}" if self.moving else text, flush=True)
        self.moving = False


def override(workflow: dict, object_info: dict, widget: str, value: Any, only: str | None = None) -> None:
    """Set `widget` of the first node that has it; nodes of this pack come first. `only` restricts to a node type."""
    nodes = [node for node in workflow["nodes"] if only in (None, node["type"]) and node["type"] in object_info]
    nodes.sort(key=lambda node: not node["type"].startswith("PackForcing"))
    for node in nodes:
        if widget in widget_names(object_info[node["type"]]):
            set_widget(node, object_info[node["type"]], widget, value)
            return
    raise DemoError(f"The workflow has no {only or 'node'} with a {widget!r} to change.")


def read_back(path: Path) -> tuple[int, float, int, int]:
    """Frames, seconds, width and height of a video, by decoding it to its end."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        return frames, frames / float(stream.average_rate), stream.width, stream.height


def collect(result: Result, prompt: dict, client: Client) -> None:
    """Copy the video, the cache's report and its picture from the server to out/demo/."""
    inspectors = [i for i, node in prompt.items() if "inspector" in node["class_type"].lower()]
    inspectors.sort(key=lambda i: i not in result.outputs)
    files = [(i, file) for i, output in result.outputs.items() for file in output.get("images", [])]
    videos = [file for _, file in files if Path(file["filename"]).suffix in (".mp4", ".webm", ".mkv")]
    # Shown by the inspector itself, or by a Preview or Save Image that hangs on it.
    pictures = [
        file
        for i, file in files
        if i in inspectors or any(v[0] in inspectors for v in prompt[i]["inputs"].values() if isinstance(v, list))
        if Path(file["filename"]).suffix == ".png"
    ]
    texts = [text for i in inspectors for text in result.outputs.get(i, {}).get("text", [])]
    if not videos:
        raise DemoError("The workflow ran but gave no video; it should end in a Save Video node.")

    video = OUT / "demo.mp4"
    video.write_bytes(client.download(videos[0]))
    frames, seconds, width, height = read_back(video)
    print(f"Video:  {shown(video)} ({frames} frames, {seconds:.2f} s, {width}x{height})")
    if texts:
        (OUT / "cache-report.txt").write_text(texts[0].rstrip() + "\n")
        print(f"Report: {shown(OUT / 'cache-report.txt')}")
    if pictures:
        (OUT / "cache-report.png").write_bytes(client.download(pictures[0]))
        print(f"Chart:  {shown(OUT / 'cache-report.png')}")


def shown(path: Path) -> str:
    """A path as the user would type it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def demo(options: argparse.Namespace) -> None:
    """Start the server, run the workflow with the user's changes, collect the results."""
    LOG.unlink(missing_ok=True)  # so that a log that is there is this run's
    if not options.workflow.is_file():
        raise DemoError(f"There is no workflow at {shown(options.workflow)}.")
    workflow = json.loads(options.workflow.read_text(encoding="utf-8"))
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    print("Starting ComfyUI ...", flush=True)
    server = Server()
    try:
        server.start()
        print(f"ComfyUI answers after {server.start_seconds:.1f} s; running {shown(options.workflow)}", flush=True)
        with server.client() as client:
            info = client.object_info()
            if options.prompt is not None:
                override(workflow, info, "text", options.prompt, only="CLIPTextEncode")
            if options.seconds is not None:
                override(workflow, info, "seconds", options.seconds)
            if options.seed is not None:
                override(workflow, info, "seed", options.seed)
            prompt = workflow_to_prompt(workflow, info)
            titles = {node: entry["_meta"]["title"] for node, entry in prompt.items()}
            result = client.run(prompt, LONGEST_RUN, Progress(titles))
            if result.status != "success":
                raise DemoError(f"The run ended as {result.status!r}: {result.error_message or 'no reason given'}")
            print(f"Done after {result.seconds:.1f} s.")
            collect(result, prompt, client)
    finally:
        server_log = server.log  # its folder goes when it stops
        server.stop()
        LOG.write_text(server_log)


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 after a success, 1 with one sentence on standard error otherwise."""
    parser = argparse.ArgumentParser(prog="demo.sh", description="Make a video with the quickstart workflow.")
    parser.add_argument("--prompt", help="what to show")
    parser.add_argument("--seconds", type=float, help="length of the video")
    parser.add_argument("--seed", type=int, help="the noise to start from")
    parser.add_argument("--workflow", type=Path, default=QUICKSTART, help="another workflow file to run")
    options = parser.parse_args(arguments)
    options.workflow = options.workflow.resolve()
    try:
        demo(options)
    except PromptRejected as error:
        print(f"demo: ComfyUI refused the workflow: {error.summary}", file=sys.stderr)
    except (DemoError, ComfyUIError, WorkflowError, TimeoutError) as error:
        print(f"demo: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
    else:
        return 0
    if LOG.is_file():
        print(f"demo: ComfyUI's log is at {shown(LOG)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
