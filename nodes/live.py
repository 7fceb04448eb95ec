"""Steering a video while it is made: the node Live Prompt, and the way of what is said there to the sampler.

browser   POST /packforcing/live_prompt -> Channel, which is open while a sampler runs that hears the node
sampler   before each block: Channel -> CLIP -> LongVideo.tell
browser   <- the event `packforcing.live`: what waits, and the story as it is now; every open tab gets it
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ..packforcing.checks import shown
from ..packforcing.errors import PackForcingError
from ..packforcing.files.state_file import StatePrompt
from ..packforcing.generate.live import LivePrompts, Mailbox, live_words
from ..packforcing.generate.long_video import LongVideo
from ..packforcing.generate.story import refresh_passes
from ..packforcing.inspector import story_of
from . import types
from .conditioning import encoded
from .prompts import check_clip, encode_words

log = logging.getLogger(__name__)

EVENT = "packforcing.live"
LIVE_PATH = "/packforcing/live_prompt"
NOTHING_RUNS = (
    "No video is being made that hears this node: connect it to the sampler's live_prompt, press Run, and say it when "
    "the sampler works."
)


@dataclass(frozen=True)
class Speaker:
    """What Live Prompt gives the sampler: which node is heard, and what encodes its words."""

    clip: Any
    node_id: str  # as the server calls it; "5:12" for node 12 in subgraph 5
    workflow: str  # its id; "" where the prompt came without a workflow


class LivePromptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PackForcingLivePrompt",
            display_name="PackForcing Live Prompt",
            category=types.CATEGORY,
            description="Steers a video while it is made: what you say here rules from the next block on. The record "
            "keeps what was said when, and the Cache Inspector gives it back as a story.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder: UMT5-XXL for Wan 2.1, or the demo models'."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What the video shall show from the next block on. The button says it; Run does not.",
                ),
            ],
            outputs=[types.LivePrompt.Output(display_name="live_prompt")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        """Never the same: a video that was steered is not what the graph alone makes, so it must not be taken again."""
        return float("nan")

    @classmethod
    def execute(cls, clip, text: str = "") -> io.NodeOutput:
        check_clip(clip)
        workflow = (cls.hidden.extra_pnginfo or {}).get("workflow") or {}
        return io.NodeOutput(Speaker(clip, str(cls.hidden.unique_id), str(workflow.get("id") or "")))


# --- channels --------------------------------------------------------------------------------------------------------


@dataclass
class Channel:
    """The way to a sampler that runs now."""

    prompt_id: str
    node_id: str
    workflow: str
    box: Mailbox = field(default_factory=Mailbox)
    running: bool = True
    story: str = ""  # of the video so far
    refused: str = ""  # why the newest words do not rule; "" where they do

    def as_dict(self) -> dict[str, Any]:
        """What a browser is told."""
        return {
            "prompt_id": self.prompt_id,
            "node_id": self.node_id,
            "workflow": self.workflow,
            "running": self.running,
            "waiting": self.box.words,
            "story": self.story,
            "refused": self.refused,
        }

    def is_meant(self, node_id: str, workflow: str, prompt_id: str) -> bool:
        """Whether a browser means this one; it calls a node in a subgraph by its own number only."""
        named = self.node_id == node_id or self.node_id.endswith(f":{node_id}")
        same_workflow = not (workflow and self.workflow) or workflow == self.workflow
        return named and same_workflow and prompt_id in ("", self.prompt_id)


class Switchboard:
    """The channels that are open. The server's thread says, the sampler's opens and closes."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: list[Channel] = []

    def channels(self) -> list[dict[str, Any]]:
        with self._lock:
            return [channel.as_dict() for channel in self._open]

    def say(self, words: str, node_id: str, workflow: str = "", prompt_id: str = "") -> Channel | None:
        """Leaves words with the channel that is meant; None where it is not open."""
        with self._lock:
            for channel in self._open:
                if channel.is_meant(node_id, workflow, prompt_id):
                    channel.box.say(words)
                    return channel
        return None

    @contextlib.contextmanager
    def open(self, channel: Channel) -> Iterator[Channel]:
        """Words that nobody has taken are dropped at the end, so the next run hears nothing of this one."""
        with self._lock:
            self._open.append(channel)
        broadcast(channel)
        try:
            yield channel
        finally:
            with self._lock:
                self._open.remove(channel)
                channel.running = False
                left = channel.box.take()
            if left is not None:
                channel.refused = f"{shown(left)} came after the last block was begun, and does not rule."
            broadcast(channel)


switchboard = Switchboard()


def broadcast(channel: Channel) -> None:
    """Tells every open tab how a channel stands."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(EVENT, channel.as_dict())


# --- the sampler's side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """The prompts of a video that hears nobody."""

    prompts: tuple[StatePrompt, ...]


@contextlib.contextmanager
def hearing(
    speaker: Speaker | None,
    video: LongVideo,
    prompts: Sequence[StatePrompt],
    blocks: int,
    bring_back: Callable[[], None],
    on_passes: Callable[[int], None],
) -> Iterator[Told | LivePrompts]:
    """Lets a video hear a Live Prompt node while it is made; `.prompts` are the video's prompts at any time.

    Args:
        prompts: its story, encoded.
        blocks: its length.
        bring_back: called after words were encoded: the text encoder may have moved the models off the device.
        on_passes: told how many model passes more the video takes.
    """
    if speaker is None:
        yield Told(tuple(prompts))
        return
    context = get_executing_context()
    channel = Channel(context.prompt_id if context else "", speaker.node_id, speaker.workflow)
    channel.story = story_of(video.record)

    def encode(words: str) -> Tensor:
        try:
            return one_prompt(speaker.clip, words)
        finally:
            bring_back()

    def on_heard(block: int, words: str, refused: str) -> None:
        channel.story, channel.refused = story_of(video.record), refused
        if refused:
            log.warning("PackForcing: the live prompt %s does not rule: %s", shown(words), refused)
        else:
            log.info("PackForcing: from block %d on: %s", block, words)
        broadcast(channel)

    live = LivePrompts(video, prompts, channel.box.take, encode, on_heard)

    def listen(block: int) -> None:
        before = refresh_passes(video.story, video.layout.config, block, blocks - block)
        live.listen(block)
        on_passes(refresh_passes(video.story, video.layout.config, block, blocks - block) - before)

    video.on_block = listen
    with switchboard.open(channel):
        yield live


def one_prompt(clip: Any, words: str) -> Tensor:
    """Words encoded [1, L, width]. Raises PackForcingError when a CLIP makes several prompts of them."""
    conditioning = encode_words(clip, words)
    if len(conditioning) != 1:
        raise PackForcingError(
            f"The CLIP makes {len(conditioning)} prompts of one, by a schedule of hooks, and a live prompt is one: "
            "connect the CLIP loader itself."
        )
    return encoded(conditioning[0]).context


# --- the server's side -----------------------------------------------------------------------------------------------


def said(body: Any) -> tuple[int, dict[str, Any]]:
    """The answer to what a browser says, {"node_id", "text", "workflow"?, "prompt_id"?}, and its HTTP status."""
    if not isinstance(body, dict) or not isinstance(body.get("node_id"), str | int):
        return 400, {"error": 'A live prompt is a JSON object with "node_id" and "text": say which node speaks.'}
    try:
        words = live_words(body.get("text"))
    except PackForcingError as error:
        return 400, {"error": str(error)}
    meant = (str(body["node_id"]), str(body.get("workflow") or ""), str(body.get("prompt_id") or ""))
    channel = switchboard.say(words, *meant)
    if channel is None:
        return 409, {"error": NOTHING_RUNS}
    broadcast(channel)
    return 200, channel.as_dict()


def register_live(server: PromptServer) -> None:
    """Adds the routes: to say words, and to ask which channels are open."""
    from aiohttp import web

    @server.routes.post(LIVE_PATH)
    async def say_route(request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except ValueError:
            body = None
        status, answer = said(body)
        return web.json_response(answer, status=status)

    @server.routes.get(LIVE_PATH)
    async def channels_route(request: web.Request) -> web.Response:
        return web.json_response({"channels": switchboard.channels()})
