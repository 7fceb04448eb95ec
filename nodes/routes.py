"""HTTP routes for what nodes show of their widgets, so that the arithmetic has one home.

A Cache Config and a Cache Preset show the plan of their configuration, and the Prompt Schedule when its prompts start.
The page sends the values that it can read from the graph. What it cannot, it leaves out; the answer then says what is
assumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from ..packforcing.checks import shown
from ..packforcing.config import VAE_TIME_STRIDE, CacheConfig, FrameSize, Length
from ..packforcing.errors import PackForcingError
from ..packforcing.generate.plan import plan, plan_text
from ..packforcing.generate.story import parse_story, story_text, times_text
from ..packforcing.known_models import KNOWN_MODELS
from ..packforcing.presets import PRESET_NAMES, preset_named
from .live import register_live

log = logging.getLogger(__name__)

PLAN_PATH, STORY_PATH = "/packforcing/plan", "/packforcing/story"
USUAL_MODEL, USUAL_SECONDS, USUAL_FPS = "wan2.1-1.3b", 120.0, 16.0  # where the page knows no better
LONGEST_REASON = 60  # characters: a line on the node
LARGEST = 1e12  # of any number: whoever asks for more has mistyped

Query = dict[str, str]


def whole(name: str, text: str) -> int:
    """The whole number that a query says: 4, or 4.0. Raises PackForcingError for anything else."""
    value = number(name, text)
    if not value.is_integer():
        raise PackForcingError(f"{name} must be a whole number, but it is {shown(text)}.")
    return int(value)


def number(name: str, text: str) -> float:
    """The number that a query says. Raises PackForcingError for anything else."""
    try:
        value = float(text)
    except ValueError:
        raise PackForcingError(f"{name} must be a number, but it is {shown(text)}.") from None
    if not abs(value) <= LARGEST:
        raise PackForcingError(f"{name} must be a number of at most {LARGEST:g}, but it is {shown(text)}.")
    return value


def flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise PackForcingError(f"{name} must be true or false, but it is {shown(text)}.")
    return text.lower() == "true"


READERS: dict[type, Callable[[str, str], Any]] = {int: whole, float: number, bool: flag, str: lambda _, text: text}


@dataclass(frozen=True)
class AskedVideo:
    """The video that a plan is asked for, and in words what of it the query did not say."""

    model: str
    size: FrameSize
    seconds: float
    fps: float
    assumed: list[str]


def asked_video(query: Query, block_frames: int) -> AskedVideo:
    """What a query says of the video; the usual values stand where it says nothing."""
    assumed = []
    model = query.get("model", USUAL_MODEL)
    if model not in KNOWN_MODELS:
        raise PackForcingError(
            f"There is no model {shown(model)} to plan for: choose one of {', '.join(KNOWN_MODELS)}."
        )
    usual = KNOWN_MODELS[model]
    size = FrameSize(*(whole(name, query.get(name, str(getattr(usual, name)))) for name in ("width", "height")))
    fps = number("fps", query.get("fps", str(USUAL_FPS)))
    if "latent_frames" in query:
        frames = whole("latent_frames", query["latent_frames"])
        seconds = frames * VAE_TIME_STRIDE / fps if fps else 0.0
    else:
        seconds = number("seconds", query.get("seconds", str(USUAL_SECONDS)))
    if not {"width", "height"} <= query.keys():
        assumed.append(f"{size.width}x{size.height}")
    if not {"seconds", "latent_frames"} & query.keys():
        assumed.append(f"{seconds:g} s")
    if "fps" not in query and "seconds" in query:  # a length that is itself assumed is said without its rate
        assumed.append(f"{fps:g} fps")
    if "model" not in query:
        assumed.append(model)
    Length(seconds, fps, block_frames)
    return AskedVideo(model, size, seconds, fps, assumed)


def planned(query: Query) -> dict[str, Any]:
    """The answer to a query: {"text", "plan"}, or {"error"} with the sentence that says what is wrong.

    The query's `linked` names cache settings whose value the page cannot read, `why` is its reason for what it leaves
    out, and `samplers` is how many samplers have this cache where their videos differ: the text says all of it first.
    """
    try:
        config = asked_config(query)
        video = asked_video(query, config.block_frames)
        model = KNOWN_MODELS[video.model]
        result = plan(model.sizes.shape, config, video.size, video.seconds, video.fps, vae_dim=model.vae_dim)
    except PackForcingError as error:
        return {"error": str(error)}
    text = "\n".join([*first_lines(query, config, video), plan_text(result, video.model)])
    return {"text": text, "plan": result.as_dict()}


def asked_config(query: Query) -> CacheConfig:
    """The configuration that a query says; its `preset`, or the defaults, stand where it says nothing."""
    preset = query.get("preset", PRESET_NAMES[0] if "preset" in linked_names(query) else None)
    usual = CacheConfig() if preset is None else preset_named(preset).config
    asked = [field for field in fields(CacheConfig) if field.name in query]
    return replace(usual, **{each.name: READERS[type(each.default)](each.name, query[each.name]) for each in asked})


def linked_names(query: Query) -> list[str]:
    return query.get("linked", "").split(",")


def first_lines(query: Query, config: CacheConfig, video: AskedVideo) -> list[str]:
    """What a plan's reader must know before its numbers: which sampler it is for, and what it assumes and why."""
    linked = linked_names(query)
    assumed = video.assumed + [
        f"{each.name} {getattr(config, each.name)}" for each in fields(config) if each.name in linked
    ]
    if "preset" in linked:
        assumed.append(f"preset {PRESET_NAMES[0]}")
    rows = [("for", f"the first of {query['samplers']} samplers")] if "samplers" in query else []
    if assumed:
        rows.append(("assumed", ", ".join(assumed)))
    if assumed and "why" in query:
        rows.append(("", f"as {query['why'][:LONGEST_REASON]}"))
    return [f"{label:<11}{value}" for label, value in rows]


def story_times(query: Query) -> dict[str, str]:
    """The answer to a story's text and the video that it is for: {"text"}, or {"error"} as above."""
    try:
        prompts = parse_story(query.get("text", ""))
        if "seconds" not in query:
            return {"text": story_text(prompts)}
        usual = preset_named(query["preset"]).config if "preset" in query else CacheConfig()
        frames = whole("block_frames", query.get("block_frames", str(usual.block_frames)))
        CacheConfig(frames, sink_frames=0, recent_frames=0)  # checks it
        length = Length(number("seconds", query["seconds"]), number("fps", query.get("fps", str(USUAL_FPS))), frames)
        return {"text": times_text(prompts, length)}
    except PackForcingError as error:
        return {"error": str(error)}


def register() -> None:
    """Adds the routes to ComfyUI's server, when there is one."""
    from aiohttp import web
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        log.debug("no server: the nodes show neither plan nor times")
        return

    register_live(server)

    @server.routes.get(PLAN_PATH)
    async def plan_route(request: web.Request) -> web.Response:
        return web.json_response(planned(dict(request.query)))

    @server.routes.post(STORY_PATH)  # a story may be longer than an address
    async def story_route(request: web.Request) -> web.Response:
        return web.json_response(story_times({name: str(value) for name, value in (await request.post()).items()}))
