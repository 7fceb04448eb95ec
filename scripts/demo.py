"""Runs a workflow file in a real, headless ComfyUI and puts what it made into out/demo/; see scripts/demo.sh."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from itertools import pairwise
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
    workflow_to_prompt,
)

sys.path.insert(0, str(REPO))  # of this process alone: in ComfyUI's, the pack's `nodes` would hide its own

from packforcing.config import Length, video_frames
from packforcing.errors import PackForcingError
from packforcing.files.side_by_side import Caption, frames_at, strip
from packforcing.generate.story import TimedPrompt, check_story_times, parse_story, start_block, story_text, time_of

SCHEDULE, SAMPLER = "PackForcingPromptSchedule", "PackForcingSampler"
INSPECTOR = "PackForcingCacheInspector"
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


def entries(prompt: dict, kind: str) -> list[dict]:
    """The nodes of a type in an API prompt."""
    return [entry for entry in prompt.values() if entry["class_type"] == kind]


def override(prompt: dict, kind: str, **values: Any) -> None:
    """Sets inputs of all nodes of a type; a value that is None changes nothing."""
    given = {name: value for name, value in values.items() if value is not None}
    found = entries(prompt, kind)
    if given and not found:
        raise DemoError(f"The workflow has no {kind} whose {' and '.join(given)} could be changed.")
    for entry in found:
        entry["inputs"].update(given)


@dataclass(frozen=True)
class Stretches:
    """The story of a workflow, as its first sampler will see it."""

    prompts: list[TimedPrompt]
    length: Length

    def middle_frames(self) -> list[int]:
        """The frame in the middle of each stretch."""
        frames = self.length.block_frames
        starts = [start_block(prompt.seconds, self.length.fps, frames) for prompt in self.prompts]
        edges = [video_frames(block * frames) for block in (*starts, self.length.blocks)]
        return [(first + end) // 2 for first, end in pairwise(edges)]


def stretches(prompt: dict) -> Stretches | None:
    """The story of an API prompt without what starts after its end; None for a workflow without a schedule."""
    schedules, samplers = entries(prompt, SCHEDULE), entries(prompt, SAMPLER)
    if not schedules or not samplers:
        return None
    sampler = samplers[0]["inputs"]
    block_frames = prompt[sampler["cache_config"][0]]["inputs"]["block_frames"]
    length = Length(sampler["seconds"], sampler["fps"], block_frames)
    prompts = parse_story(schedules[0]["inputs"]["text"])
    while len(prompts) > 1 and starts_too_late(prompts[-1], length):
        prompts.pop()
    return Stretches(prompts, length)


def starts_too_late(prompt: TimedPrompt, length: Length) -> bool:
    try:
        check_story_times([prompt], length.fps, length.block_frames, length.blocks)
    except PackForcingError:
        return True
    return False


def apply(options: argparse.Namespace, prompt: dict) -> Stretches | None:
    """Makes the user's changes to an API prompt. Returns its story."""
    text = None if options.prompt is None else f"0:00 {' '.join(options.prompt.split())}"
    if options.story is not None:
        text = options.story.read_text(encoding="utf-8-sig")
    if options.prompt is not None and not entries(prompt, SCHEDULE):
        override(prompt, "CLIPTextEncode", text=options.prompt)
    else:
        override(prompt, SCHEDULE, text=text)
    override(prompt, SAMPLER, seconds=options.seconds, seed=options.seed)
    story = stretches(prompt)
    if story is not None and options.seconds is not None:
        override(prompt, SCHEDULE, text=story_text(story.prompts))
    return story


def read_back(path: Path) -> tuple[int, float, int, int]:
    """Frames, seconds, width and height of a video, by decoding it to its end."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        return frames, frames / float(stream.average_rate), stream.width, stream.height


def collect(result: Result, prompt: dict, client: Client, story: Stretches | None) -> None:
    """Copy the video, the cache's report and its picture from the server to out/demo/, and draw the story's strip."""
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
    if story is not None:
        captions = [Caption(time_of(prompt.seconds), prompt.prompt) for prompt in story.prompts]
        strip(frames_at(video, story.middle_frames()), captions).save(OUT / "strip.png", optimize=True)
        print(f"Strip:  {shown(OUT / 'strip.png')}")
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
            prompt = workflow_to_prompt(workflow, client.object_info())
            story = apply(options, prompt)
            for node in prompt.values():
                if node["class_type"] == INSPECTOR:
                    node["inputs"]["show"] = "everything"  # the chart is a file to be opened
            titles = {node: entry["_meta"]["title"] for node, entry in prompt.items()}
            result = client.run(prompt, LONGEST_RUN, Progress(titles))
            if result.status != "success":
                raise DemoError(f"The run ended as {result.status!r}: {result.error_message or 'no reason given'}")
            print(f"Done after {result.seconds:.1f} s.")
            collect(result, prompt, client, story)
    finally:
        server_log = server.log  # its folder goes when it stops
        server.stop()
        LOG.write_text(server_log)


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 after a success, 1 with one sentence on standard error otherwise."""
    parser = argparse.ArgumentParser(prog="demo.sh", description="Make a video with the quickstart workflow.")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--prompt", help="one prompt, instead of the workflow's story")
    words.add_argument("--story", type=Path, help="a text file with a line '0:05 a blue square spins' for each prompt")
    parser.add_argument("--seconds", type=float, help="length of the video")
    parser.add_argument("--seed", type=int, help="the noise to start from")
    parser.add_argument("--workflow", type=Path, default=QUICKSTART, help="another workflow file to run")
    options = parser.parse_args(arguments)
    options.workflow = options.workflow.resolve()
    if options.story is not None and not options.story.is_file():
        parser.error(f"there is no story at {options.story}")
    try:
        demo(options)
    except PromptRejected as error:
        print(f"demo: ComfyUI refused the workflow: {error.summary}", file=sys.stderr)
    except (DemoError, PackForcingError, ComfyUIError, WorkflowError, TimeoutError) as error:
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
